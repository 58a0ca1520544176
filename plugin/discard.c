/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The discard that QEMU asks for after a conversion, on the same thread: fallocate() of the file of
 * the copy that the guest left, or madvise() of its mapping. The call owns a page only if this
 * thread's conversion is the last one of that page. What becomes of such a page:
 *
 *   kept      the conversion changed it, and the mode and the budget let its old copy stay: that
 *             enters the ledger, and QEMU's call is answered without being made;
 *   left      the conversion changed nothing, and the old copy is in the ledger already;
 *   punched   anything else: QEMU's call goes through, a chunk at a time.
 *
 * The kernel's failure is not the guest's: the copy is kept as if it had been deferred, if it fits
 * the budget. Where it does not, or nothing could be discarded for a while, QEMU is told.
 */
#include "upm.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Whether QEMU's discard of this copy is one that we know and could make later. */
bool discard_expected(const struct region *r, enum copy copy)
{
    if (r->lost || r->backing == BACKING_IN_PLACE) {
        return false;
    }
    if (copy == PRIVATE) {
        return r->private_fd >= 0;
    }
    return r->backing == BACKING_MEMFD || r->backing == BACKING_FILE
           || r->backing == BACKING_ANONYMOUS;
}

static uint64_t *owed_word(struct part *part, uint64_t page)
{
    return &part->owed[page / WORD_BITS - part->op.first / WORD_BITS];
}

static uint64_t owed_and_moved(struct part *part, uint64_t page, uint64_t end)
{
    return *owed_word(part, page) & word_mask(page, end)
           & part->moved[page / WORD_BITS - part->op.first / WORD_BITS];
}

static void no_longer_owed(struct part *part, uint64_t page, uint64_t mask)
{
    *owed_word(part, page) &= ~mask;
    part->owed_pages -= __builtin_popcountll(mask);
}

static bool fits_budget(uint64_t pages)
{
    return upm.stale_pages + pages <= upm.budget >> PAGE_SHIFT;
}

static bool may_keep(const struct region *r, enum copy copy, uint64_t pages)
{
    if (upm.mode[copy] != MODE_DEFER || r->failures[copy] >= FAILURES_MAX) {
        return false;
    }
    if (fits_budget(pages)) {
        return true;
    }
    upm.count.over_budget += in_bytes(pages);
    if (!upm.budget_hit) {
        upm.budget_hit = true;
        worker_kick();
    }
    return false;
}

/* Enters the pages of `mask` in the ledger, and in the record where the conversion is there. */
static void enter(struct part *part, uint64_t page, uint64_t mask)
{
    struct region *r = part->op.region;
    uint64_t base = page - page % WORD_BITS;

    ledger_add(r, part->op.copy, page, mask);
    while (part->recorded && mask) {
        unsigned low = __builtin_ctzll(mask);
        uint64_t rest = ~(mask >> low);
        unsigned pages = rest ? __builtin_ctzll(rest) : WORD_BITS;

        ring_append(r, base + low, pages, part->op.copy == SHARED, true, 0, part->time_ns);
        mask &= ~(word_mask(base + low, base + low + pages));
    }
}

/* All of the pages that the conversion moved, or none. */
static void keep(struct part *part, uint64_t first, uint64_t end)
{
    uint64_t pages = 0;

    for (uint64_t page = first; page < end; page = next_word(page)) {
        pages += __builtin_popcountll(owed_and_moved(part, page, end));
    }
    if (!pages || !may_keep(part->op.region, part->op.copy, pages)) {
        return;
    }
    for (uint64_t page = first; page < end; page = next_word(page)) {
        uint64_t mask = owed_and_moved(part, page, end);

        if (mask) {
            enter(part, page, mask);
            no_longer_owed(part, page, mask);
        }
    }
}

/* Pages whose old copy is in the ledger: they were stale before, and still are. */
static void leave(struct part *part, uint64_t first, uint64_t end)
{
    const struct bitmap *stale = &part->op.region->stale[part->op.copy];

    if (!stale->total) {
        return;
    }
    for (uint64_t page = first; page < end; page = next_word(page)) {
        no_longer_owed(part, page, *owed_word(part, page) & word_mask(page, end)
                                   & stale->word[page / WORD_BITS]);
    }
}

/* The next run of at most a chunk in [from, end) that is still owed. */
static bool next_owed(struct part *part, uint64_t from, uint64_t end, uint64_t *first,
                      uint64_t *pages)
{
    uint64_t page = from;

    while (page < end && !(*owed_word(part, page) & word_mask(page, end))) {
        page = next_word(page);
    }
    if (page >= end) {
        return false;
    }
    *first = page - page % WORD_BITS
             + __builtin_ctzll(*owed_word(part, page) & word_mask(page, end));
    page = *first;
    while (page < end && page - *first < CHUNK_PAGES
           && *owed_word(part, page) >> page % WORD_BITS & 1) {
        page++;
    }
    *pages = page - *first;
    return true;
}

static void consume(struct part *part, uint64_t first, uint64_t end)
{
    for (uint64_t page = first; page < end; page = next_word(page)) {
        no_longer_owed(part, page, *owed_word(part, page) & word_mask(page, end));
    }
}

/* A discard that failed: the copy is still there, and to be tried again. */
static bool keep_failed(struct part *part, uint64_t first, uint64_t pages)
{
    uint64_t end = first + pages;

    if (part->op.region->failures[part->op.copy] >= FAILURES_MAX || !fits_budget(pages)) {
        return false;
    }
    for (uint64_t page = first; page < end; page = next_word(page)) {
        enter(part, page, word_mask(page, end));
    }
    worker_kick();
    return true;
}

