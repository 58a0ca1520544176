/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The ledger: which pages have a stale copy, and how many there are in all. */
#include "upm.h"

/* Enters the pages of `mask` in the word that has `page`. Each function returns the number of pages
 * that changed. */
uint64_t ledger_add(struct region *r, enum copy copy, uint64_t page, uint64_t mask)
{
    uint64_t n = bitmap_word_fill(&r->stale[copy], page, mask, true);

    upm.stale_pages += n;
    upm.stale_of[copy] += n;
    if (upm.stale_pages > upm.peak_pages) {
        upm.peak_pages = upm.stale_pages;
    }
    upm.count.deferred[copy] += in_bytes(n);
    return n;
}

uint64_t ledger_remove(struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    uint64_t n;

    if (!r->stale[copy].total) {
        return 0;
    }
    n = bitmap_fill(&r->stale[copy], first, pages, false);
    upm.stale_pages -= n;
    upm.stale_of[copy] -= n;
    return n;
}

/* The memory of one side goes, and its copies with it. The record can't tell. */
void ledger_forget(struct region *r, enum copy copy)
{
    bool any = r->stale[copy].total;

    for (uint64_t at = 0; at < r->pages && r->stale[copy].total; at += UPM_STRIDE_PAGES) {
        uint64_t pages = r->pages - at < UPM_STRIDE_PAGES ? r->pages - at : UPM_STRIDE_PAGES;
        uint64_t n = ledger_remove(r, copy, at, pages);

        upm.count.forgotten[copy] += in_bytes(n);
        if (n) {
            upm_breathe();
        }
    }
    if (any) {
        ring_lose();
    }
}

/* The first run of at most `most` stale pages in [from, end). */
bool ledger_next(const struct region *r, enum copy copy, uint64_t from, uint64_t end,
                 uint64_t most, uint64_t *first, uint64_t *pages)
{
    return r->stale[copy].total && bitmap_next(&r->stale[copy], from, end, most, first, pages);
}
