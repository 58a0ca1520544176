/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The plugin's state as x-upm-query shows it. */
#include "json.h"
#include "upm.h"

#include <stdlib.h>
#include <string.h>

#define PROTOCOL 1

const char *const copy_names[] = { "private", "shared" };
const char *const mode_names[] = { [MODE_EAGER] = "eager", [MODE_DEFER] = "defer" };
static const char *const backing_names[] = {
    [BACKING_UNKNOWN] = "unknown", [BACKING_MEMFD] = "memfd", [BACKING_FILE] = "file",
    [BACKING_ANONYMOUS] = "anonymous", [BACKING_HUGETLB] = "hugetlb",
    [BACKING_IN_PLACE] = "in-place",
};
/* By the machine type of KVM_CREATE_VM. */
static const char *const vm_kinds[] = {
    "default", "sw-protected", "sev", "sev-es", "sev-snp", "tdx",
};

static const char *const conversion_names[] = { "none", "two-copy", "in-place" };

/* What the answer says of a region. */
struct region_seen {
    uint32_t id;
    enum backing backing;
    bool lost, failing;
    char name[64];
    uint64_t pages, page_bytes, stale_pages[COPIES];
};

/* The state at one moment, taken with the lock held and put into words without it. */
struct seen {
    struct region_seen region[REGIONS_MAX];
    unsigned nregions, nslots, slots_capacity;
    struct { uint32_t region; uint64_t gpa, bytes, offset; } *slot;
    int vm_kind;
    bool launching, keep_on_expiry, lease_expired;
    enum mode mode[COPIES];
    uint64_t budget, notify_ns, lease_ns, lease_left_ns, stale_pages[COPIES], peak_pages;
    uint64_t head, oldest, dropped;
    struct counters count;
    uint64_t convert_ns[BUCKETS], discard_ns[BUCKETS];
};

static void see_regions(struct seen *s)
{
    s->nregions = 0;
    for (unsigned i = 0; i < upm.nregions; i++) {
        const struct region *r = &upm.region[i];
        struct region_seen *seen = &s->region[s->nregions];

        if (!r->pages) {
            continue;
        }
        s->nregions++;
        *seen = (struct region_seen) {
            .id = r->id, .backing = r->backing, .pages = r->pages,
            .lost = r->lost, 
            .failing = r->failures[PRIVATE] >= FAILURES_MAX || r->failures[SHARED] >= FAILURES_MAX,
            .page_bytes = r->shared_page_bytes,
            .stale_pages = { r->stale[PRIVATE].total, r->stale[SHARED].total },
        };
        memcpy(seen->name, r->name, sizeof(seen->name));
    }
    for (unsigned i = 0; i < upm.nslots; i++) {
        const struct slot *slot = &upm.slots[i];

        s->slot[i].region = slot->region->id;
        s->slot[i].gpa = slot->gpa;
        s->slot[i].bytes = slot->bytes;
        s->slot[i].offset = slot->offset;
    }
    s->nslots = upm.nslots;
}

static void see_rest(struct seen *s)
{
    uint64_t now = now_ns();

    s->vm_kind = upm.vm_kind;
    s->launching = upm.launching;
    s->keep_on_expiry = upm.keep_on_expiry;
    s->lease_expired = upm.lease_expired;
    memcpy(s->mode, upm.mode, sizeof(s->mode));
    s->budget = upm.budget;
    s->notify_ns = upm.notify_ns;
    s->lease_ns = upm.lease_ns;
    s->lease_left_ns = upm.lease_deadline > now ? upm.lease_deadline - now : 0;
    memcpy(s->stale_pages, upm.stale_of, sizeof(s->stale_pages));
    s->peak_pages = upm.peak_pages;
    conversion_record_pending(now);
    s->head = upm.head;
    s->oldest = ring_oldest();
    s->dropped = upm.dropped;
    s->count = upm.count;
    memcpy(s->convert_ns, upm.convert_ns, sizeof(s->convert_ns));
    memcpy(s->discard_ns, upm.discard_ns, sizeof(s->discard_ns));
}

/* False if there is no memory. */
static bool see(struct seen *s)
{
    upm_lock();
    while (upm.nslots > s->slots_capacity) {
        unsigned capacity = upm.nslots;
        void *more;

        upm_unlock();
        more = realloc(s->slot, capacity * sizeof(*s->slot));
        if (!more) {
            return false;
        }
        s->slot = more;
        s->slots_capacity = capacity;
        upm_lock();
    }
    see_regions(s);
    see_rest(s);
    upm_unlock();
    return true;
}

static void add_slots(struct text *t, const struct seen *s, uint32_t region)
{
    const char *comma = "";

    for (unsigned i = 0; i < s->nslots; i++) {
        if (s->slot[i].region == region) {
            text_add(t, "%s{\"gpa\": %llu, \"size\": %llu, \"offset\": %llu}", comma,
                     (unsigned long long)s->slot[i].gpa, (unsigned long long)s->slot[i].bytes,
                     (unsigned long long)s->slot[i].offset);
            comma = ", ";
        }
    }
}

