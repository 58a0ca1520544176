/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a reader makes of the record. The mirror keeps a copy of the ledger from records alone, and
 * reads the ledger anew where it is told that some are missing. When it has read all, both must be
 * the same.
 */
#include "hazards.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define RING_RECORDS 16384

enum { PAGES = 2560 };

static struct {
    char stale[2][PAGES + 1];   /* '.' or 'x'; [1] is the shared copy */
    unsigned long long cursor;
    unsigned read_anew;
} mirror;

static const char *const copies[] = { "private", "shared" };

static void read_ledger(void)
{
    for (int copy = 0; copy < 2; copy++) {
        char *pages = ledger_of(1, copies[copy], PAGES);

        memcpy(mirror.stale[copy], pages, sizeof(mirror.stale[copy]));
        free(pages);
    }
}

static void take_record(const char *text)
{
    unsigned long long offset, bytes;
    unsigned region, to_private, deferred;

    expect(sscanf(text, "[%u, %llu, %llu, %u, %u,", &region, &offset, &bytes, &to_private,
                  &deferred) == 5);
    expect(region == 1 && bytes && offset + bytes <= PAGES * PAGE);
    memset(mirror.stale[!to_private] + offset / PAGE, '.', bytes / PAGE);
    memset(mirror.stale[to_private] + offset / PAGE, deferred ? 'x' : '.', bytes / PAGE);
}

/* One reply; returns the number of its records. */
static unsigned read_some(unsigned most)
{
    char *reply = must("x-upm-read", "{\"cursor\": %llu, \"max\": %u}", mirror.cursor, most);
    const char *at = strstr(reply, "\"records\": [");
    unsigned long long cursor, dropped;
    unsigned records = 0;

    expect(sscanf(reply, "{\"cursor\": %llu, \"dropped\": %llu", &cursor, &dropped) == 2);
    if (dropped) {
        read_ledger();
        mirror.read_anew++;
    }
    for (at = strchr(at, '[') + 1; (at = strchr(at, '[')); at++) {
        take_record(at);
        records++;
    }
    /* Every number is a record's, or is said to be missing. */
    expect(cursor == mirror.cursor + dropped + records && records <= most);
    mirror.cursor = cursor;
    free(reply);
    return records;
}

/* Reads all there is, `most` at a time. */
static void catch_up(unsigned most)
{
    while (read_some(most) == most) {
    }
    expect(mirror.cursor == query("head"));
    for (int copy = 0; copy < 2; copy++) {
        char *pages = ledger_of(1, copies[copy], PAGES);

        expect(!strcmp(mirror.stale[copy], pages));
        free(pages);
    }
}

static void start_reading(void)
{
    mirror.cursor = query("head");
    mirror.read_anew = 0;
    read_ledger();
}

static void flip(struct memory *m, uint64_t first, uint64_t pages, bool to_private)
{
    expect(!guest_convert(m, first * PAGE, pages * PAGE, to_private));
    vcpu_run();
}

/* Conversions over more runs of stale pages than the record tells of, read in portions: the number
 * that stands for what is missing comes at the end of one, at the beginning, and between. */
static void mirror_of_many_runs(void)
{
    static const unsigned most[] = { 16384, 1024, 1, 512 };
    struct memory *m = start_private(RAM_MEMFD, PAGES * PAGE);

    defer_up_to(2 * PAGES * PAGE);
    for (unsigned i = 0; i < sizeof(most) / sizeof(*most); i++) {
        start_reading();
        for (uint64_t page = 1; page < PAGES; page += 2) {
            flip(m, page, 1, false);
            flip(m, page, 1, true);
        }
        catch_up(most[i]);
        /* Changes nothing, and leaves every other page stale. */
        flip(m, 0, PAGES, true);
        catch_up(most[i]);
        expect(query("stale-shared") == PAGES / 2 * PAGE && mirror.read_anew == 1);
        /* What comes after is read as ever; and with more before and behind what is missing. */
        flip(m, 64, 64, false);
        flip(m, 64, 32, true);
        catch_up(most[i]);
        flip(m, 2, 1, false);
        flip(m, 256, PAGES - 256, true);
        flip(m, 2, 1, true);
        catch_up(most[i]);
        flip(m, 0, PAGES, false);
        flip(m, 0, PAGES, true);
        catch_up(most[i]);
        discard_and_wait("both", 0, PAGES * PAGE);
    }
    expect(!fake.violations);
}

/* 23 and 29: the private copies go with the guest_memfd at a reset, and the shared ones when the
 * RAM is unmapped; no conversion tells of either. */
static void mirror_of_resets(void)
{
    struct memory *m = start_private(RAM_MEMFD, PAGES * PAGE);

    defer_up_to(2 * PAGES * PAGE);
    start_reading();
    for (int boot = 0; boot < 4; boot++) {
        flip(m, 0, 512, false);
        flip(m, 16 * boot, 16, true);
        expect(query("stale-private") == 496 * PAGE);
        if (boot % 2) {
            catch_up(100);
        }
        slot_unmap(0);
        vm_reset(&m, 1);
        slot_plug(0, m, 0, m->bytes, 0);
        vcpu_run();
        expect(query("stale-private") == 0 && query("stale-shared"));
        catch_up(100);
    }
    flip(m, 1024, 64, false);
    flip(m, 1024, 32, true);
    catch_up(100);
    munmap(m->shared, m->bytes);
    expect(query("stale-shared") == 0 && query("stale-private") == 32 * PAGE);
    catch_up(100);
    expect(!fake.violations);
}

