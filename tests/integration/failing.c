/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload, behind the plugin: while the file TEST_FAILING exists, no hole can be punched
 * in any file, as on a file system that has none.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include <linux/falloc.h>

int fallocate64(int fd, int mode, off64_t offset, off64_t bytes)
{
    static int (*next)(int fd, int mode, off64_t offset, off64_t bytes);
    const char *flag = getenv("TEST_FAILING");

    if (!next) {
        next = dlsym(RTLD_NEXT, "fallocate64");
    }
    if (mode & FALLOC_FL_PUNCH_HOLE && flag && !access(flag, F_OK)) {
        errno = EIO;
        return -1;
    }
    return next(fd, mode, offset, bytes);
}
