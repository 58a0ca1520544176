/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A conversion, from KVM_SET_MEMORY_ATTRIBUTES to the discard that QEMU owes for it, on the thread
 * of the vCPU. QEMU holds no lock of its own here, and several vCPUs come at once.
 *
 * The order that keeps live pages whole:
 *   1. wait until nobody discards, in the range, the copy that is to become live, and take the
 *      range, so that nobody begins to;
 *   2. let KVM convert;
 *   3. under the lock: take the live copy out of the ledger, and either put the other one in, or
 *      leave an operation behind that waits for QEMU's own discard.
 * If another vCPU converts the range back before QEMU's discard comes, the operation is handed
 * over to the ledger and the discard finds nothing to do.
 */
#include "kvm-abi.h"
#include "upm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

/* One region's part of the conversion, and the calls of QEMU's that belong to it. */
struct part {
    struct op op;
    bool swallow;              /* deferred: QEMU's calls are answered and not made */
    int fd;                    /* -1: none is awaited */
    uint64_t offset, end;      /* in fd: where the next call starts, and the last one ends */
    char *start, *stop;        /* the same for madvise(); NULL: none is awaited */
    int advice;
};

static __thread struct {
    unsigned nparts;
    bool has_destructor;
    /* A slot that this thread has just registered: QEMU marks it private next, which is not a
     * conversion of the guest's. */
    uint64_t registered_gpa, registered_bytes;
    struct part part[PARTS_MAX];
} mine;

static pthread_key_t exit_key;
static pthread_once_t exit_once = PTHREAD_ONCE_INIT;

static void on_thread_exit(void *unused)
{
    (void)unused;
    conversion_over();
}

static void make_exit_key(void)
{
    pthread_key_create(&exit_key, on_thread_exit);
}

void conversion_slot_registered(uint64_t gpa, uint64_t bytes)
{
    conversion_over();
    mine.registered_gpa = gpa;
    mine.registered_bytes = bytes;
}

bool conversion_unfinished(void)
{
    return mine.nparts;
}

/* QEMU will not discard any more for the thread's last conversion. */
void conversion_over(void)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct op *op = &mine.part[i].op;

        if (__atomic_load_n(&op->state, __ATOMIC_ACQUIRE) == OP_IDLE) {
            continue;
        }
        pthread_mutex_lock(&upm.lock);
        if (op->state != OP_IDLE) {
            op_hand_over(op);
        }
        pthread_mutex_unlock(&upm.lock);
    }
    mine.nparts = 0;
}

static struct slot *first_slot_ending_after(uint64_t gpa)
{
    unsigned low = 0, high = upm.nslots;

    while (low < high) {
        unsigned middle = (low + high) / 2;

        if (upm.slots[middle].gpa + upm.slots[middle].bytes <= gpa) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return upm.slots + low;
}

/* Fills mine.part with the regions' parts of [gpa, end). Returns false if there are too many. */
static bool collect(uint64_t gpa, uint64_t end, enum copy live)
{
    struct slot *stop = upm.slots + upm.nslots;

    mine.nparts = 0;
    for (struct slot *s = first_slot_ending_after(gpa); s < stop && s->gpa < end; s++) {
        uint64_t from = gpa > s->gpa ? gpa : s->gpa;
        uint64_t to = end < s->gpa + s->bytes ? end : s->gpa + s->bytes;
        uint64_t first = (s->offset + from - s->gpa) >> PAGE_SHIFT;
        uint64_t pages = (to - from) >> PAGE_SHIFT;
        struct op *last = mine.nparts ? &mine.part[mine.nparts - 1].op : NULL;

        if (last && last->region == s->region && last->first + last->pages == first) {
            last->pages += pages;
            continue;
        }
        if (mine.nparts == PARTS_MAX) {
            mine.nparts = 0;
            return false;
        }
        mine.part[mine.nparts++] = (struct part) {
            .op = {
                .region = s->region, .state = OP_IDLE, .copy = live,
                .first = first, .pages = pages,
            },
            .fd = -1,
        };
    }
    return true;
}

static bool overlap(const struct op *op, uint64_t first, uint64_t pages, const struct op *with)
{
    return op->region == with->region && first < with->first + with->pages
           && with->first < first + pages;
}

/* Whether the part has to wait. What only waits for a call of QEMU's goes to the ledger instead. */
static bool blocked(const struct op *part)
{
    struct op *next;

    for (struct op *op = upm.ops; op; op = next) {
        next = op->next;
        if (op->state == OP_CONVERT && overlap(op, op->first, op->pages, part)) {
            return true;
        }
        if (op->state != OP_DISCARD || op->copy != part->copy
            || !overlap(op, op->first, op->pages, part)) {
            continue;
        }
        if (overlap(op, op->first, op->punching, part)) {
            return true;
        }
        op_hand_over(op);
    }
    return false;
}

static bool any_blocked(void)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        if (blocked(&mine.part[i].op)) {
            return true;
        }
    }
    return false;
}

