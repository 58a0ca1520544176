/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's thread: makes the discards that were asked for, keeps the budget and the lease when
 * nobody is left to do so, and sends the events. It holds no lock of QEMU's, and takes one step (one
 * chunk, one event) between two looks at what is due.
 */
#include "upm.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RETRY_FIRST_NS (100 * MSEC)
#define RETRY_MOST_NS (10 * NSEC)
#define BUDGET_EVENT_NS NSEC
#define YIELD_US 20

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

/* Stale copies that should not be there whatever the daemon says. */
static bool is_excess(enum copy copy)
{
    return ledger_total(copy)
           && (upm.mode[copy] == MODE_EAGER || upm.stale_pages > upm.budget >> PAGE_SHIFT);
}

bool worker_has_excess(void)
{
    return is_excess(PRIVATE) || is_excess(SHARED);
}

/* Discards the next run of stale pages in [*at, end). Returns 1 if there was one, 0 if there is
 * none left, or a negative errno; the copy is then still in the ledger. Drops the lock meanwhile:
 * the region may be gone afterwards. */
static int discard_next(struct region *r, enum copy copy, uint64_t *at, uint64_t end,
                        uint64_t *counter, uint64_t *discarded)
{
    uint64_t first, pages;

    while (ledger_next(r, copy, *at, end, CHUNK_PAGES, &first, &pages)) {
        struct op op = { .region = r, .state = OP_DISCARD, .copy = copy };
        uint64_t start_ns, bytes;
        int error = 0;

        if (!op_shields(r, copy, &first, &pages)) {
            *at = first;
            continue;
        }
        op.first = first;
        op.pages = op.punching = pages;
        op_begin(&op);
        pthread_mutex_unlock(&upm.lock);
        start_ns = now_ns();
        if (punch(r, copy, first, pages)) {
            error = errno;
        }
        pthread_mutex_lock(&upm.lock);
        *at = first + pages;
        if (error) {
            upm.count.failed_discards++;
        } else {
            bytes = ledger_remove(r, copy, first, pages) << PAGE_SHIFT;
            histogram_add(upm.discard_ns, now_ns() - start_ns);
            upm.count.discards++;
            *counter += bytes;
            *discarded += bytes;
        }
        op_end(&op);
        return error ? -error : 1;
    }
    return 0;
}

static void back_off(int error)
{
    if (!upm.retry_wait) {
        say("cannot discard: %s; the copies stay in the ledger, trying again", strerror(error));
    }
    upm.retry_wait = upm.retry_wait ? 2 * upm.retry_wait : RETRY_FIRST_NS;
    if (upm.retry_wait > RETRY_MOST_NS) {
        upm.retry_wait = RETRY_MOST_NS;
    }
    upm.retry_time = now_ns() + upm.retry_wait;
}

static void drain_step(void)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        for (int c = 0; c < COPIES; c++) {
            struct region *r = upm.regions[i];
            uint64_t at = 0, discarded = 0;
            int result;

            if (!r->stale_pages[c] || !is_excess(c)) {
                continue;
            }
            result = discard_next(r, c, &at, r->pages, &upm.count.failsafe[c], &discarded);
            if (result < 0) {
                back_off(-result);
            } else if (result > 0) {
                upm.retry_wait = 0;
            }
            if (result) {
                return;
            }
        }
    }
    /* All that is left is being converted back just now. */
    upm.retry_time = now_ns() + MSEC;
}

/* The region of the request's current range, by its number since it may be closed meanwhile. */
static struct region *request_region(struct request *q, uint64_t *end)
{
    struct region *next = NULL;

    if (!q->all) {
        struct region *r = region_by_id(q->range[q->at_range].region);

        *end = q->range[q->at_range].first + q->range[q->at_range].pages;
        return r;
    }
    for (unsigned i = 0; i < upm.nregions; i++) {
        struct region *r = upm.regions[i];

        if (r->id >= q->at_range && (!next || r->id < next->id)) {
            next = r;
        }
    }
    if (next) {
        if (next->id != q->at_range) {
            q->at_range = next->id;
            q->at_page = 0;
        }
        *end = next->pages;
    }
    return next;
}

