/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sets of a region's pages. A bit for each page, and two levels of counts above, so that neither a
 * large guest with few of its pages in a set nor one with nearly all of them costs a walk.
 */
#include "upm.h"

#include <sys/mman.h>

static uint64_t up(uint64_t n, uint64_t unit)
{
    return (n + unit - 1) / unit;
}

static size_t word_bytes(uint64_t pages)
{
    return up(pages, WORD_BITS) * sizeof(uint64_t);
}

static size_t group_bytes(uint64_t pages)
{
    return up(up(pages, GROUP_PAGES) * sizeof(uint16_t), sizeof(uint64_t)) * sizeof(uint64_t);
}

static size_t all_bytes(uint64_t pages)
{
    return word_bytes(pages) + group_bytes(pages) + up(pages, BLOCK_PAGES) * sizeof(uint32_t);
}

/* Reserved, not resident: what is never touched costs nothing. Not in huge pages: clearing one
 * takes a tenth of a millisecond, and it would be with the lock held. */
bool bitmap_init(struct bitmap *b, uint64_t pages)
{
    char *p = mmap(NULL, all_bytes(pages), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        return false;
    }
    libc.madvise(p, all_bytes(pages), MADV_NOHUGEPAGE);
    *b = (struct bitmap) {
        .word = (uint64_t *)p,
        .group = (uint16_t *)(p + word_bytes(pages)),
        .block = (uint32_t *)(p + word_bytes(pages) + group_bytes(pages)),
        .pages = pages,
    };
    return true;
}

void bitmap_destroy(struct bitmap *b)
{
    if (b->word) {
        libc.munmap(b->word, all_bytes(b->pages));
    }
    *b = (struct bitmap) { 0 };
}

/* Sets or clears `mask` in the word that has `page`; returns how many bits changed. */
uint64_t bitmap_word_fill(struct bitmap *b, uint64_t page, uint64_t mask, bool value)
{
    uint64_t *word = &b->word[page / WORD_BITS];
    uint64_t hit = (value ? ~*word : *word) & mask;
    int n, change;

    if (!hit) {
        return 0;
    }
    n = __builtin_popcountll(hit);
    change = value ? n : -n;
    *word ^= hit;
    b->group[page / GROUP_PAGES] += change;
    b->block[page / BLOCK_PAGES] += change;
    b->total += change;
    return n;
}

/* Where a walk can go on from `page`, if its group or block has only such bits; else `page`. */
static uint64_t pass_over(const struct bitmap *b, uint64_t page, bool value)
{
    if (b->block[page / BLOCK_PAGES] == (value ? BLOCK_PAGES : 0)) {
        return page - page % BLOCK_PAGES + BLOCK_PAGES;
    }
    if (b->group[page / GROUP_PAGES] == (value ? GROUP_PAGES : 0)) {
        return page - page % GROUP_PAGES + GROUP_PAGES;
    }
    return page;
}

/* Returns how many bits changed. */
uint64_t bitmap_fill(struct bitmap *b, uint64_t first, uint64_t pages, bool value)
{
    uint64_t page = first, end = first + pages, changed = 0;

    while (page < end) {
        uint64_t next = pass_over(b, page, value);

        if (next == page) {
            changed += bitmap_word_fill(b, page, word_mask(page, end), value);
            next = next_word(page);
        }
        page = next;
    }
    return changed;
}

/* The first page in [from, end) whose bit is `value`, or at least `end`. */
static uint64_t find(const struct bitmap *b, uint64_t from, uint64_t end, bool value)
{
    uint64_t page = from;

    while (page < end) {
        uint64_t next = pass_over(b, page, !value);

        if (next == page) {
            uint64_t word = b->word[page / WORD_BITS];
            uint64_t hit = (value ? word : ~word) & word_mask(page, end);

            if (hit) {
                return page - page % WORD_BITS + __builtin_ctzll(hit);
            }
            next = next_word(page);
        }
        page = next;
    }
    return end;
}

/* The first run of at most `most` set bits in [from, end). */
bool bitmap_next(const struct bitmap *b, uint64_t from, uint64_t end, uint64_t most,
                 uint64_t *first, uint64_t *pages)
{
    uint64_t start;

    if (end > b->pages) {
        end = b->pages;
    }
    start = find(b, from, end, true);
    if (start >= end) {
        return false;
    }
    if (end - start > most) {
        end = start + most;
    }
    *first = start;
    *pages = find(b, start, end, false) - start;
    return true;
}