/* QEMU's calls for this part, to be recognised by their file and offset, or by their address. */
static void await_discard(struct part *part)
{
    const struct region *r = part->op.region;
    uint64_t from = part->op.first << PAGE_SHIFT, bytes = part->op.pages << PAGE_SHIFT;

    if (part->op.copy == PRIVATE) {
        part->fd = r->private_fd;
        part->offset = from;
    } else if (r->shared_fd >= 0) {
        part->fd = r->shared_fd;
        part->offset = r->shared_offset + from;
    }
    part->end = part->offset + bytes;
    if (part->op.copy == SHARED) {
        part->start = r->host + from;
        part->stop = part->start + bytes;
        part->advice = r->shared_fd < 0 ? r->advice : MADV_DONTNEED;
    }
}

static bool discardable(const struct region *r, enum copy copy)
{
    switch (r->backing) {
    case BACKING_IN_PLACE:
        return false;
    case BACKING_HUGETLB:
    case BACKING_UNKNOWN:
        return copy == PRIVATE;
    default:
        return true;
    }
}

static bool may_defer(enum copy copy, uint64_t more_pages)
{
    if (upm.mode[copy] != MODE_DEFER) {
        return false;
    }
    if (upm.stale_pages + more_pages <= upm.budget >> PAGE_SHIFT) {
        return true;
    }
    upm.count.over_budget += more_pages << PAGE_SHIFT;
    if (!upm.budget_hit) {
        upm.budget_hit = true;
        worker_kick();
    }
    return false;
}

/* KVM has converted the part: enter it in the ledger. */
static void settle(struct part *part, bool to_private, uint32_t count, uint64_t time_ns)
{
    struct op *op = &part->op;
    struct region *r = op->region;
    enum copy live = op->copy, left = live == PRIVATE ? SHARED : PRIVATE;
    uint64_t bytes = op->pages << PAGE_SHIFT;

    upm.count.reused[live] += ledger_remove(r, live, op->first, op->pages) << PAGE_SHIFT;
    upm.count.conversions[live] += count;
    upm.count.converted[live] += bytes;
    if (!discardable(r, left)) {
        upm.count.left_alone += bytes;
        op_end(op);
    } else if (may_defer(left, ledger_missing(r, left, op->first, op->pages))) {
        uint64_t added = ledger_add(r, left, op->first, op->pages);

        upm.count.deferred[left] += added << PAGE_SHIFT;
        part->swallow = true;
        op_end(op);
    } else {
        uint64_t again = ledger_remove(r, left, op->first, op->pages);

        upm.count.superseded[left] += again << PAGE_SHIFT;
        op->state = OP_DISCARD;
        op->punching = 0;
        if (upm.waiters) {
            pthread_cond_broadcast(&upm.settled);
        }
    }
    op->copy = left;
    if (discardable(r, left)) {
        await_discard(part);
    }
    ring_append(r, op->first, op->pages, to_private, part->swallow, count, time_ns);
}

/* More parts than a thread has room for: everything else waits while KVM converts, and QEMU
 * discards as it always did. */
static int convert_alone(int vm_fd, unsigned long request, struct upm_kvm_attributes *range,
                         enum copy live)
{
    uint64_t end = range->address + range->size;
    int result;

