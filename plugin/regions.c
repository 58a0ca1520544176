/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Regions and the slots that show them to the guest.
 *
 * Tracked by backing and offset, never by guest address: QEMU takes memory slots away for a
 * moment and puts them back (PAM registers, dirty logging), and the copies stay meanwhile.
 */
#include "upm.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct upm upm = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .settled = PTHREAD_COND_INITIALIZER,
    .vm_fd = -1,
    .vm_kind = -1,
    .next_region_id = 1,
};

/* Reserved, not resident: what is never touched costs nothing. */
static void *reserve(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static uint64_t bitmap_bytes(uint64_t pages)
{
    return (pages + WORD_BITS - 1) / WORD_BITS * sizeof(uint64_t);
}

static uint64_t group_bytes(uint64_t pages)
{
    return (pages + GROUP_PAGES - 1) / GROUP_PAGES * sizeof(uint16_t);
}

static void region_free(struct region *r)
{
    for (int c = 0; c < COPIES; c++) {
        if (r->stale[c]) {
            munmap(r->stale[c], bitmap_bytes(r->pages));
        }
        if (r->group[c]) {
            munmap(r->group[c], group_bytes(r->pages));
        }
    }
    free(r);
}

/* NULL where memory or room is short; QEMU then discards in that region as it always did. */
struct region *region_new(int private_fd, uint64_t bytes)
{
    struct region *r = calloc(1, sizeof(*r));

    if (!r) {
        return NULL;
    }
    r->private_fd = private_fd;
    r->shared_fd = -1;
    r->shared_page_bytes = PAGE_BYTES;
    r->pages = (bytes + PAGE_BYTES - 1) >> PAGE_SHIFT;
    for (int c = 0; c < COPIES; c++) {
        r->stale[c] = reserve(bitmap_bytes(r->pages));
        r->group[c] = reserve(group_bytes(r->pages));
        if (!r->stale[c] || !r->group[c]) {
            region_free(r);
            return NULL;
        }
    }

    pthread_mutex_lock(&upm.lock);
    if (upm.nregions < REGIONS_MAX && upm.next_region_id <= UINT16_MAX) {
        r->id = upm.next_region_id++;
        upm.regions[upm.nregions] = r;
        __atomic_store_n(&upm.nregions, upm.nregions + 1, __ATOMIC_RELEASE);
    } else {
        region_free(r);
        r = NULL;
    }
    pthread_mutex_unlock(&upm.lock);
    return r;
}

struct region *region_by_private_fd(int fd)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (upm.regions[i]->private_fd == fd) {
            return upm.regions[i];
        }
    }
    return NULL;
}

struct region *region_by_id(uint32_t id)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (upm.regions[i]->id == id) {
            return upm.regions[i];
        }
    }
    return NULL;
}

/* Waits until nothing of ours touches the region's copies with a system call. */
static void region_quiesce(const struct region *r)
{
    for (;;) {
        struct op *op = upm.ops;

        while (op && !(op->region == r && (op->state == OP_CONVERT || op->punching))) {
            op = op->next;
        }
        if (!op) {
            return;
        }
        ops_wait();
    }
}

static void region_forget_stale(struct region *r, enum copy copy)
{
    upm.count.forgotten[copy] += ledger_remove(r, copy, 0, r->pages) << PAGE_SHIFT;
}

/* Takes the operations out that wait for a call of QEMU's, since its copy is going anyway. */
static void region_drop_ops(const struct region *r, enum copy copy)
{
    struct op *next;

    for (struct op *op = upm.ops; op; op = next) {
        next = op->next;
        if (op->region == r && op->state == OP_DISCARD && op->copy == copy) {
            op_end(op);
        }
    }
}

/* The shared copy's memory is about to be unmapped or its file closed. */
static void region_lose_shared(struct region *r)
{
    region_quiesce(r);
    region_drop_ops(r, SHARED);
    region_forget_stale(r, SHARED);
    if (r->backing != BACKING_IN_PLACE) {
        r->backing = BACKING_UNKNOWN;
    }
    r->shared_fd = -1;
    r->host = NULL;
}

static void region_empty(struct region *r)
{
    region_quiesce(r);
    for (int c = 0; c < COPIES; c++) {
        region_drop_ops(r, c);
        region_forget_stale(r, c);
    }
}

