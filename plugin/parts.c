/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The parts of a thread's last conversion, one for each region that it touched: from the slots that
 * it lies in to its record. They are kept until the thread calls KVM again, or ends.
 */
#include "upm.h"

#include <string.h>
#include <sys/mman.h>

/* QEMU asks within microseconds, or within a second where its processors are emulated; or never. */
#define PENDING_NS NSEC
#define PARTS_FIRST 8
/* Runs of stale pages in the range of one conversion; with more of them, a reader does better to
 * read the ledger. */
#define RUNS_RECORDED 512
#define WORDS_FIRST 8192          /* a conversion of 1 GiB: two words for each 64 pages */
#define WORDS_KEPT (WORDS_FIRST * 16)


__thread struct conversion mine;

static pthread_key_t exit_key;
static pthread_once_t exit_once = PTHREAD_ONCE_INIT;
static bool has_exit_key;

static void *more(void *old, uint64_t old_bytes, uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    libc.madvise(p, bytes, MADV_NOHUGEPAGE); /* it is first touched with the lock held */
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
    has_exit_key = !pthread_key_create(&exit_key, on_thread_exit);
}

/* The thread's conversions are over when it ends: its memory must not stay in upm.ops. */
static bool follow_thread(void)
{
    if (!mine.has_destructor) {
        pthread_once(&exit_once, make_exit_key);
        mine.has_destructor = has_exit_key && !pthread_setspecific(exit_key, &mine);
    }
    return mine.has_destructor;
}

/* Room for as many, without the lock; false if there is no memory. */
bool parts_reserve(unsigned parts, uint64_t words)
{
    unsigned some = mine.parts_capacity ? mine.parts_capacity : PARTS_FIRST;
    uint64_t enough = mine.words_capacity ? mine.words_capacity : WORDS_FIRST;
    void *p;

    if (!follow_thread()) {
        return false;
    }
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

void conversion_slot_registered(uint64_t gpa, uint64_t bytes)
{
    mine.registered_gpa = gpa;
    mine.registered_bytes = bytes;
}

bool conversion_unfinished(void)
{
    return mine.nparts || mine.registered_bytes;
}

/* With the lock held. Records the conversion as it stands: with what has become of its old copy, if
 * QEMU has asked for the discard. What is kept later has a record of its own. */
void conversion_record(struct part *part)
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
void conversion_record_pending(uint64_t now)
{
    for (struct op *op = upm.ops; op; op = op->next) {
        struct part *part = (struct part *)op;

        if (op->state == OP_EXPECT && part->time_ns + PENDING_NS <= now) {
            conversion_record(part);
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
            conversion_record(part);
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

/* With the lock held. Goes through the slots that overlap [gpa, end): the parts, as far as there is
 * room for them, and how much room they take. */
void parts_collect(uint64_t gpa, uint64_t end, enum copy live, unsigned *parts, uint64_t *words)
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

/* Gives each part its words. */
void parts_share_words(unsigned parts)
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
