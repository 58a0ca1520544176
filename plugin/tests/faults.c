/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory, files, threads and functions that can't be had: `faults CASE`. Linked so that the plugin's
 * calls of the functions below come here, where the n-th of them fails.
 */
#include "fake.h"

#include "../upm.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>


/* Calls until one fails; negative: none does. A call that fails is the last to. */
static long left = -1;

#define NO_FALLOCATE "FAULTS_NO_FALLOCATE"

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
void *__real_dlsym(void *handle, const char *name);
int __real_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);
int __real_pthread_key_create(pthread_key_t *key, void (*at_exit)(void *));
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t m);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset);
FILE *__wrap_fopen(const char *name, const char *mode);
DIR *__wrap_opendir(const char *name);
void *__wrap_dlsym(void *handle, const char *name);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);
int __wrap_pthread_key_create(pthread_key_t *key, void (*at_exit)(void *));

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

/* As where libvirt's AppArmor profile denies /proc/self/fd: always. */
DIR *__wrap_opendir(const char *name)
{
    (void)name;
    errno = EACCES;
    return NULL;
}

/* The constructors have run when main() begins: what they are to miss is in the environment. */
void *__wrap_dlsym(void *handle, const char *name)
{
    return getenv(NO_FALLOCATE) && !strcmp(name, "fallocate64") ? NULL
                                                                : __real_dlsym(handle, name);
}

int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg)
{
    return fails(EAGAIN) ? EAGAIN : __real_pthread_create(t, a, fn, arg);
}

