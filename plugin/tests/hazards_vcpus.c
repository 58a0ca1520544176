/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Threads of QEMU's that do one thing after the other, when told to. */
#include "hazards.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define WAIT_SECONDS 30

enum act { ACT_NONE, ACT_CONVERT, ACT_DISCARD, ACT_RUN, ACT_FREE, ACT_END };

struct vcpu {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum act act;              /* ACT_NONE when it is done */
    struct memory *m;
    uint64_t offset, bytes;
    bool private;
    int result;
};

static int perform(const struct vcpu *v)
{
    switch (v->act) {
    case ACT_CONVERT:
        return convert_only(v->m->gpa + v->offset, v->bytes, v->private);
    case ACT_DISCARD:
        return qemu_discard(v->m, v->offset, v->bytes, v->private);
    case ACT_FREE:
        memory_free(v->m);
        return 0;
    case ACT_RUN:
        vcpu_run();
        return 0;
    default:
        return 0;
    }
}

static void *serve(void *argument)
{
    struct vcpu *v = argument;
    bool more = true;

    pthread_mutex_lock(&v->lock);
    while (more) {
        int result;

        while (v->act == ACT_NONE) {
            pthread_cond_wait(&v->changed, &v->lock);
        }
        pthread_mutex_unlock(&v->lock);
        result = perform(v);
        pthread_mutex_lock(&v->lock);
        more = v->act != ACT_END;
        v->result = result;
        v->act = ACT_NONE;
        pthread_cond_broadcast(&v->changed);
    }
    pthread_mutex_unlock(&v->lock);
    return NULL;
}

struct vcpu *vcpu_new(void)
{
    struct vcpu *v = calloc(1, sizeof(*v));

    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->changed, NULL);
    expect(!pthread_create(&v->thread, NULL, serve, v));
    return v;
}

static void begin(struct vcpu *v, enum act act, const struct memory *m, uint64_t first,
                  uint64_t pages, bool private)
{
    pthread_mutex_lock(&v->lock);
    expect(v->act == ACT_NONE);
    v->act = act;
    v->m = (struct memory *)m;
    v->offset = first * PAGE;
    v->bytes = pages * PAGE;
    v->private = private;
    pthread_cond_broadcast(&v->changed);
    pthread_mutex_unlock(&v->lock);
}

void vcpu_begin_convert(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                        bool to_private)
{
    begin(v, ACT_CONVERT, m, first, pages, to_private);
}

void vcpu_begin_discard(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                        bool now_private)
{
    begin(v, ACT_DISCARD, m, first, pages, now_private);
}

void vcpu_begin_free(struct vcpu *v, struct memory *m)
{
    begin(v, ACT_FREE, m, 0, 0, false);
}

bool vcpu_is_done(struct vcpu *v)
{
    bool done;

    pthread_mutex_lock(&v->lock);
    done = v->act == ACT_NONE;
    pthread_mutex_unlock(&v->lock);
    return done;
}

int vcpu_finish(struct vcpu *v)
{
    struct timespec end;
    int result;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += WAIT_SECONDS;
    pthread_mutex_lock(&v->lock);
    while (v->act != ACT_NONE) {
        if (pthread_cond_timedwait(&v->changed, &v->lock, &end)) {
            fail("a thread still waits after %d s", WAIT_SECONDS);
        }
    }
    result = v->result;
    pthread_mutex_unlock(&v->lock);
    return result;
}

int vcpu_convert(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                 bool to_private)
{
    vcpu_begin_convert(v, m, first, pages, to_private);
    return vcpu_finish(v);
}

int vcpu_discard(struct vcpu *v, const struct memory *m, uint64_t first, uint64_t pages,
                 bool now_private)
{
    vcpu_begin_discard(v, m, first, pages, now_private);
    return vcpu_finish(v);
}

void vcpu_goes_on(struct vcpu *v)
{
    begin(v, ACT_RUN, NULL, 0, 0, false);
    vcpu_finish(v);
}

void vcpu_end(struct vcpu *v)
{
    begin(v, ACT_END, NULL, 0, 0, false);
    pthread_join(v->thread, NULL);
    pthread_mutex_destroy(&v->lock);
    pthread_cond_destroy(&v->changed);
    free(v);
}
