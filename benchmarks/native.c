/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preload for benchmarks, in front of the plugin: calls QEMU's own kvm_convert_memory() from threads
 * of its own, at full speed, once the guest's firmware is done.
 *
 * A thread goes through the plugin, or past it as a QEMU does that has none: in blocks that take
 * turns, so that both meet the same noise. Each way has pages of its own.
 *
 *   BENCH_WORK     plain | flips | threads | latency | turns (turns.c)
 *   BENCH_OUT      the result: text, a line for each sample
 *   BENCH_THREADS, BENCH_COUNT, BENCH_PAGES   how many threads, round trips in each block, pages in
 *                  each conversion
 *   BENCH_BACKLOG  latency: MiB that are converted first; runs until the file BENCH_OUT.stop exists
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include "../plugin/kvm-abi.h"
#include "native.h"

#define BACKLOG (1024 * MIB)  /* below 2 GiB: one region, one slot */
#define BLOCKS 60
#define SAMPLES (8u << 20)
#define QUIET_NS 2000000000ull

static int (*next_ioctl)(int fd, unsigned long request, ...);
static int (*next_fallocate)(int fd, int mode, off64_t offset, off64_t bytes);
static int (*next_madvise)(void *start, size_t bytes, int advice);
static int (*libc_ioctl)(int fd, unsigned long request, ...);
static int (*libc_fallocate)(int fd, int mode, off64_t offset, off64_t bytes);
static int (*libc_madvise)(void *start, size_t bytes, int advice);
static __thread bool past_plugin, no_discards;

FILE *out;
__thread unsigned punches;
static char *ram;
static int guest_memfd = -1;
static int (*convert_memory)(uint64_t start, uint64_t size, bool to_private);
static uint64_t last_slot_ns;
static unsigned threads, count, pages;
static int stop;

struct sample {
    uint64_t time_ns;
    uint32_t took_ns;
};

static struct job {
    unsigned id;
    struct sample *samples;
    unsigned nsamples;
    uint64_t done;
} jobs[THREADS_MOST];

static void find_functions(void)
{
    void *libc = dlopen("libc.so.6", RTLD_LAZY);

    libc_ioctl = dlsym(libc, "ioctl");
    libc_fallocate = dlsym(libc, "fallocate64");
    libc_madvise = dlsym(libc, "madvise");
    next_fallocate = dlsym(RTLD_NEXT, "fallocate64");
    next_madvise = dlsym(RTLD_NEXT, "madvise");
    next_ioctl = dlsym(RTLD_NEXT, "ioctl");
}

uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static unsigned setting(const char *name, unsigned otherwise)
{
    const char *text = getenv(name);

    return text ? strtoul(text, NULL, 10) : otherwise;
}

uint64_t timed_convert(uint64_t gpa, uint64_t bytes, bool to_private)
{
    uint64_t start = now_ns();

    convert_memory(gpa, bytes, to_private);
    return now_ns() - start;
}

void touch_shared(uint64_t gpa, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += PAGE) {
        ram[gpa + at] = 1;
    }
}

void touch_private(uint64_t gpa, uint64_t bytes)
{
    libc_fallocate(guest_memfd, 0, gpa, bytes);
}

uint64_t round_trip(uint64_t gpa, uint64_t bytes)
{
    uint64_t ns;

    touch_shared(gpa, bytes);
    ns = timed_convert(gpa, bytes, true);
    touch_private(gpa, bytes);
    return ns + timed_convert(gpa, bytes, false);
}

static void work_flips(void)
{
    for (unsigned block = 0; block < 2 * BLOCKS; block++) {
        uint64_t ns = 0, bytes = pages * PAGE;

        past_plugin = block % 2;
        for (unsigned i = 0; i < count; i++) {
            ns += round_trip(AREA + past_plugin * THREAD_BYTES + i % 4 * bytes, bytes);
        }
        fprintf(out, "%s %llu\n", past_plugin ? "stock" : "plugin",
                (unsigned long long)(ns / count));
    }
    /* What is left without plugin and discards: QEMU's own code, and the two readings of the clock. */
    no_discards = past_plugin = true;
    for (unsigned block = 0; block < BLOCKS; block++) {
        uint64_t ns = 0;

        for (unsigned i = 0; i < count; i++) {
            ns += round_trip(AREA, pages * PAGE);
        }
        fprintf(out, "floor %llu\n", (unsigned long long)(ns / count));
    }
}

/* An ioctl that is none of KVM's, and fails at once: on both ways the same. */
static void work_plain(void)
{
    for (unsigned block = 0; block < 2 * BLOCKS; block++) {
        uint64_t start;

        past_plugin = block % 2;
        start = now_ns();
        for (unsigned i = 0; i < count; i++) {
            (past_plugin ? libc_ioctl : next_ioctl)(-1, 0x5421, NULL);
        }
        fprintf(out, "%s %llu\n", past_plugin ? "stock" : "plugin",
                (unsigned long long)((now_ns() - start) * 1000 / count));
    }
}

static void *converting(void *argument)
{
    void (*register_thread)(void) = dlsym(RTLD_DEFAULT, "rcu_register_thread");
    struct job *job = argument;
    uint64_t gpa = AREA + (2 + job->id) * THREAD_BYTES;

    register_thread();
    past_plugin = setting("BENCH_PAST_PLUGIN", 0);
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        uint64_t at = gpa + job->done / 2 % 4 * pages * PAGE;

        round_trip(at, pages * PAGE);
        job->done += 2;
    }
    return NULL;
}

