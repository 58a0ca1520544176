/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The ledger, page by page, against a model of it: one thread, at random, but the same each time.
 * The model knows for each page which copy is live and which ones should be stale.
 */
#include "hazards.h"

#include "../upm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCKS = 3, MOST = 1200, STEPS = 3000 };

static struct block {
    struct memory *m;
    uint64_t pages;
    char shared[MOST + 1], stale[2][MOST + 1];   /* '.' or 'x'; [1] is the shared copy */
} block[BLOCKS];

static uint64_t seed = 88172645463325252ull, budget;

static uint64_t random_below(uint64_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % n;
}

static void random_range(const struct block *b, uint64_t *first, uint64_t *pages)
{
    uint64_t most = 1ull << random_below(11);

    *first = random_below(b->pages);
    *pages = 1 + random_below(most < b->pages - *first ? most : b->pages - *first);
}

static uint64_t count(const char *set, uint64_t first, uint64_t pages)
{
    uint64_t n = 0;

    for (uint64_t p = first; p < first + pages; p++) {
        n += set[p] == 'x';
    }
    return n;
}

static uint64_t count_all(void)
{
    uint64_t n = 0;

    for (int i = 0; i < BLOCKS; i++) {
        n += count(block[i].stale[0], 0, block[i].pages);
        n += count(block[i].stale[1], 0, block[i].pages);
    }
    return n;
}

static void model_conversion(struct block *b, uint64_t first, uint64_t pages, int to_private,
                             bool asked)
{
    char *left = b->stale[to_private], *live = b->stale[!to_private];
    char now = to_private ? '.' : 'x';
    uint64_t moved = 0;
    bool fits;

    memset(live + first, '.', pages);
    for (uint64_t p = first; p < first + pages; p++) {
        moved += b->shared[p] != now;
    }
    fits = asked && count_all() + moved <= budget;
    for (uint64_t p = first; p < first + pages; p++) {
        if (b->shared[p] != now && fits) {
            left[p] = 'x';
        }
        b->shared[p] = now;
    }
}

static void check(const struct block *b)
{
    static const char *const copies[] = { "private", "shared" };

    for (int copy = 0; copy < 2; copy++) {
        char *pages = ledger_of(1 + (b - block), copies[copy], b->pages);

        expect(!strcmp(pages, b->stale[copy]));
        free(pages);
    }
    expect(stale() == count_all() * PAGE && accounting_closes());
}

static void touch(const struct block *b, uint64_t first, uint64_t pages)
{
    for (uint64_t p = first; p < first + pages; p++) {
        (b->shared[p] == 'x' ? b->m->shared : b->m->private)[p * PAGE] = 1;
    }
}

static void one_step(void)
{
    struct block *b = &block[random_below(BLOCKS)];
    uint64_t first, pages, kind = random_below(16);
    int to_private = random_below(2);

    random_range(b, &first, &pages);
    if (kind < 12) {
        expect(!convert_only(b->m->gpa + first * PAGE, pages * PAGE, to_private));
        if (kind) {
            expect(!qemu_discard(b->m, first * PAGE, pages * PAGE, to_private));
        }
        model_conversion(b, first, pages, to_private, kind);
        vcpu_run();
        touch(b, first, pages);
    } else if (kind < 15) {
        fake.discarded_id = 0;
        free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"%s\", \"ranges\": [[%d, %llu, %llu]]}",
                  to_private ? "private" : "both", (int)(1 + (b - block)),
                  (unsigned long long)(first * PAGE), (unsigned long long)(pages * PAGE)));
        wait_for(discarded, "X_UPM_DISCARDED");
        memset(b->stale[0] + first, '.', pages);
        if (!to_private) {
            memset(b->stale[1] + first, '.', pages);
        }
    } else {
        budget = count_all() + random_below(300);
        free(must("x-upm-configure", "{\"budget\": %llu}", (unsigned long long)(budget * PAGE)));
    }
    check(b);
}

