/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The lock, and the operations under way: conversions in KVM's hands, discards that are being made,
 * and discards that QEMU may yet ask for. While one of the first two is in upm.ops, nobody does the
 * opposite in its range.
 *
 * upm.lock comes after every lock of QEMU's and KVM's and before none: its holder takes no other and
 * calls nobody. Waiting for an operation is waiting for a system call, which waits for nobody here.
 */
#include "upm.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>

#define GIVE_WAY_NS 50000ull

void upm_lock(void)
{
    if (pthread_mutex_trylock(&upm.lock)) {
        __atomic_fetch_add(&upm.contenders, 1, __ATOMIC_RELAXED);
        pthread_mutex_lock(&upm.lock);
        __atomic_fetch_sub(&upm.contenders, 1, __ATOMIC_RELAXED);
    }
}

void upm_unlock(void)
{
    pthread_mutex_unlock(&upm.lock);
}

/* Lets others in who want the lock. A mutex is unfair: whoever unlocks and locks at once wins
 * against a thread that has to be woken first. */
void upm_breathe(void)
{
    upm_unlock();
    if (__atomic_load_n(&upm.contenders, __ATOMIC_RELAXED)) {
        uint64_t end = now_ns() + GIVE_WAY_NS;

        do {
            sched_yield();
        } while (__atomic_load_n(&upm.contenders, __ATOMIC_RELAXED) && now_ns() < end);
    }
    upm_lock();
}

/* Until some operation has ended; the caller looks again from the start. */
void ops_wait(void)
{
    unsigned round = upm.round;

    upm.waiters++;
    pthread_cond_wait(&upm.settled, &upm.lock);
    if (upm.round == round) {
        upm.waiters--;
    } else {
        __atomic_fetch_sub(&upm.contenders, 1, __ATOMIC_RELAXED);
    }
}

/* What they wait for may have come. They want the lock from now on. */
void ops_wake(void)
{
    if (upm.waiters) {
        __atomic_fetch_add(&upm.contenders, upm.waiters, __ATOMIC_RELAXED);
        upm.waiters = 0;
        upm.round++;
        pthread_cond_broadcast(&upm.settled);
    }
}

void op_begin(struct op *op)
{
    op->next = upm.ops;
    op->link = &upm.ops;
    if (op->next) {
        op->next->link = &op->next;
    }
    upm.ops = op;
}

/* Takes it off the list, where nobody waits for its end. */
void op_withdraw(struct op *op)
{
    *op->link = op->next;
    if (op->next) {
        op->next->link = op->link;
    }
    __atomic_store_n(&op->state, OP_IDLE, __ATOMIC_RELEASE);
}

void op_end(struct op *op)
{
    op_withdraw(op);
    ops_wake();
}

/* KVM has converted: from now on QEMU may ask for the discard of the copy that the guest left. */
void op_expect(struct op *op)
{
    op->state = OP_EXPECT;
    ops_wake();
}

bool op_overlaps(const struct op *op, const struct region *r, uint64_t first, uint64_t pages)
{
    return op->region == r && op->first < first + pages && first < op->first + op->pages;
}

/* Cuts [first, first + pages) down to what no conversion makes live again, or waits to. Returns
 * whether anything is left; if not, `first` is where to look next. */
bool ops_allow_discard(const struct region *r, enum copy copy, uint64_t *first, uint64_t *pages)
{
    for (const struct op *op = upm.ops; op; op = op->next) {
        bool live = (op->state == OP_CONVERT || op->state == OP_WAIT) && op->copy == copy;

        if (!live || !op_overlaps(op, r, *first, *pages)) {
            continue;
        }
        if (op->first <= *first) {
            *first = op->first + op->pages;
            return false;
        }
        *pages = op->first - *first;
    }
    return true;
}

/* Where one copy of a run is, as the lock's holder found it. */
struct place {
    int fd;
    uint64_t offset, bytes;
    char *start;
    int advice;
};

static struct place place_of(const struct region *r, enum copy copy, uint64_t first,
                             uint64_t pages)
{
    return (struct place) {
        .fd = copy == PRIVATE ? r->private_fd : r->shared_fd,
        .offset = in_bytes(first) + (copy == PRIVATE ? 0 : r->file.offset),
        .bytes = in_bytes(pages),
        .start = r->host + in_bytes(first),
        .advice = r->advice,
    };
}

/* Returns an errno. */
static int give_back(const struct place *p)
{
    int result;

    do {
        if (p->fd >= 0) {
            result = libc.fallocate(p->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, p->offset,
                                    p->bytes);
        } else {
            result = libc.madvise(p->start, p->bytes, p->advice);
        }
    } while (result && errno == EINTR);
    return result ? errno : 0;
}

/* Discards a run of pages that no conversion is making live; returns an errno. Drops the lock
 * meanwhile: the operation keeps the region, its files and its mapping until the call is made. */
int op_punch(struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    struct op op = {
        .region = r, .state = OP_PUNCH, .copy = copy, .first = first, .pages = pages,
    };
    struct place place = place_of(r, copy, first, pages);
    uint64_t start_ns, took_ns;
    int error;

    op_begin(&op);
    upm_unlock();
    start_ns = now_ns();
    error = give_back(&place);
    took_ns = now_ns() - start_ns;
    upm_lock();
    if (error) {
        upm.count.failed_discards++;
    } else {
        upm.count.discards++;
        r->failures[copy] = 0;
        histogram_add(upm.discard_ns, took_ns);
    }
    op_end(&op);
    return error;
}
