/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest of the torture, and a byte-exact model of its memory.
 *
 * A vCPU's thread holds the locks of the chunks that it converts, as a guest would, and keeps them
 * through QEMU's discard or lets go before it: the guest of a real QEMU could not, and the plugin
 * must hold even so. In the block of the races nobody holds anything: there, the kernel's look at
 * each discard is the check.
 */
#include "torture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHUNK 256ull
#define CHUNKS (PAGES / CHUNK)
#define SLOT_PAGES (BLOCK_PAGES / 2)
#define WORDS (PAGE / sizeof(uint64_t))

enum { PRIVATE, SHARED };

static struct {
    uint8_t state;
    /* QEMU did not ask for the discard of this copy, or it failed: it may be allocated, and in no
     * ledger. */
    bool abandoned[2];
    uint32_t written[2];
} shadow[PAGES];                      /* guarded by the chunk's lock */
static pthread_mutex_t chunk_lock[CHUNKS];

static uint64_t *words_of(uint64_t page, int state)
{
    const struct memory *m = block[page / BLOCK_PAGES];

    return (uint64_t *)((state == PRIVATE ? m->private : m->shared) + page % BLOCK_PAGES * PAGE);
}

static uint64_t pattern(uint64_t page, int state, uint32_t generation, uint64_t word)
{
    return ((page << 32 | generation) * 2 + state + 1) * 0x9e3779b97f4a7c15ull + word;
}

static void write_page(uint64_t page)
{
    int state = shadow[page].state;
    uint32_t generation = ++shadow[page].written[state];
    uint64_t *words = words_of(page, state);

    for (uint64_t i = 0; i < WORDS; i++) {
        words[i] = pattern(page, state, generation, i);
    }
}

static bool holds(uint64_t page, int state)
{
    const uint64_t *words = words_of(page, state);

    for (uint64_t i = 0; i < WORDS; i++) {
        if (words[i] != pattern(page, state, shadow[page].written[state], i)) {
            return false;
        }
    }
    return true;
}

static bool is_zero(uint64_t page, int state)
{
    const uint64_t *words = words_of(page, state);

    return !words[0] && !memcmp(words, words + 1, PAGE - sizeof(*words));
}

static void check_live(uint64_t page)
{
    data_errors += !holds(page, shadow[page].state);
}

/* Just converted: whole as it was left, or zeroes; then written anew. */
static void arrive(uint64_t page, int to)
{
    if (shadow[page].state == to) {
        check_live(page);
        return;
    }
    shadow[page].state = to;
    shadow[page].abandoned[to] = false;
    data_errors += !is_zero(page, to) && !(shadow[page].written[to] && holds(page, to));
    write_page(page);
}

static void arrive_all(uint64_t first, uint64_t pages, int to, bool asked)
{
    for (uint64_t p = first; p < first + pages; p++) {
        if (shadow[p].state != to && !asked) {
            shadow[p].abandoned[!to] = true;
        }
        arrive(p, to);
    }
}

static void lock_chunks(uint64_t first, uint64_t pages, bool take)
{
    for (uint64_t c = first / CHUNK; c <= (first + pages - 1) / CHUNK; c++) {
        if (take) {
            pthread_mutex_lock(&chunk_lock[c]);
        } else {
            pthread_mutex_unlock(&chunk_lock[c]);
        }
    }
}

/* QEMU goes through the RAM block by block. False if a discard failed. */
static bool discard(uint64_t first, uint64_t pages, int to)
{
    while (pages) {
        uint64_t at = first % BLOCK_PAGES, n = BLOCK_PAGES - at < pages ? BLOCK_PAGES - at : pages;

        if (qemu_discard(block[first / BLOCK_PAGES], at * PAGE, n * PAGE, to == PRIVATE)) {
            return false;
        }
        first += n;
        pages -= n;
    }
    return true;
}

/* A discard failed, perhaps after others have converted the pages again. */
static void abandon(uint64_t first, uint64_t pages, int to, bool locked)
{
    if (!locked) {
        lock_chunks(first, pages, true);
    }
    for (uint64_t p = first; p < first + pages; p++) {
        shadow[p].abandoned[!to] |= shadow[p].state == to;
    }
    if (!locked) {
        lock_chunks(first, pages, false);
    }
}

struct range {
    uint64_t first, pages;
    int to;
    bool failed;
};

/* A thread that ends with the conversion's discard still to come. */
static void *convert_and_end(void *argument)
{
    struct range *r = argument;

    r->failed = convert_only(r->first * PAGE, r->pages * PAGE, r->to == PRIVATE);
    return NULL;
}

static bool convert(const struct range *range, bool on_thread)
{
    struct range r = *range;
    pthread_t thread;

    if (on_thread) {
        expect(!pthread_create(&thread, NULL, convert_and_end, &r));
        pthread_join(thread, NULL);
        ended_threads++;
    } else {
        convert_and_end(&r);
    }
    return !r.failed;
}

