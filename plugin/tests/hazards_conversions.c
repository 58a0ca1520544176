/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of a conversion: what it waits for, and what it touches. */
#include "hazards.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* 1 */
static void flipped_back(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *v = vcpu_new();

    defer_up_to(MIB);
    fill_shared(m, 0, 2 * PAGE);
    expect(!guest_convert(m, 0, 2 * PAGE, true));
    expect(stale() == 2 * PAGE);

    /* Asked for, then converted back before it is done: the conversion waits for the punch. */
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard("shared", 0, PAGE);
    wait_for(somebody_waits, "the punch");
    vcpu_begin_convert(v, m, 0, 1, false);
    usleep(A_WHILE_US);
    expect(!vcpu_is_done(v) && page_is_private(0));
    open_gate();
    expect(!vcpu_finish(v));
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.before_punch = NULL;
    expect(query("requested-bytes-shared") == PAGE && query("reused-bytes-shared") == 0);

    /* Converted back first: the discard finds nothing. */
    expect(!guest_convert(m, PAGE, PAGE, false));
    discard_and_wait("shared", PAGE, PAGE);
    expect(strstr(fake.discarded, "\"discarded\": 0, \"skipped\": 4096"));
    expect(m->shared[PAGE] == 0x5a && query("reused-bytes-shared") == PAGE);
    expect(!fake.violations);
}

static void open_gate_and_wait(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    open_gate();
    usleep(A_WHILE_US);
}

/* 1, in the other order: a discard is asked for while KVM has the conversion back in its hands. It
 * keeps off what is becoming live and takes the pages around it. */
static void shielded(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *v = vcpu_new();

    defer_up_to(MIB);
    for (unsigned i = 0; i < 4; i++) {
        uint64_t first = i * 16;

        fill_shared(m, first * PAGE, 8 * PAGE);
        expect(!guest_convert(m, first * PAGE, 8 * PAGE, true));
        shut_gate();
        fake.before_attributes = stop_attributes;
        /* All of it; its beginning; its end; its middle. */
        vcpu_begin_convert(v, m, first + (i & 2 ? 2 : 0), i == 0 ? 8 : i == 2 ? 6 : 4, false);
        wait_for(somebody_waits, "KVM");
        fake.before_attributes = NULL;
        if (i == 0) {
            /* A discard that came through now would let the conversion go on, and meet it. */
            fake.before_punch = open_gate_and_wait;
        }
        discard_and_wait("shared", first * PAGE, 8 * PAGE);
        open_gate();
        expect(!vcpu_finish(v));
        vcpu_goes_on(v);
        fake.before_punch = NULL;
        expect(m->shared[(first + 3) * PAGE] == 0x5a);
    }
    expect(!fake.violations && !stale());
    expect(query("reused-bytes-shared") == (8 + 4 + 6 + 4) * PAGE);
    expect(query("requested-bytes-shared") == (0 + 4 + 2 + 4) * PAGE);
}

/* 14 */
static void vcpus_do_not_wait(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    struct vcpu *here = vcpu_new(), *there = vcpu_new(), *over = vcpu_new();

    defer_up_to(4 * MIB);
    fill_shared(m, 0, 4 * MIB);
    shut_gate();
    fake.before_attributes = stop_attributes;
    vcpu_begin_convert(here, m, 0, 1, true);
    wait_for(somebody_waits, "KVM");
    fake.before_attributes = NULL;
    /* Another range converts while KVM has the first; the same range has to wait. */
    expect(!vcpu_convert(there, m, 512, 1, true));
    expect(!vcpu_convert(there, m, 1, 1, true));
    vcpu_begin_convert(over, m, 0, 2, false);
    usleep(A_WHILE_US);
    expect(!vcpu_is_done(here) && !vcpu_is_done(over));
    open_gate();
    expect(!vcpu_finish(here) && !vcpu_finish(over));
    expect(!page_is_private(0) && m->shared[0] == 0x5a);
    expect(!vcpu_discard(here, m, 0, 1, true) && !vcpu_discard(over, m, 0, 2, false));
    drain();
    expect(!fake.violations);
}

