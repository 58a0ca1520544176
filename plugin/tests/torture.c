/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads convert, write, verify and discard at random, against a byte-exact model.
 *
 *   torture KIND THREADS FLIPS SEED      KIND: memfd, file, anonymous or guest-memfd
 *
 * A vCPU's thread holds the locks of the chunks that it converts, as a guest would, and keeps them
 * through QEMU's discard or lets go before it: the guest of a real QEMU could not, and the plugin
 * must hold even so. Beside them run a client that sends every command at random, one that makes
 * memory slots go and come back, and one that plugs and unplugs RAM.
 */
#include "fake.h"

#include "../kvm-abi.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCKS 2
#define BLOCK_PAGES 4096ull          /* 16 MiB, in two slots */
#define PAGES (BLOCKS * BLOCK_PAGES)
#define CHUNK 512ull
#define CHUNKS (PAGES / CHUNK)
#define PLUGGED_GPA (256ull << 20)
#define WORDS (PAGE / sizeof(uint64_t))

enum { SHARED, PRIVATE };

static struct {
    uint8_t state;
    uint32_t written[2];
} shadow[PAGES];                      /* guarded by the chunk's lock */
static pthread_mutex_t chunk_lock[CHUNKS];
static struct memory *block[BLOCKS];
static unsigned errors, flips, finished, plugged;
static enum kind kind;
static uint64_t seed;

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

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

static void error(void)
{
    __atomic_fetch_add(&errors, 1, __ATOMIC_RELAXED);
}

static void check_live(uint64_t page)
{
    int state = shadow[page].state;

    if (!holds(page, state)) {
        error();
    }
}

