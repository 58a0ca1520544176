/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload: nobody in this process may look into its folder of descriptors, as under the
 * AppArmor profile that libvirt gives its guests.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static bool denied(const char *path)
{
    char own[32];

    snprintf(own, sizeof(own), "/proc/%d/fd", getpid());
    if (strncmp(path, "/proc/self/fd", 13) && strncmp(path, own, strlen(own))
        && strncmp(path, "/dev/fd", 7)) {
        return false;
    }
    errno = EACCES;
    return true;
}

/* The mode is garbage where there is none; open() does not look at it then. */
#define STAND_IN_FOR_OPEN(name)                                     \
    int name(const char *path, int flags, ...)                      \
    {                                                               \
        static int (*next)(const char *, int, ...);                 \
        va_list args;                                               \
        mode_t mode;                                                \
                                                                    \
        va_start(args, flags);                                      \
        mode = va_arg(args, mode_t);                                \
        va_end(args);                                               \
        if (!next) {                                                \
            next = dlsym(RTLD_NEXT, #name);                         \
        }                                                           \
        return denied(path) ? -1 : next(path, flags, mode);         \
    }

#define STAND_IN_FOR_OPENAT(name)                                   \
    int name(int at, const char *path, int flags, ...)              \
    {                                                               \
        static int (*next)(int, const char *, int, ...);            \
        va_list args;                                               \
        mode_t mode;                                                \
                                                                    \
        va_start(args, flags);                                      \
        mode = va_arg(args, mode_t);                                \
        va_end(args);                                               \
        if (!next) {                                                \
            next = dlsym(RTLD_NEXT, #name);                         \
        }                                                           \
        return denied(path) ? -1 : next(at, path, flags, mode);     \
    }

STAND_IN_FOR_OPEN(open)
STAND_IN_FOR_OPEN(open64)
STAND_IN_FOR_OPENAT(openat)
STAND_IN_FOR_OPENAT(openat64)

DIR *opendir(const char *path)
{
    static DIR *(*next)(const char *);

    if (!next) {
        next = dlsym(RTLD_NEXT, "opendir");
    }
    return denied(path) ? NULL : next(path);
}

ssize_t readlink(const char *path, char *target, size_t bytes)
{
    static ssize_t (*next)(const char *, char *, size_t);

    if (!next) {
        next = dlsym(RTLD_NEXT, "readlink");
    }
    return denied(path) ? -1 : next(path, target, bytes);
}
