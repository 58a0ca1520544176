/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The plugin's state as x-upm-query shows it. */
#include "json.h"
#include "upm.h"

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

static void add_regions(struct text *t)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        const struct region *r = upm.regions[i];
        const char *comma = "";

        text_add(t, "%s{\"id\": %u, \"name\": ", i ? ", " : "", r->id);
        text_add_string(t, r->name);
        text_add(t, ", \"size\": %llu, \"backing\": \"%s\", \"page-size\": %llu, \"slots\": [",
                 in_bytes(r->pages), backing_names[r->backing],
                 (unsigned long long)r->shared_page_bytes);
        for (unsigned s = 0; s < upm.nslots; s++) {
            if (upm.slots[s].region == r) {
                text_add(t, "%s{\"gpa\": %llu, \"size\": %llu, \"offset\": %llu}", comma,
                         (unsigned long long)upm.slots[s].gpa,
                         (unsigned long long)upm.slots[s].bytes,
                         (unsigned long long)upm.slots[s].offset);
                comma = ", ";
            }
        }
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

static void add_counters(struct text *t)
{
    const struct counters *n = &upm.count;
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
    add_pair(t, "superseded-bytes", n->superseded);
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

static const char *conversion_kind(void)
{
    for (unsigned i = 0; i < upm.nregions; i++) {
        if (upm.regions[i]->backing == BACKING_IN_PLACE) {
            return "in-place";
        }
    }
    return upm.nregions ? "two-copy" : "none";
}

static const char *vm_kind(void)
{
    if (upm.vm_kind < 0) {
        return "none";
    }
    return (size_t)upm.vm_kind < sizeof(vm_kinds) / sizeof(*vm_kinds) ? vm_kinds[upm.vm_kind]
                                                                    : "unknown";
}

static void add_lease(struct text *t)
{
    uint64_t now = now_ns(), left = upm.lease_deadline > now ? upm.lease_deadline - now : 0;

    text_add(t, "\"lease\": {\"ms\": %llu, \"remaining-ms\": %llu, \"on-expiry\": \"%s\", "
             "\"expired\": %s}, ", (unsigned long long)(upm.lease_ns / MSEC),
             (unsigned long long)(left / MSEC), upm.keep_on_expiry ? "keep" : "eager",
             upm.lease_expired ? "true" : "false");
}

/* With the lock held. */
void status_add(struct text *t)
{
    text_add(t, "{\"version\": \"%s\", \"protocol\": %d, \"vm-kind\": \"%s\", "
             "\"conversion\": \"%s\", \"page-size\": %llu, \"regions\": [", UPM_VERSION, PROTOCOL,
             vm_kind(), conversion_kind(), PAGE_BYTES);
    add_regions(t);
    text_add(t, "], \"modes\": {\"private\": \"%s\", \"shared\": \"%s\"}, \"budget\": %llu, "
             "\"notify-ms\": %llu, ", mode_names[upm.mode[PRIVATE]],
             mode_names[upm.mode[SHARED]], (unsigned long long)upm.budget,
             (unsigned long long)(upm.notify_ns / MSEC));
    add_lease(t);
    text_add(t, "\"stale\": {\"private\": %llu, \"shared\": %llu, \"peak\": %llu}, ",
             in_bytes(ledger_total(PRIVATE)), in_bytes(ledger_total(SHARED)),
             in_bytes(upm.peak_pages));
    text_add(t, "\"records\": {\"head\": %llu, \"oldest\": %llu, \"dropped\": %llu}, ",
             (unsigned long long)upm.head, (unsigned long long)ring_oldest(),
             (unsigned long long)upm.dropped);
    text_add(t, "\"counters\": {");
    add_counters(t);
    text_add(t, "}, \"latency-ns\": {\"convert\": [");
    add_histogram(t, upm.convert_ns);
    text_add(t, "], \"discard\": [");
    add_histogram(t, upm.discard_ns);
    text_add(t, "]}}");
}