/* Attributes are being set on this guest_memfd itself: it has one copy, and nothing is stale. */
void region_in_place(int private_fd)
{
    struct region *r;

    pthread_mutex_lock(&upm.lock);
    r = region_by_private_fd(private_fd);
    if (r) {
        r->backing = BACKING_IN_PLACE;
        region_empty(r);
    }
    pthread_mutex_unlock(&upm.lock);
}

static void region_remove(unsigned index)
{
    struct region *r = upm.regions[index];
    unsigned kept = 0;

    region_empty(r);
    for (unsigned i = 0; i < upm.nslots; i++) {
        if (upm.slots[i].region != r) {
            upm.slots[kept++] = upm.slots[i];
        }
    }
    upm.nslots = kept;
    /* Others may have come or gone while we waited. */
    for (index = 0; upm.regions[index] != r; index++) {
    }
    upm.regions[index] = upm.regions[upm.nregions - 1];
    __atomic_store_n(&upm.nregions, upm.nregions - 1, __ATOMIC_RELEASE);
    region_free(r);
}

static bool ours(int fd)
{
    /* Racy on purpose: this process closes a file of its own that nobody is registering now. */
    for (unsigned i = 0; i < __atomic_load_n(&upm.nregions, __ATOMIC_ACQUIRE); i++) {
        if (upm.regions[i]->private_fd == fd || upm.regions[i]->shared_fd == fd) {
            return true;
        }
    }
    return false;
}

/* Called before the number can be given to another file. */
void region_close(int fd)
{
    if (!ours(fd)) {
        return;
    }
    pthread_mutex_lock(&upm.lock);
    for (unsigned i = 0; i < upm.nregions; i++) {
        struct region *r = upm.regions[i];

        if (r->shared_fd == fd) {
            region_lose_shared(r);
        }
        if (r->private_fd == fd) {
            region_remove(i);
            break;
        }
    }
    pthread_mutex_unlock(&upm.lock);
}

static bool region_overlaps(const struct region *r, const char *start, size_t bytes)
{
    return r->host && start < r->host + (r->pages << PAGE_SHIFT) && r->host < start + bytes;
}

/* Called before the addresses can be given to another mapping. */
void region_unmap(const void *start, size_t bytes)
{
    bool hit = false;

    for (unsigned i = 0; i < __atomic_load_n(&upm.nregions, __ATOMIC_ACQUIRE); i++) {
        hit |= region_overlaps(upm.regions[i], start, bytes);
    }
    if (!hit) {
        return;
    }
    pthread_mutex_lock(&upm.lock);
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (region_overlaps(upm.regions[i], start, bytes)) {
            region_lose_shared(upm.regions[i]);
        }
    }
    pthread_mutex_unlock(&upm.lock);
}

/* Only the first address space: guests with more of them have no private memory. */
void slot_set(uint32_t slot, uint64_t gpa, uint64_t bytes, struct region *region, uint64_t offset)
{
    unsigned at = 0;

    if (slot >> 16) {
        return;
    }
    for (unsigned i = 0; i < upm.nslots; i++) {
        if (upm.slots[i].id == slot) {
            memmove(&upm.slots[i], &upm.slots[i + 1],
                    (upm.nslots - i - 1) * sizeof(*upm.slots));
            upm.nslots--;
            break;
        }
    }
    if (!bytes || !region) {
        return;
    }
    if (upm.nslots == upm.slots_capacity) {
        unsigned capacity = upm.slots_capacity ? 2 * upm.slots_capacity : 64;
        struct slot *slots = realloc(upm.slots, capacity * sizeof(*slots));

        if (!slots) {
            return; /* conversions there stay unknown to us, and QEMU's own */
        }
        upm.slots = slots;
        upm.slots_capacity = capacity;
    }
    while (at < upm.nslots && upm.slots[at].gpa < gpa) {
        at++;
    }
    memmove(&upm.slots[at + 1], &upm.slots[at], (upm.nslots - at) * sizeof(*upm.slots));
    upm.slots[at] = (struct slot) {
        .id = slot, .region = region, .gpa = gpa, .bytes = bytes, .offset = offset,
    };
    upm.nslots++;
}

void slots_clear(void)
{
    upm.nslots = 0;
}
