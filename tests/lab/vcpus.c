/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload: threads that convert guest memory with QEMU's own code, as its virtual
 * processors do: without the BQL, many at once.
 *
 * x-test-flip {gpa, size, to, rounds}  starts a thread that goes through the letters of "to", s for
 *                                      shared and p for private, that many times
 * x-test-flipping                      -> {running, failed}; out of band: QEMU may be stuck
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../plugin/kvm-abi.h"

#define COMMAND_ALLOW_OOB 2

struct flips {
    uint64_t gpa, bytes, rounds;
    char to[16];
};

/* Counted with atomics: threads end while the monitor asks. */
static unsigned running, failed;

static void *symbol(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);

    if (!found) {
        fprintf(stderr, "vcpus: QEMU does not export %s\n", name);
        exit(1);
    }
    return found;
}

static void *flip(void *argument)
{
    int (*convert_memory)(uint64_t, uint64_t, bool) = symbol("kvm_convert_memory");
    void (*enter)(void) = symbol("rcu_register_thread");
    void (*leave)(void) = symbol("rcu_unregister_thread");
    struct flips *f = argument;

    enter();
    while (f->rounds--) {
        for (const char *to = f->to; *to; to++) {
            if (convert_memory(f->gpa, f->bytes, *to == 'p')) {
                __atomic_add_fetch(&failed, 1, __ATOMIC_SEQ_CST);
            }
        }
    }
    leave();
    free(f);
    __atomic_sub_fetch(&running, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static uint64_t number(const char *text, const char *key)
{
    const char *at = strstr(text, key);

    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

static void start(void *arguments, void **result, void **error)
{
    char **(*to_json)(void *) = symbol("qobject_to_json");
    void *(*from_json)(const char *, void **) = symbol("qobject_from_json");
    const char *text = *to_json(arguments), *to = strstr(text, "\"to\": \"");
    struct flips *f = calloc(1, sizeof(*f));
    pthread_t thread;

    if (!f || !to) {
        fprintf(stderr, "vcpus: x-test-flip: no memory, or no \"to\"\n");
        exit(1);
    }
    f->gpa = number(text, "\"gpa\": ");
    f->bytes = number(text, "\"size\": ");
    f->rounds = number(text, "\"rounds\": ");
    sscanf(to + strlen("\"to\": \""), "%15[sp]", f->to);
    __atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
    if (pthread_create(&thread, NULL, flip, f)) {
        perror("vcpus: pthread_create");
        exit(1);
    }
    pthread_detach(thread);
    *result = from_json("{}", error);
}

static void tell(void *arguments, void **result, void **error)
{
    void *(*from_json)(const char *, void **) = symbol("qobject_from_json");
    char reply[64];

    (void)arguments;
    snprintf(reply, sizeof(reply), "{\"running\": %u, \"failed\": %u}",
             __atomic_load_n(&running, __ATOMIC_SEQ_CST),
             __atomic_load_n(&failed, __ATOMIC_SEQ_CST));
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

        add(symbol("qmp_commands"), "x-test-flip", start, 0, 0);
        add(symbol("qmp_commands"), "x-test-flipping", tell, COMMAND_ALLOW_OOB, 0);
    }
    return next(fd, request, argument);
}
