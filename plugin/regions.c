/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Regions: backings of guest RAM, tracked by file and mapping and never by guest address. QEMU takes
 * memory slots away for a moment and puts them back (PAM registers, dirty logging), and the copies
 * stay meanwhile.
 *
 * A region has two sides. Its private one goes when QEMU closes the guest_memfd, its shared one when
 * QEMU unmaps the RAM. At a reset QEMU 11 closes the guest_memfd and makes another for the same RAM:
 * the region waits for that, with what is stale of the shared side.
 */
#include "upm.h"

#include <string.h>

struct upm upm = {
    /* Holds are short: a thread that spins a little need not sleep. */
    .lock = PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP,
    .settled = PTHREAD_COND_INITIALIZER,
    .vm_fd = -1,
    .vm_kind = -1,
    .next_region_id = 1,
};

static void set_private_fd(struct region *r, int fd)
{
    __atomic_store_n(&r->private_fd, fd, __ATOMIC_RELAXED);
}

static void set_shared_fd(struct region *r, int fd)
{
    __atomic_store_n(&r->shared_fd, fd, __ATOMIC_RELAXED);
}

static void set_host(struct region *r, char *host)
{
    __atomic_store_n(&r->host, host, __ATOMIC_RELAXED);
}

static void set_pages(struct region *r, uint64_t pages)
{
    __atomic_store_n(&r->pages, pages, __ATOMIC_RELAXED);
}

/* The region has no operations, and nobody finds it any more. Drops the lock, since unmapping takes
 * long. */
static void region_free(struct region *r)
{
    struct bitmap gone[] = { r->shared, r->stale[PRIVATE], r->stale[SHARED] };

    set_pages(r, 0);
    set_private_fd(r, -1);
    set_shared_fd(r, -1);
    set_host(r, NULL);
    r->shared = r->stale[PRIVATE] = r->stale[SHARED] = (struct bitmap) { 0 };
    upm_unlock();
    for (int i = 0; i < 3; i++) {
        bitmap_destroy(&gone[i]);
    }
    upm_lock();
}

static struct region *unused(void)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (!upm.region[i].pages) {
            return &upm.region[i];
        }
    }
    return upm.nregions < REGIONS_MAX ? &upm.region[upm.nregions] : NULL;
}

static void region_begin(struct region *r, int private_fd, uint64_t pages)
{
    r->id = upm.next_region_id++;
    r->backing = BACKING_UNKNOWN;
    r->lost = false;
    r->failures[PRIVATE] = r->failures[SHARED] = 0;
    r->name[0] = '\0';
    r->file = (struct file_place) { 0 };
    r->shared_page_bytes = PAGE_BYTES;
    set_host(r, NULL);
    set_shared_fd(r, -1);
    set_private_fd(r, private_fd);
    set_pages(r, pages);
    if (r == &upm.region[upm.nregions]) {
        __atomic_store_n(&upm.nregions, upm.nregions + 1, __ATOMIC_RELEASE);
    }
}

struct region *region_by_private_fd(int fd)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (fd >= 0 && upm.region[i].pages && upm.region[i].private_fd == fd) {
            return &upm.region[i];
        }
    }
    return NULL;
}

struct region *region_by_id(uint32_t id)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (upm.region[i].pages && upm.region[i].id == id) {
            return &upm.region[i];
        }
    }
    return NULL;
}

static bool is_mapped_in(const struct region *r, const char *start, size_t bytes)
{
    const char *host = __atomic_load_n(&r->host, __ATOMIC_RELAXED);

    return host && start < host + in_bytes(__atomic_load_n(&r->pages, __ATOMIC_RELAXED))
           && host < start + bytes;
}

/* Waits until no system call of ours is in the region. Drops the lock meanwhile. */
static void region_quiesce(const struct region *r)
{
    struct op *op = upm.ops;

    while (op) {
        if (op->region == r && (op->state == OP_CONVERT || op->state == OP_PUNCH)) {
            ops_wait();
            op = upm.ops;
        } else {
            op = op->next;
        }
    }
}

/* QEMU's discards of this copy go their own way from now on. */
static void region_expect_nothing(const struct region *r, enum copy copy)
{
    struct op *next;

    for (struct op *op = upm.ops; op; op = next) {
        next = op->next;
        if (op->region == r && op->state == OP_EXPECT && op->copy == copy) {
            conversion_record((struct part *)op);
            ((struct part *)op)->expected = false;
            op_end(op);
        }
    }
}

/* Whether a copy can be discarded there: its side is not gone, nor given up. */
bool region_has(const struct region *r, enum copy copy)
{
    return !r->lost && (copy == PRIVATE ? r->private_fd >= 0 : r->host != NULL);
}

/* With the lock held; drops it. All of the region's discards are QEMU's own from now on. */
void region_lose(struct region *r)
{
    r->lost = true;
    region_quiesce(r);
    for (int c = 0; c < COPIES; c++) {
        region_expect_nothing(r, c);
        ledger_forget(r, c);
    }
    ops_wake(); /* conversions that wait in it need not any more */
}

/* With the lock held; drops it. A guest_memfd that we could not follow has been put beside this
 * memory: what is stale there from before a reset may become live, and nobody would tell us. */
void region_lose_at(const char *start, uint64_t bytes)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (is_mapped_in(&upm.region[i], start, bytes)) {
            region_lose(&upm.region[i]);
        }
    }
}