static void add_regions(struct text *t, const struct seen *s)
{
    for (unsigned i = 0; i < s->nregions; i++) {
        const struct region_seen *r = &s->region[i];

        text_add(t, "%s{\"id\": %u, \"name\": ", i ? ", " : "", r->id);
        text_add_string(t, r->name);
        text_add(t, ", \"size\": %llu, \"backing\": \"%s\", \"page-size\": %llu, "
                 "\"state\": \"%s\", \"slots\": [", in_bytes(r->pages), backing_names[r->backing],
                 (unsigned long long)r->page_bytes,
                 r->lost ? "lost" : r->failing ? "failing" : "followed");
        add_slots(t, s, r->id);
        text_add(t, "], \"stale-private\": %llu, \"stale-shared\": %llu}",
                 in_bytes(r->stale_pages[PRIVATE]), in_bytes(r->stale_pages[SHARED]));
    }
}

static void add_pair(struct text *t, const char *name, const uint64_t *by_copy)
{
    for (int c = 0; c < COPIES; c++) {
        text_add(t, "\"%s-%s\": %llu, ", name, copy_names[c], (unsigned long long)by_copy[c]);
    }
}

static void add_counters(struct text *t, const struct counters *n)
{
    const struct { const char *name; uint64_t value; } single[] = {
        { "left-alone-bytes", n->left_alone }, { "skipped-bytes", n->skipped },
        { "over-budget-bytes", n->over_budget }, { "discards", n->discards },
        { "failed-discards", n->failed_discards }, { "lease-expiries", n->lease_expiries },
        { "commands", n->commands }, { "events", n->events },
    };

    add_pair(t, "conversions-to", n->conversions);
    add_pair(t, "converted-bytes-to", n->converted);
    add_pair(t, "deferred-bytes", n->deferred);
    add_pair(t, "reused-bytes", n->reused);
    add_pair(t, "inline-bytes", n->inline_);
    add_pair(t, "requested-bytes", n->requested);
    add_pair(t, "failsafe-bytes", n->failsafe);
    add_pair(t, "forgotten-bytes", n->forgotten);
    for (unsigned i = 0; i < sizeof(single) / sizeof(*single); i++) {
        text_add(t, "%s\"%s\": %llu", i ? ", " : "", single[i].name,
                 (unsigned long long)single[i].value);
    }
}

static void add_histogram(struct text *t, const uint64_t *buckets)
{
    for (int i = 0; i < BUCKETS; i++) {
        text_add(t, "%s%llu", i ? ", " : "", (unsigned long long)buckets[i]);
    }
}

static const char *conversion_kind(const struct seen *s)
{
    for (unsigned i = 0; i < s->nregions; i++) {
        if (s->region[i].backing == BACKING_IN_PLACE) {
            return conversion_names[2];
        }
    }
    return conversion_names[s->nregions > 0];
}

static const char *vm_kind(int kind)
{
    if (kind < 0) {
        return "none";
    }
    return (size_t)kind < sizeof(vm_kinds) / sizeof(*vm_kinds) ? vm_kinds[kind] : "unknown";
}

static void add_seen(struct text *t, const struct seen *s)
{
    text_add(t, "{\"version\": \"%s\", \"protocol\": %d, \"vm-kind\": \"%s\", "
             "\"launching\": %s, \"conversion\": \"%s\", \"page-size\": %llu, \"regions\": [",
             UPM_VERSION, PROTOCOL, vm_kind(s->vm_kind), s->launching ? "true" : "false",
             conversion_kind(s), PAGE_BYTES);
    add_regions(t, s);
    text_add(t, "], \"modes\": {\"private\": \"%s\", \"shared\": \"%s\"}, \"budget\": %llu, "
             "\"notify-ms\": %llu, ", mode_names[s->mode[PRIVATE]], mode_names[s->mode[SHARED]],
             (unsigned long long)s->budget, (unsigned long long)(s->notify_ns / MSEC));
    text_add(t, "\"lease\": {\"ms\": %llu, \"remaining-ms\": %llu, \"on-expiry\": \"%s\", "
             "\"expired\": %s}, ", (unsigned long long)(s->lease_ns / MSEC),
             (unsigned long long)(s->lease_left_ns / MSEC), s->keep_on_expiry ? "keep" : "eager",
             s->lease_expired ? "true" : "false");
    text_add(t, "\"stale\": {\"private\": %llu, \"shared\": %llu, \"peak\": %llu}, ",
             in_bytes(s->stale_pages[PRIVATE]), in_bytes(s->stale_pages[SHARED]),
             in_bytes(s->peak_pages));
    text_add(t, "\"records\": {\"head\": %llu, \"oldest\": %llu, \"dropped\": %llu}, ",
             (unsigned long long)s->head, (unsigned long long)s->oldest,
             (unsigned long long)s->dropped);
    text_add(t, "\"counters\": {");
    add_counters(t, &s->count);
    text_add(t, "}, \"latency-ns\": {\"convert\": [");
    add_histogram(t, s->convert_ns);
    text_add(t, "], \"discard\": [");
    add_histogram(t, s->discard_ns);
    text_add(t, "]}}");
}

bool status_add(struct text *t)
{
    struct seen *s = calloc(1, sizeof(*s));
    bool done = s && see(s);

    if (done) {
        add_seen(t, s);
    }
    if (s) {
        free(s->slot);
    }
    free(s);
    return done;
}
