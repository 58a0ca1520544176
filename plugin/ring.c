/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The record of conversions, for the daemon to read: the last RING_RECORDS of them.
 *
 * A reader that is too slow loses the oldest, learns how many, and reads the ledger instead.
 */
#include "upm.h"

/* What was before a gap is as good as overwritten. */
uint64_t ring_oldest(void)
{
    uint64_t oldest = upm.head > RING_RECORDS ? upm.head - RING_RECORDS : 0;

    return oldest > upm.gap ? oldest : upm.gap;
}

/* The first record that nobody has read yet. */
static uint64_t first_unread(void)
{
    return upm.sealed > upm.gap ? upm.sealed : upm.gap;
}

static bool ring_merge(const struct region *r, uint64_t first, uint64_t pages, bool to_private,
                       bool deferred, uint32_t count)
{
    struct record *last = &upm.ring[(upm.head - 1) % RING_RECORDS];

    if (upm.head <= first_unread() || last->region != r->id || last->to_private != to_private
        || last->deferred != deferred || last->first + last->pages != first
        || last->pages + pages > UINT32_MAX) {
        return false;
    }
    last->pages += pages;
    last->count += count;
    return true;
}

static void ring_add(const struct region *r, uint64_t first, uint64_t pages, bool to_private,
                     bool deferred, uint32_t count, uint64_t time_ns)
{
    if (upm.head >= RING_RECORDS && first_unread() <= upm.head - RING_RECORDS) {
        upm.dropped++;
    }
    upm.ring[upm.head++ % RING_RECORDS] = (struct record) {
        .first = first, .time_ns = time_ns, .pages = pages, .count = count,
        .region = r->id, .to_private = to_private, .deferred = deferred,
    };
}

/* What has happened is too much for the record: whoever has not read up to here is to read the
 * ledger, as after records that were overwritten. One number stands for all that is missing. */
void ring_lose(void)
{
    uint64_t oldest = ring_oldest(), unread = first_unread();

    upm.head++;
    upm.dropped += upm.head - (unread > oldest ? unread : oldest);
    upm.gap = upm.head;
}

/* A reader sees a run of neighbours as one record, with the time of the first. */
void ring_append(const struct region *r, uint64_t first, uint64_t pages, bool to_private,
                 bool deferred, uint32_t count, uint64_t time_ns)
{
    while (pages > UINT32_MAX) {
        ring_add(r, first, UINT32_MAX, to_private, deferred, count, time_ns);
        first += UINT32_MAX;
        pages -= UINT32_MAX;
        count = 0;
    }
    if (!ring_merge(r, first, pages, to_private, deferred, count)) {
        ring_add(r, first, pages, to_private, deferred, count, time_ns);
    }
    if (upm.bell_armed && !upm.bell) {
        upm.bell = true;
        worker_kick();
    }
}
