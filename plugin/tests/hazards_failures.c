/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of discards that fail. */
#include "hazards.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* 16: each way in which a discard is made, and each error */
static void failed_discards(void)
{
    static const int errors[] = { EIO, ENOSPC, EPERM, ENOMEM, EINVAL, EBADF };
    struct memory *m = start(RAM_MEMFD, MIB);
    uint64_t failed = 0;

    for (unsigned i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
        /* At the conversion: the guest and QEMU see success, the copy goes to the ledger. */
        configure("{\"shared\": \"eager\", \"budget\": 1048576}");
        usleep(A_WHILE_US);   /* the plugin's thread is asleep: it has to be woken */
        fill_shared(m, 0, PAGE);
        fail_next(&fake.punch, errors[i], 0, 1);
        errno = 4711;
        expect(!guest_convert(m, 0, PAGE, true) && errno == 4711);
        expect(query("failed-discards") == ++failed);
        wait_for(ledger_is_empty, "another try");
        expect(allocated(m->shared_fd) == 0 && query("failsafe-bytes-shared") == (i + 1) * PAGE);
        expect(!guest_convert(m, 0, PAGE, false));

        /* By request: said in the event, and still stale. */
        defer_up_to(MIB);
        fill_shared(m, 0, PAGE);
        expect(!guest_convert(m, 0, PAGE, true));
        fail_next(&fake.punch, errors[i], 0, 1);
        discard_and_wait("shared", 0, PAGE);
        expect(strstr(fake.discarded, strerror(errors[i])) && stale() == PAGE);
        expect(query("failed-discards") == ++failed);
        discard_and_wait("shared", 0, PAGE);
        expect(strstr(fake.discarded, "\"error\": null"));
        expect(!stale() && !guest_convert(m, 0, PAGE, false));
        drain();
    }
    /* Interrupted: made again, and nobody told. */
    defer_up_to(MIB);
    fill_shared(m, 0, PAGE);
    expect(!guest_convert(m, 0, PAGE, true));
    fail_next(&fake.punch, EINTR, 0, 3);
    discard_and_wait("shared", 0, PAGE);
    expect(!stale() && query("failed-discards") == failed);
    expect(query_says("\"state\": \"followed\"") && !fake.violations);
}

static bool thrice_failed(void)
{
    return query("failed-discards") == 3;
}

static bool said_something(void)
{
    return fake.said;
}

/* 16: a drain that fails is tried again with growing pauses, and said once */
static void drain_retries(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    for (unsigned round = 1; round <= 2; round++) {
        defer_up_to(MIB);
        fill_shared(m, 0, PAGE);
        expect(!guest_convert(m, 0, PAGE, true));
        fake.said = 0;
        fail_next(&fake.punch, EIO, 0, 3);
        configure("{\"shared\": \"eager\"}");
        if (round == 1) {
            wait_for(thrice_failed, "the third try");
        }
        wait_for(said_something, "a word about it");
        /* Pauses of 100, 200 and 400 ms: it does not spin meanwhile. */
        expect(stale() == PAGE && fake.said == 1 && strstr(fake.last_said, "trying again"));
        wait_for(ledger_is_empty, "the fourth try");
        expect(query("failed-discards") == 3 * round && fake.said == 1);
        expect(!guest_convert(m, 0, PAGE, false) && !fake.violations);
    }
    /* Nobody sets anything in between: a try that works ends what was said before. */
    for (unsigned round = 1; round <= 2; round++) {
        fake.said = 0;
        fail_next(&fake.punch, EIO, 0, 3);   /* QEMU's own, and two of the drain's */
        expect(!guest_convert(m, 0, PAGE, true));
        wait_for(said_something, "a word about it");
        wait_for(ledger_is_empty, "the third try");
        expect(fake.said == 1 && !guest_convert(m, 0, PAGE, false));
    }
}

static _Atomic uint64_t bad_offset;
static _Atomic int bad_error, bad_fd;

