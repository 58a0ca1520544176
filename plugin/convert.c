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
#include <string.h>
#include <sys/mman.h>

#define PENDING_NS (10 * MSEC)
#define PARTS_FIRST 8
/* Runs of stale pages in the range of one conversion; with more of them, a reader does better to
 * read the ledger. */
#define RUNS_RECORDED 512
#define WORDS_FIRST 8192          /* a conversion of 1 GiB: two words for each 64 pages */
#define WORDS_KEPT (WORDS_FIRST * 16)

static __thread struct {
    struct part *part;
    unsigned nparts, parts_capacity;
    uint64_t *words;       /* what the parts' owed and moved point into */
    uint64_t words_capacity;
    bool has_destructor;
    /* A slot that this thread has just registered: QEMU marks it private next, which is not a
     * conversion of the guest's. */
    uint64_t registered_gpa, registered_bytes;
} mine;

static pthread_key_t exit_key;
static pthread_once_t exit_once = PTHREAD_ONCE_INIT;

static void *more(void *old, uint64_t old_bytes, uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    if (old) {
        libc.munmap(old, old_bytes);
    }
    return p;
}

static uint64_t parts_bytes(void)
{
    return mine.parts_capacity * sizeof(*mine.part);
}

static uint64_t words_bytes(void)
{
    return mine.words_capacity * sizeof(*mine.words);
}

/* Room for as many, without the lock; false if there is no memory. */
static bool reserve(unsigned parts, uint64_t words)
{
    unsigned some = mine.parts_capacity ? mine.parts_capacity : PARTS_FIRST;
    uint64_t enough = mine.words_capacity ? mine.words_capacity : WORDS_FIRST;
    void *p;

    while (some < parts) {
        some *= 2;
    }
    while (enough < words) {
        enough *= 2;
    }
    if (some > mine.parts_capacity) {
        p = more(mine.part, parts_bytes(), some * sizeof(*mine.part));
        if (!p) {
            return false;
        }
        mine.part = p;
        mine.parts_capacity = some;
    }
    if (enough > mine.words_capacity) {
        p = more(mine.words, words_bytes(), enough * sizeof(*mine.words));
        if (!p) {
            return false;
        }
        mine.words = p;
        mine.words_capacity = enough;
    }
    return true;
}

static void on_thread_exit(void *unused)
{
    (void)unused;
    conversion_over();
    if (mine.part) {
        libc.munmap(mine.part, parts_bytes());
    }
    if (mine.words) {
        libc.munmap(mine.words, words_bytes());
    }
    memset(&mine, 0, sizeof(mine));
}

static void make_exit_key(void)
{
    pthread_key_create(&exit_key, on_thread_exit);
}

void conversion_slot_registered(uint64_t gpa, uint64_t bytes)
{
    mine.registered_gpa = gpa;
    mine.registered_bytes = bytes;
}

bool conversion_unfinished(void)
{
    return mine.nparts || mine.registered_bytes;
}

struct part *conversion_parts(unsigned *count)
{
    *count = mine.nparts;
    return mine.part;
}

/* With the lock held. Records the conversion as it stands: with what has become of its old copy, if
 * QEMU has asked for the discard. What is kept later has a record of its own. */
void convert_record(struct part *part)
{
    const struct op *op = &part->op;
    uint64_t at = op->first, end = op->first + op->pages, first, pages;
    unsigned count = part->count;

    if (part->recorded) {
        return;
    }
    part->recorded = true;
    for (int runs = 0; at < end; runs++) {
        bool kept = ledger_next(op->region, op->copy, at, end, end - at, &first, &pages);

        if (kept && runs == RUNS_RECORDED) {
            ring_lose();
            return;
        }
        if (!kept) {
            first = end;
        }
        if (at < first) {
            ring_append(op->region, at, first - at, op->copy == SHARED, false, count, part->time_ns);
            count = 0;
        }
        if (kept) {
            ring_append(op->region, first, pages, op->copy == SHARED, true, count, part->time_ns);
            count = 0;
            first += pages;
        }
        at = first;
    }
}

/* With the lock held. Conversions whose discard is long in coming: a reader need not wait for it. */
void convert_record_pending(uint64_t now)
{
    for (struct op *op = upm.ops; op; op = op->next) {
        struct part *part = (struct part *)op;

        if (op->state == OP_EXPECT && part->time_ns + PENDING_NS <= now) {
            convert_record(part);
        }
    }
}

