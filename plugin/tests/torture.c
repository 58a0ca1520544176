/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads convert, write, verify and discard at random, against a byte-exact model.
 *
 *   torture KIND THREADS FLIPS SEED [SECONDS]
 *
 * KIND: memfd, file, anonymous or guest-memfd. With SECONDS, for so long and not for FLIPS, and with
 * more conversions of pages that others convert at the same moment.
 *
 * Beside the vCPUs run a client that sends every command at random, one that makes memory slots go
 * and come back, one that plugs and unplugs RAM, and one that rebuilds the VM around the same RAM.
 * System calls fail at random.
 */
#include "torture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PLUGGED_GPA (256 * MIB)
#define RACES_OF_A_LONG_RUN 62       /* for each conversion that is checked */
#define ONE_CONVERSION (MOST_PAGES * PAGE)

struct memory *block[BLOCKS];
enum kind kind;
uint64_t seed;
_Atomic unsigned data_errors, ended_threads;
pthread_rwlock_t world = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

static _Atomic unsigned finished, plugged, resets, refused;
static unsigned flips, seconds;
static uintptr_t threads;
static _Atomic bool failing;
static time_t end_time;
/* QEMU ends where KVM refuses to mark a new slot. */
static __thread bool in_slot_change;

uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool chance(unsigned one_in)
{
    static __thread uint64_t state;

    if (!state) {
        state = seed * 31 + (uintptr_t)&state;
    }
    return next_random(&state) % one_in == 0;
}

static int refuse_punch(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    if (!failing || !chance(32)) {
        return 0;
    }
    refused++;
    return chance(2) ? EIO : EINTR;
}

static int refuse_attributes(void)
{
    if (!failing || in_slot_change || !chance(64)) {
        return 0;
    }
    refused++;
    return ENOMEM;
}

static bool is_over(unsigned done)
{
    return seconds ? time(NULL) >= end_time : done >= flips;
}

static void *vcpu(void *number)
{
    uint64_t r = seed * 1000003 + (uintptr_t)number * 7919 + 1;

    for (unsigned i = 0; !is_over(i); i++) {
        pthread_rwlock_rdlock(&world);
        guest_flip(&r);
        for (unsigned races = seconds ? RACES_OF_A_LONG_RUN : next_random(&r) % 8; races; races--) {
            guest_race(&r);
        }
        pthread_rwlock_unlock(&world);
    }
    finished++;
    return NULL;
}

static bool vcpus_run(void)
{
    return finished < threads;
}

/* What the budget allows: the highest that was ever set, for the peak; the present one, once the
 * backlog has come down to it. */
static struct {
    uint64_t now, highest;
    bool reached;
} budget;

static void check_budget(void)
{
    uint64_t backlog = stale();

    budget.reached |= backlog <= budget.now;
    if (budget.reached && backlog > budget.now + ONE_CONVERSION) {
        fail("%llu bytes are stale, and the budget is %llu", (unsigned long long)backlog,
             (unsigned long long)budget.now);
    }
    if (query("peak") > budget.highest + ONE_CONVERSION) {
        fail("the backlog's peak was %llu, and the highest budget %llu",
             (unsigned long long)query("peak"), (unsigned long long)budget.highest);
    }
}

static void set_budget(uint64_t bytes, const char *rest)
{
    /* Others convert meanwhile, by the old one or the new one. */
    budget.highest = bytes > budget.highest ? bytes : budget.highest;
    free(must("x-upm-configure", "{\"budget\": %llu%s}", (unsigned long long)bytes, rest));
    budget.reached = bytes >= budget.now && budget.reached;
    budget.now = bytes;
}

static void configure(uint64_t *r)
{
    static const char *const modes[] = { "eager", "defer" };
    char rest[128];

    snprintf(rest, sizeof(rest), ", \"private\": \"%s\", \"shared\": \"%s\", \"lease-ms\": %u, "
             "\"notify-ms\": 1", modes[next_random(r) % 4 > 0], modes[next_random(r) % 4 > 0],
             (unsigned)(next_random(r) % 20));
    set_budget(next_random(r) % (PAGES * PAGE), rest);
}