int __wrap_pthread_key_create(pthread_key_t *key, void (*at_exit)(void *))
{
    return fails(EAGAIN) ? EAGAIN : __real_pthread_key_create(key, at_exit);
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

/* One block, plugged as QEMU does, with a page that is shared. */
static struct memory *plug(void)
{
    struct memory *m = memory_new(RAM_MEMFD, 0, MIB);

    slot_plug(0, m, 0, MIB, 0);
    expect(!convert_only(0, MIB, false));
    memset(m->shared, 1, MIB);
    return m;
}

/* RAM that is plugged while nothing can be had: QEMU discards there as it does without us. */
static void regions(void)
{
    unsigned unknown = 0, refused = 0;

    fake_start();
    vcpu_run();
    defer();
    for (long n = 0;; n++) {
        struct memory *m;
        bool hit;

        fake.said = 0;
        left = n;
        m = plug();
        hit = left < 0;
        left = -1;
        vcpu_run();
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

static void *share_all(void *argument)
{
    struct memory *m = argument;

    expect(!convert_only(0, m->bytes, false));
    left = -1;
    expect(!qemu_discard(m, 0, m->bytes, false));
    vcpu_run();
    return NULL;
}

/* A conversion that can't be followed, on a thread that has had none: its RAM is QEMU's own from
 * then on, and nothing of it stale. */
static void conversions(void)
{
    unsigned lost = 0;

    fake_start();
    vcpu_run();
    defer();
    for (long n = 0; n < 4; n++) {
        struct memory *m = plug();
        pthread_t thread;

        vcpu_run();
        expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
        vcpu_run();
        left = n;
        pthread_create(&thread, NULL, share_all, m);
        pthread_join(thread, NULL);
        if (query_says("\"state\": \"lost\"")) {
            expect(!stale() && fake.punches);
            lost++;
        } else {
            expect(query("reused-bytes-shared"));
        }
        drain();
        expect(m->shared[0] == 1 && m->shared[MIB - 1] == 1 && !fake.violations);
        slot_unmap(0);
        memory_free(m);
        expect(accounting_closes());
        defer();
    }
    expect(lost);
}

/* A slot that can't be stored comes back while copies of its RAM are stale. */
static void lost_slot(void)
{
    enum { SLOTS = 64 };
    struct memory *m, *many;

    fake_start();
    m = plug();
    many = memory_new(RAM_MEMFD, 16 * MIB, SLOTS * PAGE);
    for (unsigned i = 1; i < SLOTS; i++) {
        slot_plug(i, many, i * PAGE, PAGE, many->gpa + i * PAGE);
    }
    vcpu_run();
    defer();
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    slot_unmap(0);
    slot_plug(SLOTS, many, 0, PAGE, many->gpa);
    left = 0;
    slot_map(0, m, 0, MIB, 0);
    expect(left < 0);
    left = -1;
    expect(!convert_only(0, MIB, true));
    expect(fake.said == 1 && strstr(fake.last_said, "no memory to follow a memory slot"));
    /* What we do not see converted back must not be stale. */
    expect(!guest_convert(m, 0, MIB, false));
    vcpu_run();
    drain();
    expect(!fake.violations && m->shared[0] == 1 && m->shared[MIB - 1] == 1);
    expect(query_says("\"state\": \"lost\"") && query_says("\"state\": \"followed\""));
    expect(!guest_convert(m, 0, PAGE, true) && !stale() && accounting_closes());
}

/* QEMU's reset gives RAM another guest_memfd, which can't be followed: what the last boot left stale
 * there is not discarded in the next one, where it may be live. */
static void reset(void)
{
    unsigned lost = 0;
    bool hit = true;

    fake_start();
    for (long n = 0; hit; n++) {
        struct memory *m = plug();

        vcpu_run();
        defer();
        expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
        slot_unmap(0);
        left = n;
        vm_reset(&m, 1);
        slot_plug(0, m, 0, MIB, 0);
        hit = left < 0;
        left = -1;
        vcpu_run();
        lost += query_says("\"state\": \"lost\"");
        expect(!guest_convert(m, 0, MIB, false));
        vcpu_run();
        memset(m->shared, 0x77, MIB);
        drain();
        expect(m->shared[0] == 0x77 && m->shared[MIB - 1] == 0x77 && !fake.violations);
        slot_unmap(0);
        memory_free(m);
        expect(accounting_closes());
    }
    expect(lost);
}

/* Nothing of /proc/self/fd can be read: both copies are deferred and drained. */
static void no_descriptors(void)
{
    struct memory *m;

    fake_start();
    m = plug();
    vcpu_run();
    defer();
    memset(m->private, 1, MIB);
    expect(!guest_convert(m, 0, MIB / 2, true) && query("stale-shared") == MIB / 2);
    expect(!guest_convert(m, 0, MIB / 4, false) && query("stale-private") == MIB / 4);
    expect(!guest_convert(m, MIB / 2, MIB / 2, true) && query("stale-shared") == 3 * MIB / 4);
    expect(!fake.punches);
    drain();
    expect(!stale() && fake.punches && !fake.violations);
}

/* A C library may have no fallocate64(): a program that never calls it is not ended by us. */
static void no_fallocate(void)
{
    char *arguments[] = { "faults", "no-fallocate", NULL };

    if (!getenv(NO_FALLOCATE)) {
        setenv(NO_FALLOCATE, "1", 1);
        execv("/proc/self/exe", arguments);
    }
    expect(!libc.fallocate && libc.close && !close(dup(0)));
}

/* No key is left for a thread's end: its conversions can't be followed, since what they leave would
 * outlive it. */
static void no_key(void)
{
    struct memory *m;

    fake_start();
    m = memory_new(RAM_MEMFD, 0, MIB);
    slot_map(0, m, 0, MIB, 0);
    vcpu_run();
    defer();
    left = 0;
    expect(!convert_only(0, MIB, true) && left < 0);
    expect(query_says("\"state\": \"lost\""));
    expect(!qemu_discard(m, 0, MIB, true) && !stale() && fake.punches);
}

static void worker(void)
{
    struct memory *m;

    left = 0;
    fake_start();
    expect(fake.said == 1 && strstr(fake.last_said, "not in use: cannot start a thread"));
    m = plug();
    vcpu_run();
    expect(!guest_convert(m, 0, PAGE, true) && fake.punches == 1 && !m->shared[0]);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } cases[] = {
        { "commands", commands }, { "regions", regions }, { "conversions", conversions },
        { "lost-slot", lost_slot }, { "reset", reset }, { "no-descriptors", no_descriptors },
        { "no-fallocate", no_fallocate }, { "no-key", no_key }, { "worker", worker },
    };

    for (unsigned i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++) {
        if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            return 0;
        }
    }
    fail("usage: faults CASE");
}
