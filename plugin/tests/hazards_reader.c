/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a reader makes of the record. It keeps a copy of the ledger from records alone, and reads the
 * ledger anew where it is told that some are missing. When it has read all, both must be the same.
 */
#include "hazards.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

const struct hazard reader_hazards[] = {
    { "mirror-of-many-runs", mirror_of_many_runs }, { "mirror-of-resets", mirror_of_resets },
    { NULL, NULL },
};