static void client_command(uint64_t *r)
{
    static const char *const copies[] = { "private", "shared", "both" };
    char *reply, *why, text[256];
    uint64_t cursor = 0;

    switch (next_random(r) % 8) {
    case 0:
    case 1:
        configure(r);
        break;
    case 2:
        reply = command("x-upm-discard", "{\"id\": 1, \"copy\": \"both\", \"all\": true}", &why);
        free(reply);
        free(why);
        break;
    case 3:
        cursor = query("head");
        free(must("x-upm-read", "{\"cursor\": %llu, \"max\": 1000}",
                  (unsigned long long)(cursor > 500 ? cursor - 500 : 0)));
        break;
    case 4:
        free(must("x-upm-stale", "{\"copy\": \"%s\", \"region\": %d, \"cursor\": 0, \"max\": 64}",
                  copies[next_random(r) % 2], (int)(1 + next_random(r) % BLOCKS)));
        break;
    default:
        snprintf(text, sizeof(text), "{\"id\": 2, \"copy\": \"%s\", \"ranges\": [[%d, %llu, %llu]]}",
                 copies[next_random(r) % 3], (int)(1 + next_random(r) % BLOCKS),
                 next_random(r) % (BLOCK_PAGES / 2) * PAGE,
                 (1 + next_random(r) % (BLOCK_PAGES / 2)) * PAGE);
        reply = command("x-upm-discard", text, &why); /* busy, at times */
        free(reply);
        free(why);
    }
    check_budget();
    if (!accounting_closes()) {
        fail("what was deferred and what became of it differ");
    }
}

static void *client(void *unused)
{
    uint64_t r = seed + 77;

    (void)unused;
    while (vcpus_run()) {
        client_command(&r);
        if (seconds) {
            usleep(500);
        }
    }
    return NULL;
}

void map_slot(unsigned slot)
{
    const uint64_t half = BLOCK_PAGES / 2 * PAGE;
    const struct memory *m = block[slot / 2];

    in_slot_change = true;
    slot_plug(slot, m, slot % 2 * half, half, m->gpa + slot % 2 * half);
    in_slot_change = false;
}

static void remap(unsigned slot)
{
    slot_unmap(slot);
    map_slot(slot);
}

static void *remapper(void *unused)
{
    (void)unused;
    while (vcpus_run()) {
        pthread_rwlock_rdlock(&world);
        guest_slot_is_private(0, remap);
        guest_slot_is_private(1, remap);
        pthread_rwlock_unlock(&world);
        usleep(5000);
    }
    return NULL;
}

static void must_hold(int fd, const char *text)
{
    char found[16] = "";

    if (pread(fd, found, strlen(text), 0) < 0 || strcmp(found, text)) {
        fail("a discard met the file that took the number of a closed one");
    }
    close(fd);
}

/* RAM that goes while its copies are stale, and files that take its numbers at once. */
static void plug_and_unplug(void)
{
    const uint64_t bytes = 64 * PAGE;
    struct memory *m = memory_new(kind, PLUGGED_GPA, bytes);
    int later[2];

    in_slot_change = true;
    slot_plug(100, m, 0, bytes, PLUGGED_GPA);
    in_slot_change = false;
    memset(m->private, 2, bytes);
    guest_convert(m, 0, bytes / 2, false);
    memset(m->shared, 1, bytes);
    guest_convert(m, 0, bytes, true);
    convert_only(PLUGGED_GPA, bytes / 4, false);
    slot_unmap(100);
    memory_free(m);
    for (int i = 0; i < 2; i++) {
        later[i] = memfd_create("later", MFD_CLOEXEC);
        if (pwrite(later[i], "later", 5, 0) != 5) {
            fail("cannot write");
        }
    }
    usleep(500);
    must_hold(later[0], "later");
    must_hold(later[1], "later");
    plugged++;
}

static void *plugger(void *unused)
{
    (void)unused;
    while (vcpus_run()) {
        pthread_rwlock_rdlock(&world);
        plug_and_unplug();
        pthread_rwlock_unlock(&world);
        if (seconds) {
            usleep(5000);
        }
    }
    return NULL;
}

static void reset(void)
{
    for (unsigned slot = 0; slot < 2 * BLOCKS; slot++) {
        slot_unmap(slot);
    }
    vm_reset(block, BLOCKS);
    for (unsigned slot = 0; slot < 2 * BLOCKS; slot++) {
        map_slot(slot);
    }
    usleep(2000);
    guest_is_reset();
    vcpu_run();
    resets++;
}