static void model(void)
{
    static const uint64_t pages[BLOCKS] = { 1, 700, MOST };
    uint64_t gpa = 0;

    fake_start();
    for (int i = 0; i < BLOCKS; i++) {
        struct block *b = &block[i];

        b->pages = pages[i];
        b->m = memory_new(i == 1 ? RAM_ANONYMOUS : RAM_MEMFD, gpa, b->pages * PAGE);
        slot_plug(i, b->m, 0, b->m->bytes, gpa);
        gpa += b->m->bytes;
        memset(b->shared, '.', b->pages);
        memset(b->stale[0], '.', b->pages);
        memset(b->stale[1], '.', b->pages);
    }
    vcpu_run();
    budget = 1000;
    defer_up_to(budget * PAGE);
    for (int i = 0; i < STEPS; i++) {
        one_step();
    }
    expect(query("inline-bytes-shared") && query("over-budget-bytes") && !fake.violations);
    drain();
    for (int i = 0; i < BLOCKS; i++) {
        memset(block[i].stale[0], '.', block[i].pages);
        memset(block[i].stale[1], '.', block[i].pages);
    }
    for (int i = 0; i < BLOCKS; i++) {
        check(&block[i]);
    }
}

/* More than anything in the plugin works through at once. */
static void large(void)
{
    const uint64_t size = 400 * MIB, pages = size / PAGE;
    struct memory *m = start_private(RAM_MEMFD, size);
    char *set;

    /* Three bitmaps: to clear a huge page of one would take long, with the lock held. */
    expect(fake.not_huge > 3 * pages / 8);
    defer_up_to(4 * size);
    expect(!guest_convert(m, 0, size, false) && !guest_convert(m, 0, size, true));
    expect(query("stale-shared") == size && query("stale-private") == 0);
    set = must("x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 4}");
    expect(strstr(set, "{\"ranges\": [[0, 419430400]], \"cursor\": 419430400, \"done\": true}"));
    free(set);
    expect(!guest_convert(m, 64 * PAGE, size - 128 * PAGE, false));
    set = ledger_of(1, "shared", pages);
    expect(strspn(set, "x") == 64 && strspn(set + 64, ".") == pages - 128);
    free(set);
    set = ledger_of(1, "private", pages);
    expect(strspn(set, ".") == 64 && strspn(set + 64, "x") == pages - 128);
    free(set);
    discard_and_wait("both", PAGE, size - 2 * PAGE);
    expect(stale() == 2 * PAGE && fake.longest_punch == 2 * MIB && !fake.violations);
    /* Too much for the budget, so made, in chunks. */
    configure("{\"budget\": 1048576}");
    fake.punches = 0;
    expect(!guest_convert(m, 0, size, true) && fake.punches == 200 && stale() == 2 * PAGE);
    expect(query("inline-bytes-shared") == size - 2 * PAGE);
    /* All of it is private: its memory goes, and what was stale is forgotten. */
    slot_unmap(0);
    memory_free(m);
    expect(!stale() && counter("forgotten-bytes") == 2 * PAGE && !fake.violations);
}

static _Atomic unsigned asked;
static _Atomic bool over;

static void *ask_all_the_time(void *unused)
{
    (void)unused;
    while (!over) {
        expect(accounting_closes());
        asked++;
    }
    return NULL;
}

/* A query may come between two holds of the lock of one conversion, also of one that makes copies
 * live which were stale. Somebody seems to want the lock all the time, so that it is let go for as
 * long as it ever is. */
static void closes_meanwhile(void)
{
    struct memory *m = start_private(RAM_MEMFD, 256 * MIB);
    pthread_t thread;

    defer_up_to(4 * m->bytes);
    __atomic_fetch_add(&upm.contenders, 1, __ATOMIC_RELAXED);
    pthread_create(&thread, NULL, ask_all_the_time, NULL);
    for (unsigned i = 0; i < 20 || asked < 300; i++) {
        expect(!guest_convert(m, 0, m->bytes, i % 2));
        vcpu_run();
    }
    over = true;
    pthread_join(thread, NULL);
    __atomic_fetch_sub(&upm.contenders, 1, __ATOMIC_RELAXED);
    expect(counter("reused-bytes") >= 19 * m->bytes && !fake.violations);
}

const struct hazard model_hazards[] = {
    { "model", model }, { "large", large }, { "closes-meanwhile", closes_meanwhile },
    { NULL, NULL },
};
