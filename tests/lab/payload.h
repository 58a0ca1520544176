/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the guest's workloads are made of. */
#ifndef PAYLOAD_H
#define PAYLOAD_H

#include <stdbool.h>
#include <stdint.h>

#define PAGE 4096u
#define CHUNK (2u << 20)
#define CHUNK_PAGES (CHUNK / PAGE)
#define AREA (32u << 20)              /* where the pages that are converted start */
#define AREA_PAGES (192u * CHUNK_PAGES / 2)   /* 192 MiB */
#define VCPUS_MAX 8
#define BOOT_BUFFER_USES 5000u
#define HOT_PAGES 16u                 /* what a burst of the paced guest shares and takes back */
#define BLOCK_PAGES 32u               /* what it ends with */
#define BLOCKS 8u
#define STRIDE 64                     /* in words: one in each 256 bytes of a page is checked */

enum state { SHARED, PRIVATE };

/* What the guest knows of a page. Only one processor at a time may use it. */
struct shadow {
    uint8_t state;
    bool converted;                   /* to shared, at least once */
    uint32_t written[2];              /* generation last written in each state; 0: never */
};

extern struct shadow shadow[AREA_PAGES];
extern uint32_t vcpus, flips, seed;

uint32_t random32(uint32_t *state);
volatile uint32_t *words(uint32_t page);
void error(void);
void write_page(uint32_t page);
/* The page is as the guest last wrote it in its present state. */
void check_live(uint32_t page);
/* The conversion alone; the shadow is left as it was. */
void ask_host(uint32_t page, uint32_t pages, enum state to);
/* With all checks before and after it, and new contents in each page that changed. */
void convert(uint32_t page, uint32_t pages, enum state to);

void work_race(uint32_t id);
void work_matrix(uint32_t id);
void work_accept(uint32_t id);

#endif
