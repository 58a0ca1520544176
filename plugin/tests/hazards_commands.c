/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of what a client sets, reads and asks for; and of its absence. */
#include "hazards.h"

#include "../json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* 11 */
static void budget(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, 4 * MIB);
    for (uint64_t at = 0; at < 4 * MIB; at += 64 * 1024) {
        expect(!guest_convert(m, at, 64 * 1024, true));
        expect(stale() == (at < MIB ? at + 64 * 1024 : MIB));
    }
    expect(query("peak") == MIB && query("inline-bytes-shared") == 3 * MIB);
    expect(query("over-budget-bytes") == 3 * MIB);
    /* A smaller one takes effect at once. */
    configure("{\"budget\": 65536}");
    while (stale() > 65536) {
        usleep(200);
    }
    expect(!fake.violations && query("peak") == MIB);
}

/* 11: eight vCPUs at once, each over the budget, and a page of each comes back before QEMU asks */
static void many_vcpus(void)
{
    enum { VCPUS = 8, PAGES = 2048 };
    struct memory *m = start(RAM_MEMFD, (VCPUS + 1) * 8 * MIB);
    struct vcpu *v[VCPUS], *back = vcpu_new();

    defer_up_to(MIB);
    fill_shared(m, 0, m->bytes);
    for (unsigned i = 0; i < VCPUS; i++) {
        v[i] = vcpu_new();
        expect(!vcpu_convert(v[i], m, i * PAGES, PAGES, true));
    }
    for (unsigned i = 0; i < VCPUS; i++) {
        expect(!vcpu_convert(back, m, (i + 1) * PAGES - 1, 1, false));
        expect(query("peak") <= 9 * MIB);
    }
    for (unsigned i = 0; i < VCPUS; i++) {
        vcpu_begin_discard(v[i], m, i * PAGES, PAGES, true);
    }
    for (unsigned i = 0; i < VCPUS; i++) {
        expect(!vcpu_finish(v[i]));
    }
    expect(query("peak") <= 9 * MIB && stale() <= MIB);
    /* And many small ones that fit only together not. */
    for (unsigned i = 0; i < VCPUS; i++) {
        vcpu_goes_on(v[i]);
        expect(!vcpu_convert(v[i], m, VCPUS * PAGES + i * 64, 64, true));
    }
    for (unsigned i = 0; i < VCPUS; i++) {
        vcpu_begin_discard(v[i], m, VCPUS * PAGES + i * 64, 64, true);
    }
    for (unsigned i = 0; i < VCPUS; i++) {
        expect(!vcpu_finish(v[i]));
    }
    expect(stale() == MIB && query("peak") <= 9 * MIB && !fake.violations);
}

/* 15 */
static void commands_do_not_wait(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    struct vcpu *here = vcpu_new();

    defer_up_to(4 * MIB);
    fill_shared(m, 0, 4 * MIB);
    expect(!guest_convert(m, 0, MIB, true));
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard("shared", 0, 4 * MIB);
    wait_for(somebody_waits, "the punch");
    fake.before_attributes = stop_attributes;
    vcpu_begin_convert(here, m, 512, 1, true);
    usleep(A_WHILE_US);
    /* One vCPU is in KVM and the worker in a punch: every command answers. */
    expect(stale() == MIB);
    free(must("x-upm-read", "{\"cursor\": 0, \"max\": 10}"));
    free(must("x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 10}"));
    free(must("x-upm-discard", "{\"id\": 8, \"copy\": \"both\", \"all\": true}"));
    configure("{\"budget\": 1048576}");
    expect(somebody_waits() && !vcpu_is_done(here));
    open_gate();
    expect(!vcpu_finish(here));
}

/* 29: a copy whose mode is eager again goes, and the other one stays. */
static void one_copy_eager(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    for (int shared = 0; shared < 2; shared++) {
        defer_up_to(4 * MIB);
        expect(!guest_convert(m, 0, MIB / 2, true) && !guest_convert(m, 0, MIB / 4, false));
        expect(query("stale-shared") == MIB / 4 && query("stale-private") == MIB / 4);
        configure(shared ? "{\"shared\": \"eager\"}" : "{\"private\": \"eager\"}");
        while (query(shared ? "stale-shared" : "stale-private")) {
            usleep(1000);
        }
        usleep(A_WHILE_US);
        expect(query(shared ? "stale-private" : "stale-shared") == MIB / 4);
        drain();
        expect(!guest_convert(m, 0, MIB, false));
        vcpu_run();
    }
    expect(!fake.violations);
}