/* QEMU will not discard any more for the thread's last conversion: what it has not asked for is its
 * own, as it is without us. */
void conversion_over(void)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];

        if (__atomic_load_n(&part->op.state, __ATOMIC_ACQUIRE) == OP_IDLE) {
            continue;
        }
        upm_lock();
        if (part->op.state == OP_EXPECT) {
            convert_record(part);
            upm.count.left_alone += in_bytes(part->owed_pages);
            op_end(&part->op);
        }
        upm_unlock();
    }
    mine.nparts = 0;
    mine.registered_bytes = 0;
    if (mine.words_capacity > WORDS_KEPT) {
        libc.munmap(mine.words, words_bytes());
        mine.words = NULL;
        mine.words_capacity = 0;
    }
}

static void part_begin(struct part *part, struct region *r, enum copy live, uint64_t first,
                       uint64_t pages)
{
    part->op.region = r;
    part->op.state = OP_IDLE;
    part->op.copy = live;
    part->op.first = part->next = first;
    part->op.pages = pages;
    part->owed_pages = 0;
    part->recorded = part->expected = false;
    part->spared = NULL;
}

/* Goes through the slots that overlap [gpa, end): the parts, as far as there is room for them, and
 * how much room they take. */
static void collect(uint64_t gpa, uint64_t end, enum copy live, unsigned *parts, uint64_t *words)
{
    const struct region *last = NULL;
    uint64_t last_end = 0;

    *parts = 0;
    *words = 0;
    for (struct slot *s = slot_ending_after(gpa);
         s < upm.slots + upm.nslots && s->gpa < end; s++) {
        uint64_t from = gpa > s->gpa ? gpa : s->gpa;
        uint64_t to = end < s->gpa + s->bytes ? end : s->gpa + s->bytes;
        uint64_t first = (s->offset + from - s->gpa) >> PAGE_SHIFT;
        uint64_t pages = (to - from) >> PAGE_SHIFT;
        bool joins = last == s->region && last_end == first;

        if (s->region->lost) {
            continue;
        }
        last = s->region;
        last_end = first + pages;
        *words += 2 * (pages / WORD_BITS + 2);
        *parts += !joins;
        if (*parts > mine.parts_capacity) {
            continue;
        }
        if (joins) {
            mine.part[*parts - 1].op.pages += pages;
        } else {
            part_begin(&mine.part[*parts - 1], s->region, live, first, pages);
        }
    }
}

static void share_words(unsigned parts)
{
    uint64_t *at = mine.words;

    for (unsigned i = 0; i < parts; i++) {
        struct op *op = &mine.part[i].op;
        uint64_t words = (op->first % WORD_BITS + op->pages + WORD_BITS - 1) / WORD_BITS;

        mine.part[i].owed = at;
        mine.part[i].moved = at + words;
        at += 2 * words;
    }
}

/* Whether a system call is under way in the range that the part must not meet. */
static bool is_blocked(const struct op *part)
{
    for (const struct op *op = upm.ops; op; op = op->next) {
        bool call = op->state == OP_CONVERT || (op->state == OP_PUNCH && op->copy == part->copy);

        if (call && op_overlaps(op, part->region, part->first, part->pages)) {
            return true;
        }
    }
    return false;
}

static bool any_blocked(unsigned parts)
{
    for (unsigned i = 0; i < parts; i++) {
        if (is_blocked(&mine.part[i].op)) {
            return true;
        }
    }
    return false;
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
    for (;;) {
        unsigned parts;
        uint64_t words;
        bool room;

        collect(gpa, end, live, &parts, &words);
        words = guests ? words : 0;
        if (parts > mine.parts_capacity || words > mine.words_capacity) {
            upm_unlock();
            room = reserve(parts, words);
            upm_lock();
            if (!room) {
                lose_range(gpa, end);
            }
            continue;
        }
        if (!any_blocked(parts)) {
            mine.nparts = parts;
            break;
        }
        ops_wait();
    }
    if (guests) {
        share_words(mine.nparts);
    }
    for (unsigned i = 0; i < mine.nparts; i++) {
        mine.part[i].op.state = OP_CONVERT;
        op_begin(&mine.part[i].op);
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
        convert_record(part);
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
            convert_record(part);
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
        convert_record(part);
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
    if (!mine.has_destructor) {
        pthread_once(&exit_once, make_exit_key);
        pthread_setspecific(exit_key, &mine);
        mine.has_destructor = true;
    }
    return convert_range(vm_fd, request, range, !registration && !launching);
}
