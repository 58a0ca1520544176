/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's own functions, found by name in the running process. Only pointers and JSON text cross
 * the border, never a structure of QEMU's, so that one binary serves many releases.
 *
 * Requests and replies: QEMU's dictionaries become text (qobject_to_json) and back
 * (qobject_from_json, which hands its one reference to the caller). An event's dictionary is kept
 * in a dictionary of our own, whose next qdict_put_obj() drops the one before: that is how a
 * reference is given up without knowing where QEMU counts it.
 */
#include "upm.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A member of QAPIEvent that QEMU does not throttle: STOP. The event's name is in its dictionary. */
#define EVENT_UNTHROTTLED 3
/* The command may run out of band, without QEMU's big lock: QCO_ALLOW_OOB. */
#define COMMAND_ALLOW_OOB 2

static struct {
    void (*register_command)(void *commands, const char *name, command_fn *fn, int options,
                             uint64_t features);
    struct qobject *(*from_json)(const char *text, struct qerror **error);
    char **(*to_json)(const void *object);             /* a GString: its first member is the text */
    void (*put)(struct qobject *dict, const char *key, struct qobject *value);
    void (*emit)(int event, struct qobject *dict);
    void (*set_error)(struct qerror **error, const char *file, int line, const char *function,
                      const char *format, ...);
    char *(*free_gstring)(char **string, int with_text);
    void *commands;
    void *convert_memory;
} qemu;

static const struct { const char *name; void *where; } symbols[] = {
    /* Arrived with QEMU 9.1: without it there is nothing to watch. */
    { "kvm_convert_memory", &qemu.convert_memory },
    { "qmp_register_command", &qemu.register_command },
    { "qmp_commands", &qemu.commands },
    { "qobject_from_json", &qemu.from_json },
    { "qobject_to_json", &qemu.to_json },
    { "qdict_put_obj", &qemu.put },
    { "qapi_event_emit", &qemu.emit },
    { "error_setg_internal", &qemu.set_error },
    { "g_string_free", &qemu.free_gstring },
};

static struct qobject *last_event;

void say(const char *format, ...)
{
    char line[512];
    va_list args;

    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    fprintf(stderr, "qmp-upm: %s\n", line);
}

/* Whether this process is a QEMU that we can serve. LD_PRELOAD reaches its helpers too. */
bool qemu_present(void)
{
    return dlsym(RTLD_DEFAULT, "qmp_register_command")
           && dlsym(RTLD_DEFAULT, "kvm_convert_memory");
}

/* Finds everything or says what is missing. */
bool qemu_attach(void)
{
    for (unsigned i = 0; i < sizeof(symbols) / sizeof(*symbols); i++) {
        void *found = dlsym(RTLD_DEFAULT, symbols[i].name);

        if (!found) {
            say("not in use: this program does not export %s. It takes QEMU 9.1 or newer, built "
                "with --enable-modules as distributions do. It runs on as if the plugin were not "
                "loaded.", symbols[i].name);
            return false;
        }
        memcpy(symbols[i].where, &found, sizeof(found));
    }
    last_event = qemu.from_json("{}", NULL);
    return last_event;
}

void qemu_register(const char *name, command_fn *fn)
{
    qemu.register_command(qemu.commands, name, fn, COMMAND_ALLOW_OOB, 0);
}

/* The text of a command's arguments, to be freed, or NULL. */
char *qemu_arguments(struct qdict *arguments)
{
    char **string = qemu.to_json(arguments);
    char *text = strdup(*string);

    qemu.free_gstring(string, 1);
    return text;
}

void qemu_return(struct qobject **result, const char *json, struct qerror **error)
{
    *result = qemu.from_json(json, NULL);
    if (!*result) {
        qemu_fail(error, "internal error: the reply is not JSON");
    }
}

void qemu_fail(struct qerror **error, const char *format, ...)
{
    char text[256];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    qemu.set_error(error, __FILE__, __LINE__, __func__, "%s", text);
}

/* Called by the worker alone, without any lock. */
void qemu_event(const char *name, const char *data)
{
    struct timespec t;
    struct qobject *event;
    char text[512];

    clock_gettime(CLOCK_REALTIME, &t);
    snprintf(text, sizeof(text),
             "{\"event\": \"%s\", \"data\": %s,"
             " \"timestamp\": {\"seconds\": %lld, \"microseconds\": %ld}}",
             name, data, (long long)t.tv_sec, t.tv_nsec / 1000);
    event = qemu.from_json(text, NULL);
    if (event) {
        qemu.put(last_event, "event", event);
        qemu.emit(EVENT_UNTHROTTLED, event);
    }
}