/* 14 and 22: a large conversion that waits is not passed by for ever by small ones in its range */
static void in_turn(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *first = vcpu_new(), *large = vcpu_new(), *later = vcpu_new();

    defer_up_to(MIB);
    shut_gate();
    fake.before_attributes = stop_attributes;
    vcpu_begin_convert(first, m, 0, 1, true);
    wait_for(somebody_waits, "KVM");
    fake.before_attributes = NULL;
    vcpu_begin_convert(large, m, 0, 100, true);
    usleep(A_WHILE_US);
    vcpu_begin_convert(later, m, 50, 1, false);
    usleep(A_WHILE_US);
    expect(!vcpu_is_done(large) && !vcpu_is_done(later));
    /* A discard keeps off what waits to be converted back, and nobody else waits. */
    expect(!guest_convert(m, 200 * PAGE, PAGE, true));
    open_gate();
    expect(!vcpu_finish(first) && !vcpu_finish(large) && !vcpu_finish(later));
    expect(!page_is_private(50 * PAGE) && page_is_private(51 * PAGE) && !fake.violations);
}

/* 22: what only expects a call of QEMU's holds up nobody, wherever it lies in the range */
static void leftover(void)
{
    static const struct { uint64_t first, pages; } range[] = {
        { 10, 4 }, { 12, 4 }, { 11, 1 }, { 8, 3 }, { 9, 12 }, { 0, 20 }, { 0, 1024 },
    };
    static const char *const modes[] = { "eager", "defer" };
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    struct vcpu *pending = vcpu_new(), *v = vcpu_new();

    for (int mode = 0; mode < 2; mode++) {
        free(must("x-upm-configure", "{\"shared\": \"%s\", \"private\": \"%s\", \"budget\": 0}",
                  modes[mode], modes[mode]));
        for (unsigned i = 0; i < sizeof(range) / sizeof(*range); i++) {
            for (int to_private = 0; to_private < 2; to_private++) {
                expect(!vcpu_convert(pending, m, 10, 4, true));
                expect(!vcpu_convert(v, m, range[i].first, range[i].pages, to_private));
                expect(!vcpu_discard(v, m, range[i].first, range[i].pages, to_private));
                vcpu_goes_on(v);
                vcpu_goes_on(pending);
                expect(!guest_convert(m, 0, 4 * MIB, false));
                vcpu_run();
            }
        }
    }
    expect(!fake.violations && !stale());
}

/* 8 */
static void spans_regions(void)
{
    struct memory *first = start(RAM_MEMFD, MIB), *second = memory_new(RAM_ANONYMOUS, MIB, MIB);
    struct memory *third = plug(3, RAM_MEMFD, 4 * MIB, MIB);
    uint64_t converted;

    slot_plug(1, second, 0, MIB / 2, MIB);
    slot_plug(2, second, MIB / 2, MIB / 2, MIB + MIB / 2);
    expect(!convert_only(MIB, MIB, false));
    vcpu_run();
    defer_up_to(8 * MIB);
    fill_shared(first, 0, MIB);
    fill_shared(second, 0, MIB);
    fill_shared(third, 0, MIB);
    converted = counter("conversions-to");
    /* The end of one, all of another with two slots, a hole, and the beginning of a third. */
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, true));
    expect(!stale() && counter("conversions-to") == converted + 1);
    expect(!qemu_discard(first, MIB - PAGE, PAGE, true));
    expect(!qemu_discard(second, 0, MIB, true));
    expect(!qemu_discard(third, 0, PAGE, true));
    expect(!fake.punches && stale() == PAGE + MIB + PAGE);
    /* And eagerly, in another order. */
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, false));
    vcpu_run();
    drain();
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, true));
    expect(!qemu_discard(third, 0, PAGE, true));
    expect(!qemu_discard(second, 0, MIB, true));
    expect(!qemu_discard(first, MIB - PAGE, PAGE, true));
    expect(query("inline-bytes-shared") == PAGE + MIB + PAGE && !stale());
    expect(!fake.violations);
}