static bool second_is_done(void)
{
    return fake.discarded_id == 8;
}

/* A request of several ranges, in two regions, and one of everything; and more of them than fit. */
static void requests(void)
{
    struct memory *m = start(RAM_MEMFD, MIB), *second = plug(1, RAM_MEMFD, 4 * MIB, MIB);
    char *error, *reply;

    defer_up_to(8 * MIB);
    fill_shared(m, 0, MIB);
    fill_shared(second, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && !guest_convert(second, 0, MIB, true));
    expect(!guest_convert(m, 16 * PAGE, 16 * PAGE, false));
    expect(query("stale-private") == 16 * PAGE);
    fake.discarded_id = 0;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"both\", \"ranges\": "
              "[[1, 4096, 4096], [1, 61440, 16384], [2, 0, 8192], [2, 1044480, 4096]]}"));
    wait_for(discarded, "X_UPM_DISCARDED");
    reply = ledger_of(1, "shared", 20);
    expect(!strcmp(reply, "x.xxxxxxxxxxxxx....."));
    free(reply);
    reply = ledger_of(1, "private", 20);
    expect(!strcmp(reply, "...................x"));
    free(reply);
    reply = ledger_of(2, "shared", 256);
    expect(!strncmp(reply, "..xxxx", 6) && reply[254] == 'x' && reply[255] == '.');
    free(reply);
    /* 1 page, 1 and 3 of the other copy, 2, and 1; of 8 pages in both copies. */
    expect(strstr(fake.discarded, "\"discarded\": 32768, \"skipped\": 32768, \"error\": null"));
    expect(query("skipped-bytes") == 8 * PAGE);
    expect(query("requested-bytes-shared") == 5 * PAGE
           && query("requested-bytes-private") == 3 * PAGE);
    /* A request may name one copy only. */
    ask_discard("private", 0, MIB);
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(counter("requested-bytes") == 21 * PAGE && query("requested-bytes-private") == 16 * PAGE);
    /* The queue has an end, and all of it is done in turn. */
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard("shared", 0, MIB);
    wait_for(somebody_waits, "the punch");
    for (unsigned i = 1; i < 16; i++) {
        free(must("x-upm-discard", "{\"id\": 8, \"copy\": \"both\", \"all\": true}"));
    }
    reply = command("x-upm-discard", "{\"id\": 9, \"copy\": \"both\", \"all\": true}", &error);
    expect(!reply && strstr(error, "busy"));
    free(error);
    open_gate();
    wait_for(second_is_done, "the queue");
    wait_for(ledger_is_empty, "the queue");
    expect(!fake.violations && allocated(second->shared_fd) == 0);
}

/* 24: while the ledger is drained, requests and bells are served */
static void served_meanwhile(void)
{
    struct memory *m = start(RAM_MEMFD, 64 * MIB);

    defer_up_to(256 * MIB);
    for (uint64_t at = 0; at < 64 * MIB; at += 2 * PAGE) {
        expect(!guest_convert(m, at, PAGE, true));
    }
    shut_gate();
    fake.before_punch = stop_punch;
    configure("{\"private\": \"eager\", \"shared\": \"eager\"}");
    wait_for(somebody_waits, "the drain");
    ask_discard("shared", 64 * MIB - 2 * PAGE, PAGE);
    fake.before_punch = NULL;
    expect(!guest_convert(m, 64 * MIB - PAGE, PAGE, true));
    fake.events = 0;
    configure("{\"notify-ms\": 1}");
    free(must("x-upm-read", "{\"cursor\": 0, \"max\": 1}"));
    open_gate();
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(stale() > 16 * MIB);
    expect(query("requested-bytes-shared") == PAGE);
    drain();
    expect(fake.events >= 2 && !fake.violations);
}

/* A conversion is on record before the one that takes its pages over, though its discard comes later:
 * who reads them in order knows what is live. */
