/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's discard comes some time after KVM has converted, and another vCPU may have converted the
 * same pages again: the late call owns only those pages whose last conversion was its own.
 */
#include "hazards.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct vcpu *a, *b;

static struct memory *begin(bool eager)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    fill_shared(m, 0, MIB);
    memset(m->private, 0x33, MIB);
    a = vcpu_new();
    b = vcpu_new();
    defer_up_to(16 * MIB);
    if (eager) {
        configure("{\"shared\": \"eager\", \"private\": \"eager\"}");
    }
    return m;
}

/* A unshares, B shares a page of it again and discards, then A's discard comes. */
static void taken_back(bool eager)
{
    struct memory *m = begin(eager);
    char *pages;

    expect(!vcpu_convert(a, m, 0, 4, true));
    expect(!vcpu_convert(b, m, 1, 1, false) && !vcpu_discard(b, m, 1, 1, false));
    memset(m->shared + PAGE, 0x77, PAGE);
    expect(!vcpu_discard(a, m, 0, 4, true));
    expect(m->shared[PAGE] == 0x77 && m->shared[2 * PAGE - 1] == 0x77);
    pages = ledger_of(1, "shared", 6);
    expect(!strcmp(pages, eager ? "......" : "x.xx.."));
    free(pages);
    pages = ledger_of(1, "private", 6);
    expect(!strcmp(pages, eager ? "......" : ".x...."));
    free(pages);
    if (eager) {
        expect(m->shared[0] == 0 && m->shared[2 * PAGE] == 0 && m->shared[3 * PAGE] == 0);
        expect(query("inline-bytes-shared") == 3 * PAGE);
    }
    vcpu_goes_on(a);
    vcpu_goes_on(b);
    expect(query("left-alone-bytes") == 0);
    drain();
    expect(m->shared[PAGE] == 0x77 && !fake.violations);
}

static void taken_back_deferred(void)
{
    taken_back(false);
}

static void taken_back_eagerly(void)
{
    taken_back(true);
}

/* The other direction: A shares, B unshares, A's discard of the private copy comes. */
static void given_back(bool eager)
{
    struct memory *m = begin(eager);

    expect(!vcpu_convert(b, m, 0, 64, true));
    vcpu_goes_on(b);
    expect(!vcpu_convert(a, m, 0, 64, false));
    expect(!vcpu_convert(b, m, 0, 32, true) && !vcpu_discard(b, m, 0, 32, true));
    expect(!vcpu_discard(a, m, 0, 64, false));
    expect(m->private[0] == 0x33 && m->private[31 * PAGE] == 0x33);
    expect((m->private[32 * PAGE] == 0) == eager);
    expect(query("stale-private") == (eager ? 0 : 32 * PAGE));
    expect(query("stale-shared") == (eager ? 0 : 32 * PAGE));
    drain();
    expect(m->private[31 * PAGE] == 0x33 && m->shared[32 * PAGE] == 0x5a && !fake.violations);
}

static void given_back_deferred(void)
{
    given_back(false);
}

static void given_back_eagerly(void)
{
    given_back(true);
}

/* B converts there and back: the copy that A left is stale again, but B has the last word. */
static void there_and_back(void)
{
    struct memory *m = begin(false);

    expect(!vcpu_convert(a, m, 0, 2, true));
    expect(!vcpu_convert(b, m, 0, 1, false));
    vcpu_goes_on(b);
    expect(!vcpu_convert(b, m, 0, 1, true));
    expect(!vcpu_discard(a, m, 0, 2, true));
    expect(stale() == PAGE);
    expect(!vcpu_discard(b, m, 0, 1, true));
    expect(stale() == 2 * PAGE && m->shared[0] == 0x5a);
    /* Again, and B's discard never comes: nobody's to make. */
    expect(!vcpu_convert(a, m, 8, 2, true));
    expect(!vcpu_convert(b, m, 8, 1, false));
    vcpu_goes_on(b);
    expect(!vcpu_convert(b, m, 8, 1, true));
    vcpu_goes_on(b);
    configure("{\"shared\": \"eager\"}");
    expect(!vcpu_discard(a, m, 8, 2, true));
    drain();
    expect(m->shared[8 * PAGE] == 0x5a && m->shared[9 * PAGE] == 0 && !fake.violations);
}

/* Both convert to the same side: the second changes nothing, and its call is the last one. */
static void same_way(void)
{
    struct memory *m = begin(false);

    expect(!vcpu_convert(a, m, 0, 2, true));
    expect(!vcpu_convert(b, m, 0, 1, true));
    expect(!vcpu_discard(a, m, 0, 2, true));
    expect(stale() == PAGE && m->shared[0] == 0x5a);
    /* B's conversion changed nothing, and nothing is in the ledger: its call goes through. */
    expect(!vcpu_discard(b, m, 0, 1, true));
    expect(stale() == PAGE && m->shared[0] == 0 && !fake.violations);
}

