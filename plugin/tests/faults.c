/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory, files and threads that can't be had: `faults CASE`. Linked so that the plugin's calls of
 * the functions below come here, where the n-th of them fails.
 */
#include "fake.h"

#include "../upm.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MIB (1ull << 20)

/* Calls until one fails; negative: none does. A call that fails is the last to. */
static long left = -1;

static bool fails(int error)
{
    if (!in_plugin || left < 0 || left-- > 0) {
        return false;
    }
    errno = error;
    return true;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t m);
void *__real_realloc(void *p, size_t n);
void *__real_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
FILE *__real_fopen(const char *name, const char *mode);
DIR *__real_opendir(const char *name);
int __real_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t m);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
FILE *__wrap_fopen(const char *name, const char *mode);
DIR *__wrap_opendir(const char *name);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);

void *__wrap_malloc(size_t n)
{
    return fails(ENOMEM) ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t m)
{
    return fails(ENOMEM) ? NULL : __real_calloc(n, m);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails(ENOMEM) ? NULL : __real_realloc(p, n);
}

void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
    return fails(ENOMEM) ? MAP_FAILED : __real_mmap(at, n, prot, flags, fd, offset);
}

FILE *__wrap_fopen(const char *name, const char *mode)
{
    return fails(EMFILE) ? NULL : __real_fopen(name, mode);
}

DIR *__wrap_opendir(const char *name)
{
    return fails(EMFILE) ? NULL : __real_opendir(name);
}

int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg)
{
    return fails(EAGAIN) ? EAGAIN : __real_pthread_create(t, a, fn, arg);
}

static void defer(void)
{
    free(must("x-upm-configure",
              "{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": 16777216}"));
}

/* Each command with each allocation failing: an error with a reason or a whole reply. */
static void commands(void)
{
    static const struct { const char *name, *arguments; } each[] = {
        { "x-upm-query", "{}" },
        { "x-upm-configure", "{\"private\": \"eager\", \"budget\": 4096}" },
        { "x-upm-configure", "{\"private\": \"neither\"}" },
        { "x-upm-read", "{\"cursor\": 0, \"max\": 16}" },
        { "x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 16}" },
        { "x-upm-discard", "{\"id\": 7, \"copy\": \"both\", \"ranges\": [[1, 0, 4096]]}" },
    };
    struct memory *m;

    fake_start();
    m = memory_new(RAM_MEMFD, 0, MIB);
    slot_map(0, m, 0, MIB, 0);
    convert_only(0, MIB, false);
    vcpu_run();
    for (unsigned i = 0; i < sizeof(each) / sizeof(*each); i++) {
        unsigned failed = 0;

        for (long n = 0;; n++) {
            char *error, *reply;
            bool hit;

            defer();
            left = n;
            reply = command(each[i].name, each[i].arguments, &error);
            hit = left < 0;
            left = -1;
            expect(!reply != !error);
            if (hit && error) {
                expect(*error);
                expect(query("budget") == 16777216);
                failed++;
            }
            free(reply);
            free(error);
            if (!hit) {
                break;
            }
        }
        expect(failed);
    }
    expect(guest_convert(m, 0, PAGE, true) == 0 && stale() <= PAGE);
}

/* RAM that is plugged while nothing can be had: QEMU discards there as it always did. */
static void regions(void)
{
    unsigned unknown = 0, refused = 0;

    fake_start();
    defer();
    for (long n = 0;; n++) {
        struct memory *m;
        bool hit;

        m = memory_new(RAM_MEMFD, 0, MIB);
        memory_free(m);
        fake.said = 0;
        left = n;
        m = memory_new(RAM_MEMFD, 0, MIB);
        slot_map(0, m, 0, MIB, 0);
        hit = left < 0;
        left = -1;
        memset(m->shared, 1, MIB);
        expect(!guest_convert(m, 0, PAGE, true));
        refused += fake.said;
        if (hit && !fake.said && !stale()) {
            unknown++;
        }
        expect(stale() <= PAGE && !fake.violations);
        slot_unmap(0);
        memory_free(m);
        expect(!stale() && accounting_closes());
        if (!hit) {
            break;
        }
    }
    expect(refused && unknown);
}

static void worker(void)
{
    struct memory *m;

    left = 0;
    fake_start();
    expect(fake.said == 1 && strstr(fake.last_said, "not in use: cannot start a thread"));
    m = memory_new(RAM_MEMFD, 0, MIB);
    slot_map(0, m, 0, MIB, 0);
    memset(m->shared, 1, MIB);
    expect(!guest_convert(m, 0, PAGE, true) && fake.punches == 1 && !m->shared[0]);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } cases[] = {
        { "commands", commands }, { "regions", regions }, { "worker", worker },
    };

    for (unsigned i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++) {
        if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            return 0;
        }
    }
    fail("usage: faults CASE");
}
