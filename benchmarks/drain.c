/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a stale page costs to discard, and what that adds to conversions in another region:
 *
 *   drain GIB request|drain
 *
 * 100,000 pages, allocated and isolated, in a guest of GIB. The files are real memfds and their
 * punches the kernel's; KVM is not there: a conversion takes what the plugin takes.
 */
#include "../plugin/tests/fake.h"
#include "../plugin/upm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STALE_PAGES 100000ull
#define BIG_GPA (1ull << 41)
#define SAMPLES (4u << 20)
#define PAUSE_US 20
#define IDLE_US 1000000

static struct { uint64_t time_ns; uint32_t took_ns; } *sample;
static _Atomic unsigned samples;
static _Atomic bool stop;
static struct memory *other;

static void *others(void *unused)
{
    (void)unused;
    for (unsigned i = 0; i < SAMPLES && !stop; i++) {
        uint64_t start = now_ns();

        guest_convert(other, 0, PAGE, i % 2 == 0);
        sample[i].time_ns = start;
        sample[i].took_ns = now_ns() - start;
        samples = i + 1;
        usleep(PAUSE_US);
    }
    return NULL;
}

static int by_size(const void *a, const void *b)
{
    return (*(const uint32_t *)a > *(const uint32_t *)b)
           - (*(const uint32_t *)a < *(const uint32_t *)b);
}

/* Prints how long conversions took that began in [from, to), in microseconds: what only a thousandth
 * of them exceeded, and the longest. */
static void figures(const char *name, uint64_t from, uint64_t to)
{
    uint32_t *took = malloc(SAMPLES * sizeof(*took));
    unsigned n = 0;

    for (unsigned i = 0; i < samples; i++) {
        if (sample[i].time_ns >= from && sample[i].time_ns < to) {
            took[n++] = sample[i].took_ns;
        }
    }
    expect(n);
    qsort(took, n, sizeof(*took), by_size);
    printf(", \"%s_samples\": %u, \"%s_p999_us\": %.1f, \"%s_max_us\": %.1f", name, n, name,
           took[n * 999ull / 1000] / 1000.0, name, took[n - 1] / 1000.0);
    free(took);
}

static bool is_over(void)
{
    return fake.discarded_id == 7 || !query("stale-shared");
}

int main(int argc, char **argv)
{
    uint64_t bytes = argc == 3 ? strtoull(argv[1], NULL, 10) << 30 : 0, begin, drain, end;
    uint64_t stride = bytes / STALE_PAGES / PAGE * PAGE;
    bool request = argc == 3 && !strcmp(argv[2], "request");
    struct memory *m;
    pthread_t thread;

    expect(stride >= 2 * PAGE);
    fake_start();
    m = memory_new(RAM_MEMFD, BIG_GPA, bytes);
    slot_plug(0, m, 0, bytes, BIG_GPA);
    convert_only(BIG_GPA, bytes, false);
    other = memory_new(RAM_ANONYMOUS, 0, MIB);
    slot_plug(1, other, 0, MIB, 0);
    convert_only(0, MIB, false);
    vcpu_run();
    sample = calloc(SAMPLES, sizeof(*sample));
    free(must("x-upm-configure", "{\"private\": \"eager\", \"shared\": \"defer\", "
              "\"budget\": %llu}", 1ull << 50));
    for (uint64_t i = 0; i < STALE_PAGES; i++) {
        m->shared[i * stride] = 1;
        expect(!guest_convert(m, i * stride, PAGE, true));
    }
    vcpu_run();
    expect(query("stale-shared") == STALE_PAGES * PAGE);
    pthread_create(&thread, NULL, others, NULL);
    begin = now_ns();
    usleep(IDLE_US);
    drain = now_ns();
    if (request) {
        free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"shared\", \"ranges\": [[1, 0, %llu]]}",
                  (unsigned long long)bytes));
    } else {
        free(must("x-upm-configure", "{\"shared\": \"eager\"}"));
    }
    while (!is_over()) {
        usleep(1000);
    }
    end = now_ns();
    stop = true;
    pthread_join(thread, NULL);
    printf("{\"page_us\": %.3f", (end - drain) / 1000.0 / STALE_PAGES);
    figures("idle", begin, drain);
    figures("beside", drain, end);
    puts("}");
    return 0;
}