/* Makes QEMU's call for what is still owed; returns an errno. Drops the lock meanwhile. */
static int punch(struct part *part, uint64_t from, uint64_t end)
{
    struct op *op = &part->op;
    uint64_t first, pages;

    while (op->state == OP_EXPECT && next_owed(part, from, end, &first, &pages)) {
        uint64_t start = first;
        int error;

        if (!ops_allow_discard(op->region, op->copy, &first, &pages)) {
            from = start;
            ops_wait(); /* KVM is converting it back, or refuses to: then it is still owed */
            continue;
        }
        consume(part, first, first + pages);
        error = op_punch(op->region, op->copy, first, pages);
        from = first + pages;
        if (!error) {
            upm.count.inline_[op->copy] += in_bytes(pages);
            continue;
        }
        op->region->failures[op->copy]++;
        if (!keep_failed(part, first, pages)) {
            return error;
        }
    }
    return 0;
}

/* QEMU asks for the discard of the part's next pages. With the lock held; returns an errno. */
static int discard(struct part *part, uint64_t pages)
{
    struct op *op = &part->op;
    uint64_t end = part->next + pages;
    int error = 0;

    while (part->next < end && op->state == OP_EXPECT && !error) {
        uint64_t first = part->next, rest = end - first;
        uint64_t n = rest < UPM_STRIDE_PAGES ? rest : UPM_STRIDE_PAGES;

        keep(part, first, first + n);
        if (part->owed_pages) {
            leave(part, first, first + n);
            error = punch(part, first, first + n);
        }
        part->next = first + n;
        if (part->next < end) {
            upm_breathe();
        }
    }
    part->next = end;
    if (op->state == OP_EXPECT && (error || end == op->first + op->pages)) {
        conversion_record(part);
        upm.count.left_alone += in_bytes(part->owed_pages);
        op_end(op);
    }
    return error;
}

/* Whether a call for [offset, offset + bytes) in a file or mapping that begins with the region's
 * byte `base` is QEMU's next one for the part. */
static bool is_next(const struct part *part, uint64_t base, uint64_t offset, uint64_t bytes)
{
    uint64_t end = base + in_bytes(part->op.first + part->op.pages);

    return part->expected && base + in_bytes(part->next) == offset && bytes
           && bytes % PAGE_BYTES == 0 && bytes <= end - offset;
}

static bool in_file(const struct region *r)
{
    return r->backing == BACKING_MEMFD || r->backing == BACKING_FILE;
}

/* Whether QEMU has discarded in `fd` before: no need to ask the kernel which file it is. */
static bool is_known(int fd)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        const struct part *part = &mine.part[i];
        const struct region *r = part->op.region;

        if (__atomic_load_n(part->op.copy == PRIVATE ? &r->private_fd : &r->shared_fd,
                            __ATOMIC_RELAXED) == fd) {
            return true;
        }
    }
    return false;
}

/* The part whose next discard this is, with the lock held. `st` tells the file, or is NULL. */
static struct part *part_in_file(int fd, const struct stat *st, uint64_t offset, uint64_t bytes)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];
        struct region *r = part->op.region;

        if (part->op.copy == PRIVATE) {
            if (r->private_fd == fd && is_next(part, 0, offset, bytes)) {
                return part;
            }
        } else if (in_file(r) && is_next(part, r->file.offset, offset, bytes)) {
            if (r->shared_fd == fd) {
                return part;
            }
            if (st && st->st_ino == r->file.inode && st->st_dev == r->file.device) {
                __atomic_store_n(&r->shared_fd, fd, __ATOMIC_RELAXED);
                return part;
            }
        }
    }
    return NULL;
}

/* Whether the call is a discard that this thread's last conversion may bring; dealt with, if so. */
bool discard_in_file(int fd, off64_t offset, off64_t bytes, int *result)
{
    int error = 0, before = errno;
    struct part *part;
    struct stat st;
    bool known = is_known(fd);

    if (fd < 0 || bytes <= 0 || (!known && fstat(fd, &st))) {
        errno = before;
        return false;
    }
    upm_lock();
    part = part_in_file(fd, known ? NULL : &st, offset, bytes);
    if (part) {
        char *start = part->op.region->host + in_bytes(part->next);

        error = discard(part, bytes >> PAGE_SHIFT);
        if (!error && part->op.copy == SHARED) {
            part->spared = start;
            part->spared_end = start + bytes;
        }
    }
    upm_unlock();
    *result = error ? -1 : 0;
    errno = error ? error : before;
    return part;
}

/* The madvise() that QEMU makes after a discard in the file. It has no memory left to free: a punch
 * has emptied the mapping too, and what was kept stays mapped. */
static bool is_spared(const void *start, size_t bytes, int advice)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];

        if (part->spared && part->spared == start && advice == MADV_DONTNEED
            && bytes <= (size_t)(part->spared_end - part->spared)) {
            part->spared = NULL;
            return true;
        }
    }
    return false;
}

static struct part *part_in_mapping(const char *start, size_t bytes, int advice)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];
        const struct region *r = part->op.region;

        if (part->op.copy == SHARED && r->backing == BACKING_ANONYMOUS && r->advice == advice
            && is_next(part, (uintptr_t)r->host, (uintptr_t)start, bytes)) {
            return part;
        }
    }
    return NULL;
}

bool discard_in_mapping(const void *start, size_t bytes, int advice, int *result)
{
    int error = 0, before = errno;
    struct part *part;

    *result = 0;
    if (is_spared(start, bytes, advice)) {
        return true;
    }
    upm_lock();
    part = part_in_mapping(start, bytes, advice);
    if (part) {
        error = discard(part, bytes >> PAGE_SHIFT);
    }
    upm_unlock();
    *result = error ? -1 : 0;
    errno = error ? error : before;
    return part;
}
