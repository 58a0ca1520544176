/* SPDX-License-Identifier: GPL-2.0-or-later */
/* QEMU's monitor: the commands that the plugin registers, and the events that it sends. */
#include "fake.h"
#include "fake_kvm.h"

#include "../upm.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WAIT_SECONDS 60

struct fake fake = { .vm_fd = -1 };
__thread bool in_plugin;
pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;

static struct { const char *name; command_fn *fn; } registered[16];

void fail(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(1);
}

/* qemu.c's interface */

bool qemu_present(void)
{
    return true;
}

bool qemu_attach(void)
{
    return true;
}

void say(const char *format, ...)
{
    va_list args;

    pthread_mutex_lock(&fake_lock);
    va_start(args, format);
    vsnprintf(fake.last_said, sizeof(fake.last_said), format, args);
    va_end(args);
    fake.said++;
    pthread_mutex_unlock(&fake_lock);
}

void qemu_register(const char *name, command_fn *fn)
{
    unsigned i = 0;

    while (registered[i].name) {
        i++;
    }
    registered[i].name = name;
    registered[i].fn = fn;
}

char *qemu_arguments(struct qdict *arguments)
{
    return strdup((const char *)arguments);
}

void qemu_return(struct qobject **result, const char *json, struct qerror **error)
{
    *result = (struct qobject *)strdup(json);
    if (!*result) {
        qemu_fail(error, "no memory");
    }
}

void qemu_fail(struct qerror **error, const char *format, ...)
{
    va_list args;
    char *text = NULL;

    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) {
        abort();
    }
    va_end(args);
    *error = (struct qerror *)text;
}

void qemu_event(const char *name, const char *data)
{
    pthread_mutex_lock(&fake_lock);
    fake.events++;
    if (!strcmp(name, "X_UPM_DISCARDED")) {
        snprintf(fake.discarded, sizeof(fake.discarded), "%s", data);
        fake.discarded_id = strtoll(strchr(data, ':') + 1, NULL, 10);
    }
    pthread_mutex_unlock(&fake_lock);
}

char *command(const char *name, const char *arguments, char **error)
{
    struct qobject *result = NULL;
    unsigned i = 0;

    *error = NULL;
    while (strcmp(registered[i].name, name)) {
        i++;
    }
    in_plugin = true;
    registered[i].fn((struct qdict *)arguments, &result, (struct qerror **)error);
    in_plugin = false;
    if (!result && !*error) {
        result = (struct qobject *)strdup("{}");
    }
    return (char *)result;
}

char *must(const char *name, const char *format, ...)
{
    char *arguments, *error, *reply;
    va_list args;

    va_start(args, format);
    if (vasprintf(&arguments, format, args) < 0) {
        abort();
    }
    va_end(args);
    reply = command(name, arguments, &error);
    if (!reply) {
        fail("%s %s: %s", name, arguments, error);
    }
    free(arguments);
    return reply;
}

static uint64_t number_after(const char *text, const char *key)
{
    char quoted[128];
    const char *at;

    snprintf(quoted, sizeof(quoted), "\"%s\": ", key);
    at = strstr(text, quoted);
    if (!at) {
        fail("no %s in %s", key, text);
    }
    return strtoull(at + strlen(quoted), NULL, 10);
}

bool query_says(const char *text)
{
    char *reply = must("x-upm-query", "{}");
    bool found = strstr(reply, text);

    free(reply);
    return found;
}

uint64_t query(const char *key)
{
    char *text = must("x-upm-query", "{}");
    uint64_t value = number_after(text, key);

    free(text);
    return value;
}

static uint64_t both(const char *text, const char *name)
{
    char key[2][64];

    snprintf(key[0], sizeof(key[0]), "%s-private", name);
    snprintf(key[1], sizeof(key[1]), "%s-shared", name);
    return number_after(text, key[0]) + number_after(text, key[1]);
}

uint64_t counter(const char *name)
{
    char *text = must("x-upm-query", "{}");
    uint64_t value = both(text, name);

    free(text);
    return value;
}

static uint64_t stale_of(const char *text, const char *copy)
{
    return number_after(strstr(text, "\"stale\": {"), copy);
}

uint64_t stale(void)
{
    char *text = must("x-upm-query", "{}");
    uint64_t bytes = stale_of(text, "private") + stale_of(text, "shared");

    free(text);
    return bytes;
}

bool accounting_closes(void)
{
    static const char *const became[] = {
        "reused", "requested", "failsafe", "forgotten",
    };
    char *text = must("x-upm-query", "{}"), key[64];
    bool closes = true;

    for (int c = 0; c < COPIES; c++) {
        uint64_t left = stale_of(text, copy_names[c]);

        for (unsigned i = 0; i < sizeof(became) / sizeof(*became); i++) {
            snprintf(key, sizeof(key), "%s-bytes-%s", became[i], copy_names[c]);
            left += number_after(text, key);
        }
        snprintf(key, sizeof(key), "deferred-bytes-%s", copy_names[c]);
        closes = closes && left == number_after(text, key);
    }
    free(text);
    return closes;
}

static uint64_t enter_ranges(const char *reply, char *pages, uint64_t count)
{
    const char *at = strchr(reply, '[') + 1;
    char *end;

    while (*at == '[' || *at == ',' || *at == ' ') {
        uint64_t first, n;

        at = strchr(at, '[') + 1;
        first = strtoull(at, &end, 10) / PAGE;
        n = strtoull(end + 1, &end, 10) / PAGE;
        expect(n);
        for (; n && first < count; n--) {
            pages[first++] = 'x';
        }
        at = end + 1;
    }
    return strtoull(strstr(at, "\"cursor\": ") + 10, NULL, 10);
}

char *ledger_of(unsigned region, const char *copy, uint64_t count)
{
    char *pages = malloc(count + 1);
    uint64_t cursor = 0;
    bool done = false;

    memset(pages, '.', count);
    pages[count] = '\0';
    while (!done) {
        char *reply = must("x-upm-stale", "{\"copy\": \"%s\", \"region\": %u, \"cursor\": %llu, "
                           "\"max\": 100}", copy, region, (unsigned long long)cursor);

        cursor = enter_ranges(reply, pages, count);
        done = strstr(reply, "\"done\": true");
        free(reply);
    }
    return pages;
}

void wait_for(bool (*come)(void), const char *what)
{
    uint64_t end = now_ns() + WAIT_SECONDS * NSEC;

    while (!come()) {
        if (now_ns() > end) {
            fail("waited %d s for %s", WAIT_SECONDS, what);
        }
        usleep(200);
    }
}

bool nobody_waits(void)
{
    bool nobody;

    upm_lock();
    nobody = !upm.waiters && !__atomic_load_n(&upm.contenders, __ATOMIC_SEQ_CST);
    upm_unlock();
    return nobody;
}

static bool drained(void)
{
    return !stale();
}

void drain(void)
{
    free(must("x-upm-configure", "{\"private\": \"eager\", \"shared\": \"eager\"}"));
    wait_for(drained, "the ledger to be empty");
}
