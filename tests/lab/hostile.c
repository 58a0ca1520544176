/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Workloads that no sane guest has: the same pages converted by all processors at once, ranges that
 * cut each other, and private memory that is made private, as a guest does that accepts it.
 */
#include "payload.h"

/* The pages that all fight for: few, so that they meet. One in STEP is converted by nobody. */
#define NARROW_PAGES 64u
#define STEP 8u
/* Behind them, the same for ranges of up to a chunk. */
#define WIDE CHUNK_PAGES
#define WIDE_PAGES (2 * CHUNK_PAGES)
#define WIDE_PARTS 8u
#define RACED_PAGES (WIDE + WIDE_PAGES)
#define RACE_STEPS 48u                /* of each processor, in each round */
/* Words of a page that no pattern has: anybody's, and from here on one of each processor. */
#define ANYBODYS 1u
#define OWN 2u

#define ACCEPTED_SINGLY (4 * CHUNK_PAGES)
#define USED_PAGES 64u

struct range {
    uint32_t first, pages;
};

/* In which round a processor last wrote its own word of a page. */
static uint16_t own_round[VCPUS_MAX][RACED_PAGES];

/* All processors come here before any goes on. */
static void meet(void)
{
    static volatile uint32_t arrived, round;
    uint32_t mine = round;

    if (__sync_add_and_fetch(&arrived, 1) == vcpus) {
        arrived = 0;
        __sync_fetch_and_add(&round, 1);
        return;
    }
    while (round == mine) {
        __asm__ volatile("pause");
    }
}

static enum state either(uint32_t *r)
{
    return random32(r) % 2 ? PRIVATE : SHARED;
}

/* Mostly between two of the pages that nobody converts. */
static struct range raced_range(uint32_t *r)
{
    struct range range;
    uint32_t at;

    if (random32(r) % 8) {
        at = 1 + random32(r) % (STEP - 1);
        range.first = random32(r) % (NARROW_PAGES / STEP) * STEP + at;
        range.pages = 1 + random32(r) % (STEP - at);
        return range;
    }
    at = random32(r) % WIDE_PAGES;
    range.first = WIDE + at;
    range.pages = 1 + random32(r) % (WIDE_PAGES - at < CHUNK_PAGES ? WIDE_PAGES - at : CHUNK_PAGES);
    return range;
}

/* Nobody promises a racer his data. But what he finds is of this page, or zero. */
static void race(uint32_t *r)
{
    struct range range = raced_range(r);
    uint32_t page = range.first + random32(r) % range.pages, found;

    ask_host(range.first, range.pages, either(r));
    found = words(page)[ANYBODYS];
    if (found && found >> 12 != page + 1) {
        error();
    }
    words(page)[ANYBODYS] = (page + 1) << 12 | random32(r) % PAGE;
}

static uint32_t own_word(uint32_t page, uint32_t id, uint32_t round)
{
    return ((page + 1) << 16 | round) ^ id << 28;
}

/* Where all convert to the same state, what one writes after his own conversion is live, and no
 * other's conversion may take it: that discards the copy on the other side. */
static void agree(uint32_t id, uint32_t round, enum state to, uint32_t *r)
{
    struct range range = raced_range(r);

    ask_host(range.first, range.pages, to);
    for (uint32_t page = range.first; page < range.first + range.pages; page++) {
        words(page)[OWN + id] = own_word(page, id, round);
        own_round[id][page] = round;
    }
}

static void check_own(uint32_t id, uint32_t round)
{
    for (uint32_t page = 0; page < RACED_PAGES; page++) {
        if (own_round[id][page] == round && words(page)[OWN + id] != own_word(page, id, round)) {
            error();
        }
    }
}

/* After a race nobody knows a page's state, or what is in its copies. Here it becomes known again:
 * both copies are written, since a host that defers may keep either. */
static void settle(uint32_t first, uint32_t pages, enum state to)
{
    for (int side = 0; side < 2; side++) {
        enum state now = side == (to == PRIVATE) ? SHARED : PRIVATE;

        ask_host(first, pages, now);
        for (uint32_t page = first; page < first + pages; page++) {
            shadow[page].state = now;
            shadow[page].converted |= now == SHARED;
            words(page)[ANYBODYS] = 0;
            write_page(page);
        }
    }
}

