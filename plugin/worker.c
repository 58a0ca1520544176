/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's thread: makes the discards that were asked for, keeps the budget and the lease when
 * nobody is left to do so, and sends the events. It holds no lock of QEMU's, and takes one step (one
 * chunk, one event) between two looks at what is due.
 */
#include "upm.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RETRY_FIRST_NS (100 * MSEC)
#define RETRY_MOST_NS (10 * NSEC)
#define BUDGET_EVENT_NS NSEC

uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NSEC + t.tv_nsec;
}

void histogram_add(uint64_t *buckets, uint64_t ns)
{
    unsigned i = ns ? 63 - __builtin_clzll(ns) : 0;

    buckets[i < BUCKETS ? i : BUCKETS - 1]++;
}

void worker_kick(void)
{
    pthread_cond_signal(&upm.work);
}

void lease_renew(void)
{
    bool asleep = !upm.lease_deadline;

    if (upm.lease_ns && !upm.lease_expired) {
        upm.lease_deadline = now_ns() + upm.lease_ns;
        if (asleep) {
            worker_kick();
        }
    }
}

/*
 * A launch is from KVM_CREATE_VM, or the close of a guest_memfd whose RAM lives on, to the first
 * KVM_RUN. QEMU then writes what the guest is to be measured with into the shared copies of pages
 * that the guest before a reset may have left stale, and KVM reads it there: nothing is discarded.
 */
void launch_begin(void)
{
    struct op *op;

    __atomic_store_n(&upm.launching, true, __ATOMIC_RELAXED);
    do {
        for (op = upm.ops; op && op->state != OP_PUNCH; op = op->next) {
        }
        if (op) {
            ops_wait();
        }
    } while (op);
}

void launch_end(void)
{
    upm_lock();
    if (upm.launching) {
        __atomic_store_n(&upm.launching, false, __ATOMIC_RELAXED);
        worker_kick();
    }
    upm_unlock();
}

/* Stale copies that should not be there whatever the daemon says. */
static bool is_excess(enum copy copy)
{
    return upm.stale_of[copy]
           && (upm.mode[copy] == MODE_EAGER || upm.stale_pages > upm.budget >> PAGE_SHIFT);
}

static bool has_excess(void)
{
    return is_excess(PRIVATE) || is_excess(SHARED);
}

/* Discards the next run of stale pages in [*at, end). Returns 1 if there was one, 0 if there is
 * none left, or a negative errno; the copy is then still in the ledger. Drops the lock meanwhile:
 * the region may be gone afterwards. */
int discard_next(struct region *r, enum copy copy, uint64_t *at, uint64_t end, uint64_t *counter,
                 uint64_t *discarded)
{
    uint64_t first, pages, bytes;

    while (region_has(r, copy)
           && ledger_next(r, copy, *at, end, CHUNK_PAGES, &first, &pages)) {
        int error;

        if (!ops_allow_discard(r, copy, &first, &pages)) {
            *at = first;
            continue;
        }
        *at = first + pages;
        error = op_punch(r, copy, first, pages);
        if (error) {
            return -error;
        }
        bytes = in_bytes(ledger_remove(r, copy, first, pages));
        *counter += bytes;
        *discarded += bytes;
        return 1;
    }
    return 0;
}

/* Where the drain is: it goes round the regions and their copies. A run that can't be discarded is
 * left behind until the next round. */
static struct {
    unsigned region;
    enum copy copy;
    uint64_t page;
    bool progress;             /* in this round */
    int error;                 /* in this round; 0: none */
    uint64_t wait, until;      /* after a round without progress; wait: 0 if nothing failed */
} tour;

/* What is asked for now need not wait for what could not be discarded before. */
void drain_at_once(void)
{
    tour.wait = tour.until = 0;
    worker_kick();
}

static void drain_wait(void)
{
    bool first = tour.error && !tour.wait;

    if (!tour.error) {
        tour.wait = 0; /* what is left is being converted back just now */
        tour.until = now_ns() + MSEC;
        return;
    }
    tour.wait = first ? RETRY_FIRST_NS : 2 * tour.wait;
    if (tour.wait > RETRY_MOST_NS) {
        tour.wait = RETRY_MOST_NS;
    }
    tour.until = now_ns() + tour.wait;
    if (first) {
        int error = tour.error;

        upm_unlock();
        say("cannot discard: %s; the copies stay in the ledger, trying again", strerror(error));
        upm_lock();
    }
}

/* One chunk; or, if the rest of the round has nothing to discard, the end of the round. */
static void drain_step(void)
{
    for (; tour.region < upm.nregions; tour.region++, tour.copy = PRIVATE) {
        for (; tour.copy < COPIES; tour.copy++, tour.page = 0) {
            struct region *r = &upm.region[tour.region];
            uint64_t discarded = 0;
            int result;

            if (!is_excess(tour.copy)) {
                continue;
            }
            result = discard_next(r, tour.copy, &tour.page, r->pages,
                                  &upm.count.failsafe[tour.copy], &discarded);
            tour.progress |= result > 0;
            if (result < 0) {
                r->failures[tour.copy] += !tour.error; /* one for the round: it tries many in no time */
                tour.error = -result;
            }
            if (result) {
                return;
            }
        }
    }
    if (!tour.progress) {
        drain_wait();
    } else if (!tour.error) {
        tour.wait = 0;
    }
    tour.region = tour.error = 0;
    tour.copy = PRIVATE;
    tour.page = 0;
    tour.progress = false;
}