static int refuse_one(int fd, uint64_t offset, uint64_t bytes)
{
    return fd == bad_fd && offset <= bad_offset && bad_offset < offset + bytes ? bad_error : 0;
}

static int refuse_all(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    return bad_error;
}

static bool only_the_bad_one(void)
{
    return stale() == PAGE;
}

/* 26: a page that can't be punched holds up no other, in its region or behind it */
static void one_bad_page(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB), *second = plug(1, RAM_MEMFD, 8 * MIB, MIB);

    fill_shared(m, 0, 4 * MIB);
    fill_shared(second, 0, MIB);
    bad_error = EIO;
    bad_fd = m->shared_fd;
    for (int by_request = 0; by_request < 2; by_request++) {
        bad_offset = by_request ? 64 * PAGE : 0;
        defer_up_to(64 * MIB);
        for (uint64_t at = 0; at < 4 * MIB; at += 2 * PAGE) {
            expect(!guest_convert(m, at, PAGE, true));
        }
        expect(!guest_convert(second, PAGE, MIB - PAGE, true));
        fake.refuse_punch = refuse_one;
        if (by_request) {
            ask_discard_of_all();
            wait_for(discarded, "X_UPM_DISCARDED");
            expect(strstr(fake.discarded, strerror(EIO)) && stale() == PAGE);
            expect(strstr(fake.discarded, "\"discarded\": 3137536"));   /* 511 and 255 pages */
            expect(query("failed-discards") >= 1);
        } else {
            configure("{\"private\": \"eager\", \"shared\": \"eager\"}");
            wait_for(only_the_bad_one, "all pages but one");
        }
        expect(allocated(m->shared_fd) == 2 * MIB + PAGE && allocated(second->shared_fd) == PAGE);
        expect(query_says("\"state\": \"followed\"") && !query_says("\"failing\""));
        /* It is tried again, and goes when it can. */
        fake.refuse_punch = NULL;
        drain();
        expect(allocated(m->shared_fd) == 2 * MIB);
        expect(!guest_convert(m, 0, 4 * MIB, false) && !guest_convert(second, 0, MIB, false));
        vcpu_run();
        fill_shared(m, 0, 4 * MIB);
        fill_shared(second, 0, MIB);
    }
    expect(!fake.violations);
}

/* 26: where no discard works, the ledger keeps what fits the budget, then QEMU hears of it */
static void no_punch_works(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB), *well = plug(1, RAM_MEMFD, 8 * MIB, MIB);
    unsigned n;

    fill_shared(m, 0, 4 * MIB);
    fill_shared(well, 0, MIB);
    bad_error = EOPNOTSUPP;
    /* Nothing may be kept: QEMU hears of the first. */
    configure("{\"budget\": 0}");
    fake.refuse_punch = refuse_all;
    expect(guest_convert(m, 0, PAGE, true) == -1 && errno == EOPNOTSUPP && !stale());
    vcpu_run();
    /* What fits is kept and tried again in vain. */
    configure("{\"private\": \"eager\", \"shared\": \"eager\", \"budget\": 65536}");
    for (n = 1; !guest_convert(m, n * PAGE, PAGE, true); n++) {
        expect(n <= 8 && stale() <= 65536 && stale() == n * PAGE);
    }
    expect(errno == EOPNOTSUPP && query("failed-discards") >= 8);
    expect(query_says("\"state\": \"failing\"") && query_says("\"state\": \"followed\""));
    vcpu_run();
    /* Failing: nothing is entered any more, deferring or not; all are QEMU's own. */
    n = stale() / PAGE;
    defer_up_to(MIB);
    expect(guest_convert(m, 32 * PAGE, PAGE, true) == -1 && errno == EOPNOTSUPP);
    expect(stale() == n * PAGE);
    /* The other region is well. */
    fake.refuse_punch = NULL;
    expect(!guest_convert(well, 0, PAGE, true) && stale() == (n + 1) * PAGE);
    /* One that succeeds heals it. */
    expect(!guest_convert(m, 64 * PAGE, PAGE, true));
    expect(!query_says("\"failing\"") && stale() == (n + 1) * PAGE);
    expect(!guest_convert(m, 65 * PAGE, PAGE, true) && stale() == (n + 2) * PAGE);
    drain();
    expect(!fake.violations && allocated(m->shared_fd) == 4 * MIB - (n + 2) * PAGE);
}