static void records_in_order(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *a = vcpu_new(), *b = vcpu_new();
    char *reply, *back;

    defer_up_to(MIB);
    expect(!vcpu_convert(a, m, 0, 2, true));
    expect(!vcpu_convert(b, m, 0, 1, false) && !vcpu_discard(b, m, 0, 1, false));
    expect(!vcpu_discard(a, m, 0, 2, true));
    vcpu_goes_on(a);
    vcpu_goes_on(b);
    reply = must("x-upm-read", "{\"cursor\": 0, \"max\": 100}");
    back = strstr(reply, "[1, 0, 4096, 0, 1, ");
    expect(strstr(reply, "\"records\": [[1, 0, 8192, 1, 0, ") && back);
    expect(strstr(back, "[1, 4096, 4096, 1, 1, "));   /* kept later, and told later */
    free(reply);
}

static bool lease_is_over(void)
{
    return query("lease-expiries") == 1;
}

/* 19 */
static void lease_runs_out(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    configure("{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": 1048576, "
              "\"lease-ms\": 30, \"on-lease-expiry\": \"eager\"}");
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    wait_for(ledger_is_empty, "the lease to run out");
    expect(query("lease-expiries") == 1 && allocated(m->shared_fd) == 0);
    expect(query_says("\"expired\": true") && query_says("\"shared\": \"eager\""));
    expect(!guest_convert(m, 0, MIB, false) && !stale());
    /* Or all stays, as long as it fits. */
    configure("{\"private\": \"defer\", \"shared\": \"defer\", \"lease-ms\": 0}");
    expect(query_says("\"expired\": false"));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    usleep(A_WHILE_US);
    expect(stale() == MIB && lease_is_over());
    configure("{\"lease-ms\": 60000, \"on-lease-expiry\": \"keep\"}");
    free(must("x-upm-read", "{\"cursor\": 0, \"max\": 1}"));
    usleep(A_WHILE_US);
    expect(stale() == MIB && query("lease-expiries") == 1 && query("remaining-ms") > 1000);
    configure("{\"lease-ms\": 20}");
    while (lease_is_over()) {
        usleep(1000);
    }
    usleep(A_WHILE_US);
    expect(query("lease-expiries") == 2 && stale() == MIB && query_says("\"shared\": \"defer\""));
}

static bool budget_event_came(void)
{
    return fake.events;
}

/* The bell rings once, until somebody reads; the budget's event comes when it is reached. */
static void bells(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    expect(!guest_convert(m, 0, PAGE, true));
    wait_for(budget_event_came, "the bell");
    expect(!guest_convert(m, 2 * PAGE, PAGE, true));
    usleep(A_WHILE_US);
    expect(fake.events == 1 && query("events") == 1);
    free(must("x-upm-read", "{\"cursor\": 0, \"max\": 1}"));   /* there is more to read */
    while (fake.events < 2) {
        usleep(1000);
    }
    free(must("x-upm-read", "{\"cursor\": 1, \"max\": 10}"));
    usleep(A_WHILE_US);
    expect(fake.events == 2);
    configure("{\"notify-ms\": 0, \"budget\": 8192}");
    usleep(A_WHILE_US);   /* the plugin's thread is asleep: it has to be woken */
    expect(!guest_convert(m, 4 * PAGE, PAGE, true));
    while (fake.events < 3) {
        usleep(1000);
    }
    expect(!guest_convert(m, 6 * PAGE, PAGE, true));
    usleep(A_WHILE_US);
    expect(fake.events == 3);
}

/* What QEMU hands over always ends; what does not is refused and not read on behind. */
static void unterminated(void)
{
    static const char *const texts[] = { "\"", "\"a", "{\"a", "{\"a\": \"b", "[\"\\", "\"\\\"" };

    fake_start();
    for (unsigned i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
        char *exact = strdup(texts[i]);

        expect(!json_parse(exact));
        free(exact);
    }
}

const struct hazard command_hazards[] = {
    { "budget", budget }, { "many-vcpus", many_vcpus },
    { "one-copy-eager", one_copy_eager },
    { "commands-do-not-wait", commands_do_not_wait }, { "requests", requests },
    { "served-meanwhile", served_meanwhile }, { "records-in-order", records_in_order },
    { "lease-runs-out", lease_runs_out }, { "bells", bells }, { "unterminated", unterminated },
    { NULL, NULL },
};
