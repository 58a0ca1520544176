/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the works of the native benchmark share. */
#ifndef NATIVE_H
#define NATIVE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define PAGE 4096ull
#define MIB (1ull << 20)
#define AREA (256 * MIB)      /* guest address of the pages that threads convert */
#define THREAD_BYTES (8 * MIB)
#define THREADS_MOST 8

extern FILE *out;                     /* the result */
extern __thread unsigned punches;     /* that QEMU has asked for on this thread */

uint64_t now_ns(void);
/* Nanoseconds of QEMU's conversion. */
uint64_t timed_convert(uint64_t gpa, uint64_t bytes, bool to_private);
/* What the guest does between two conversions: there must be something to discard. */
void touch_shared(uint64_t gpa, uint64_t bytes);
void touch_private(uint64_t gpa, uint64_t bytes);
/* There and back; nanoseconds of the two conversions. */
uint64_t round_trip(uint64_t gpa, uint64_t bytes);

/* turns.c */
void work_turns(void);

#endif
