/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's state, and what its parts ask of each other.
 *
 *   interpose.c  what QEMU calls: ioctl, fallocate, madvise, close, munmap
 *   convert.c    a conversion and the discard that follows it, on the vCPU's thread
 *   ops.c        what is under way, and in which range
 *   regions.c    backings of guest RAM, and their slots
 *   ledger.c     stale pages
 *   ring.c       the record of conversions
 *   worker.c     the thread that discards, keeps the lease and rings the bell
 *   backing.c    what the shared side of a region is made of
 *   commands.c   the QMP commands
 *   arguments.c  what comes with them
 *   status.c     the answer to x-upm-query
 *   json.c       JSON text in and out
 *   qemu.c       QEMU's own functions, found by name
 *
 * A page has two copies, private and shared. One is live; the other is stale if it is still
 * allocated and we have deferred its discard. The ledger is the set of stale copies.
 *
 * There is one lock, upm.lock. It guards every field of this header that does not say otherwise,
 * and it is never held across a system call of any length or a call into QEMU. What needs a range
 * to hold still meanwhile puts an operation (struct op) into upm.ops.
 */
#ifndef UPM_H
#define UPM_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE_SHIFT 12
#define PAGE_BYTES (1ull << PAGE_SHIFT)
#define WORD_BITS 64
/* One summary count for each 2 MiB, and the most that one system call discards: the lock of the
 * backing's inode is exclusive, and a neighbour's fault waits for it. */
#define GROUP_PAGES 512ull
#define CHUNK_PAGES 512ull

#define REGIONS_MAX 512
#define PARTS_MAX 32
#define REQUESTS_MAX 16
#define BUCKETS 40
#define RING_RECORDS 16384

#define NSEC 1000000000ull
#define MSEC 1000000ull

enum copy { PRIVATE, SHARED, COPIES };

enum mode { MODE_EAGER, MODE_DEFER };

enum backing {
    BACKING_UNKNOWN,      /* not looked at yet, or nothing we know how to discard */
    BACKING_MEMFD,        /* shared mapping of a memfd */
    BACKING_FILE,         /* shared mapping of another file */
    BACKING_ANONYMOUS,    /* private anonymous memory: discarded by madvise */
    BACKING_HUGETLB,      /* huge pages: QEMU leaves them alone, and so do we */
    BACKING_IN_PLACE,     /* the guest_memfd itself: one copy, nothing to discard */
};

/* One backing of guest RAM: a guest_memfd, and the shared memory beside it. */
struct region {
    uint32_t id;
    int private_fd;
    uint64_t pages;
    enum backing backing;
    char name[64];
    int shared_fd;            /* -1: none */
    uint64_t shared_offset;   /* in shared_fd, of the region's first byte */
    char *host;               /* where the region's first byte is mapped, or NULL */
    int advice;               /* for the shared copy, where there is no shared_fd */
    uint64_t shared_page_bytes;
    uint64_t *stale[COPIES];  /* a bit for each page */
    uint16_t *group[COPIES];  /* the number of them in each GROUP_PAGES */
    uint64_t stale_pages[COPIES];
};

/* A memory slot of the guest that lies in a region. Sorted by gpa. */
struct slot {
    uint16_t id;
    struct region *region;
    uint64_t gpa, bytes, offset;
};

enum op_state {
    OP_IDLE,       /* not in upm.ops */
    OP_CONVERT,    /* `copy` is becoming live in the whole range */
    OP_DISCARD,    /* `copy` is going: the first `punching` pages now, the rest when QEMU asks */
};

/* Something under way in a range of a region; lives with the thread that does it. */
struct op {
    struct op *next;
    struct region *region;
    enum op_state state;
    enum copy copy;
    uint64_t first, pages, punching;
};

struct record {
    uint64_t first; /* page of the region */
    uint64_t time_ns;
    uint32_t pages;
    uint32_t count; /* guest conversions merged here */
    uint16_t region;
    bool to_private, deferred;
};

struct request {
    int64_t id;
    bool copy[COPIES];
    bool all;
    /* How far the worker is; at_range is a region's number where all are meant. */
    int at_copy, error;
    size_t at_range;
    uint64_t at_page, discarded;
    size_t count;
    struct { uint32_t region; uint64_t first, pages; } range[];
};

/* Bytes by what became of them; where two are given, by copy. For each copy
 * deferred == reused + requested + failsafe + superseded + forgotten + stale, at any time. */
struct counters {
    uint64_t conversions[COPIES];     /* by the copy that became live */
    uint64_t converted[COPIES];
    uint64_t deferred[COPIES];
    uint64_t reused[COPIES];
    uint64_t inline_[COPIES];         /* by QEMU's own call, at the conversion */
    uint64_t requested[COPIES];
    uint64_t failsafe[COPIES];
    uint64_t superseded[COPIES];      /* converted once more to the same state, then inline */
    uint64_t forgotten[COPIES];       /* the region was closed */
    uint64_t left_alone;
    uint64_t skipped;
    uint64_t failed_discards;
    uint64_t over_budget;
    uint64_t discards;                /* system calls of ours and QEMU's that succeeded */
    uint64_t lease_expiries, commands, events;
};