/* Conversions that no reader has taken are counted when newer ones take their place. */
static void overrun(void)
{
    const unsigned more = 100;
    const struct memory *m = start(RAM_MEMFD, 4 * MIB);
    char *reply;

    expect(m->bytes == 4 * MIB);
    defer_up_to(MIB);
    for (unsigned i = 0; i < RING_RECORDS + more; i++) {
        expect(!convert_only(i % 2 * 64 * PAGE, PAGE, i / 2 % 2 == 0));
        if (i == RING_RECORDS - 1) {
            vcpu_run();
            expect(query("head") == RING_RECORDS && query("oldest") == 0 && !query("dropped"));
        }
    }
    vcpu_run();
    expect(query("head") == RING_RECORDS + more && query("oldest") == more);
    expect(query("dropped") == more);
    reply = must("x-upm-read", "{\"cursor\": 10, \"max\": 2}");
    expect(strstr(reply, "\"cursor\": 102, \"dropped\": 90, \"records\": [[1, "));
    free(reply);
    /* What has been read is not lost. */
    free(must("x-upm-read", "{\"cursor\": %u, \"max\": %u}", more, RING_RECORDS));
    for (unsigned i = 0; i < 50; i++) {
        expect(!convert_only(i % 2 * 64 * PAGE, PAGE, i / 2 % 2 == 0));
    }
    vcpu_run();
    expect(query("dropped") == more && query("oldest") == more + 50);
}

/* One record of each conversion, whenever it is read; what becomes stale later is told later. */
static void records(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    char *reply;

    defer_up_to(MIB);
    expect(!guest_convert(m, 0, 2 * PAGE, true) && !guest_convert(m, 2 * PAGE, 2 * PAGE, true));
    reply = must("x-upm-read", "{\"cursor\": 0, \"max\": 100}");
    expect(strstr(reply, "\"records\": [[1, 0, 16384, 1, 1, ") && strstr(reply, ", 2]]"));
    free(reply);
    /* Read while QEMU takes long to ask. */
    expect(!convert_only(8 * PAGE, 2 * PAGE, true));
    usleep(1100000);   /* nobody looks until a second is over */
    while (query("head") < 2) {
        usleep(1000);
    }
    reply = must("x-upm-read", "{\"cursor\": 1, \"max\": 100}");
    expect(strstr(reply, "\"records\": [[1, 32768, 8192, 1, 0, ") && strstr(reply, ", 1]]"));
    free(reply);
    expect(!qemu_discard(m, 8 * PAGE, 2 * PAGE, true));
    reply = must("x-upm-read", "{\"cursor\": 2, \"max\": 100}");
    expect(strstr(reply, "\"records\": [[1, 32768, 8192, 1, 1, ") && strstr(reply, ", 0]]"));
    free(reply);
    /* Never asked for, and over the budget: not deferred. */
    expect(!convert_only(16 * PAGE, PAGE, true));
    vcpu_run();
    configure("{\"budget\": 24576}");
    expect(!guest_convert(m, 32 * PAGE, 4 * PAGE, true));
    reply = must("x-upm-read", "{\"cursor\": 3, \"max\": 100}");
    expect(strstr(reply, "[1, 65536, 4096, 1, 0, ") && strstr(reply, "[1, 131072, 16384, 1, 0, "));
    expect(strstr(reply, "\"cursor\": 5, "));
    free(reply);
    expect(counter("conversions-to") == 5);
}

/* A conversion over more runs of stale pages than are worth a record each: a reader is told that it
 * has missed something, whether it comes before or after. */
static void many_runs(void)
{
    struct memory *m = start_private(RAM_MEMFD, 8 * MIB);
    uint64_t head, missed;
    char *reply;

    defer_up_to(16 * MIB);
    for (unsigned runs = 512; runs <= 513; runs++) {
        expect(!guest_convert(m, 0, 8 * MIB, false) && !guest_convert(m, 0, 8 * MIB, true));
        discard_and_wait("both", 0, 8 * MIB);
        for (uint64_t i = 0; i < runs; i++) {
            expect(!guest_convert(m, 2 * i * PAGE, PAGE, false));
            expect(!guest_convert(m, 2 * i * PAGE, PAGE, true));
        }
        expect(query("stale-shared") == runs * PAGE);
        head = query("head");
        missed = query("dropped");
        free(must("x-upm-read", "{\"cursor\": %llu, \"max\": 1}", (unsigned long long)head));
        expect(!guest_convert(m, 0, 8 * MIB, true));
        reply = must("x-upm-read", "{\"cursor\": %llu, \"max\": 2000}", (unsigned long long)head);
        expect(!strstr(reply, "\"dropped\": 0") == (runs > 512));
        expect((query("dropped") > missed) == (runs > 512));
        /* A record of each run and of each gap between two; then of the rest, or of the loss. */
        expect(query("head") == head + 1024);
        free(reply);
    }
    expect(!fake.violations);
}

const struct hazard reader_hazards[] = {
    { "mirror-of-many-runs", mirror_of_many_runs }, { "mirror-of-resets", mirror_of_resets },
    { "overrun", overrun }, { "records", records }, { "many-runs", many_runs }, { NULL, NULL },
};