static void request_finish(struct request *q)
{
    uint64_t asked = request_bytes(q), skipped = asked > q->discarded ? asked - q->discarded : 0;
    char data[256], error[128] = "null";

    upm.first_request = (upm.first_request + 1) % REQUESTS_MAX;
    upm.nrequests--;
    upm.count.skipped += skipped;
    upm.count.events++;
    if (q->error) {
        snprintf(error, sizeof(error), "\"%s\"", strerror(q->error));
    }
    snprintf(data, sizeof(data),
             "{\"id\": %lld, \"discarded\": %llu, \"skipped\": %llu, \"error\": %s}",
             (long long)q->id, (unsigned long long)q->discarded, (unsigned long long)skipped, error);
    upm_unlock();
    qemu_event("X_UPM_DISCARDED", data);
    free(q);
    upm_lock();
}

static void send(const char *name, const char *format, uint64_t a, uint64_t b)
{
    char data[128];

    snprintf(data, sizeof(data), format, (unsigned long long)a, (unsigned long long)b);
    upm.count.events++;
    upm_unlock();
    qemu_event(name, data);
    upm_lock();
}

static void lease_expire(void)
{
    upm.lease_deadline = 0;
    upm.lease_expired = true;
    upm.count.lease_expiries++;
    if (!upm.keep_on_expiry) {
        upm.mode[PRIVATE] = upm.mode[SHARED] = MODE_EAGER;
        drain_at_once();
    }
    send("X_UPM_LEASE_EXPIRED", "{\"stale\": %llu}", in_bytes(upm.stale_pages), 0);
}

static bool bell_due(uint64_t now)
{
    return upm.bell && upm.bell_armed && upm.notify_ns && now >= upm.bell_time + upm.notify_ns;
}

/* A chunk of the drain and of the oldest request, in turns: neither holds up the other. */
static bool discard_step(uint64_t now)
{
    static bool request_is_next;
    bool drain = has_excess() && now >= tour.until;

    if (!drain && !upm.nrequests) {
        return false;
    }
    if (upm.nrequests && (request_is_next || !drain)) {
        struct request *q = upm.requests[upm.first_request];

        if (!request_step(q)) {
            request_finish(q);
        }
    } else {
        drain_step();
    }
    request_is_next = !request_is_next;
    return true;
}

/* One thing that is due. False if nothing is. */
static bool step(uint64_t now)
{
    if (upm.lease_deadline && now >= upm.lease_deadline) {
        lease_expire();
    } else if (bell_due(now)) {
        upm.bell = upm.bell_armed = false;
        upm.bell_time = now;
        send("X_UPM_CONVERSIONS", "{\"cursor\": %llu, \"dropped\": %llu}", upm.head, upm.dropped);
    } else if (upm.budget_hit && now >= upm.budget_time + BUDGET_EVENT_NS) {
        upm.budget_hit = false;
        upm.budget_time = now;
        if (upm.budget) {
            send("X_UPM_BUDGET_REACHED", "{\"stale\": %llu, \"budget\": %llu}",
                 in_bytes(upm.stale_pages), upm.budget);
        }
    } else {
        return !upm.launching && discard_step(now);
    }
    return true;
}

static void earlier(uint64_t *at, bool wanted, uint64_t then)
{
    if (wanted && (!*at || then < *at)) {
        *at = then;
    }
}

static void sleep_until_due(void)
{
    uint64_t at = 0;
    struct timespec t;

    earlier(&at, upm.lease_deadline, upm.lease_deadline);
    earlier(&at, has_excess() && !upm.launching, tour.until);
    earlier(&at, upm.bell && upm.bell_armed && upm.notify_ns, upm.bell_time + upm.notify_ns);
    earlier(&at, upm.budget_hit, upm.budget_time + BUDGET_EVENT_NS);
    if (!at) {
        pthread_cond_wait(&upm.work, &upm.lock);
        return;
    }
    t = (struct timespec) { .tv_sec = at / NSEC, .tv_nsec = at % NSEC };
    pthread_cond_timedwait(&upm.work, &upm.lock, &t);
}

static void *worker_main(void *unused)
{
    (void)unused;
    upm_lock();
    while (!upm.stopping) {
        if (step(now_ns())) {
            upm_breathe();
        } else {
            sleep_until_due();
        }
    }
    upm_unlock();
    return NULL;
}

/* QEMU's signals are for QEMU's threads. Returns an errno. */
int worker_start(void)
{
    pthread_condattr_t attributes;
    sigset_t all, before;
    int error;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&upm.work, &attributes);
    pthread_condattr_destroy(&attributes);

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&upm.worker, NULL, worker_main, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_setname_np(upm.worker, "qmp-upm");
        upm.worker_running = true;
    }
    return error;
}

void worker_stop(void)
{
    if (!upm.worker_running) {
        return;
    }
    upm_lock();
    upm.stopping = true;
    worker_kick();
    upm_unlock();
    pthread_join(upm.worker, NULL);
    upm.worker_running = false;
}
