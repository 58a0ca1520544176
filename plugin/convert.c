/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A conversion, on the thread of the vCPU. QEMU holds no lock of its own here, and several vCPUs
 * come at once. The order that keeps live pages whole:
 *
 *   1. Wait until no system call converts in the range or discards the copy that is to become live
 *      there, and take the range, so that none begins to.
 *   2. Let KVM convert.
 *   3. Under the lock, take the copy that is live now out of the ledger, and the range away from
 *      earlier conversions whose discard QEMU has yet to ask for: theirs is not the last word.
 *   4. Remember what QEMU may ask for on this thread (discard.c). Nobody waits for that: it may
 *      never come, since the launch of a guest makes no discard, and a conversion may fail after
 *      the ioctl. What has not come when the thread calls KVM again is forgotten.
 */
#include "kvm-abi.h"
#include "upm.h"

#include <errno.h>

/* Whether the part has to wait for a system call under way in its range, or for conversions there
 * that were first. */
static bool is_blocked(const struct op *part)
{
    for (const struct op *op = upm.ops; op; op = op->next) {
        bool first = op->state == OP_CONVERT || (op->state == OP_PUNCH && op->copy == part->copy)
                     || (op->state == OP_WAIT && op->turn < part->turn);

        if (first && op_overlaps(op, part->region, part->first, part->pages)) {
            return true;
        }
    }
    return false;
}

static bool any_blocked(unsigned parts, uint64_t turn)
{
    for (unsigned i = 0; i < parts; i++) {
        mine.part[i].op.turn = turn;
        if (is_blocked(&mine.part[i].op)) {
            return true;
        }
    }
    return false;
}

/* In turn: else conversions of single pages would pass by one of a large range for ever. */
static void wait_for_turn(unsigned parts, uint64_t turn)
{
    for (unsigned i = 0; i < parts; i++) {
        mine.part[i].op.turn = turn;
        mine.part[i].op.state = OP_WAIT;
        op_begin(&mine.part[i].op);
    }
    ops_wait();
    for (unsigned i = 0; i < parts; i++) {
        op_withdraw(&mine.part[i].op);
    }
}

/* There is no memory to follow a conversion: what it touches is QEMU's own from now on. */
static void lose_range(uint64_t gpa, uint64_t end)
{
    for (;;) {
        struct slot *s = slot_ending_after(gpa);

        while (s < upm.slots + upm.nslots && s->gpa < end && s->region->lost) {
            s++;
        }
        if (s >= upm.slots + upm.nslots || s->gpa >= end) {
            return;
        }
        region_lose(s->region);
    }
}

/* Takes the range for `live`, with the lock held; the number of parts is in mine.nparts. Nothing is
 * owed for what is not a guest's conversion, and such a one may be as large as the guest. */
static void take_range(uint64_t gpa, uint64_t end, enum copy live, bool guests)
{
    uint64_t turn = UINT64_MAX;

    for (;;) {
        unsigned parts;
        uint64_t words;
        bool room;

        parts_collect(gpa, end, live, &parts, &words);
        words = guests ? words : 0;
        if (parts > mine.parts_capacity || words > mine.words_capacity) {
            upm_unlock();
            room = parts_reserve(parts, words);
            upm_lock();
            if (!room) {
                lose_range(gpa, end);
            }
            continue;
        }
        if (!any_blocked(parts, turn)) {
            mine.nparts = parts;
            break;
        }
        if (turn == UINT64_MAX) {
            turn = upm.next_turn++;
        }
        wait_for_turn(parts, turn);
    }
    if (guests) {
        parts_share_words(mine.nparts);
    }
    for (unsigned i = 0; i < mine.nparts; i++) {
        mine.part[i].op.state = OP_CONVERT;
        op_begin(&mine.part[i].op);
    }
    if (turn != UINT64_MAX) {
        ops_wake(); /* who waited behind this one may look again: its range may be another now */
    }
}

/* Takes pages away from earlier conversions of other threads. A registration is no conversion: it
 * only takes the pages that it makes live again. */
static void take_over(const struct op *mine_op, uint64_t first, uint64_t pages, bool guests)
{
    for (struct op *op = upm.ops; op; op = op->next) {
        struct part *part = (struct part *)op;
        uint64_t from = op->first > first ? op->first : first, end;

        if (op == mine_op || op->state != OP_EXPECT || (!guests && op->copy != mine_op->copy)
            || !op_overlaps(op, mine_op->region, first, pages)) {
            continue;
        }
        conversion_record(part);
        end = op->first + op->pages < first + pages ? op->first + op->pages : first + pages;
        for (uint64_t page = from; page < end; page = next_word(page)) {
            uint64_t *word = &part->owed[page / WORD_BITS - op->first / WORD_BITS];
            uint64_t lost = *word & word_mask(page, end);

            *word &= ~lost;
            part->owed_pages -= __builtin_popcountll(lost);
        }
    }
}