/* 16 and 26: a long discard of QEMU's fails in its middle */
static void half_failed(void)
{
    struct memory *m = start(RAM_MEMFD, 8 * MIB);

    fill_shared(m, 0, 8 * MIB);
    bad_error = EIO;
    bad_fd = m->shared_fd;
    bad_offset = 3 * MIB;
    configure("{\"private\": \"eager\", \"shared\": \"eager\", \"budget\": 2097152}");
    fake.refuse_punch = refuse_one;
    /* The chunk that fails is kept, and the rest goes. */
    expect(!guest_convert(m, 0, 8 * MIB, true));
    expect(stale() == 2 * MIB && allocated(m->shared_fd) == 2 * MIB);
    expect(query("inline-bytes-shared") == 6 * MIB && query("deferred-bytes-shared") == 2 * MIB);
    fake.refuse_punch = NULL;
    drain();
    expect(!guest_convert(m, 0, 8 * MIB, false));
    vcpu_run();
    fill_shared(m, 0, 8 * MIB);
    /* Too much to keep: QEMU hears of it, as it does without us, after the first chunk. */
    configure("{\"budget\": 1048576}");
    fake.refuse_punch = refuse_one;
    expect(guest_convert(m, 0, 8 * MIB, true) == -1 && errno == EIO && !stale());
    expect(allocated(m->shared_fd) == 6 * MIB && m->shared[2 * MIB] == 0x5a);
    vcpu_run();
    expect(query("left-alone-bytes") == 4 * MIB && !fake.violations);
}

static _Atomic bool budgets_kept;

static void *lower_budgets(void *argument)
{
    struct memory *m = argument;

    for (uint64_t page = 2; page <= 60; page += 2) {
        uint64_t failed;

        defer_up_to(MIB);
        expect(!guest_convert(m, page * PAGE, PAGE, true));
        vcpu_run();
        failed = query("failed-discards");
        configure("{\"budget\": 0}");
        /* The good page goes. A second try of the bad one is in vain, so that a pause begins. */
        while (!only_the_bad_one() || query("failed-discards") < failed + 2) {
            usleep(200);
        }
    }
    budgets_kept = true;
    return NULL;
}

static bool all_budgets_kept(void)
{
    return budgets_kept;
}

/* 11 and 26: a smaller budget does not wait for the pause after a page that can't be punched. The
 * pauses grow to 10 s: thirty budgets that each waited for one would take minutes. */
static void lowered_in_a_pause(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    pthread_t thread;

    fill_shared(m, 0, MIB);
    bad_error = EIO;
    bad_fd = m->shared_fd;
    bad_offset = 0;
    fake.refuse_punch = refuse_one;
    defer_up_to(MIB);
    expect(!guest_convert(m, 0, PAGE, true));
    vcpu_run();
    pthread_create(&thread, NULL, lower_budgets, m);
    wait_for(all_budgets_kept, "thirty smaller budgets to be kept");
    pthread_join(thread, NULL);
    expect(query_says("\"state\": \"followed\"") && allocated(m->shared_fd) == MIB - 30 * PAGE);
    fake.refuse_punch = NULL;
    drain();
    expect(!fake.violations);
}

/* A request of one copy ends with it, and does not look into the region behind, whose own discards
 * have failed. */
