/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The ledger: which pages have a stale copy. A bit for each page, and a count for each group of
 * pages, so that looking for the few stale ones of a large guest touches little.
 */
#include "upm.h"

static uint64_t mask_of(uint64_t page, uint64_t end)
{
    uint64_t low = page % WORD_BITS;
    uint64_t word_end = page - low + WORD_BITS;
    uint64_t mask = ~0ull << low;

    if (end < word_end) {
        mask &= ~0ull >> (word_end - end);
    }
    return mask;
}

enum change { COUNT_MISSING, ADD, REMOVE };

static uint64_t ledger_change(struct region *r, enum copy copy, uint64_t first, uint64_t pages,
                              enum change change)
{
    uint64_t end = first + pages, total = 0;

    for (uint64_t page = first; page < end; page += WORD_BITS - page % WORD_BITS) {
        uint64_t mask = mask_of(page, end);
        uint64_t *word = &r->stale[copy][page / WORD_BITS];
        uint64_t hit = change == REMOVE ? *word & mask : ~*word & mask;
        unsigned n;

        if (!hit) {
            continue;
        }
        n = __builtin_popcountll(hit);
        total += n;
        if (change == ADD) {
            *word |= hit;
            r->group[copy][page / GROUP_PAGES] += n;
        } else if (change == REMOVE) {
            *word &= ~hit;
            r->group[copy][page / GROUP_PAGES] -= n;
        }
    }
    return total;
}

/* Each returns the number of pages that changed, or would. */
uint64_t ledger_add(struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    uint64_t n = ledger_change(r, copy, first, pages, ADD);

    r->stale_pages[copy] += n;
    upm.stale_pages += n;
    if (upm.stale_pages > upm.peak_pages) {
        upm.peak_pages = upm.stale_pages;
    }
    return n;
}

uint64_t ledger_remove(struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    uint64_t n;

    if (!r->stale_pages[copy]) {
        return 0;
    }
    n = ledger_change(r, copy, first, pages, REMOVE);
    r->stale_pages[copy] -= n;
    upm.stale_pages -= n;
    return n;
}

uint64_t ledger_missing(const struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    return ledger_change((struct region *)r, copy, first, pages, COUNT_MISSING);
}

static bool is_stale(const struct region *r, enum copy copy, uint64_t page)
{
    return r->stale[copy][page / WORD_BITS] >> (page % WORD_BITS) & 1;
}

/* The first run of at most `most` stale pages in [from, end). */
bool ledger_next(const struct region *r, enum copy copy, uint64_t from, uint64_t end,
                 uint64_t most, uint64_t *first, uint64_t *pages)
{
    uint64_t page = from;

    if (end > r->pages) {
        end = r->pages;
    }
    while (page < end) {
        if (!r->group[copy][page / GROUP_PAGES]) {
            page += GROUP_PAGES - page % GROUP_PAGES;
        } else if (!(r->stale[copy][page / WORD_BITS] & mask_of(page, end))) {
            page += WORD_BITS - page % WORD_BITS;
        } else {
            page += __builtin_ctzll(r->stale[copy][page / WORD_BITS] & mask_of(page, end))
                    - page % WORD_BITS;
            break;
        }
    }
    if (page >= end) {
        return false;
    }
    *first = page;
    while (page < end && page - *first < most && is_stale(r, copy, page)) {
        page++;
    }
    *pages = page - *first;
    return true;
}

/* Stale pages of all regions. */
uint64_t ledger_total(enum copy copy)
{
    uint64_t pages = 0;

    for (unsigned i = 0; i < upm.nregions; i++) {
        pages += upm.regions[i]->stale_pages[copy];
    }
    return pages;
}
