/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest: shares and unshares its memory as a confidential guest does, and checks at every step
 * that nobody touched what it had written. Freestanding, 32 bits, no paging.
 *
 * Command line: workload=flip|ovmf|swiotlb|boot|random|paced|race|matrix|accept|selftest vcpus=N
 * flips=N seed=N backing=one|two
 * Output, on port 0xe9 when the work is done: one line of JSON. Then it halts for ever.
 *
 * The rule it checks: what was written to a page while it was private (or shared) is there until
 * the guest converts the page; after a round trip a page holds what it held, or zeroes.
 */
#include "payload.h"

#define DEBUG_PORT 0xe9
#define PVPANIC_PORT 0x505
#define PVPANIC_PANICKED 1
#define APIC 0xfee00000u
#define TRAMPOLINE 0x8000u
#define HC_MAP_GPA_RANGE 12
#define MAP_GPA_PRIVATE 0x10u

extern char trampoline[], trampoline_end[];
extern volatile uint32_t processors;

struct shadow shadow[AREA_PAGES];
uint32_t vcpus = 1, flips, seed = 1;

static volatile uint32_t go, finished, errors;
static volatile uint32_t conversions[2], converted_pages[2]; /* by the state that they led to */
static bool one_backing;              /* the same work on memory that is never converted */
static char workload[16] = "flip";

static void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint64_t cycles(void)
{
    uint64_t t;

    __asm__ volatile("rdtsc" : "=A"(t));
    return t;
}

static void put(const char *s)
{
    while (*s) {
        out8(DEBUG_PORT, *s++);
    }
}

/* Divides by ten and returns the remainder, without a library for 64 bits. */
static uint32_t divide(uint64_t *n)
{
    uint32_t high = *n >> 32, low = *n, rest = high % 10;

    high /= 10;
    __asm__("divl %2" : "+a"(low), "+d"(rest) : "r"(10u));
    *n = (uint64_t)high << 32 | low;
    return rest;
}

static void put_number(uint64_t n)
{
    char digits[24], *p = digits + sizeof(digits) - 1;

    *p = 0;
    do {
        *--p = '0' + divide(&n);
    } while (n);
    put(p);
}

static void put_field(const char *name, uint64_t value)
{
    put("\"");
    put(name);
    put("\": ");
    put_number(value);
    put(", ");
}

