/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload, in front of the plugin: passes ioctl requests on as QEMU 9.1 does, whose
 * kvm_vm_ioctl() takes an int. KVM_CREATE_GUEST_MEMFD has bit 31 set and arrives sign-extended.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>

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
    return next(fd, (unsigned long)(int)request, argument);
}