    while (upm.ops) {
        ops_wait();
    }
    result = libc.ioctl(vm_fd, request, range);
    for (unsigned i = 0; !result && i < upm.nslots; i++) {
        struct slot *s = &upm.slots[i];
        uint64_t from = range->address > s->gpa ? range->address : s->gpa;
        uint64_t to = end < s->gpa + s->bytes ? end : s->gpa + s->bytes;

        if (from < to) {
            uint64_t first = (s->offset + from - s->gpa) >> PAGE_SHIFT;
            uint64_t pages = (to - from) >> PAGE_SHIFT;

            upm.count.reused[live] += ledger_remove(s->region, live, first, pages) << PAGE_SHIFT;
        }
    }
    return result;
}

static int convert_range(int vm_fd, unsigned long request, struct upm_kvm_attributes *range,
                         bool registration)
{
    bool to_private = range->attributes & UPM_KVM_ATTRIBUTE_PRIVATE;
    enum copy live = to_private ? PRIVATE : SHARED;
    uint64_t end = range->address + range->size, start_ns = now_ns(), end_ns;
    int result, error;

    pthread_mutex_lock(&upm.lock);
    do {
        if (!collect(range->address, end, live)) {
            result = convert_alone(vm_fd, request, range, live);
            pthread_mutex_unlock(&upm.lock);
            return result;
        }
    } while (any_blocked() && (ops_wait(), true));
    for (unsigned i = 0; i < mine.nparts; i++) {
        mine.part[i].op.state = OP_CONVERT;
        op_begin(&mine.part[i].op);
    }
    pthread_mutex_unlock(&upm.lock);

    result = libc.ioctl(vm_fd, request, range);
    error = errno;
    end_ns = now_ns();

    pthread_mutex_lock(&upm.lock);
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct op *op = &mine.part[i].op;

        if (!result && !registration) {
            settle(&mine.part[i], to_private, i == 0, end_ns);
            continue;
        }
        if (!result) {
            uint64_t n = ledger_remove(op->region, live, op->first, op->pages);

            upm.count.reused[live] += n << PAGE_SHIFT;
        }
        op_end(op);
    }
    if (mine.nparts && !registration) {
        histogram_add(upm.convert_ns, end_ns - start_ns);
    }
    pthread_mutex_unlock(&upm.lock);
    errno = error;
    return result;
}

/* Stands in for ioctl(KVM_SET_MEMORY_ATTRIBUTES); returns what it returns. */
int convert(int vm_fd, unsigned long request, void *argument)
{
    struct upm_kvm_attributes *range = argument;
    bool registration = mine.registered_bytes && mine.registered_gpa == range->address
                        && mine.registered_bytes == range->size;

    conversion_over();
    mine.registered_bytes = 0;
    if (!range->size || (range->address | range->size) % PAGE_BYTES
        || range->address + range->size < range->address) {
        return libc.ioctl(vm_fd, request, argument); /* KVM refuses it */
    }
    if (!mine.has_destructor) {
        pthread_once(&exit_once, make_exit_key);
        pthread_setspecific(exit_key, &mine);
        mine.has_destructor = true;
    }
    return convert_range(vm_fd, request, range, registration);
}

/* Whether the call is the discard that this thread's last conversion owes; done with, if so. */
bool conversion_discard_fd(int fd, off64_t offset, off64_t bytes, int *result)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];

        if (part->fd != fd || part->offset != (uint64_t)offset || bytes <= 0
            || bytes % PAGE_BYTES || part->offset + bytes > part->end) {
            continue;
        }
        part->offset += bytes;
        if (!part->swallow) {
            op_discard(&part->op, bytes >> PAGE_SHIFT);
        }
        *result = 0;
        return true;
    }
    return false;
}

bool conversion_discard_mapping(const void *start, size_t bytes, int advice, int *result)
{
    for (unsigned i = 0; i < mine.nparts; i++) {
        struct part *part = &mine.part[i];

        if (!part->start || part->start != start || part->advice != advice || !bytes
            || bytes % PAGE_BYTES || bytes > (size_t)(part->stop - part->start)) {
            continue;
        }
        part->start += bytes;
        /* A punch of the file has emptied the mapping as well: the madvise() after it is spared. */
        if (!part->swallow && part->fd < 0) {
            op_discard(&part->op, bytes >> PAGE_SHIFT);
        }
        *result = 0;
        return true;
    }
    return false;
}