static void one_copy_asked_for(void)
{
    struct memory *m = start(RAM_MEMFD, MIB), *second = plug(1, RAM_MEMFD, 4 * MIB, MIB);

    bad_error = EIO;
    bad_fd = second->private_fd;
    bad_offset = 0;
    fake.refuse_punch = refuse_one;
    configure("{\"private\": \"eager\", \"shared\": \"defer\", \"budget\": 1048576}");
    expect(!guest_convert(m, 0, PAGE, true));
    expect(!guest_convert(second, 0, PAGE, true) && !guest_convert(second, 0, PAGE, false));
    discard_and_wait("private", 0, MIB);
    expect(strstr(fake.discarded, "\"discarded\": 0, \"skipped\": 1048576, \"error\": null"));
    expect(stale() == 2 * PAGE && !fake.violations);
    fake.refuse_punch = NULL;
    drain();
}

enum { STALE_PAGES = 16 };

static _Atomic unsigned refused_to_worker;
static __thread bool is_vcpu;

/* The kernel is short of memory. The worker's second round is stopped at its first page. */
static int refuse_a_round(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    if (!is_vcpu && refused_to_worker++ == STALE_PAGES) {
        stop_attributes();
    }
    return ENOMEM;
}

/* 16 and 26: one short lack of memory meets many pages of a drain: that is one failure. QEMU's own
 * call, which meets it too, is still kept in the ledger and the guest hears nothing. */
static void failed_round(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    is_vcpu = true;
    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    for (uint64_t i = 0; i < STALE_PAGES; i++) {
        expect(!guest_convert(m, 2 * i * PAGE, PAGE, true));
    }
    shut_gate();
    fake.refuse_punch = refuse_a_round;
    configure("{\"private\": \"eager\", \"shared\": \"eager\"}");
    wait_for(somebody_waits, "the second round");
    expect(query("failed-discards") == STALE_PAGES);
    expect(!guest_convert(m, 100 * PAGE, PAGE, true) && !query_says("\"failing\""));
    expect(stale() == (STALE_PAGES + 1) * PAGE && m->shared[100 * PAGE] == 0x5a);
    fake.refuse_punch = NULL;
    open_gate();
    drain();
    expect(query("failsafe-bytes-shared") == (STALE_PAGES + 1) * PAGE && !fake.violations);
}

static bool said_while_leased(void)
{
    return !query("lease-expiries") && fake.said;   /* each look renews the lease */
}

static bool said_again(void)
{
    return fake.said == 2;
}

/* 19 and 26: a lease runs out in the pause after a page that can't be punched. What is to go now
 * does not wait: a new drain begins, and says so anew where it fails. */
static void lease_in_a_pause(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    fill_shared(m, 0, MIB);
    bad_error = EIO;
    bad_fd = m->private_fd;
    bad_offset = 0;
    fake.refuse_punch = refuse_one;
    configure("{\"private\": \"eager\", \"shared\": \"defer\", \"budget\": 1048576, "
              "\"lease-ms\": 1000, \"on-lease-expiry\": \"eager\"}");
    expect(!guest_convert(m, 0, 16 * PAGE, true) && !guest_convert(m, 0, PAGE, false));
    expect(query("stale-private") == PAGE && query("stale-shared") == 15 * PAGE);
    wait_for(said_while_leased, "the first pause");
    expect(fake.said == 1);
    wait_for(said_again, "the lease to run out");
    wait_for(only_the_bad_one, "the drain");
    expect(query("lease-expiries") == 1);
    fake.refuse_punch = NULL;
    drain();
    expect(!fake.violations);
}

const struct hazard failure_hazards[] = {
    { "failed-discards", failed_discards }, { "drain-retries", drain_retries },
    { "one-bad-page", one_bad_page }, { "no-punch-works", no_punch_works },
    { "half-failed", half_failed }, { "lowered-in-a-pause", lowered_in_a_pause },
    { "failed-round", failed_round }, { "lease-in-a-pause", lease_in_a_pause },
    { "one-copy-asked-for", one_copy_asked_for },
    { NULL, NULL },
};