/* 8, and 22: more regions than anybody expects in one conversion, and one that is none of them has
 * an operation that waits for QEMU */
static void forty_regions(void)
{
    enum { REGIONS = 40 };
    struct memory *m[REGIONS], *beside = start(RAM_MEMFD, MIB);
    struct vcpu *pending = vcpu_new();

    for (unsigned i = 0; i < REGIONS; i++) {
        m[i] = plug(1 + i, RAM_MEMFD, (1 + i) * MIB, MIB);
        fill_shared(m[i], 0, MIB);
    }
    defer_up_to(128 * MIB);
    expect(!vcpu_convert(pending, beside, 0, 1, true));
    expect(!convert_only(MIB, REGIONS * MIB, true));
    for (unsigned i = 0; i < REGIONS; i++) {
        expect(!qemu_discard(m[i], 0, MIB, true));
    }
    expect(stale() == REGIONS * MIB && !fake.punches);
    expect(!convert_only(MIB, REGIONS * MIB, false));
    expect(!stale() && query("reused-bytes-shared") == REGIONS * MIB);
    for (unsigned i = 0; i < REGIONS; i++) {
        expect(!qemu_discard(m[i], 0, MIB, false));
        expect(m[i]->shared[MIB - 1] == 0x5a);
    }
    expect(stale() == REGIONS * MIB);
    drain();
    expect(!fake.violations);
}

/* 9 */
static void not_ram(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    char *before, *after;

    defer_up_to(MIB);
    before = must("x-upm-query", "{}");
    expect(!convert_only(100 * MIB, 16 * PAGE, false));
    expect(convert_only(100 * MIB, 17, false) == -1 && errno == EINVAL);
    expect(convert_only(100 * MIB, 0, false) == -1 && errno == EINVAL);
    expect(convert_only(-PAGE, 2 * PAGE, false) == -1 && errno == EINVAL);
    expect(convert_only(0, 17, true) == -1 && errno == EINVAL);
    expect(!query("head") && !query("converted-bytes-to-shared") && !counter("conversions-to"));
    after = must("x-upm-query", "{}");
    expect(!strcmp(strstr(before, "latency-ns"), strstr(after, "latency-ns")));
    free(before);
    free(after);
    /* Partly: what is RAM is followed. */
    fill_shared(m, 0, MIB);
    expect(!convert_only(MIB - PAGE, 2 * PAGE, true));
    expect(!qemu_discard(m, MIB - PAGE, PAGE, true));
    expect(stale() == PAGE && query("converted-bytes-to-private") == PAGE);
}

/* 16: KVM refuses */
static void failed_conversions(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, 2 * PAGE, true));
    fail_next(&fake.attributes, ENOMEM, 0, 2);
    expect(convert_only(0, 4 * PAGE, false) == -1 && errno == ENOMEM);
    expect(convert_only(8 * PAGE, PAGE, true) == -1 && errno == ENOMEM);
    expect(stale() == 2 * PAGE && counter("conversions-to") == 1);
    /* QEMU does not discard then; if it did, it would be its own affair. */
    expect(!fallocate64(m->private_fd, PUNCH, 32 * PAGE, PAGE) && fake.punches == 1);
    expect(!fallocate64(m->shared_fd, PUNCH, 0, PAGE) && fake.punches == 2);
    /* The next one is not in the way of what failed. */
    expect(!guest_convert(m, 0, 2 * PAGE, false) && m->shared[PAGE] == 0x5a && !fake.violations);
}

const struct hazard conversion_hazards[] = {
    { "flipped-back", flipped_back }, { "shielded", shielded },
    { "vcpus-do-not-wait", vcpus_do_not_wait }, { "in-turn", in_turn },
    { "leftover", leftover }, { "spans-regions", spans_regions },
    { "forty-regions", forty_regions }, { "not-ram", not_ram },
    { "failed-conversions", failed_conversions }, { NULL, NULL },
};
