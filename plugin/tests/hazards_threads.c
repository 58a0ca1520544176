/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of threads that end, and of what the plugin keeps for a thread. */
#include "hazards.h"

#include <pthread.h>
#include <stdlib.h>

/* 22, where the thread ends before QEMU asks */
static void ended_threads(void)
{
    static const char *const modes[] = { "eager", "defer" };
    struct memory *m = start(RAM_MEMFD, 4 * MIB);

    fill_shared(m, 0, 4 * MIB);
    for (unsigned i = 0; i < 2; i++) {
        free(must("x-upm-configure", "{\"shared\": \"%s\", \"private\": \"%s\", "
                  "\"budget\": 4194304}", modes[i], modes[i]));
        for (unsigned n = 0; n < 8; n++) {
            struct vcpu *v = vcpu_new();

            expect(!vcpu_convert(v, m, n * 4, 4, true));
            vcpu_end(v);
        }
        expect(query("left-alone-bytes") == (i + 1) * 32 * PAGE);
        /* What the threads have left is no hindrance, and nobody's to discard. */
        expect(!guest_convert(m, 0, MIB, false));
        vcpu_run();
        ask_discard_of_all();
        wait_for(discarded, "X_UPM_DISCARDED");
        drain();
    }
    expect(!fake.violations && m->shared[0] == 0x5a && allocated(m->shared_fd) == 4 * MIB);
}

static void *convert_a_page(void *unused)
{
    (void)unused;
    expect(!convert_only(0, PAGE, true));
    return NULL;
}

static void convert_late(void *unused)
{
    convert_a_page(unused);
}

static void *convert_with_key(void *key)
{
    pthread_setspecific(*(pthread_key_t *)key, key);
    return convert_a_page(NULL);
}

/* 22: a thread that ends converts once more, when our own memory of it has gone. */
static void converts_at_its_end(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    pthread_key_t key;
    struct vcpu *v = vcpu_new();

    defer_up_to(MIB);
    expect(!vcpu_convert(v, m, 0, 8, true));   /* our key is older: it is looked at first */
    vcpu_goes_on(v);
    expect(!pthread_key_create(&key, convert_late));
    for (unsigned i = 1; i <= 3; i++) {
        uint64_t before = query("left-alone-bytes");
        pthread_t thread;

        pthread_create(&thread, NULL, convert_with_key, &key);
        pthread_join(thread, NULL);
        expect(query("left-alone-bytes") == before + 2 * PAGE);
    }
}

/* 11, of the plugin's own memory: what it takes for a thread goes with the thread, what it takes for a
 * very large conversion with that, and what it takes for RAM with the RAM. */
static void threads_and_memory(void)
{
    const uint64_t far = 1ull << 40, large = 16ull << 30;
    struct memory *m = start(RAM_MEMFD, MIB);
    uint64_t before = 0;
    pthread_t thread;

    for (int i = 0; i < 1500; i++) {
        expect(!pthread_create(&thread, NULL, convert_a_page, NULL));
        pthread_join(thread, NULL);
        before = i == 100 ? mapped() : before;
    }
    expect(SANITIZED || mapped() < before + 4 * MIB);
    m = memory_new(RAM_MEMFD, far, large);
    slot_plug(1, m, 0, large, far);
    for (int i = 0; i < 20; i++) {
        expect(!convert_only(far, 2ull << 30, false));
        expect(!convert_only(far, large, false));
        vcpu_run();
        before = i == 2 ? mapped() : before;
    }
    expect(SANITIZED || mapped() < before + 4 * MIB);
    for (int i = 0; i < 20; i++) {
        slot_unmap(1);
        memory_free(m);
        m = memory_new(RAM_MEMFD, far, large);
        slot_plug(1, m, 0, large, far);
    }
    expect(SANITIZED || mapped() < before + 4 * MIB);
}

static void *convert_more_and_more(void *unused)
{
    (void)unused;
    expect(!convert_only(0, PAGE, true));
    expect(!convert_only(0, 12 * MIB, false));
    return NULL;
}

/* 11, of the plugin's own memory, where a thread needs more of it than it first took */
static void threads_and_regions(void)
{
    enum { REGIONS = 12 };
    const struct memory *m = start(RAM_MEMFD, MIB);
    uint64_t before = 0;
    pthread_t thread;

    for (unsigned i = 1; i < REGIONS; i++) {
        m = plug(i, RAM_MEMFD, i * MIB, MIB);
    }
    expect(m->gpa == (REGIONS - 1) * MIB);
    for (int i = 0; i < 700; i++) {
        expect(!pthread_create(&thread, NULL, convert_more_and_more, NULL));
        pthread_join(thread, NULL);
        before = i == 100 ? mapped() : before;
    }
    expect(SANITIZED || mapped() < before + MIB);
}

const struct hazard thread_hazards[] = {
    { "ended-threads", ended_threads }, { "converts-at-its-end", converts_at_its_end },
    { "threads-and-memory", threads_and_memory }, { "threads-and-regions", threads_and_regions },
    { NULL, NULL },
};
