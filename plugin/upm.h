/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The plugin's state, and what its parts ask of each other.
 *
 *   interpose.c  what QEMU calls: ioctl, fallocate, madvise, close, munmap
 *   convert.c    a conversion, on the vCPU's thread
 *   parts.c      what that thread remembers of it
 *   discard.c    the discard that QEMU asks for after it, on the same thread
 *   ops.c        what is under way, and in which range
 *   regions.c    backings of guest RAM
 *   slots.c      where the guest sees them
 *   bitmap.c     sets of pages
 *   ledger.c     stale pages
 *   ring.c       the record of conversions
 *   worker.c     the thread that discards, keeps the lease and rings the bell
 *   requests.c   the discards that a client has asked for
 *   backing.c    what the shared side of a region is made of
 *   commands.c   the QMP commands
 *   arguments.c  what comes with them
 *   status.c     the answer to x-upm-query
 *   json.c       JSON text in and out
 *   qemu.c       QEMU's own functions, found by name
 *
 * A page has two copies, private and shared. The one that KVM gives to the guest is live. The other
 * one is stale once QEMU has asked for its discard and we have answered without making it: not
 * before, because until then QEMU and KVM may still read it (the launch of an SNP guest does). The
 * ledger is the set of stale copies.
 *
 * There is one lock, upm.lock, taken by upm_lock(). It guards every field of this header that does
 * not say otherwise, and it is never held across a system call of any length or a call into QEMU.
 * What needs a range to hold still meanwhile puts an operation (struct op) into upm.ops. Whoever
 * works through very many pages lets others in after each UPM_STRIDE_PAGES.
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
#define GROUP_PAGES 512ull              /* 2 MiB */
#define BLOCK_PAGES (1024 * GROUP_PAGES) /* 2 GiB */
/* The most that one system call discards: the lock of the backing's inode is exclusive, and a
 * neighbour's fault waits for it. */
#define CHUNK_PAGES 512ull
/* The most that is worked through in one hold of the lock. */
#define UPM_STRIDE_PAGES (32 * GROUP_PAGES)

#define REGIONS_MAX 512
#define REQUESTS_MAX 16
#define BUCKETS 40
#define RING_RECORDS 16384
/* After so many failures in a row QEMU's own discards and their errors go through. */
#define FAILURES_MAX 8

#define NSEC 1000000000ull
#define MSEC 1000000ull

enum copy { PRIVATE, SHARED, COPIES };

enum mode { MODE_EAGER, MODE_DEFER };

enum backing {
    BACKING_UNKNOWN,      /* not looked at yet, or nothing we know how to discard */
    BACKING_MEMFD,        /* shared mapping of a memfd */
    BACKING_FILE,         /* shared mapping of another file */
    BACKING_ANONYMOUS,    /* memory without a file: discarded by madvise() */
    BACKING_HUGETLB,      /* huge pages: QEMU leaves them alone, and so do we */
    BACKING_IN_PLACE,     /* the guest_memfd itself: one copy, nothing to discard */
};

/* A set of a region's pages, with counts by which what is empty or full is passed over. */
struct bitmap {
    uint64_t *word;
    uint16_t *group;      /* the number of set bits in each GROUP_PAGES */
    uint32_t *block;      /* and in each BLOCK_PAGES */
    uint64_t pages, total;
};

/* The file and offset that a region's first byte is mapped from. */
struct file_place {
    dev_t device;
    ino_t inode;
    uint64_t offset;
};

/*
 * One backing of guest RAM: a guest_memfd, and the shared memory beside it. The two live apart: at a
 * reset, QEMU 11 replaces the guest_memfd and keeps the RAM.
 *
 * Regions are never freed and never move. close() and munmap() read pages, private_fd, shared_fd and
 * host without the lock, as a hint: these are written atomically.
 */
struct region {
    uint32_t id;
    uint64_t pages;           /* 0: not in use */
    int private_fd;           /* -1: closed; the shared side waits for the next one */
    enum backing backing;
    bool lost;                /* a failure of ours: all discards in it are QEMU's own */
    unsigned failures[COPIES]; /* discards that failed since the last one that didn't */
    char name[64];
    char *host;               /* where the region's first byte is mapped, or NULL */
    struct file_place file;   /* what is mapped there, if it is a file */
    int shared_fd;            /* that file, as QEMU discards in it; -1: not seen yet */
    int advice;               /* how to discard in the mapping, where there is no shared_fd */
    uint64_t shared_page_bytes;
    struct bitmap shared;     /* pages that KVM has as shared; the others are private */
    struct bitmap stale[COPIES];
};

/* A memory slot of the guest that lies in a region. Sorted by gpa. */
struct slot {
    uint16_t id;
    struct region *region;
    uint64_t gpa, bytes, offset;
};

enum op_state {
    OP_IDLE,       /* not in upm.ops */
    OP_WAIT,       /* a conversion that is to make `copy` live waits for its turn */
    OP_CONVERT,    /* KVM is making `copy` live */
    OP_EXPECT,     /* QEMU may ask for the discard of `copy`; nobody waits for this */
    OP_PUNCH,      /* a system call is discarding `copy` */
};

