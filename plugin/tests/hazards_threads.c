/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of threads: QEMU's, which end, and the plugin's own. */
#include "hazards.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* worker.c: what QEMU's exit calls, by way of the destructor. */
void worker_stop(void);

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

/* The signals that a thread of this process blocks, by its name; 0 if there is none of that name. */
static unsigned long long blocked_by(const char *name)
{
    unsigned long long blocked = 0;
    DIR *tasks = opendir("/proc/self/task");

    for (struct dirent *task; (task = readdir(tasks));) {
        char path[300], line[256], found[256] = "";
        unsigned long long mask;
        FILE *f;

        snprintf(path, sizeof(path), "/proc/self/task/%s/status", task->d_name);
        f = fopen(path, "r");
        while (f && fgets(line, sizeof(line), f)) {
            if (sscanf(line, "Name: %255s", found) != 1 && sscanf(line, "SigBlk: %llx", &mask) == 1
                && !strcmp(found, name)) {
                blocked = mask;
            }
        }
        if (f) {
            fclose(f);
        }
    }
    closedir(tasks);
    return blocked;
}

/* QEMU's signals are for QEMU's threads, and its threads block no more of them than before. */
static void signals(void)
{
    const unsigned long long every = 1ull << (SIGUSR1 - 1) | 1ull << (SIGTERM - 1)
                                     | 1ull << (SIGALRM - 1) | 1ull << (SIGIO - 1);
    sigset_t mine;

    fake_start();
    expect((blocked_by("qmp-upm") & every) == every);
    expect(!pthread_sigmask(SIG_SETMASK, NULL, &mine) && !sigismember(&mine, SIGTERM));
}

static uint64_t cpu_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static bool bell_rang(void)
{
    return fake.events;
}

/* The plugin's thread takes no CPU time while it waits for what is due in a minute: the end of the
 * lease, and the next bell. */
static void sleeps(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    uint64_t before;

    configure("{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": 1048576, "
              "\"lease-ms\": 60000, \"notify-ms\": 60000}");
    for (uint64_t page = 0; page < 2; page++) {
        expect(!guest_convert(m, page * PAGE, PAGE, true));
        vcpu_run();
        wait_for(bell_rang, "the first bell");
        free(must("x-upm-read", "{\"cursor\": 0, \"max\": 10}"));
    }
    usleep(A_WHILE_US);
    before = cpu_ns();
    usleep(10 * A_WHILE_US);
    expect(cpu_ns() < before + 50000000 && fake.events == 1 && stale() == 2 * PAGE);
}

/* QEMU ends: its other threads still close files and convert when the plugin's own has gone. */
static void after_the_worker(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    worker_stop();
    fill_shared(m, 0, PAGE);
    expect(!guest_convert(m, 0, PAGE, true) && stale() == PAGE);
    memory_free(m);
    expect(!stale());
}

const struct hazard thread_hazards[] = {
    { "ended-threads", ended_threads }, { "converts-at-its-end", converts_at_its_end },
    { "threads-and-memory", threads_and_memory }, { "threads-and-regions", threads_and_regions },
    { "signals", signals }, { "sleeps", sleeps }, { "after-the-worker", after_the_worker },
    { NULL, NULL },
};