static void settle_all(uint32_t *r)
{
    for (uint32_t page = 1; page < NARROW_PAGES; page += STEP) {
        settle(page, STEP - 1, either(r));
    }
    for (uint32_t part = 0; part < WIDE_PARTS; part++) {
        settle(WIDE + part * (WIDE_PAGES / WIDE_PARTS), WIDE_PAGES / WIDE_PARTS, either(r));
    }
}

static void check_all(void)
{
    for (uint32_t page = 0; page < RACED_PAGES; page++) {
        check_live(page);
    }
}

/* The processor's share of the narrow pages goes there and back, with all checks. */
static void return_trip(uint32_t id)
{
    for (uint32_t page = 1 + id * STEP; page < NARROW_PAGES; page += vcpus * STEP) {
        enum state was = shadow[page].state;

        convert(page, STEP - 1, was == PRIVATE ? SHARED : PRIVATE);
        convert(page, STEP - 1, was);
    }
}

/* Hostile rounds, in which each asks for what he likes, and others in which all ask for the same.
 * After each, one processor settles what was raced for, and all see what he wrote. */
void work_race(uint32_t id)
{
    uint32_t r = seed * 7919u + id * 104729u + 1, rounds = flips / (vcpus * RACE_STEPS) + 2;

    if (!id) {
        for (uint32_t page = 0; page < NARROW_PAGES; page += STEP) {
            convert(page, 1, page / STEP % 2 ? PRIVATE : SHARED);
            write_page(page);
        }
        settle_all(&r);
    }
    meet();
    for (uint32_t round = 1; round <= rounds; round++) {
        for (uint32_t step = 0; step < RACE_STEPS; step++) {
            if (round % 2) {
                race(&r);
            } else {
                agree(id, round, round / 2 % 2 ? PRIVATE : SHARED, &r);
            }
        }
        meet();
        check_own(id, round);
        meet();
        if (round % vcpus == id) {
            settle_all(&r);
        }
        meet();
        check_all();
        meet();
        return_trip(id);
        meet();
    }
}

/* The ranges of private_mem_conversions_test, KVM's own: the whole of one becomes private, then its
 * odd pages shared again, then all of it. A processor has two chunks; the rest of them stays. */
static void matrix(uint32_t base, struct range range)
{
    uint32_t first = base + range.first, end = first + range.pages;

    convert(first, range.pages, PRIVATE);
    for (uint32_t page = first + 1; page < end; page += 2) {
        convert(page, 1, SHARED);
    }
    for (uint32_t page = base; page < base + 2 * CHUNK_PAGES; page++) {
        check_live(page);
    }
    convert(first, range.pages, SHARED);
    convert(first, range.pages, PRIVATE);
    convert(first, range.pages, SHARED);
}

void work_matrix(uint32_t id)
{
    static const struct range ranges[] = {
        { 0, 1 }, { 0, CHUNK_PAGES }, { 1, 1 }, { 1, CHUNK_PAGES }, { CHUNK_PAGES, 1 },
    };
    uint32_t base = id * 2 * CHUNK_PAGES;

    for (uint32_t page = base; page < base + 2 * CHUNK_PAGES; page++) {
        write_page(page);
    }
    for (uint32_t i = 0; i < flips; i++) {
        matrix(base, ranges[i % (sizeof(ranges) / sizeof(*ranges))]);
    }
}

/* Its machine has made all of the area private. The guest accepts it, which changes nothing: some
 * of it page by page, the rest in chunks. Then it uses a little of it as any guest does. */
void work_accept(uint32_t id)
{
    if (id) {
        return;
    }
    for (uint32_t page = 0; page < AREA_PAGES; page++) {
        shadow[page].state = PRIVATE;
    }
    for (uint32_t page = 0; page < ACCEPTED_SINGLY; page++) {
        ask_host(page, 1, PRIVATE);
    }
    for (uint32_t page = ACCEPTED_SINGLY; page < AREA_PAGES; page += CHUNK_PAGES) {
        ask_host(page, CHUNK_PAGES, PRIVATE);
    }
    for (uint32_t page = 0; page < USED_PAGES; page++) {
        write_page(page);
    }
    for (uint32_t i = 0; i < flips; i++) {
        convert(i % USED_PAGES, 1, SHARED);
        convert(i % USED_PAGES, 1, PRIVATE);
    }
    for (uint32_t page = 0; page < AREA_PAGES; page++) {
        check_live(page);
    }
}