/* Something under way in a range of a region; lives with the thread that does it. */
struct op {
    struct op *next, **link;
    struct region *region;
    enum op_state state;      /* its own thread reads it without the lock */
    enum copy copy;
    uint64_t first, pages;
    uint64_t turn;            /* of OP_WAIT: whoever has a lower one is first */
};

/*
 * One region's part of a thread's last conversion. `owed` and `moved` have a bit for each page of
 * its words, from the one on that has op.first: QEMU's discard is still to come and this conversion
 * is the page's last one; the conversion changed the page.
 */
struct part {
    struct op op;
    uint64_t *owed, *moved;
    uint64_t owed_pages, time_ns;
    bool recorded;
    unsigned count;            /* conversions of the guest that the record stands for: 1 or 0 */
    bool expected;             /* QEMU's discard, from page `next` on */
    uint64_t next;
    char *spared, *spared_end; /* what a discard in the file has dealt with: its own thread's */
};

/* What a thread has to remember of its last conversion, and of the slot before that. */
struct conversion {
    struct part *part;
    unsigned nparts, parts_capacity;
    uint64_t *words;          /* what the parts' owed and moved point into */
    uint64_t words_capacity;
    bool has_destructor;
    /* A slot that this thread has just registered: QEMU marks it private next, which is not a
     * conversion of the guest's. 0 bytes: none. */
    uint64_t registered_gpa, registered_bytes;
};
extern __thread struct conversion mine;

struct record {
    uint64_t first; /* page of the region */
    uint64_t time_ns;
    uint32_t pages;
    uint32_t count; /* guest conversions merged here */
    uint32_t region;
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
 * deferred == reused + requested + failsafe + forgotten + stale, at any time. */
struct counters {
    uint64_t conversions[COPIES];     /* by the copy that became live */
    uint64_t converted[COPIES];
    uint64_t deferred[COPIES];
    uint64_t reused[COPIES];
    uint64_t inline_[COPIES];         /* by QEMU's own call, at the conversion */
    uint64_t requested[COPIES];
    uint64_t failsafe[COPIES];
    uint64_t forgotten[COPIES];       /* the memory went with its file or mapping */
    uint64_t left_alone;              /* QEMU never asked for its discard, or we can't make it */
    uint64_t skipped;
    uint64_t failed_discards;
    uint64_t over_budget;
    uint64_t discards;                /* system calls of ours and QEMU's that succeeded */
    uint64_t lease_expiries, commands, events;
};

struct upm {
    pthread_mutex_t lock;
    unsigned contenders;     /* threads that want the lock; atomic */
    pthread_cond_t settled;  /* an operation ended, and somebody waits for one */
    pthread_cond_t work;     /* for the worker, by CLOCK_MONOTONIC */
    unsigned waiters;        /* for settled, and not woken yet */
    unsigned round;          /* how often they have been woken */
    struct op *ops;
    uint64_t next_turn;

    bool active;             /* set once, before QEMU has a vCPU; atomic */
    pid_t pid;
    int vm_fd;               /* atomic */
    int vm_kind;             /* KVM's machine type; -1: no VM yet */
    /* A VM is being made or rebuilt: no vCPU has run since. Written with the lock, read without. */
    bool launching;
    struct region region[REGIONS_MAX];
    unsigned nregions;       /* entries of region[] that have ever been in use; atomic */
    uint32_t next_region_id;
    struct slot *slots;
    unsigned nslots, slots_capacity;

    enum mode mode[COPIES];
    uint64_t budget;
    uint64_t stale_pages, stale_of[COPIES], peak_pages;
    uint64_t lease_ns, lease_deadline;   /* 0: none */
    bool keep_on_expiry, lease_expired;
    uint64_t notify_ns;                  /* 0: never */

    struct record ring[RING_RECORDS];
    uint64_t head;           /* sequence number of the next record */
    uint64_t sealed;         /* records below were read: nothing is merged into them */
    uint64_t dropped;        /* overwritten before anybody had read them, or never recorded */
    uint64_t gap;            /* records are missing just below; 0: there is no gap */

    struct request *requests[REQUESTS_MAX];
    unsigned first_request, nrequests;
    bool bell, bell_armed, budget_hit;
    uint64_t bell_time, budget_time;
    bool worker_running, stopping;
    pthread_t worker;