/* QEMU resets with its vCPUs stopped; some of their conversions wait for a discard even so. */
static void *resetter(void *unused)
{
    (void)unused;
    while (vcpus_run()) {
        usleep(seconds ? 500000 : 200000);
        pthread_rwlock_wrlock(&world);
        reset();
        pthread_rwlock_unlock(&world);
    }
    return NULL;
}

static void set_up(const char *name)
{
    static const char *const kinds[] = { "memfd", "file", "anonymous" };

    fake.real_guest_memfd = !strcmp(name, "guest-memfd");
    for (int i = 0; i < 3; i++) {
        if (!strcmp(name, kinds[i])) {
            kind = i;
        }
    }
    fake_start();
    for (int b = 0; b < BLOCKS; b++) {
        block[b] = memory_new(kind, b * BLOCK_PAGES * PAGE, BLOCK_PAGES * PAGE);
        map_slot(2 * b);
        map_slot(2 * b + 1);
    }
    vcpu_run();
    guest_begin();
    set_budget(16 * MIB, ", \"private\": \"defer\", \"shared\": \"defer\", \"lease-ms\": 0");
    fake.refuse_punch = refuse_punch;
    fake.refuse_attributes = refuse_attributes;
    failing = true;
}

static bool requests_are_done(void)
{
    return fake.discarded_id == 3;
}

/* Requests that are in the queue change the ledger, and so does an excess. */
static void let_it_settle(void)
{
    char *reply = NULL, *why;

    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", "
              "\"budget\": %llu, \"lease-ms\": 0}", 1ull << 40));
    while (!reply) {
        reply = command("x-upm-discard", "{\"id\": 3, \"copy\": \"private\", \"ranges\": "
                        "[[1, 0, 4096]]}", &why);
        free(why);
        usleep(1000);
    }
    free(reply);
    wait_for(requests_are_done, "the queue");
}

/* Writes what happened; returns whether all was well. */
static bool report(void)
{
    printf("{\"conversions\": %llu, \"reused_bytes\": %llu, \"requested_bytes\": %llu, "
           "\"failsafe_bytes\": %llu, \"inline_bytes\": %llu, \"left_alone_bytes\": %llu, "
           "\"plugged\": %u, \"resets\": %u, \"ended_threads\": %u, \"refused_calls\": %u, "
           "\"punches\": %u, \"longest_punch\": %llu, \"violations\": %u, \"data_errors\": %u}\n",
           (unsigned long long)counter("conversions-to"),
           (unsigned long long)counter("reused-bytes"),
           (unsigned long long)counter("requested-bytes"),
           (unsigned long long)counter("failsafe-bytes"),
           (unsigned long long)counter("inline-bytes"),
           (unsigned long long)query("left-alone-bytes"), plugged, resets, ended_threads, refused,
           fake.punches, (unsigned long long)fake.longest_punch, fake.violations, data_errors);
    return !fake.violations && !data_errors && accounting_closes() && nobody_waits();
}

int main(int argc, char **argv)
{
    void *(*const beside[])(void *) = { client, remapper, plugger, resetter };
    pthread_t thread[32];
    unsigned n = 0;

    threads = argc >= 5 ? strtoul(argv[2], NULL, 10) : 0;
    if (!threads || threads > 16 || argc > 6) {
        fail("usage: torture memfd|file|anonymous|guest-memfd THREADS FLIPS SEED [SECONDS]");
    }
    flips = strtoul(argv[3], NULL, 10);
    seed = strtoull(argv[4], NULL, 10) + 1;
    seconds = argc == 6 ? strtoul(argv[5], NULL, 10) : 0;
    end_time = time(NULL) + seconds;
    set_up(argv[1]);
    for (uintptr_t i = 0; i < threads; i++) {
        pthread_create(&thread[n++], NULL, vcpu, (void *)i);
    }
    for (unsigned i = 0; i < sizeof(beside) / sizeof(*beside); i++) {
        pthread_create(&thread[n++], NULL, beside[i], NULL);
    }
    while (n) {
        pthread_join(thread[--n], NULL);
    }
    failing = false;
    /* The guest is checked while copies are stale, and again when all of them have gone. */
    let_it_settle();
    guest_check();
    drain();
    guest_check();
    return !report();
}
