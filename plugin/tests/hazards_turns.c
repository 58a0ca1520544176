/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of conversions that wait for each other. */
#include "hazards.h"

#include "../upm.h"

#include <sched.h>

enum { FLIPPERS = 2, WIDE_CONVERSIONS = 50 };

static struct memory *ram;
static _Atomic unsigned entered, passed_by;
static _Atomic bool wide_is_coming, over;
static __thread bool flips;

static unsigned waiting(void)
{
    unsigned n;

    upm_lock();
    n = upm.waiters;
    upm_unlock();
    return n;
}

/* A flip stays in KVM until the next one is there too, or all others wait: at no time is the range
 * free of them, unless they wait for their turn. */
static void relay(void)
{
    unsigned number;

    if (!flips) {
        wide_is_coming = false;
        return;
    }
    if (wide_is_coming && waiting()) {
        passed_by++;
        /* Each may have had its page already when the wide one came. */
        expect(passed_by <= FLIPPERS);
    }
    number = ++entered;
    while (entered == number && waiting() < FLIPPERS && !over) {
        sched_yield();
    }
}

static void *flip_a_page(void *argument)
{
    bool to_private = false;

    flips = true;
    while (!over) {
        to_private = !to_private;
        expect(!guest_convert(ram, *(uint64_t *)argument, PAGE, to_private));
        vcpu_run();
    }
    return NULL;
}

/* 14 and 22: a conversion of a large range waits for the single pages in it that were first, and
 * none that comes later passes by. Counted are the flips that reach KVM while it waits. */
static void wide_among_pages(void)
{
    uint64_t offset[FLIPPERS] = { 7 * PAGE, 700 * PAGE };
    pthread_t thread[FLIPPERS];

    ram = start(RAM_MEMFD, 4 * MIB);
    defer_up_to(64 * MIB);
    fake.before_attributes = relay;
    for (unsigned i = 0; i < FLIPPERS; i++) {
        pthread_create(&thread[i], NULL, flip_a_page, &offset[i]);
    }
    for (unsigned i = 0; i < WIDE_CONVERSIONS; i++) {
        unsigned before = entered;

        while (entered == before) {
            sched_yield();
        }
        passed_by = 0;
        wide_is_coming = true;
        expect(!convert_only(0, ram->bytes, i % 2));
        expect(!qemu_discard(ram, 0, ram->bytes, i % 2));
        vcpu_run();
    }
    over = true;
    for (unsigned i = 0; i < FLIPPERS; i++) {
        pthread_join(thread[i], NULL);
    }
    expect(!fake.violations);
}

const struct hazard turn_hazards[] = {
    { "wide-among-pages", wide_among_pages }, { NULL, NULL },
};
