/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The discards that a client has asked for, done by the worker a step at a time. */
#include "upm.h"

/* The region of the request's current range, by its number since it may be closed meanwhile. */
static struct region *request_region(struct request *q, uint64_t *end)
{
    struct region *next = NULL;

    if (!q->all) {
        struct region *r = region_by_id(q->range[q->at_range].region);

        *end = q->range[q->at_range].first + q->range[q->at_range].pages;
        return r;
    }
    for (unsigned i = 0; i < upm.nregions; i++) {
        struct region *r = &upm.region[i];

        if (r->pages && r->id >= q->at_range && (!next || r->id < next->id)) {
            next = r;
        }
    }
    if (next) {
        if (next->id != q->at_range) {
            q->at_range = next->id;
            q->at_page = 0;
        }
        *end = next->pages;
    }
    return next;
}

/* Goes on to the next range, or to the other copy; false at the end. */
static bool request_next_range(struct request *q, bool more)
{
    q->at_range++;
    if (!q->all && q->at_range < q->count) {
        q->at_page = q->range[q->at_range].first;
        return true;
    }
    if (q->all && more) {
        q->at_page = 0;
        return true;
    }
    q->at_range = 0;
    q->at_page = q->count ? q->range[0].first : 0;
    q->at_copy++;
    return q->at_copy < COPIES;
}

/* A chunk of the request, or one range of it that has nothing stale. A run that can't be discarded
 * stays behind, and the error is told at the end. False when there is nothing left of it. */
bool request_step(struct request *q)
{
    struct region *r;
    uint64_t end;
    int result;

    if (!q->copy[q->at_copy]) {
        q->at_copy++;
        return q->at_copy < COPIES;
    }
    r = request_region(q, &end);
    if (!r) {
        return request_next_range(q, false);
    }
    result = discard_next(r, q->at_copy, &q->at_page, end, &upm.count.requested[q->at_copy],
                          &q->discarded);
    if (result < 0) {
        q->error = -result;
    }
    return result ? true : request_next_range(q, true);
}

uint64_t request_bytes(const struct request *q)
{
    uint64_t pages = 0;

    for (size_t i = 0; i < q->count; i++) {
        pages += q->range[i].pages;
    }
    return in_bytes(pages) * (q->copy[PRIVATE] + q->copy[SHARED]);
}
