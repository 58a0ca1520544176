/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of the torture share. */
#ifndef TORTURE_H
#define TORTURE_H

#include "fake.h"

#include <pthread.h>

#define BLOCKS 3
#define RACED (BLOCKS - 1)           /* the block whose pages nobody writes */
#define BLOCK_PAGES 2048ull          /* 8 MiB, in two slots */
#define PAGES ((BLOCKS - 1) * BLOCK_PAGES)
#define MOST_PAGES 512ull            /* of one conversion */

extern struct memory *block[BLOCKS];
extern enum kind kind;
extern uint64_t seed;
extern _Atomic unsigned data_errors, ended_threads;
/* Held to read by whoever converts, maps or plugs; to write while the VM is rebuilt. */
extern pthread_rwlock_t world;

uint64_t next_random(uint64_t *state);
void map_slot(unsigned slot);

/* torture_guest.c: what the guest does, and the model of its memory */
void guest_begin(void);
/* One conversion of pages that are locked, written and verified; or of pages that others convert
 * at the same moment. */
void guest_flip(uint64_t *r);
void guest_race(uint64_t *r);
/* QEMU has mapped the slot again and marked it private. */
void guest_slot_is_private(unsigned slot, void (*remap)(unsigned slot));
/* The VM has been rebuilt: all is private, and the private copies are new. With the world to
 * oneself. */
void guest_is_reset(void);
/* Nothing runs any more: contents, the ledger and what is allocated must agree. */
void guest_check(void);

#endif
