/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The QMP commands. Each reads its arguments whole and refuses what it doesn't know before it
 * changes anything. All may run out of band.
 */
#include "arguments.h"
#include "upm.h"

#include <stdlib.h>

#define READ_MOST RING_RECORDS
#define STALE_MOST 16384
#define RANGES_MOST 16384
/* What is looked at in one hold of the lock. */
#define RUNS_AT_ONCE 1024
#define RANGES_AT_ONCE 64
#define MS_MOST (24 * 3600 * 1000)

static void reply(struct qobject **result, struct text *t, struct qerror **error)
{
    if (t->failed) {
        qemu_fail(error, "no memory for the reply");
    } else {
        qemu_return(result, t->p, error);
    }
    free(t->p);
}

static void count_command(void)
{
    upm.count.commands++;
    lease_renew();
}

static void cmd_query(struct qdict *dict, struct qobject **result, struct qerror **error)
{
    static const char *const known[] = { NULL };
    struct text t = { 0 };
    char *text;
    struct json *args = args_read(dict, known, &text, error);

    if (!args) {
        return;
    }
    upm_lock();
    upm.count.commands++;
    upm_unlock();
    if (status_add(&t)) {
        reply(result, &t, error);
    } else {
        qemu_fail(error, "no memory for the reply");
    }
    args_free(args, text);
}

struct settings {
    int mode[COPIES], keep;
    int64_t budget, lease_ms, notify_ms;
};

static bool read_settings(const struct json *args, struct settings *s, struct qerror **error)
{
    static const char *const expiry[] = { "eager", "keep" };

    return args_optional_choice(args, "private", mode_names, &s->mode[PRIVATE], error)
           && args_optional_choice(args, "shared", mode_names, &s->mode[SHARED], error)
           && args_optional_choice(args, "on-lease-expiry", expiry, &s->keep, error)
           && args_optional_int(args, "budget", INT64_MAX, &s->budget, error)
           && args_optional_int(args, "lease-ms", MS_MOST, &s->lease_ms, error)
           && args_optional_int(args, "notify-ms", MS_MOST, &s->notify_ms, error);
}

/* With the lock held. What is not given stays. */
static void apply_settings(const struct settings *s)
{
    for (int c = 0; c < COPIES; c++) {
        if (s->mode[c] != NOT_GIVEN) {
            upm.mode[c] = s->mode[c];
        }
    }
    if (s->keep != NOT_GIVEN) {
        upm.keep_on_expiry = s->keep;
    }
    if (s->budget != NOT_GIVEN) {
        upm.budget = s->budget;
    }
    if (s->lease_ms != NOT_GIVEN) {
        upm.lease_ns = s->lease_ms * MSEC;
    }
    if (s->notify_ms != NOT_GIVEN) {
        upm.notify_ns = s->notify_ms * MSEC;
    }
    upm.bell_armed = upm.notify_ns;
    upm.lease_deadline = 0;
    upm.lease_expired = false;
}

static void cmd_configure(struct qdict *dict, struct qobject **result, struct qerror **error)
{
    static const char *const known[] = {
        "private", "shared", "budget", "lease-ms", "on-lease-expiry", "notify-ms", NULL,
    };
    char *text;
    struct json *args = args_read(dict, known, &text, error);
    struct settings s;

    (void)result;
    if (!args) {
        return;
    }
    if (read_settings(args, &s, error)) {
        upm_lock();
        apply_settings(&s);
        count_command();
        drain_at_once();
        upm_unlock();
    }
    args_free(args, text);
}

/* What a read takes from the ring: copied with the lock held, put into words without it. */
struct excerpt {
    struct record *records;
    uint64_t count, cursor, lost;
};

/* With the lock held. False if the cursor is from the future. */
static bool take_records(struct excerpt *e, uint64_t cursor, uint64_t most)
{
    uint64_t oldest;

    conversion_record_pending(now_ns());
    if (cursor > upm.head) {
        return false;
    }
    oldest = ring_oldest();
    e->lost = cursor < oldest ? oldest - cursor : 0;
    cursor += e->lost;
    e->count = upm.head - cursor < most ? upm.head - cursor : most;
    for (uint64_t i = 0; i < e->count; i++) {
        e->records[i] = upm.ring[(cursor + i) % RING_RECORDS];
    }
    e->cursor = cursor + e->count;
    if (e->cursor > upm.sealed) {
        upm.sealed = e->cursor;
    }
    upm.bell_armed = upm.notify_ns;
    upm.bell = e->cursor < upm.head;
    if (upm.bell) {
        worker_kick();
    }
    count_command();
    return true;
}

