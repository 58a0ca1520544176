/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long the plugin's lock is held at most, in the holder's thread CPU time, so that a holder that
 * the host has put aside does not count. Linked so that the calls that take and give the lock come
 * here. The guest's memory is two holes of 1 TiB; no page of it is touched.
 */
#include "../plugin/kvm-abi.h"
#include "../plugin/tests/fake.h"
#include "../plugin/upm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define GUEST_BYTES (1ull << 40)
#define FIRST_GPA (1ull << 41)
#define SECOND_GPA (1ull << 42)
#define RANGES 4096
#define REGIONS 400

int ioctl(int fd, unsigned long request, ...);
int __real_pthread_mutex_lock(pthread_mutex_t *lock);
int __real_pthread_mutex_trylock(pthread_mutex_t *lock);
int __real_pthread_mutex_unlock(pthread_mutex_t *lock);
int __real_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *lock);
int __real_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *lock,
                                  const struct timespec *until);
int __wrap_pthread_mutex_lock(pthread_mutex_t *lock);
int __wrap_pthread_mutex_trylock(pthread_mutex_t *lock);
int __wrap_pthread_mutex_unlock(pthread_mutex_t *lock);
int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *lock);
int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *lock,
                                  const struct timespec *until);

/* Guarded by the lock that they are about. */
static uint64_t taken_ns, most_ns, step_ns;
static const char *step = "start", *most_step = "none";

static uint64_t cpu_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * NSEC + t.tv_nsec;
}

static void taken(const pthread_mutex_t *lock)
{
    if (lock == &upm.lock) {
        taken_ns = cpu_ns();
    }
}

static void given(const pthread_mutex_t *lock)
{
    uint64_t held;

    if (lock != &upm.lock) {
        return;
    }
    held = cpu_ns() - taken_ns;
    step_ns = held > step_ns ? held : step_ns;
    if (held > most_ns) {
        most_ns = held;
        most_step = step;
    }
}

int __wrap_pthread_mutex_lock(pthread_mutex_t *lock)
{
    int result = __real_pthread_mutex_lock(lock);

    taken(lock);
    return result;
}

int __wrap_pthread_mutex_trylock(pthread_mutex_t *lock)
{
    int result = __real_pthread_mutex_trylock(lock);

    if (!result) {
        taken(lock);
    }
    return result;
}

int __wrap_pthread_mutex_unlock(pthread_mutex_t *lock)
{
    given(lock);
    return __real_pthread_mutex_unlock(lock);
}

int __wrap_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *lock)
{
    int result;

    given(lock);
    result = __real_pthread_cond_wait(c, lock);
    taken(lock);
    return result;
}

int __wrap_pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *lock,
                                  const struct timespec *until)
{
    int result;

    given(lock);
    result = __real_pthread_cond_timedwait(c, lock, until);
    taken(lock);
    return result;
}

static void begin(const char *name)
{
    const char *last;
    uint64_t held;

    upm_lock();
    last = step;
    held = step_ns;
    step = name;
    step_ns = 0;
    upm_unlock();
    fprintf(stderr, "%-24s %8.1f us\n", last, held / 1000.0);
}

static bool discarded(void)
{
    return fake.discarded_id == 7;
}

static void settle(void)
{
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.discarded_id = 0;
}

static void ask_for_many_ranges(void)
{
    char *arguments = malloc(RANGES * 64 + 128), *at = arguments;

    at += sprintf(at, "{\"id\": 7, \"copy\": \"both\", \"ranges\": [");
    for (uint64_t i = 0; i < RANGES; i++) {
        at += sprintf(at, "%s[2, %llu, %llu]", i ? ", " : "", i * (GUEST_BYTES / RANGES),
                      GUEST_BYTES / RANGES);
    }
    strcpy(at, "]}");
    free(must("x-upm-discard", "%s", arguments));
    free(arguments);
    settle();
}

/* Every second page of a gibibyte, each in a conversion of its own. */
static void scatter(const struct memory *m)
{
    for (uint64_t at = 0; at < 1024 * MIB; at += 2 * PAGE) {
        guest_convert(m, at, PAGE, true);
    }
}

int main(void)
{
    struct upm_kvm_create_guest_memfd create = { .size = GUEST_BYTES };
    struct memory *m, *empty;

    fake_start();
    m = memory_new(RAM_MEMFD, FIRST_GPA, GUEST_BYTES);
    empty = memory_new(RAM_MEMFD, SECOND_GPA, GUEST_BYTES);
    begin("registration");
    slot_plug(0, m, 0, GUEST_BYTES, FIRST_GPA);
    slot_plug(1, empty, 0, GUEST_BYTES, SECOND_GPA);
    vcpu_run();
    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", "
              "\"budget\": %llu, \"notify-ms\": 1}", 1ull << 50));
    begin("whole slot, shared");
    guest_convert(m, 0, GUEST_BYTES, false);
    begin("whole slot, private");
    guest_convert(m, 0, GUEST_BYTES, true);
    vcpu_run();
    begin("stale, one run");
    free(must("x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 16384}"));
    begin("discard, 4096 ranges");
    ask_for_many_ranges();
    begin("every second page");
    guest_convert(m, 0, GUEST_BYTES, false);
    scatter(m);
    begin("stale, many runs");
    free(must("x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 16384}"));
    begin("across many runs");
    guest_convert(m, 0, 1024 * MIB, false);
    guest_convert(m, 0, 1024 * MIB, true);
    begin("read of a full ring");
    free(must("x-upm-read", "{\"cursor\": %llu, \"max\": 16384}",
              (unsigned long long)query("oldest")));
    begin("query, many regions");
    for (int i = 0; i < REGIONS; i++) {
        expect(ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create) >= 0);
    }
    for (int i = 0; i < 20; i++) {
        free(must("x-upm-query", "{}"));
    }
    begin("drain");
    scatter(m);
    free(must("x-upm-configure", "{\"private\": \"eager\"}"));
    usleep(200000);
    begin("close");
    slot_unmap(0);
    memory_free(m);
    begin("end");
    printf("{\"lock_held_most_us\": %.1f, \"lock_held_most_in\": \"%s\"}\n", most_ns / 1000.0,
           most_step);
    _exit(fflush(stdout));
}
