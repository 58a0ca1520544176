/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Operations under way: conversions in KVM's hands and discards being made or awaited. While one
 * is in upm.ops, nobody else does the opposite in its range.
 */
#include "upm.h"

#include <errno.h>
#include <fcntl.h>

void op_begin(struct op *op)
{
    op->next = upm.ops;
    upm.ops = op;
}

void op_end(struct op *op)
{
    for (struct op **at = &upm.ops; *at; at = &(*at)->next) {
        if (*at == op) {
            *at = op->next;
            break;
        }
    }
    __atomic_store_n(&op->state, OP_IDLE, __ATOMIC_RELEASE); /* its thread looks without the lock */
    if (upm.waiters) {
        pthread_cond_broadcast(&upm.settled);
    }
}

/* Leaves to the ledger what a discarding operation has not begun to punch: the range is being
 * converted back, its discard failed, or QEMU never asked for it. */
void op_hand_over(struct op *op)
{
    struct region *r = op->region;
    uint64_t first = op->first + op->punching, pages = op->pages - op->punching;
    uint64_t added = ledger_add(r, op->copy, first, pages);

    upm.count.deferred[op->copy] += added << PAGE_SHIFT;
    if (added) {
        ring_append(r, first, pages, op->copy == SHARED, true, 0, now_ns());
        worker_kick();
    }
    op->pages = op->punching;
    if (!op->pages) {
        op_end(op);
    }
}

/* Cuts [first, first + pages) down to what no conversion is making live again. Returns whether
 * anything is left; if not, `first` is where to look next. */
bool op_shields(const struct region *r, enum copy copy, uint64_t *first, uint64_t *pages)
{
    for (const struct op *op = upm.ops; op; op = op->next) {
        uint64_t end = op->first + op->pages;

        if (op->state != OP_CONVERT || op->region != r || op->copy != copy
            || op->first >= *first + *pages || end <= *first) {
            continue;
        }
        if (op->first <= *first) {
            *first = end;
            return false;
        }
        *pages = op->first - *first;
    }
    return true;
}

/* Until some operation has ended; the caller looks again from the start. */
void ops_wait(void)
{
    upm.waiters++;
    pthread_cond_wait(&upm.settled, &upm.lock);
    upm.waiters--;
}

/* Gives the memory of one copy back. Without the lock, with an operation on the range. */
int punch(const struct region *r, enum copy copy, uint64_t first, uint64_t pages)
{
    uint64_t offset = first << PAGE_SHIFT, bytes = pages << PAGE_SHIFT;
    int fd = copy == PRIVATE ? r->private_fd : r->shared_fd;
    int result;

    if (copy == SHARED) {
        offset += r->shared_offset;
    }
    do {
        if (fd >= 0) {
            result = libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
        } else {
            result = libc.madvise(r->host + (first << PAGE_SHIFT), bytes, r->advice);
        }
    } while (result && errno == EINTR);
    return result;
}

/* QEMU's own discard, a chunk at a time, of what has not been converted back. The guest's
 * conversion is done: it isn't told of a failure; the copy goes to the ledger to be tried again. */
void op_discard(struct op *op, uint64_t pages)
{
    pthread_mutex_lock(&upm.lock);
    while (pages && op->state == OP_DISCARD) {
        uint64_t n = pages < CHUNK_PAGES ? pages : CHUNK_PAGES, start_ns;
        int result;

        if (n > op->pages) {
            n = op->pages;
        }
        op->punching = n;
        pthread_mutex_unlock(&upm.lock);
        start_ns = now_ns();
        result = punch(op->region, op->copy, op->first, n);
        pthread_mutex_lock(&upm.lock);
        op->punching = 0;
        if (result) {
            upm.count.failed_discards++;
            op_hand_over(op);
            break;
        }
        histogram_add(upm.discard_ns, now_ns() - start_ns);
        upm.count.inline_[op->copy] += n << PAGE_SHIFT;
        upm.count.discards++;
        op->first += n;
        op->pages -= n;
        pages -= n;
        if (!op->pages) {
            op_end(op);
        } else if (upm.waiters) {
            pthread_cond_broadcast(&upm.settled);
        }
    }
    pthread_mutex_unlock(&upm.lock);
}