/* Just converted: whole as it was left, or zeroes; then written anew. */
static void arrive(uint64_t page, int to)
{
    if (shadow[page].state == to) {
        check_live(page);
        return;
    }
    shadow[page].state = to;
    if (!is_zero(page, to) && !(shadow[page].written[to] && holds(page, to))) {
        error();
    }
    write_page(page);
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

/* QEMU goes through the RAM block by block. */
static void discard(uint64_t first, uint64_t pages, int to)
{
    while (pages) {
        uint64_t at = first % BLOCK_PAGES, n = BLOCK_PAGES - at < pages ? BLOCK_PAGES - at : pages;

        if (qemu_discard(block[first / BLOCK_PAGES], at * PAGE, n * PAGE, to == PRIVATE)) {
            fail("a discard failed");
        }
        first += n;
        pages -= n;
    }
}

static void flip(uint64_t *r)
{
    uint64_t pages = 1 + next_random(r) % (1ull << next_random(r) % 10);
    uint64_t first = next_random(r) % (PAGES - pages + 1);
    int to = next_random(r) % 2;
    bool early = next_random(r) % 2;

    lock_chunks(first, pages, true);
    for (uint64_t p = first; p < first + pages; p++) {
        check_live(p);
    }
    if (convert_only(first * PAGE, pages * PAGE, to == PRIVATE)) {
        fail("a conversion failed");
    }
    if (early) {
        for (uint64_t p = first; p < first + pages; p++) {
            arrive(p, to);
        }
        lock_chunks(first, pages, false);
    }
    discard(first, pages, to);
    if (!early) {
        for (uint64_t p = first; p < first + pages; p++) {
            arrive(p, to);
        }
        lock_chunks(first, pages, false);
    }
    vcpu_run();
}

static void *vcpu(void *number)
{
    uint64_t r = seed * 1000003 + (uintptr_t)number * 7919 + 1;

    for (unsigned i = 0; i < flips; i++) {
        flip(&r);
    }
    __atomic_fetch_add(&finished, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void client_command(uint64_t *r)
{
    static const char *const copies[] = { "private", "shared", "both" };
    static const char *const modes[] = { "eager", "defer" };
    char *reply, *why, text[256];
    uint64_t cursor = 0;

    switch (next_random(r) % 8) {
    case 0:
    case 1:
        snprintf(text, sizeof(text), "{\"private\": \"%s\", \"shared\": \"%s\", \"budget\": %llu, "
                 "\"lease-ms\": %u, \"notify-ms\": 1}", modes[next_random(r) % 4 > 0],
                 modes[next_random(r) % 4 > 0],
                 (unsigned long long)(next_random(r) % (PAGES * PAGE)),
                 (unsigned)(next_random(r) % 20));
        free(must("x-upm-configure", "%s", text));
        break;
    case 2:
        reply = command("x-upm-discard", "{\"id\": 1, \"copy\": \"both\", \"all\": true}", &why);
        free(reply);
        free(why);
        break;
    case 3:
        cursor = query("head");
        free(must("x-upm-read", "{\"cursor\": %llu, \"max\": 1000}",
                  (unsigned long long)(cursor > 500 ? cursor - 500 : 0)));
        break;
    case 4:
        free(must("x-upm-stale", "{\"copy\": \"%s\", \"region\": %d, \"cursor\": 0, \"max\": 64}",
                  copies[next_random(r) % 2], (int)(1 + next_random(r) % BLOCKS)));
        break;
    default:
        snprintf(text, sizeof(text), "{\"id\": 2, \"copy\": \"%s\", \"ranges\": [[%d, %llu, %llu]]}",
                 copies[next_random(r) % 3], (int)(1 + next_random(r) % BLOCKS),
                 next_random(r) % (BLOCK_PAGES / 2) * PAGE,
                 (1 + next_random(r) % (BLOCK_PAGES / 2)) * PAGE);
        reply = command("x-upm-discard", text, &why); /* busy, at times */
        free(reply);
        free(why);
    }
    if (!accounting_closes()) {
        fail("what was deferred and what became of it differ");
    }
}

static void *client(void *threads)
{
    uint64_t r = seed + 77;

    while (__atomic_load_n(&finished, __ATOMIC_SEQ_CST) < (uintptr_t)threads) {
        client_command(&r);
    }
    return NULL;
}

static void map_block(int b)
{
    const uint64_t half = BLOCK_PAGES / 2 * PAGE;

    slot_map(2 * b, block[b], 0, half, block[b]->gpa);
    slot_map(2 * b + 1, block[b], half, half, block[b]->gpa + half);
}

/* QEMU keeps vCPUs out of KVM while slots that overlap change: so do the chunks' locks here. */
static void *remapper(void *threads)
{
    while (__atomic_load_n(&finished, __ATOMIC_SEQ_CST) < (uintptr_t)threads) {
        lock_chunks(0, BLOCK_PAGES, true);
        slot_unmap(0);
        slot_unmap(1);
        map_block(0);
        lock_chunks(0, BLOCK_PAGES, false);
        usleep(2000);
    }
    return NULL;
}

static void must_hold(int fd, const char *text)
{
    char found[16] = "";

    if (pread(fd, found, strlen(text), 0) < 0 || strcmp(found, text)) {
        fail("a discard met the file that took the number of a closed one");
    }
    close(fd);
}

/* RAM that goes while its copies are stale, and files that take its numbers at once. */
static void *plugger(void *threads)
{
    const uint64_t bytes = 64 * PAGE;

    while (__atomic_load_n(&finished, __ATOMIC_SEQ_CST) < (uintptr_t)threads) {
        struct memory *m = memory_new(kind, PLUGGED_GPA, bytes);
        int later[2];

        slot_map(100, m, 0, bytes, PLUGGED_GPA);
        memset(m->shared, 1, bytes);
        guest_convert(m, 0, bytes, true);
        memset(m->private, 2, bytes);
        guest_convert(m, 0, bytes / 2, false);
        slot_unmap(100);
        memory_free(m);
        for (int i = 0; i < 2; i++) {
            later[i] = memfd_create("later", MFD_CLOEXEC);
            if (pwrite(later[i], "later", 5, 0) != 5) {
                fail("cannot write");
            }
        }
        usleep(500);
        must_hold(later[0], "later");
        must_hold(later[1], "later");
        convert_only(PLUGGED_GPA, bytes, false);
        plugged++;
    }
    return NULL;
}

static uint64_t allocated(int fd)
{
    struct stat st;

    return fstat(fd, &st) ? 0 : st.st_blocks * 512;
}

/* The ledger is empty: what is allocated is what the guest has written and not left. */
static void check_blocks(void)
{
    for (int b = 0; b < BLOCKS; b++) {
        uint64_t live[2] = { 0 };

        for (uint64_t p = b * BLOCK_PAGES; p < (b + 1) * BLOCK_PAGES; p++) {
            live[shadow[p].state] += PAGE;
        }
        if (kind == RAM_MEMFD && allocated(block[b]->shared_fd) != live[SHARED]) {
            fail("shared: %llu bytes allocated, %llu live",
                 (unsigned long long)allocated(block[b]->shared_fd),
                 (unsigned long long)live[SHARED]);
        }
        if (!fake.real_guest_memfd && allocated(block[b]->private_fd) != live[PRIVATE]) {
            fail("private: %llu bytes allocated, %llu live",
                 (unsigned long long)allocated(block[b]->private_fd),
                 (unsigned long long)live[PRIVATE]);
        }
    }
}

static void set_up(const char *name)
{
    static const char *const kinds[] = { "memfd", "file", "anonymous" };

    fake.real_guest_memfd = !strcmp(name, "guest-memfd");
    for (int i = 0; i < 3; i++) {
        if (!strcmp(name, kinds[i])) {
            kind = i;
        }
    }
    fake_start();
    for (uint64_t c = 0; c < CHUNKS; c++) {
        pthread_mutex_init(&chunk_lock[c], NULL);
    }
    for (int b = 0; b < BLOCKS; b++) {
        block[b] = memory_new(kind, b * BLOCK_PAGES * PAGE, BLOCK_PAGES * PAGE);
        map_block(b);
    }
    convert_only(0, PAGES * PAGE, false);
    vcpu_run();
    for (uint64_t p = 0; p < PAGES; p++) {
        write_page(p);
    }
    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", "
              "\"budget\": 16777216, \"lease-ms\": 0}"));
}

int main(int argc, char **argv)
{
    uintptr_t threads = argc == 5 ? strtoul(argv[2], NULL, 10) : 0;
    pthread_t thread[32];
    unsigned n = 0;

    if (!threads || threads > 16) {
        fail("usage: torture memfd|file|anonymous|guest-memfd THREADS FLIPS SEED");
    }
    flips = strtoul(argv[3], NULL, 10);
    seed = strtoull(argv[4], NULL, 10) + 1;
    set_up(argv[1]);
    for (uintptr_t i = 0; i < threads; i++) {
        pthread_create(&thread[n++], NULL, vcpu, (void *)i);
    }
    pthread_create(&thread[n++], NULL, client, (void *)threads);
    pthread_create(&thread[n++], NULL, remapper, (void *)threads);
    pthread_create(&thread[n++], NULL, plugger, (void *)threads);
    while (n) {
        pthread_join(thread[--n], NULL);
    }
    drain();
    for (uint64_t p = 0; p < PAGES; p++) {
        check_live(p);
    }
    check_blocks();
    printf("{\"conversions\": %llu, \"reused_bytes\": %llu, \"requested_bytes\": %llu, "
           "\"failsafe_bytes\": %llu, \"inline_bytes\": %llu, \"plugged\": %u, \"punches\": %u, "
           "\"longest_punch\": %llu, \"violations\": %u, \"data_errors\": %u}\n",
           (unsigned long long)counter("conversions-to"),
           (unsigned long long)counter("reused-bytes"),
           (unsigned long long)counter("requested-bytes"),
           (unsigned long long)counter("failsafe-bytes"),
           (unsigned long long)counter("inline-bytes"), plugged, fake.punches,
           (unsigned long long)fake.longest_punch, fake.violations, errors);
    return fake.violations || errors || !accounting_closes();
}
