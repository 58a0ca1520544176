/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Work of the native benchmark that is told what to do while it runs, so that several QEMUs can take
 * turns: a line each from the FIFO BENCH_TURNS, and a line of the result for each.
 *
 *   flips BACKING PAGES THREADS MS   round trips of so many pages, by so many threads, for so long
 *   boot BACKING 0 0 0               the transfers and the bounce buffer of tests/lab/payload.c, once
 *   -> turn TRIPS TOTAL_NS CPU_NS CONVERT_NS FAULTS PUNCHES   sums over the threads; CPU_NS is
 *      their processor time
 *
 * BACKING "one": the same touches of memory, and no conversion.
 */
#define _GNU_SOURCE
#include "native.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define BOOT_AREA (512 * MIB)
#define CHUNK (2 * MIB)
#define TRANSFERS 5100u
#define BUFFER (64 * MIB)
#define BUFFER_USES 5000u

struct lane {
    pthread_t thread;
    unsigned id, pages, ms;
    bool one_backing, boot;
    uint64_t trips, total_ns, cpu_ns, convert_ns, faults, punched;
};

static void there_and_back(struct lane *lane, uint64_t gpa, uint64_t bytes)
{
    lane->trips++;
    if (lane->one_backing) {
        touch_shared(gpa, bytes);
        touch_shared(gpa, bytes);
    } else {
        lane->convert_ns += round_trip(gpa, bytes);
    }
}

static void become(struct lane *lane, uint64_t gpa, uint64_t bytes, bool to_private)
{
    if (!lane->one_backing) {
        lane->convert_ns += timed_convert(gpa, bytes, to_private);
    }
    if (to_private && !lane->one_backing) {
        touch_private(gpa, bytes);
    } else if (bytes < BUFFER) {
        touch_shared(gpa, bytes);
    }
}

static uint32_t random32(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void boot(struct lane *lane)
{
    uint64_t buffer = BOOT_AREA + 8 * CHUNK;
    uint32_t r = 7;

    become(lane, BOOT_AREA, CHUNK, true);
    for (unsigned i = 0; i < TRANSFERS; i++) {
        bool large = random32(&r) % 255 == 0;
        uint64_t pages = large ? 8 + random32(&r) % 56 : 1 + random32(&r) % 2;
        uint64_t page = large ? 64 : random32(&r) % 4 * 2;

        become(lane, BOOT_AREA + page * PAGE, pages * PAGE, false);
        become(lane, BOOT_AREA + page * PAGE, pages * PAGE, true);
        lane->trips++;
    }
    for (uint64_t at = 0; at < BUFFER; at += CHUNK) {
        become(lane, buffer + at, CHUNK, true);
    }
    become(lane, buffer, BUFFER, false);
    for (unsigned i = 0; i < BUFFER_USES; i++) {
        touch_shared(buffer + random32(&r) % (BUFFER / PAGE) * PAGE, PAGE);
    }
}

static void flips(struct lane *lane)
{
    uint64_t gpa = AREA + lane->id * THREAD_BYTES, bytes = lane->pages * PAGE;
    uint64_t end = now_ns() + lane->ms * 1000000ull;

    do {
        for (unsigned i = 0; i < 4; i++) {
            there_and_back(lane, gpa + i * bytes, bytes);
        }
    } while (now_ns() < end);
}

static uint64_t thread_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void *run_lane(void *argument)
{
    void (*register_thread)(void) = dlsym(RTLD_DEFAULT, "rcu_register_thread");
    void (*unregister_thread)(void) = dlsym(RTLD_DEFAULT, "rcu_unregister_thread");
    struct lane *lane = argument;
    struct rusage before, after;
    uint64_t start, cpu;

    register_thread();
    getrusage(RUSAGE_THREAD, &before);
    cpu = thread_ns();
    start = now_ns();
    if (lane->boot) {
        boot(lane);
    } else {
        flips(lane);
    }
    lane->total_ns = now_ns() - start;
    lane->cpu_ns = thread_ns() - cpu;
    getrusage(RUSAGE_THREAD, &after);
    lane->faults = after.ru_minflt - before.ru_minflt;
    lane->punched = punches;
    unregister_thread();
    return NULL;
}

static void take_turn(const struct lane *like, unsigned threads)
{
    struct lane lanes[THREADS_MOST], sum = { 0 };

    for (unsigned i = 0; i < threads; i++) {
        lanes[i] = *like;
        lanes[i].id = i;
        pthread_create(&lanes[i].thread, NULL, run_lane, &lanes[i]);
    }
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(lanes[i].thread, NULL);
        sum.trips += lanes[i].trips;
        sum.total_ns += lanes[i].total_ns;
        sum.cpu_ns += lanes[i].cpu_ns;
        sum.convert_ns += lanes[i].convert_ns;
        sum.faults += lanes[i].faults;
        sum.punched += lanes[i].punched;
    }
    fprintf(out, "turn %llu %llu %llu %llu %llu %llu\n", (unsigned long long)sum.trips,
            (unsigned long long)sum.total_ns, (unsigned long long)sum.cpu_ns,
            (unsigned long long)sum.convert_ns, (unsigned long long)sum.faults,
            (unsigned long long)sum.punched);
    fflush(out);
}

void work_turns(void)
{
    FILE *in = fopen(getenv("BENCH_TURNS"), "r");
    char line[128], kind[16], backing[16];
    unsigned threads;

    while (in && fgets(line, sizeof(line), in)) {
        struct lane like = { 0 };

        if (sscanf(line, "%15s %15s %u %u %u", kind, backing, &like.pages, &threads, &like.ms) != 5
            || threads > THREADS_MOST) {
            break;
        }
        like.one_backing = !strcmp(backing, "one");
        like.boot = !strcmp(kind, "boot");
        take_turn(&like, like.boot ? 1 : threads);
    }
}