    struct counters count;
    uint64_t convert_ns[BUCKETS], discard_ns[BUCKETS];
};

extern struct upm upm;

/* The functions that we stand in front of, as found behind us; NULL where the C library lacks one.
 * Set once, at load. */
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
/* One line on stderr, "qmp-upm: ...". Never with the lock held: stderr may be a full pipe. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ops.c; upm_breathe() and those below with the lock held, ops_wait() and op_punch() drop it */
void upm_lock(void);
void upm_unlock(void);
void upm_breathe(void);
void op_begin(struct op *op);
void op_withdraw(struct op *op);
void op_end(struct op *op);
void op_expect(struct op *op);
bool op_overlaps(const struct op *op, const struct region *r, uint64_t first, uint64_t pages);
bool ops_allow_discard(const struct region *r, enum copy copy, uint64_t *first, uint64_t *pages);
void ops_wait(void);
void ops_wake(void);
int op_punch(struct region *r, enum copy copy, uint64_t first, uint64_t pages);

/* backing.c; without the lock */
struct backing_facts {
    bool found;               /* else there was no looking: too many files are open */
    enum backing backing;
    char name[64];
    struct file_place file;
    int advice;
    uint64_t page_bytes;
};
struct backing_facts backing_look(int private_fd, uint64_t address, uint64_t offset);

/* regions.c; from region_has() on with the lock held (region_adopt() and region_lose() drop it),
 * those before without */
struct region *region_new(int private_fd, uint64_t bytes);
bool region_has_file(int fd);
bool region_is_in(const void *start, size_t bytes);
void region_close(int fd);
void region_in_place(int private_fd);
void region_unmap(const void *start, size_t bytes);
bool region_has(const struct region *r, enum copy copy);
void region_lose(struct region *r);
void region_lose_at(const char *start, uint64_t bytes);
struct region *region_by_private_fd(int fd);
struct region *region_by_id(uint32_t id);
void region_is_mapped(struct region *r, char *host, const struct backing_facts *f);
struct region *region_adopt(struct region *r, char *host);

/* slots.c; with the lock held. slot_set() is false if there was no memory. */
bool slot_set(uint32_t slot, uint64_t gpa, uint64_t bytes, struct region *region, uint64_t offset);
struct slot *slot_ending_after(uint64_t gpa);
void slots_forget(const struct region *r);
void slots_clear(void);

/* bitmap.c */
bool bitmap_init(struct bitmap *b, uint64_t pages);
void bitmap_destroy(struct bitmap *b);
uint64_t bitmap_word_fill(struct bitmap *b, uint64_t page, uint64_t mask, bool value);
uint64_t bitmap_fill(struct bitmap *b, uint64_t first, uint64_t pages, bool value);
bool bitmap_next(const struct bitmap *b, uint64_t from, uint64_t end, uint64_t most,
                 uint64_t *first, uint64_t *pages);

/* ledger.c; with the lock held; ledger_forget() drops it meanwhile */
uint64_t ledger_add(struct region *r, enum copy copy, uint64_t page, uint64_t mask);
uint64_t ledger_remove(struct region *r, enum copy copy, uint64_t first, uint64_t pages);
void ledger_forget(struct region *r, enum copy copy);
bool ledger_next(const struct region *r, enum copy copy, uint64_t from, uint64_t end,
                 uint64_t most, uint64_t *first, uint64_t *pages);

/* parts.c; parts_collect() and conversion_record*() with the lock held, the others without */
bool parts_reserve(unsigned parts, uint64_t words);
void parts_collect(uint64_t gpa, uint64_t end, enum copy live, unsigned *parts, uint64_t *words);
void parts_share_words(unsigned parts);
void conversion_slot_registered(uint64_t gpa, uint64_t bytes);
bool conversion_unfinished(void);
void conversion_over(void);
void conversion_record(struct part *part);
void conversion_record_pending(uint64_t now);

/* convert.c; without the lock */
int convert(int vm_fd, unsigned long request, void *argument);

/* discard.c; discard_expected() with the lock held, the others without */
bool discard_expected(const struct region *r, enum copy copy);
bool discard_in_file(int fd, off64_t offset, off64_t bytes, int *result);
bool discard_in_mapping(const void *start, size_t bytes, int advice, int *result);

/* ring.c; with the lock held */
void ring_append(const struct region *r, uint64_t first, uint64_t pages, bool to_private,
                 bool deferred, uint32_t count, uint64_t time_ns);
uint64_t ring_oldest(void);
void ring_lose(void);

/* worker.c */
int worker_start(void);
void worker_stop(void);
void worker_kick(void);        /* with the lock held */
void lease_renew(void);        /* with the lock held */
void drain_at_once(void);      /* with the lock held */
void launch_begin(void);       /* with the lock held, which it drops */
void launch_end(void);         /* without */
int discard_next(struct region *r, enum copy copy, uint64_t *at, uint64_t end, uint64_t *counter,
                 uint64_t *discarded); /* with the lock held */

/* requests.c; with the lock held */
bool request_step(struct request *q);
uint64_t request_bytes(const struct request *q);

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
bool status_add(struct text *t);   /* without the lock; false if there was no memory */
extern const char *const copy_names[], *const mode_names[];

static inline unsigned long long in_bytes(uint64_t pages)
{
    return pages << PAGE_SHIFT;
}

static inline enum copy other_copy(enum copy copy)
{
    return copy == PRIVATE ? SHARED : PRIVATE;
}

/* The bits of `page`'s word that stand for pages from `page` on and before `end`. */
static inline uint64_t word_mask(uint64_t page, uint64_t end)
{
    uint64_t low = page % WORD_BITS, word_end = page - low + WORD_BITS;
    uint64_t mask = ~0ull << low;

    return end < word_end ? mask & ~0ull >> (word_end - end) : mask;
}

static inline uint64_t next_word(uint64_t page)
{
    return page - page % WORD_BITS + WORD_BITS;
}

#endif
