/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the plugin's tests run it in instead of QEMU: a VM whose attributes are an array, RAM that
 * is real (memfds and, where /dev/kvm has them, guest_memfds), and the functions of QEMU's that
 * qemu.c finds by name. The plugin's other objects are the ones that ship.
 *
 *   fake.c       QEMU's monitor
 *   fake_kvm.c   the kernel
 *   fake_ram.c   QEMU's memory backends, slots and conversions
 *
 * The fake knows which copy of a page is live, and looks at every discard that reaches the
 * kernel: one that meets a live page is counted in `violations`, and so is one that meets any page
 * while a VM is being launched, when nobody but the plugin would discard.
 */
#ifndef FAKE_H
#define FAKE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096ull
#define MIB (1ull << 20)
#define FAKE_PAGES (1u << 17) /* guest addresses below 512 MiB: of others nothing is known */
#define KVM_FD 1000000        /* no file: the fake answers for it */

enum kind { RAM_MEMFD, RAM_FILE, RAM_ANONYMOUS, RAM_HUGETLB, RAM_IN_PLACE };

/* A block of guest RAM with a guest_memfd. `private` is the test's own view of the private copy. */
struct memory {
    enum kind kind;
    int private_fd, shared_fd;
    char *private, *shared;
    uint64_t gpa, bytes;
};

/* Makes the next calls of one kind fail: `count` of them with `error`, after `skip` that work. */
struct fault {
    int error;
    unsigned skip, count;
};

struct fake {
    int vm_fd;
    bool real_guest_memfd;
    bool int_requests;         /* an ioctl's number is an int, as in QEMU 9.1 */
    _Atomic bool launching;    /* no vcpu_run() since the VM was created */
    struct fault punch, attributes;   /* set by fail_next() */
    _Atomic unsigned violations, punches, events, said;
    uint64_t longest_punch;
    _Atomic uint64_t not_huge;        /* bytes that are to be in no huge pages */
    char last_said[512];
    _Atomic long long discarded_id;   /* of the last X_UPM_DISCARDED, and what it said */
    char discarded[512];
    /* Called before the kernel acts; `fd` is -1 for a discard by madvise(). refuse_*() returns the
     * errno to fail with, or 0. */
    void (*_Atomic before_punch)(int fd, uint64_t offset, uint64_t bytes);
    void (*_Atomic before_attributes)(void);
    int (*_Atomic refuse_punch)(int fd, uint64_t offset, uint64_t bytes);
    int (*_Atomic refuse_attributes)(void);
};
extern struct fake fake;
/* Set while this thread is in a call of the plugin's that may allocate. */
extern __thread bool in_plugin;

/* Starts the plugin as QEMU's opening of KVM does, and creates a VM. */
void fake_start(void);
void vm_new(void);
struct memory *memory_new(enum kind kind, uint64_t gpa, uint64_t bytes);
/* As QEMU: unmap, close the RAM, then close the guest_memfd. */
void memory_free(struct memory *m);
void slot_map(unsigned slot, const struct memory *m, uint64_t offset, uint64_t bytes, uint64_t gpa);
void slot_unmap(unsigned slot);
/* slot_map(), and marked private, as QEMU does with each new slot that has a guest_memfd. */
void slot_plug(unsigned slot, const struct memory *m, uint64_t offset, uint64_t bytes,
               uint64_t gpa);
/* What QEMU 11 does to a confidential guest's VM on reset, but for the slots, which the caller maps
 * again: the VM is another, each block of RAM stays and gets another guest_memfd. */
void vm_reset(struct memory *const *blocks, unsigned count);

bool page_is_private(uint64_t gpa);
/* KVM_SET_MEMORY_ATTRIBUTES alone; and the discard that QEMU makes after it. */
int convert_only(uint64_t gpa, uint64_t bytes, bool to_private);
int qemu_discard(const struct memory *m, uint64_t offset, uint64_t bytes, bool now_private);
int guest_convert(const struct memory *m, uint64_t offset, uint64_t bytes, bool to_private);
/* ioctl(KVM_RUN): ends the thread's conversion, and the launch. */
void vcpu_run(void);

/* Sets fake.punch or fake.attributes while others look at it. */
void fail_next(struct fault *fault, int error, unsigned skip, unsigned count);

/* A QMP command; the reply, to be freed, or NULL and the error in *error, to be freed. */
char *command(const char *name, const char *arguments, char **error);
/* The same where failure ends the test. */
char *must(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The number after "key": in the reply of x-upm-query, from the first place that has it. */
uint64_t query(const char *key);
/* Whether the reply of x-upm-query has this text. */
bool query_says(const char *text);
uint64_t stale(void);
/* Which of the first pages x-upm-stale tells of, a letter for each: '.' or 'x'. To be freed. */
char *ledger_of(unsigned region, const char *copy, uint64_t pages);
/* The sum of a counter's two copies. */
uint64_t counter(const char *name);
/* deferred == all that became of it, for each copy. */
bool accounting_closes(void);
void wait_for(bool (*come)(void), const char *what);
void drain(void);
/* Whether the plugin counts nobody who waits for its lock or for an operation: the drain gives way
 * to those. */
bool nobody_waits(void);

void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
#define expect(condition) \
    do { \
        if (!(condition)) { \
            fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
        } \
    } while (0)

#endif
