/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a VMM that delays discards must never do, one case each: `hazards NAME`. Exit code 0: held;
 * 77: this host has not what the case needs. The tests that run them say what each is about.
 */
#include "hazards.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int gate_shut, gate_waiting;

void shut_gate(void)
{
    __atomic_store_n(&gate_shut, 1, __ATOMIC_SEQ_CST);
}

void open_gate(void)
{
    __atomic_store_n(&gate_shut, 0, __ATOMIC_SEQ_CST);
}

void stop_attributes(void)
{
    __atomic_store_n(&gate_waiting, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&gate_shut, __ATOMIC_SEQ_CST)) {
        usleep(100);
    }
    __atomic_store_n(&gate_waiting, 0, __ATOMIC_SEQ_CST);
}

void stop_punch(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    stop_attributes();
}

bool somebody_waits(void)
{
    return __atomic_load_n(&gate_waiting, __ATOMIC_SEQ_CST);
}

struct memory *start_private(enum kind kind, uint64_t bytes)
{
    struct memory *m;

    fake_start();
    m = memory_new(kind, 0, bytes);
    slot_plug(0, m, 0, bytes, 0);
    vcpu_run();
    return m;
}

struct memory *start(enum kind kind, uint64_t bytes)
{
    struct memory *m;

    fake_start();
    m = memory_new(kind, 0, bytes);
    slot_plug(0, m, 0, bytes, 0);
    expect(!convert_only(0, bytes, false));
    vcpu_run();
    return m;
}

struct memory *plug(unsigned slot, enum kind kind, uint64_t gpa, uint64_t bytes)
{
    struct memory *m = memory_new(kind, gpa, bytes);

    slot_plug(slot, m, 0, bytes, gpa);
    expect(!convert_only(gpa, bytes, false));
    vcpu_run();
    return m;
}

void configure(const char *settings)
{
    free(must("x-upm-configure", "%s", settings));
}

void defer_up_to(uint64_t budget)
{
    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": %llu, "
              "\"notify-ms\": 1, \"lease-ms\": 0}", (unsigned long long)budget));
}

void fill_shared(const struct memory *m, uint64_t offset, uint64_t bytes)
{
    memset(m->shared + offset, 0x5a, bytes);
}

uint64_t allocated(int fd)
{
    struct stat st;

    expect(!fstat(fd, &st));
    return st.st_blocks * 512;
}

bool resident(const char *start)
{
    unsigned char in;

    expect(!mincore((void *)start, PAGE, &in));
    return in & 1;
}

uint64_t mapped(void)
{
    unsigned long long pages;
    FILE *f = fopen("/proc/self/statm", "r");

    expect(f && fscanf(f, "%llu", &pages) == 1);
    fclose(f);
    return pages * PAGE;
}

bool discarded(void)
{
    return fake.discarded_id == 7;
}

void ask_discard(const char *copy, uint64_t offset, uint64_t bytes)
{
    fake.discarded_id = 0;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"%s\", \"ranges\": [[1, %llu, %llu]]}", copy,
              (unsigned long long)offset, (unsigned long long)bytes));
}

void ask_discard_of_all(void)
{
    fake.discarded_id = 0;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"both\", \"all\": true}"));
}

void discard_and_wait(const char *copy, uint64_t offset, uint64_t bytes)
{
    ask_discard(copy, offset, bytes);
    wait_for(discarded, "X_UPM_DISCARDED");
}

bool ledger_is_empty(void)
{
    return !stale();
}

int main(int argc, char **argv)
{
    static const struct hazard *const all[] = {
        closing_hazards, command_hazards, conversion_hazards, discard_hazards, failure_hazards,
        launch_hazards, model_hazards, ownership_hazards, reader_hazards, region_hazards,
        thread_hazards, turn_hazards,
    };

    for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++) {
        for (const struct hazard *h = all[i]; h->name; h++) {
            if (argc == 1) {
                puts(h->name);
            } else if (argc == 2 && !strcmp(argv[1], h->name)) {
                h->run();
                expect(accounting_closes());
                wait_for(nobody_waits, "those who wait to be done");
                return 0;
            }
        }
    }
    return argc != 1;
}