/* A's discard is under way while B converts back the rest of it. */
static void during_the_discard(void)
{
    struct memory *m = start(RAM_MEMFD, 8 * MIB);

    fill_shared(m, 0, 8 * MIB);
    a = vcpu_new();
    b = vcpu_new();
    configure("{\"shared\": \"eager\", \"private\": \"eager\", \"budget\": 1048576}");
    expect(!vcpu_convert(a, m, 0, 2048, true));
    shut_gate();
    fake.before_punch = stop_punch;
    vcpu_begin_discard(a, m, 0, 2048, true);
    wait_for(somebody_waits, "QEMU's discard");
    /* Behind the chunk in the kernel's hands nobody waits; in it one does. */
    expect(!vcpu_convert(b, m, 1024, 256, false));
    vcpu_goes_on(b);
    vcpu_begin_convert(b, m, 16, 1, false);
    expect(!vcpu_is_done(a));
    open_gate();
    expect(!vcpu_finish(b) && !vcpu_finish(a));
    expect(m->shared[1024 * PAGE] == 0x5a && m->shared[1280 * PAGE - 1] == 0x5a);
    expect(m->shared[0] == 0 && m->shared[1023 * PAGE] == 0 && m->shared[1280 * PAGE] == 0);
    expect(m->shared[2047 * PAGE] == 0 && !stale() && query("peak") == 0 && !fake.violations);
}

/* A's late discard meets KVM at work on B's conversion back: it keeps off that, and whether B's
 * fails or not decides. */
static void during_the_conversion(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    fill_shared(m, 0, MIB);
    a = vcpu_new();
    b = vcpu_new();
    configure("{\"shared\": \"eager\", \"private\": \"eager\"}");
    for (int fails = 0; fails < 2; fails++) {
        expect(!vcpu_convert(a, m, 0, 8, true));
        shut_gate();
        fake.before_attributes = stop_attributes;
        if (fails) {
            fail_next(&fake.attributes, EIO, 0, 1);
        }
        vcpu_begin_convert(b, m, 2, 2, false);
        wait_for(somebody_waits, "KVM");
        fake.before_attributes = NULL;
        vcpu_begin_discard(a, m, 0, 8, true);
        usleep(A_WHILE_US);
        expect(m->shared[2 * PAGE] == 0x5a && m->shared[3 * PAGE] == 0x5a);
        open_gate();
        expect(vcpu_finish(b) == (fails ? -1 : 0));
        expect(!vcpu_finish(a));
        expect(m->shared[0] == 0 && m->shared[7 * PAGE] == 0);
        expect((m->shared[2 * PAGE] == 0x5a) == !fails);
        vcpu_goes_on(a);
        vcpu_goes_on(b);
        expect(!guest_convert(m, 0, 8 * PAGE, false));
        vcpu_run();
        fill_shared(m, 0, MIB);
    }
    expect(!fake.violations);
}

/* QEMU takes the slot away and puts it back, as it does for PAM registers, and marks it private. */
static void *register_again(void *argument)
{
    slot_unmap(0);
    slot_plug(0, argument, 0, MIB, 0);
    return NULL;
}

static void registered_meanwhile(bool eager)
{
    struct memory *m = begin(eager);
    pthread_t thread;

    /* A unshares, and the registration makes the same copy live: A's discard is still the last. */
    expect(!vcpu_convert(a, m, 0, 64, true));
    pthread_create(&thread, NULL, register_again, m);
    pthread_join(thread, NULL);
    expect(!vcpu_discard(a, m, 0, 64, true));
    expect(allocated(m->shared_fd) == MIB - (eager ? 64 : 0) * PAGE);
    expect(query("stale-shared") == (eager ? 0 : 64 * PAGE));
    vcpu_goes_on(a);
    /* A shares, and the registration makes private live again: A's discard is of no page. */
    expect(!vcpu_convert(a, m, 128, 64, false));
    pthread_create(&thread, NULL, register_again, m);
    pthread_join(thread, NULL);
    expect(!vcpu_discard(a, m, 128, 64, false));
    expect(m->private[128 * PAGE] == 0x33 && m->private[192 * PAGE - 1] == 0x33);
    expect(query("stale-private") == 0);
    vcpu_goes_on(a);
    drain();
    expect(allocated(m->shared_fd) == MIB - 64 * PAGE && !fake.violations);
}

static void registered_meanwhile_deferred(void)
{
    registered_meanwhile(false);
}

static void registered_meanwhile_eagerly(void)
{
    registered_meanwhile(true);
}

const struct hazard ownership_hazards[] = {
    { "taken-back-deferred", taken_back_deferred }, { "taken-back-eagerly", taken_back_eagerly },
    { "given-back-deferred", given_back_deferred }, { "given-back-eagerly", given_back_eagerly },
    { "there-and-back", there_and_back }, { "same-way", same_way },
    { "during-the-discard", during_the_discard },
    { "during-the-conversion", during_the_conversion },
    { "registered-meanwhile-deferred", registered_meanwhile_deferred },
    { "registered-meanwhile-eagerly", registered_meanwhile_eagerly }, { NULL, NULL },
};
