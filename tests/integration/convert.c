/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload: the QMP command x-test-convert {gpa, size, private} has QEMU convert guest
 * memory as it does for a vCPU; returns kvm_convert_memory()'s result.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../plugin/kvm-abi.h"

static void *symbol(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);

    if (!found) {
        fprintf(stderr, "convert: QEMU does not export %s\n", name);
        exit(1);
    }
    return found;
}

static uint64_t number(const char *text, const char *key)
{
    const char *at = strstr(text, key);

    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static void convert(void *arguments, void **result, void **error)
{
    char **(*to_json)(void *) = symbol("qobject_to_json");
    void *(*from_json)(const char *, void **) = symbol("qobject_from_json");
    int (*convert_memory)(uint64_t, uint64_t, bool) = symbol("kvm_convert_memory");
    const char *text = *to_json(arguments);
    char reply[64];
    int code = convert_memory(number(text, "\"gpa\": "), number(text, "\"size\": "),
                              strstr(text, "\"private\": true"));

    snprintf(reply, sizeof(reply), "{\"result\": %d}", code);
    *result = from_json(reply, error);
}

int ioctl(int fd, unsigned long request, ...)
{
    static int (*next)(int fd, unsigned long request, ...);
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (!next) {
        next = dlsym(RTLD_NEXT, "ioctl");
    }
    if (request == UPM_KVM_GET_API_VERSION) {
        void (*add)(void *, const char *, void (*)(void *, void **, void **), int, uint64_t) =
            symbol("qmp_register_command");

        add(symbol("qmp_commands"), "x-test-convert", convert, 0, 0);
    }
    return next(fd, request, argument);
}