static bool equal(const char *a, const char *b)
{
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

uint32_t random32(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

volatile uint32_t *words(uint32_t page)
{
    return (volatile uint32_t *)(AREA + page * PAGE);
}

static uint32_t pattern(uint32_t page, uint32_t state, uint32_t generation, uint32_t word)
{
    uint32_t x = page * 2654435761u ^ (generation << 1 | state) * 40503u ^ word * 2246822519u;

    x ^= x >> 15;
    return x * 2654435761u | 1; /* never zero */
}

void error(void)
{
    __sync_fetch_and_add(&errors, 1);
}

void write_page(uint32_t page)
{
    struct shadow *s = &shadow[page];
    uint32_t generation = ++s->written[s->state];

    for (uint32_t w = 0; w < PAGE / 4; w += STRIDE) {
        words(page)[w] = pattern(page, s->state, generation, w);
    }
}

/* The page is as the guest last wrote it in its present state. */
void check_live(uint32_t page)
{
    const struct shadow *s = &shadow[page];

    if (!s->written[s->state]) {
        return;
    }
    for (uint32_t w = 0; w < PAGE / 4; w += STRIDE) {
        if (words(page)[w] != pattern(page, s->state, s->written[s->state], w)) {
            error();
            return;
        }
    }
}

/* The page has just come back to its present state: kept whole, or zeroes throughout. */
static void check_returned(uint32_t page)
{
    const struct shadow *s = &shadow[page];
    bool kept = s->written[s->state], zero = true;

    for (uint32_t w = 0; w < PAGE / 4; w += STRIDE) {
        uint32_t found = words(page)[w];

        kept = kept && found == pattern(page, s->state, s->written[s->state], w);
        zero = zero && !found;
    }
    if (!kept && !zero) {
        error();
    }
}

void ask_host(uint32_t page, uint32_t pages, enum state to)
{
    uint32_t result = HC_MAP_GPA_RANGE;

    __asm__ volatile("vmmcall"
                     : "+a"(result)
                     : "b"(AREA + page * PAGE), "c"(pages), "d"(to == PRIVATE ? MAP_GPA_PRIVATE : 0)
                     : "memory");
    if (result) {
        error();
    }
    __sync_fetch_and_add(&conversions[to], 1);
    __sync_fetch_and_add(&converted_pages[to], pages);
}

void convert(uint32_t page, uint32_t pages, enum state to)
{
    for (uint32_t p = page; p < page + pages; p++) {
        check_live(p);
    }
    if (one_backing) {
        for (uint32_t p = page; p < page + pages; p++) {
            check_live(p);
            write_page(p);
        }
        return;
    }
    ask_host(page, pages, to);
    for (uint32_t p = page; p < page + pages; p++) {
        shadow[p].converted |= to == SHARED;
        if (shadow[p].state == to) {
            check_live(p); /* converted to what it was: nothing may change */
            continue;
        }
        shadow[p].state = to;
        check_returned(p);
        write_page(p);
    }
}

/* One page there and back. */
static void work_flip(uint32_t id)
{
    for (uint32_t i = id; i < flips; i += vcpus) {
        convert(id * CHUNK_PAGES, 1, PRIVATE);
        convert(id * CHUNK_PAGES, 1, SHARED);
    }
}

/* Firmware without a bounce buffer pool: each transfer shares its pages and takes them back. About
 * 1 in 250 is larger than 28 KiB; they use the same few pages again and again. */
static void work_ovmf(uint32_t id)
{
    uint32_t r = seed + id, base = id * CHUNK_PAGES;

    convert(base, CHUNK_PAGES, PRIVATE);
    for (uint32_t i = id; i < flips; i += vcpus) {
        bool large = random32(&r) % 255 == 0;
        uint32_t pages = large ? 8 + random32(&r) % 56 : 1 + random32(&r) % 2;
        uint32_t page = base + (large ? 64 : random32(&r) % 4 * 2);

        convert(page, pages, SHARED);
        convert(page, pages, PRIVATE);
    }
}

/* A bounce buffer: one block of private memory, shared once and used from then on. */
static void bounce_buffer(uint32_t first, uint32_t uses)
{
    uint32_t r = seed, pages = AREA_PAGES / 3;

    for (uint32_t page = 0; page < pages; page += CHUNK_PAGES) {
        convert(first + page, CHUNK_PAGES, PRIVATE);
    }
    convert(first, pages, SHARED);
    for (uint32_t i = 0; i < uses; i++) {
        uint32_t page = first + random32(&r) % pages;

        check_live(page);
        write_page(page);
    }
}

static void work_swiotlb(uint32_t id)
{
    if (!id) {
        bounce_buffer(0, flips);
    }
}

/* What a guest does between power-on and its idle loop: its firmware's transfers, then its kernel's
 * bounce buffer, past the firmware's pages. */
static void work_boot(uint32_t id)
{
    work_ovmf(id);
    if (!id) {
        bounce_buffer(VCPUS_MAX * CHUNK_PAGES, BOOT_BUFFER_USES);
    }
}

/* Ranges of 4 KiB to 2 MiB, mostly small, in chunks that the processors take turns to own. */
static void work_random(uint32_t id)
{
    uint32_t r = seed * 7919u + id * 104729u + 1, chunks = AREA_PAGES / CHUNK_PAGES / vcpus;

    for (uint32_t i = id; i < flips; i += vcpus) {
        uint32_t chunk = random32(&r) % chunks * vcpus + id;
        uint32_t most = 1u << __builtin_ctz(random32(&r) | 1u << 9);
        uint32_t pages = 1 + random32(&r) % most;
        uint32_t at = random32(&r) % (CHUNK_PAGES - pages + 1);

        if (random32(&r) % 64 == 0) {
            at = 0;
            pages = 1u << random32(&r) % 10;
        }
        convert(chunk * CHUNK_PAGES + at, pages, random32(&r) % 2 ? PRIVATE : SHARED);
    }
}

/* Its host stops it here, and lets it go on when all that it did has been dealt with. */
static void rest(void)
{
    out8(PVPANIC_PORT, PVPANIC_PANICKED);
}

/* Bursts of transfers, each ended by a block, the blocks in turn and a rest after each: whoever acts
 * on stale bytes then acts while the guest rests, since only a block brings more of them. */
static void work_paced(uint32_t id)
{
    if (id) {
        return;
    }
    convert(0, CHUNK_PAGES, PRIVATE);
    for (uint32_t i = 0; i < flips; i++) {
        uint32_t block = HOT_PAGES + i % BLOCKS * BLOCK_PAGES;

        for (uint32_t page = 0; page < HOT_PAGES; page++) {
            convert(page, 1, SHARED);
            convert(page, 1, PRIVATE);
        }
        convert(block, BLOCK_PAGES, i / BLOCKS % 2 ? PRIVATE : SHARED);
        rest();
    }
}

/* Changes memory behind the checker's back: it has to notice. */
static void work_selftest(uint32_t id)
{
    if (id == 0) {
        convert(0, 1, PRIVATE);
        words(0)[STRIDE] ^= 1;
        convert(0, 1, SHARED);
        words(0)[0] = 0;
        convert(0, 1, PRIVATE);
    }
}

static void work(uint32_t id)
{
    if (equal(workload, "flip")) {
        work_flip(id);
    } else if (equal(workload, "ovmf")) {
        work_ovmf(id);
    } else if (equal(workload, "swiotlb")) {
        work_swiotlb(id);
    } else if (equal(workload, "boot")) {
        work_boot(id);
    } else if (equal(workload, "random")) {
        work_random(id);
    } else if (equal(workload, "paced")) {
        work_paced(id);
    } else if (equal(workload, "race")) {
        work_race(id);
    } else if (equal(workload, "matrix")) {
        work_matrix(id);
    } else if (equal(workload, "accept")) {
        work_accept(id);
    } else {
        work_selftest(id);
    }
    __sync_fetch_and_add(&finished, 1);
}

void processor_main(uint32_t id)
{
    while (!go) {
        __asm__ volatile("pause");
    }
    work(id);
}

static const char *find(const char *line, const char *key)
{
    for (; *line; line++) {
        const char *a = line, *b = key;

        while (*b && *a == *b) {
            a++;
            b++;
        }
        if (!*b) {
            return a;
        }
    }
    return 0;
}

static void read_number(const char *line, const char *key, uint32_t *value)
{
    const char *p = find(line, key);

    if (p) {
        for (*value = 0; *p >= '0' && *p <= '9'; p++) {
            *value = *value * 10 + (*p - '0');
        }
    }
}

static void read_command_line(const char *line)
{
    const char *p = find(line, "workload=");

    for (unsigned i = 0; p && *p && *p != ' ' && i < sizeof(workload) - 1; i++) {
        workload[i] = *p++;
        workload[i + 1] = 0;
    }
    one_backing = find(line, "backing=one");
    read_number(line, "vcpus=", &vcpus);
    read_number(line, "flips=", &flips);
    read_number(line, "seed=", &seed);
    if (!vcpus || vcpus > VCPUS_MAX) {
        vcpus = 1;
    }
}

static void apic_command(uint32_t command)
{
    volatile uint32_t *low = (volatile uint32_t *)(APIC + 0x300);

    *low = command;
    while (*low & 1u << 12) {
        __asm__ volatile("pause");
    }
}

static void start_processors(void)
{
    uint64_t until;

    for (char *from = trampoline, *to = (char *)TRAMPOLINE; from < trampoline_end;) {
        *to++ = *from++;
    }
    *(volatile uint32_t *)(APIC + 0xf0) |= 0x100;
    apic_command(0x000c4500); /* INIT to all but this one */
    /* On a busy host one of them may not have seen INIT yet; who runs already ignores the next. */
    while (processors < vcpus) {
        for (until = cycles() + 50000000; cycles() < until && processors < vcpus;) {
            __asm__ volatile("pause");
        }
        apic_command(0x000c4600 | TRAMPOLINE >> 12);
    }
}

/* Pages whose shared copy is live and has been written or, if asked for, only converted. */
static uint32_t live_shared(bool or_converted)
{
    uint32_t pages = 0;

    for (uint32_t page = 0; page < AREA_PAGES; page++) {
        const struct shadow *s = &shadow[page];

        pages += s->state == SHARED && (s->written[SHARED] || (or_converted && s->converted));
    }
    return pages;
}

void guest_main(const uint32_t *multiboot)
{
    uint64_t start;

    if (multiboot[0] & 1u << 2) {
        read_command_line((const char *)multiboot[4]);
    }
    if (vcpus > 1) {
        start_processors();
    }
    start = cycles();
    go = 1;
    work(0);
    while (finished < vcpus) {
        __asm__ volatile("pause");
    }
    start = cycles() - start;
    put("{");
    put_field("conversions", conversions[PRIVATE] + conversions[SHARED]);
    put_field("conversions_to_private", conversions[PRIVATE]);
    put_field("conversions_to_shared", conversions[SHARED]);
    put_field("bytes_to_private", (uint64_t)converted_pages[PRIVATE] * PAGE);
    put_field("bytes_to_shared", (uint64_t)converted_pages[SHARED] * PAGE);
    put_field("cycles", start);
    put_field("live_shared_bytes", (uint64_t)live_shared(false) * PAGE);
    put_field("mapped_shared_bytes", (uint64_t)live_shared(true) * PAGE);
    put("\"errors\": ");
    put_number(errors);
    put("}\n");
}