static void add_records(struct text *t, const struct excerpt *e)
{
    text_add(t, "{\"cursor\": %llu, \"dropped\": %llu, \"records\": [",
             (unsigned long long)e->cursor, (unsigned long long)e->lost);
    for (uint64_t i = 0; i < e->count; i++) {
        const struct record *r = &e->records[i];

        text_add(t, "%s[%u, %llu, %llu, %d, %d, %llu, %u]", i ? ", " : "", r->region,
                 in_bytes(r->first), in_bytes(r->pages), r->to_private, r->deferred,
                 (unsigned long long)r->time_ns, r->count);
    }
    text_add(t, "]}");
}

static void cmd_read(struct qdict *dict, struct qobject **result, struct qerror **error)
{
    static const char *const known[] = { "cursor", "max", NULL };
    char *text;
    struct json *args = args_read(dict, known, &text, error);
    struct excerpt e = { 0 };
    struct text t = { 0 };
    int64_t cursor, most;
    bool ok;

    if (!args) {
        return;
    }
    if (!args_int(args, "cursor", 0, INT64_MAX, &cursor, error)
        || !args_int(args, "max", 1, READ_MOST, &most, error)) {
        goto out;
    }
    e.records = malloc(most * sizeof(*e.records));
    if (!e.records) {
        qemu_fail(error, "no memory for the reply");
        goto out;
    }
    upm_lock();
    ok = take_records(&e, cursor, most);
    upm_unlock();
    if (!ok) {
        qemu_fail(error, "Parameter 'cursor' is beyond the newest record");
        goto out;
    }
    add_records(&t, &e);
    reply(result, &t, error);
out:
    free(e.records);
    args_free(args, text);
}

struct runs {
    struct { uint64_t first, pages; } *run;
    uint64_t count, end;   /* end: the page to go on from */
    bool done;
};

static void add_run(struct runs *runs, uint64_t first, uint64_t pages)
{
    if (runs->count && first == runs->end) {
        runs->run[runs->count - 1].pages += pages;
    } else {
        runs->run[runs->count].first = first;
        runs->run[runs->count++].pages = pages;
    }
    runs->end = first + pages;
}

/* With the lock held, which it drops now and then: the region is looked up each time. False if
 * there is no such region. */
static bool take_runs(struct runs *runs, uint32_t region, enum copy copy, uint64_t most)
{
    while (!runs->done && runs->count < most) {
        const struct region *r = region_by_id(region);

        if (!r) {
            return false;
        }
        for (int i = 0; i < RUNS_AT_ONCE && !runs->done && runs->count < most; i++) {
            uint64_t first, pages;

            runs->done = !ledger_next(r, copy, runs->end, r->pages, r->pages,
                                      &first, &pages);
            if (!runs->done) {
                add_run(runs, first, pages);
            }
        }
        upm_breathe();
    }
    return true;
}

static void cmd_stale(struct qdict *dict, struct qobject **result, struct qerror **error)
{
    static const char *const known[] = { "copy", "region", "cursor", "max", NULL };
    char *text;
    struct json *args = args_read(dict, known, &text, error);
    struct runs runs = { 0 };
    struct text t = { 0 };
    int64_t id, cursor, most;
    unsigned copy;
    bool found;

    if (!args) {
        return;
    }
    if (!args_choice(args, "copy", copy_names, COPIES, &copy, error)
        || !args_int(args, "region", 1, UINT32_MAX, &id, error)
        || !args_int(args, "cursor", 0, INT64_MAX, &cursor, error)
        || !args_int(args, "max", 1, STALE_MOST, &most, error)) {
        goto out;
    }
    runs.run = malloc(most * sizeof(*runs.run));
    if (!runs.run) {
        qemu_fail(error, "no memory for the reply");
        goto out;
    }
    runs.end = (uint64_t)cursor >> PAGE_SHIFT;
    upm_lock();
    found = take_runs(&runs, id, copy, most);
    if (found) {
        count_command();
    }
    upm_unlock();
    if (!found) {
        qemu_fail(error, "Region %lld not found", (long long)id);
        goto out;
    }
    text_add(&t, "{\"ranges\": [");
    for (uint64_t i = 0; i < runs.count; i++) {
        text_add(&t, "%s[%llu, %llu]", i ? ", " : "", in_bytes(runs.run[i].first),
                 in_bytes(runs.run[i].pages));
    }
    text_add(&t, "], \"cursor\": %llu, \"done\": %s}", in_bytes(runs.end),
             runs.done ? "true" : "false");
    reply(result, &t, error);
out:
    free(runs.run);
    args_free(args, text);
}