static void work_threads(void)
{
    pthread_t thread[THREADS_MOST];
    uint64_t start = now_ns(), done = 0;

    for (unsigned i = 0; i < threads; i++) {
        jobs[i].id = i;
        pthread_create(&thread[i], NULL, converting, &jobs[i]);
    }
    usleep(count * 1000);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(thread[i], NULL);
        done += jobs[i].done;
    }
    fprintf(out, "per_second %llu\n",
            (unsigned long long)(done * 1000000000ull / (now_ns() - start)));
}

static void *sampling(void *argument)
{
    void (*register_thread)(void) = dlsym(RTLD_DEFAULT, "rcu_register_thread");
    struct job *job = argument;
    uint64_t gpa = AREA + (2 + job->id) * THREAD_BYTES;

    register_thread();
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED) && job->nsamples < SAMPLES) {
        struct sample *s = &job->samples[job->nsamples];
        bool to_private = job->nsamples++ % 2 == 0;

        s->took_ns = timed_convert(gpa, PAGE, to_private);
        s->time_ns = now_ns();
        usleep(50);
    }
    return NULL;
}

static bool exists(const char *suffix)
{
    char name[512];

    snprintf(name, sizeof(name), "%s%s", getenv("BENCH_OUT"), suffix);
    return !access(name, F_OK);
}

/* Conversions of pages beside a backlog that somebody drains. */
static void work_latency(void)
{
    uint64_t backlog = setting("BENCH_BACKLOG", 1024) * MIB;
    pthread_t thread[THREADS_MOST];

    touch_shared(BACKLOG, backlog);
    for (uint64_t at = 0; at < backlog; at += 2 * MIB) {
        if (convert_memory(BACKLOG + at, 2 * MIB, true)) {
            fprintf(stderr, "native benchmark: QEMU refuses to convert\n");
            exit(1);
        }
    }
    for (unsigned i = 0; i < threads; i++) {
        jobs[i].id = i;
        jobs[i].samples = calloc(SAMPLES, sizeof(struct sample));
        pthread_create(&thread[i], NULL, sampling, &jobs[i]);
    }
    fprintf(out, "ready 1\n");
    fflush(out);
    while (!exists(".stop")) {
        usleep(1000);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < threads; i++) {
        pthread_join(thread[i], NULL);
        for (unsigned n = 0; n < jobs[i].nsamples; n++) {
            fprintf(out, "%llu %u\n", (unsigned long long)jobs[i].samples[n].time_ns,
                    jobs[i].samples[n].took_ns);
        }
    }
}

static void *bench(void *unused)
{
    static const struct { const char *name; void (*run)(void); } works[] = {
        { "flips", work_flips }, { "threads", work_threads }, { "latency", work_latency },
        { "turns", work_turns },
    };
    void (*register_thread)(void) = dlsym(RTLD_DEFAULT, "rcu_register_thread");

    (void)unused;
    /* Firmware makes QEMU take slots away and mark new ones. */
    while (now_ns() < __atomic_load_n(&last_slot_ns, __ATOMIC_RELAXED) + QUIET_NS) {
        usleep(10000);
    }
    register_thread();
    for (unsigned i = 0; i < sizeof(works) / sizeof(*works); i++) {
        if (!strcmp(works[i].name, getenv("BENCH_WORK"))) {
            works[i].run();
        }
    }
    fprintf(out, "end 1\n");
    fclose(out);
    return NULL;
}

/* Needs no QEMU: done in any program. */
__attribute__((constructor)) static void measure_plain(void)
{
    if (!strcmp(getenv("BENCH_WORK"), "plain")) {
        find_functions();
        count = setting("BENCH_COUNT", 1000);
        out = fopen(getenv("BENCH_OUT"), "w");
        work_plain();
        fclose(out);
        exit(0);
    }
}

static void begin(void)
{
    pthread_t thread;

    threads = setting("BENCH_THREADS", 1);
    count = setting("BENCH_COUNT", 1000);
    pages = setting("BENCH_PAGES", 1);
    convert_memory = dlsym(RTLD_DEFAULT, "kvm_convert_memory");
    out = fopen(getenv("BENCH_OUT"), "w");
    if (!convert_memory || !out || !ram || guest_memfd < 0 || threads > THREADS_MOST) {
        fprintf(stderr, "native benchmark: cannot begin\n");
        exit(1);
    }
    pthread_create(&thread, NULL, bench, NULL);
}

/* Guest address 0 on is the region's first byte, below the hole for devices. */
static void learn_ram(const struct upm_kvm_region2 *r)
{
    if (r->flags & UPM_KVM_MEM_GUEST_MEMFD && r->memory_size > AREA) {
        ram = (char *)(uintptr_t)r->userspace_addr - r->guest_memfd_offset;
        guest_memfd = r->guest_memfd;
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    static bool begun;
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (!next_ioctl) {
        find_functions();
    }
    if (past_plugin) {
        return request == UPM_KVM_SET_ATTRIBUTES ? 0 : libc_ioctl(fd, request, argument);
    }
    if (request == UPM_KVM_SET_REGION2) {
        learn_ram(argument);
        __atomic_store_n(&last_slot_ns, now_ns(), __ATOMIC_RELAXED);
    } else if (request == UPM_KVM_RUN && !__atomic_exchange_n(&begun, true, __ATOMIC_SEQ_CST)) {
        begin();
    }
    return next_ioctl(fd, request, argument);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t bytes)
{
    if (!next_ioctl) {
        find_functions();
    }
    if (no_discards) {
        return 0;
    }
    punches += !!(mode & FALLOC_FL_PUNCH_HOLE);
    return (past_plugin ? libc_fallocate : next_fallocate)(fd, mode, offset, bytes);
}

int madvise(void *start, size_t bytes, int advice)
{
    if (!next_ioctl) {
        find_functions();
    }
    if (no_discards) {
        return 0;
    }
    return (past_plugin ? libc_madvise : next_madvise)(start, bytes, advice);
}