static bool request_next_range(struct request *q)
{
    q->at_range++;
    if (q->at_range < q->count) {
        q->at_page = q->range[q->at_range].first;
        return true;
    }
    if (q->all && q->at_range < upm.next_region_id) {
        q->at_page = 0;
        return true;
    }
    q->at_range = 0;
    q->at_page = q->count ? q->range[0].first : 0;
    q->at_copy++;
    return q->at_copy < COPIES;
}

/* One chunk of the request; false when there is nothing left of it. */
static bool request_step(struct request *q)
{
    struct region *r;
    uint64_t end;
    int result;

    while (q->at_copy < COPIES) {
        r = q->copy[q->at_copy] ? request_region(q, &end) : NULL;
        if (!r) {
            if (!request_next_range(q)) {
                return false;
            }
            continue;
        }
        result = discard_next(r, q->at_copy, &q->at_page, end,
                              &upm.count.requested[q->at_copy], &q->discarded);
        if (result < 0) {
            q->error = -result;
            return false;
        }
        if (result) {
            return true;
        }
        if (!request_next_range(q)) {
            return false;
        }
    }
    return false;
}

static uint64_t request_bytes(const struct request *q)
{
    uint64_t pages = 0;

    for (size_t i = 0; i < q->count; i++) {
        pages += q->range[i].pages;
    }
    return (pages << PAGE_SHIFT) * (q->copy[PRIVATE] + q->copy[SHARED]);
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
    pthread_mutex_unlock(&upm.lock);
    qemu_event("X_UPM_DISCARDED", data);
    free(q);
    pthread_mutex_lock(&upm.lock);
}

static void send(const char *name, const char *format, uint64_t a, uint64_t b)
{
    char data[128];

    snprintf(data, sizeof(data), format, (unsigned long long)a, (unsigned long long)b);
    upm.count.events++;
    pthread_mutex_unlock(&upm.lock);
    qemu_event(name, data);
    pthread_mutex_lock(&upm.lock);
}

static void lease_expire(void)
{
    upm.lease_deadline = 0;
    upm.lease_expired = true;
    upm.count.lease_expiries++;
    if (!upm.keep_on_expiry) {
        upm.mode[PRIVATE] = upm.mode[SHARED] = MODE_EAGER;
    }
    send("X_UPM_LEASE_EXPIRED", "{\"stale\": %llu}", upm.stale_pages << PAGE_SHIFT, 0);
}

static bool bell_due(uint64_t now)
{
    return upm.bell && upm.bell_armed && upm.notify_ns && now >= upm.bell_time + upm.notify_ns;
}

/* One thing that is due. False if nothing is. */
static bool step(uint64_t now)
{
    if (upm.lease_deadline && now >= upm.lease_deadline) {
        lease_expire();
    } else if (worker_has_excess() && now >= upm.retry_time) {
        drain_step();
    } else if (bell_due(now)) {
        upm.bell = upm.bell_armed = false;
        upm.bell_time = now;
        send("X_UPM_CONVERSIONS", "{\"cursor\": %llu, \"dropped\": %llu}", upm.head, upm.dropped);
    } else if (upm.budget_hit && now >= upm.budget_time + BUDGET_EVENT_NS) {
        upm.budget_hit = false;
        upm.budget_time = now;
        if (upm.budget) {
            send("X_UPM_BUDGET_REACHED", "{\"stale\": %llu, \"budget\": %llu}",
                 upm.stale_pages << PAGE_SHIFT, upm.budget);
        }
    } else if (upm.nrequests) {
        struct request *q = upm.requests[upm.first_request];

        if (!request_step(q)) {
            request_finish(q);
        }
    } else {
        return false;
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
    earlier(&at, worker_has_excess(), upm.retry_time);
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
    pthread_mutex_lock(&upm.lock);
    while (!upm.stopping) {
        if (!step(now_ns())) {
            sleep_until_due();
        } else if (upm.waiters) {
            /* A vCPU waits for what has just ended; the lock alone would not let it in first. */
            pthread_mutex_unlock(&upm.lock);
            usleep(YIELD_US);
            pthread_mutex_lock(&upm.lock);
        }
    }
    pthread_mutex_unlock(&upm.lock);
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
    pthread_mutex_lock(&upm.lock);
    upm.stopping = true;
    worker_kick();
    pthread_mutex_unlock(&upm.lock);
    pthread_join(upm.worker, NULL);
    upm.worker_running = false;
}