/* Notes what KVM has converted, and which pages that has changed. */
static void note_moved(struct part *part, uint64_t first, uint64_t pages)
{
    struct op *op = &part->op;
    struct region *r = op->region;
    bool to_shared = op->copy == SHARED;
    uint64_t end = first + pages;

    for (uint64_t page = first; page < end; page = next_word(page)) {
        uint64_t mask = word_mask(page, end), word = r->shared.word[page / WORD_BITS];
        uint64_t at = page / WORD_BITS - op->first / WORD_BITS;
        uint64_t moved = (to_shared ? ~word : word) & mask;

        if (page == op->first || page % WORD_BITS == 0) {
            part->owed[at] = part->moved[at] = 0;
        }
        part->owed[at] |= mask;
        part->moved[at] |= moved;
        if (moved) {
            bitmap_word_fill(&r->shared, page, moved, to_shared);
        }
    }
    part->owed_pages += pages;
}

/* KVM has converted these pages of the part. Returns the number that had a stale copy which is live
 * again. */
static uint64_t settle_pages(struct part *part, uint64_t first, uint64_t pages, bool guests)
{
    struct op *op = &part->op;

    take_over(op, first, pages, guests);
    if (guests) {
        note_moved(part, first, pages);
    } else {
        bitmap_fill(&op->region->shared, first, pages, op->copy == SHARED);
    }
    return ledger_remove(op->region, op->copy, first, pages);
}

/* KVM has converted the part. Its operation holds the range until all of it is settled. */
static void settle(struct part *part, bool guests)
{
    struct op *op = &part->op;
    enum copy live = op->copy, left = other_copy(live);
    uint64_t end = op->first + op->pages, reused = 0, n;

    for (uint64_t at = op->first; at < end; at += n) {
        uint64_t again;

        n = end - at < UPM_STRIDE_PAGES ? end - at : UPM_STRIDE_PAGES;
        again = settle_pages(part, at, n, guests);
        upm.count.reused[live] += in_bytes(again);
        reused += again;
        if (at + n < end) {
            upm_breathe();
        }
    }
    op->copy = left;
    if (!guests) {
        if (reused) {
            conversion_record(part);
        }
        op_end(op);
        return;
    }
    upm.count.converted[live] += in_bytes(op->pages);
    if (discard_expected(op->region, left)) {
        part->expected = true;
        op_expect(op);
    } else {
        upm.count.left_alone += in_bytes(op->pages);
        conversion_record(part);
        op_end(op);
    }
}

static int convert_range(int vm_fd, unsigned long request, struct upm_kvm_attributes *range,
                         bool guests)
{
    enum copy live = range->attributes & UPM_KVM_ATTRIBUTE_PRIVATE ? PRIVATE : SHARED;
    uint64_t start_ns = now_ns(), end_ns;
    int result, error;

    upm_lock();
    take_range(range->address, range->address + range->size, live, guests);
    upm_unlock();

    result = libc.ioctl(vm_fd, request, range);
    error = errno;
    if (!mine.nparts) {
        return result;
    }
    end_ns = now_ns();

    upm_lock();
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];

        if (result) {
            op_end(&part->op);
            continue;
        }
        part->time_ns = end_ns;
        part->count = guests && !i;
        settle(part, guests);
    }
    if (guests) {
        histogram_add(upm.convert_ns, end_ns - start_ns);
        upm.count.conversions[live] += !result;
    }
    upm_unlock();
    if (result || !guests) {
        mine.nparts = 0;
    }
    errno = error;
    return result;
}

/* Stands in for ioctl(KVM_SET_MEMORY_ATTRIBUTES); returns what it returns. While a VM is launched,
 * no guest runs that could convert: what QEMU sets then is the state that the guest begins with. */
int convert(int vm_fd, unsigned long request, void *argument)
{
    struct upm_kvm_attributes *range = argument;
    bool registration = mine.registered_bytes && mine.registered_gpa == range->address
                        && mine.registered_bytes == range->size;
    bool launching = __atomic_load_n(&upm.launching, __ATOMIC_RELAXED);

    conversion_over();
    if (!range->size || (range->address | range->size) % PAGE_BYTES
        || range->address + range->size < range->address) {
        return libc.ioctl(vm_fd, request, argument); /* KVM refuses it */
    }
    return convert_range(vm_fd, request, range, !registration && !launching);
}