/* Attributes are being set on this guest_memfd itself: it has one copy, and nothing is stale. */
void region_in_place(int private_fd)
{
    struct region *r;

    upm_lock();
    r = region_by_private_fd(private_fd);
    if (r && r->backing != BACKING_IN_PLACE) {
        r->backing = BACKING_IN_PLACE;
        region_lose(r);
        r->lost = false;
    }
    upm_unlock();
}

/* The shared copy's memory is about to be unmapped. */
static void region_lose_shared(struct region *r)
{
    uint32_t id = r->id; /* another thread may lose the other side meanwhile, and free the region */

    region_quiesce(r);
    region_expect_nothing(r, SHARED);
    set_host(r, NULL);
    set_shared_fd(r, -1);
    if (r->backing != BACKING_IN_PLACE) {
        r->backing = BACKING_UNKNOWN;
    }
    ledger_forget(r, SHARED);
    if (r->pages && r->id == id && r->private_fd < 0) {
        region_free(r);
    }
}

/* The guest_memfd is about to be closed. A VM whose RAM outlives it is being rebuilt. */
static void region_lose_private(struct region *r)
{
    uint32_t id = r->id;

    if (r->host) {
        launch_begin();
    }
    region_quiesce(r);
    region_expect_nothing(r, PRIVATE);
    slots_forget(r);
    set_private_fd(r, -1);
    ledger_forget(r, PRIVATE);
    if (r->pages && r->id == id && !r->host) {
        region_free(r);
    }
}

/* NULL where memory or room is short; QEMU then discards in that region as it does without us. */
struct region *region_new(int private_fd, uint64_t bytes)
{
    uint64_t pages = (bytes + PAGE_BYTES - 1) >> PAGE_SHIFT;
    struct bitmap made[3] = { 0 };
    struct region *r = NULL, *old;
    bool enough = pages;

    for (int i = 0; i < 3 && enough; i++) {
        enough = bitmap_init(&made[i], pages);
    }
    if (enough) {
        upm_lock();
        while ((old = region_by_private_fd(private_fd))) {
            region_lose_private(old); /* closed by a way round us, such as dup2() */
        }
        r = unused();
        if (r) {
            r->shared = made[0];
            r->stale[PRIVATE] = made[1];
            r->stale[SHARED] = made[2];
            region_begin(r, private_fd, pages);
        }
        upm_unlock();
    }
    for (int i = 0; i < 3 && !r; i++) {
        bitmap_destroy(&made[i]);
    }
    return r;
}

/* The region's first slot shows where its RAM is mapped, and `f` what that is made of. */
void region_is_mapped(struct region *r, char *host, const struct backing_facts *f)
{
    if (r->backing != BACKING_IN_PLACE) {
        r->backing = f->backing;
    }
    memcpy(r->name, f->name, sizeof(r->name));
    r->file = f->file;
    r->advice = f->advice;
    r->shared_page_bytes = f->page_bytes;
    set_host(r, host);
}

/* A guest_memfd has been made for RAM that `r` knows nothing of yet, and that has outlived another
 * one: the region of that RAM takes it. Returns the region to use. */
struct region *region_adopt(struct region *r, char *host)
{
    if (r->host) {
        return r;
    }
    for (unsigned i = 0; i < upm.nregions; i++) {
        struct region *old = &upm.region[i];

        if (old->pages == r->pages && old->private_fd < 0 && old->host == host) {
            set_private_fd(old, r->private_fd);
            old->lost = false;
            old->failures[PRIVATE] = 0;
            slots_forget(r);
            region_free(r);
            return old;
        }
    }
    return r;
}

/* These two without the lock, as a hint that spares it: this process closes or unmaps what is its
 * own, which nobody is registering now. */
bool region_has_file(int fd)
{
    for (unsigned i = 0; i < __atomic_load_n(&upm.nregions, __ATOMIC_ACQUIRE); i++) {
        const struct region *r = &upm.region[i];

        if (fd >= 0 && (__atomic_load_n(&r->private_fd, __ATOMIC_RELAXED) == fd
                        || __atomic_load_n(&r->shared_fd, __ATOMIC_RELAXED) == fd)) {
            return true;
        }
    }
    return false;
}

bool region_is_in(const void *start, size_t bytes)
{
    for (unsigned i = 0; i < __atomic_load_n(&upm.nregions, __ATOMIC_ACQUIRE); i++) {
        if (is_mapped_in(&upm.region[i], start, bytes)) {
            return true;
        }
    }
    return false;
}

/* Called before the number can be given to another file. */
void region_close(int fd)
{
    upm_lock();
    for (unsigned i = 0; i < upm.nregions; i++) {
        struct region *r = &upm.region[i];

        if (r->pages && r->shared_fd == fd) {
            region_quiesce(r); /* the RAM stays mapped: its discards go through the mapping */
            set_shared_fd(r, -1);
        }
        if (r->pages && r->private_fd == fd) {
            region_lose_private(r);
        }
    }
    upm_unlock();
}

/* Called before the addresses can be given to another mapping. */
void region_unmap(const void *start, size_t bytes)
{
    upm_lock();
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (is_mapped_in(&upm.region[i], start, bytes)) {
            region_lose_shared(&upm.region[i]);
        }
    }
    upm_unlock();
}
