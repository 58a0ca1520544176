/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preload for benchmarks, behind the plugin: answers for the memory attributes that this host's KVM
 * does not have. Everything else of a conversion is real: guest_memfd, memfd, QEMU's code.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>

#include "../plugin/kvm-abi.h"

#define CHECK_EXTENSION _IO(UPM_KVMIO, 0x03)
#define CAP_MEMORY_ATTRIBUTES 233
#define CAP_VM_TYPES 235
#define DEFAULT_VM 0
#define SW_PROTECTED_VM 1

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
    switch (request) {
    case UPM_KVM_SET_ATTRIBUTES:
        return 0;
    case UPM_KVM_CREATE_VM:
        return next(fd, request, DEFAULT_VM);
    case CHECK_EXTENSION:
        if ((uintptr_t)argument == CAP_MEMORY_ATTRIBUTES) {
            return UPM_KVM_ATTRIBUTE_PRIVATE;
        }
        if ((uintptr_t)argument == CAP_VM_TYPES) {
            return 1 << DEFAULT_VM | 1 << SW_PROTECTED_VM;
        }
        /* fall through */
    default:
        return next(fd, request, argument);
    }
}