/* One [region, offset, size] in whole pages. */
static bool read_range(const struct json *v, struct request *q, struct qerror **error)
{
    const struct json *n = v->type == JSON_ARRAY && v->children == 3 ? v->first : NULL;
    int64_t value[3];

    for (int i = 0; i < 3; i++) {
        if (!n || n->type != JSON_INT || n->integer < 0) {
            qemu_fail(error, "Parameter 'ranges' expects arrays [region, offset, size] of "
                      "integers");
            return false;
        }
        value[i] = n->integer;
        n = n->next;
    }
    if ((value[1] | value[2]) % (int64_t)PAGE_BYTES || !value[2] || value[0] > UINT32_MAX) {
        qemu_fail(error, "Parameter 'ranges' expects a region's number, and offset and size in "
                  "whole pages of %llu bytes", PAGE_BYTES);
        return false;
    }
    q->range[q->count].region = value[0];
    q->range[q->count].first = (uint64_t)value[1] >> PAGE_SHIFT;
    q->range[q->count].pages = (uint64_t)value[2] >> PAGE_SHIFT;
    q->count++;
    return true;
}

/* With the lock held, which it drops now and then. What is wrong with the ranges, or NULL. A region
 * that goes later is no error: there is nothing stale in it. */
static const char *check_ranges(const struct request *q)
{
    for (size_t i = 0; i < q->count; i++) {
        const struct region *r = region_by_id(q->range[i].region);

        if (!r) {
            return "Parameter 'ranges' names a region that is not there";
        }
        if (q->range[i].first >= r->pages || q->range[i].pages > r->pages - q->range[i].first) {
            return "Parameter 'ranges' has a range beyond the end of its region";
        }
        if (i % RANGES_AT_ONCE == RANGES_AT_ONCE - 1) {
            upm_breathe();
        }
    }
    return NULL;
}

/* With the lock held. What is wrong with the request now, or NULL. */
static const char *queue_request(struct request *q)
{
    const char *wrong = check_ranges(q);

    if (wrong) {
        return wrong;
    }
    if (upm.nrequests == REQUESTS_MAX) {
        return upm.launching
               ? "busy: the VM is being launched, and discards wait until it runs"
               : "busy: too many discards are outstanding; wait for X_UPM_DISCARDED";
    }
    upm.requests[(upm.first_request + upm.nrequests++) % REQUESTS_MAX] = q;
    count_command();
    worker_kick();
    return NULL;
}

static const struct json *get_ranges(const struct json *args, bool *all, struct qerror **error)
{
    const struct json *ranges = json_get(args, "ranges"), *whole = json_get(args, "all");

    *all = whole && whole->type == JSON_BOOL && whole->boolean;
    if (*all && !ranges) {
        return whole;
    }
    if (whole || !ranges || ranges->type != JSON_ARRAY || !ranges->children
        || ranges->children > RANGES_MOST) {
        qemu_fail(error, "expects either 'ranges' (1 to %d of them) or 'all': true", RANGES_MOST);
        return NULL;
    }
    return ranges;
}

static void cmd_discard(struct qdict *dict, struct qobject **result, struct qerror **error)
{
    static const char *const known[] = { "id", "copy", "ranges", "all", NULL };
    static const char *const copies[] = { "private", "shared", "both" };
    char *text;
    struct json *args = args_read(dict, known, &text, error);
    const struct json *ranges;
    struct request *q = NULL;
    struct text t = { 0 };
    const char *wrong;
    unsigned copy, queued;
    int64_t id;
    bool all;

    if (!args) {
        return;
    }
    if (!args_int(args, "id", 0, INT64_MAX, &id, error)
        || !args_choice(args, "copy", copies, 3, &copy, error)
        || !(ranges = get_ranges(args, &all, error))) {
        goto out;
    }
    q = calloc(1, sizeof(*q) + (all ? 0 : ranges->children) * sizeof(*q->range));
    if (!q) {
        qemu_fail(error, "no memory for the request");
        goto out;
    }
    q->id = id;
    q->all = all;
    q->copy[PRIVATE] = copy != SHARED;
    q->copy[SHARED] = copy != PRIVATE;
    for (const struct json *v = all ? NULL : ranges->first; v; v = v->next) {
        if (!read_range(v, q, error)) {
            goto out;
        }
    }
    q->at_page = q->count ? q->range[0].first : 0;

    upm_lock();
    wrong = queue_request(q);
    queued = upm.nrequests;
    upm_unlock();
    if (wrong) {
        qemu_fail(error, "%s", wrong);
        goto out;
    }
    q = NULL;
    text_add(&t, "{\"queued\": %u}", queued);
    reply(result, &t, error);
out:
    free(q);
    args_free(args, text);
}

void commands_register(void)
{
    qemu_register("x-upm-query", cmd_query);
    qemu_register("x-upm-configure", cmd_configure);
    qemu_register("x-upm-read", cmd_read);
    qemu_register("x-upm-stale", cmd_stale);
    qemu_register("x-upm-discard", cmd_discard);
}
