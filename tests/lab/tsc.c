/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Prints the frequency of this processor's time-stamp counter in kHz. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

#define WANTED_NS 100000000ull

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(void)
{
    uint64_t start_ns = now_ns(), start = __rdtsc(), ns;

    while ((ns = now_ns() - start_ns) < WANTED_NS) {
    }
    printf("%llu\n", (unsigned long long)((__rdtsc() - start) * 1000000 / ns));
    return 0;
}