void guest_flip(uint64_t *r)
{
    uint64_t pages = 1 + next_random(r) % (1ull << next_random(r) % 10);
    struct range range = {
        .first = next_random(r) % (PAGES - pages + 1), .pages = pages, .to = next_random(r) % 2,
    };
    bool early = next_random(r) % 2, ends = next_random(r) % 64 == 0;
    bool asks = !ends && next_random(r) % 32, succeeded;

    lock_chunks(range.first, pages, true);
    for (uint64_t p = range.first; p < range.first + pages; p++) {
        check_live(p);
    }
    succeeded = convert(&range, ends);
    if (succeeded) {
        arrive_all(range.first, pages, range.to, asks);
    }
    if (early) {
        lock_chunks(range.first, pages, false);
    }
    if (succeeded && asks && !discard(range.first, pages, range.to)) {
        abandon(range.first, pages, range.to, !early);
    }
    if (!early) {
        lock_chunks(range.first, pages, false);
    }
    if (next_random(r) % 8) {         /* else its next call of KVM's is another conversion */
        vcpu_run();
    }
}

void guest_race(uint64_t *r)
{
    uint64_t pages = 1 + next_random(r) % 32, offset = next_random(r) % (256 - pages) * PAGE;
    bool to_private = next_random(r) % 2;
    const struct memory *m = block[RACED];

    if (!convert_only(m->gpa + offset, pages * PAGE, to_private) && next_random(r) % 32) {
        qemu_discard(m, offset, pages * PAGE, to_private);
    }
    if (next_random(r) % 8) {
        vcpu_run();
    }
}

/* QEMU keeps vCPUs out of KVM while slots that overlap change: so do the chunks' locks here. */
void guest_slot_is_private(unsigned slot, void (*remap)(unsigned slot))
{
    uint64_t first = slot * SLOT_PAGES;

    lock_chunks(first, SLOT_PAGES, true);
    remap(slot);
    arrive_all(first, SLOT_PAGES, PRIVATE, false);
    lock_chunks(first, SLOT_PAGES, false);
}

void guest_is_reset(void)
{
    for (uint64_t p = 0; p < PAGES; p++) {
        shadow[p].abandoned[SHARED] |= shadow[p].state == SHARED;
        shadow[p].abandoned[PRIVATE] = false;
        shadow[p].written[PRIVATE] = 0;
        shadow[p].state = PRIVATE;
        data_errors += !is_zero(p, PRIVATE);
        write_page(p);
    }
}

void guest_begin(void)
{
    for (uint64_t c = 0; c < CHUNKS; c++) {
        pthread_mutex_init(&chunk_lock[c], NULL);
    }
    for (uint64_t p = 0; p < PAGES; p++) {
        write_page(p);
    }
}

static void tell(const char *what, uint64_t page, int copy)
{
    data_errors++;
    if (data_errors < 10) {
        dprintf(2, "page %llu, %s copy: %s\n", (unsigned long long)page,
                copy == PRIVATE ? "private" : "shared", what);
    }
}

/* Where the file has memory, page by page. */
static void look_up_allocated(int fd, bool *has)
{
    off_t at = 0, end = BLOCK_PAGES * PAGE;

    memset(has, 0, BLOCK_PAGES);
    while (at < end && (at = lseek(fd, at, SEEK_DATA)) >= 0) {
        off_t hole = lseek(fd, at, SEEK_HOLE);

        for (; at < hole; at += PAGE) {
            has[at / PAGE] = true;
        }
    }
}

static void check_copy(int b, int copy)
{
    static bool has[BLOCK_PAGES];
    char *stale_pages = ledger_of(1 + b, copy == PRIVATE ? "private" : "shared", BLOCK_PAGES);
    bool known = copy == PRIVATE ? !fake.real_guest_memfd : kind == RAM_MEMFD;

    if (known) {
        look_up_allocated(copy == PRIVATE ? block[b]->private_fd : block[b]->shared_fd, has);
    }
    for (uint64_t i = 0; i < BLOCK_PAGES; i++) {
        uint64_t page = b * BLOCK_PAGES + i;
        bool live = shadow[page].state == copy, is_stale = stale_pages[i] == 'x';

        if (live && is_stale) {
            tell("live, and in the ledger", page, copy);
        } else if (known && has[i] && !live && !is_stale && !shadow[page].abandoned[copy]) {
            tell("allocated, and neither live nor in the ledger", page, copy);
        } else if (known && !has[i] && (live || is_stale)) {
            tell("live or in the ledger, and not allocated", page, copy);
        }
    }
    free(stale_pages);
}

void guest_check(void)
{
    for (int b = 0; b < RACED; b++) {
        check_copy(b, PRIVATE);
        check_copy(b, SHARED);
    }
    for (uint64_t p = 0; p < PAGES; p++) {
        check_live(p);
    }
}