struct upm {
    pthread_mutex_t lock;
    pthread_cond_t settled;  /* an operation ended, and somebody waits for one */
    pthread_cond_t work;     /* for the worker, by CLOCK_MONOTONIC */
    unsigned waiters;
    struct op *ops;

    bool active;             /* set once, before QEMU has a second thread */
    pid_t pid;
    int vm_fd, vm_kind;      /* vm_kind: KVM's machine type; -1: no VM yet */
    struct region *regions[REGIONS_MAX];
    unsigned nregions;       /* read without the lock by close() and munmap(), as a hint */
    uint32_t next_region_id;
    struct slot *slots;
    unsigned nslots, slots_capacity;

    enum mode mode[COPIES];
    uint64_t budget;
    uint64_t stale_pages, peak_pages;
    uint64_t lease_ns, lease_deadline;   /* 0: none */
    bool keep_on_expiry, lease_expired;
    uint64_t notify_ns;                  /* 0: never */

    struct record ring[RING_RECORDS];
    uint64_t head;           /* sequence number of the next record */
    uint64_t sealed;         /* records below were read: nothing is merged into them */
    uint64_t dropped;        /* overwritten before anybody had read them */

    struct request *requests[REQUESTS_MAX];
    unsigned first_request, nrequests;
    bool bell, bell_armed, budget_hit;
    uint64_t bell_time, budget_time, retry_time, retry_wait;
    bool worker_running, stopping;
    pthread_t worker;

    struct counters count;
    uint64_t convert_ns[BUCKETS], discard_ns[BUCKETS];
};

extern struct upm upm;

/* The functions that we stand in front of, as found behind us. Set once, at load. */
struct libc {
    int (*ioctl)(int fd, unsigned long request, ...);
    int (*fallocate)(int fd, int mode, off64_t offset, off64_t bytes);
    int (*madvise)(void *start, size_t bytes, int advice);
    int (*munmap)(void *start, size_t bytes);
    int (*close)(int fd);
};
extern struct libc libc;

uint64_t now_ns(void);
void histogram_add(uint64_t *buckets, uint64_t ns);
/* One line on stderr, "qmp-upm: ...". */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* regions.c; region_by_*() and slot*() with the lock held, the others without */
struct region *region_new(int private_fd, uint64_t bytes);
void region_close(int fd);
void region_in_place(int private_fd);
void region_unmap(const void *start, size_t bytes);
struct region *region_by_private_fd(int fd);
struct region *region_by_id(uint32_t id);
void slot_set(uint32_t slot, uint64_t gpa, uint64_t bytes, struct region *region, uint64_t offset);
void slots_clear(void);

/* ledger.c; with the lock held */
uint64_t ledger_add(struct region *r, enum copy copy, uint64_t first, uint64_t pages);
uint64_t ledger_remove(struct region *r, enum copy copy, uint64_t first, uint64_t pages);
uint64_t ledger_missing(const struct region *r, enum copy copy, uint64_t first, uint64_t pages);
bool ledger_next(const struct region *r, enum copy copy, uint64_t from, uint64_t end,
                 uint64_t most, uint64_t *first, uint64_t *pages);
uint64_t ledger_total(enum copy copy);

/* ops.c; with the lock held, but for punch() and op_discard() */
void op_begin(struct op *op);
void op_end(struct op *op);
void op_hand_over(struct op *op);
void op_discard(struct op *op, uint64_t pages);
bool op_shields(const struct region *r, enum copy copy, uint64_t *first, uint64_t *pages);
void ops_wait(void);
int punch(const struct region *r, enum copy copy, uint64_t first, uint64_t pages);

/* backing.c */
void backing_learn(struct region *r, uint64_t address, uint64_t offset);

/* convert.c; without the lock */
int convert(int vm_fd, unsigned long request, void *argument);
void conversion_slot_registered(uint64_t gpa, uint64_t bytes);
bool conversion_discard_fd(int fd, off64_t offset, off64_t bytes, int *result);
bool conversion_discard_mapping(const void *start, size_t bytes, int advice, int *result);
void conversion_over(void);
bool conversion_unfinished(void);

/* ring.c; with the lock held */
void ring_append(const struct region *r, uint64_t first, uint64_t pages, bool to_private,
                 bool deferred, uint32_t count, uint64_t time_ns);
uint64_t ring_oldest(void);

/* worker.c */
int worker_start(void);
void worker_stop(void);
void worker_kick(void);        /* with the lock held */
bool worker_has_excess(void);  /* with the lock held */
void lease_renew(void);        /* with the lock held */

/* qemu.c */
struct qdict;
struct qobject;
struct qerror;
typedef void command_fn(struct qdict *arguments, struct qobject **result, struct qerror **error);
bool qemu_present(void);
bool qemu_attach(void);
void qemu_register(const char *name, command_fn *fn);
char *qemu_arguments(struct qdict *arguments);
void qemu_return(struct qobject **result, const char *json, struct qerror **error);
void qemu_fail(struct qerror **error, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void qemu_event(const char *name, const char *data);

/* commands.c */
void commands_register(void);

/* status.c */
struct text;
void status_add(struct text *t);
extern const char *const copy_names[], *const mode_names[];

static inline unsigned long long in_bytes(uint64_t pages)
{
    return pages << PAGE_SHIFT;
}

#endif
