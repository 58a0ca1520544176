/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The functions of libc that QEMU converts and discards with. Each looks whether the call is one of
 * ours, and otherwise is the function behind it.
 */
#include "kvm-abi.h"
#include "upm.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <linux/falloc.h>

#define EXPORT __attribute__((visibility("default")))

struct libc libc;

static void *behind(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);

    if (!found) {
        abort(); /* no C library */
    }
    return found;
}

/* Other libraries' constructors may come before ours. */
static void find_libc(void)
{
    if (!libc.close) {
        libc.ioctl = behind("ioctl");
        libc.fallocate = behind("fallocate64");
        libc.madvise = behind("madvise");
        libc.munmap = behind("munmap");
        libc.close = behind("close");
    }
}

/* Programs that QEMU starts have no use for us. */
static void leave_environment(void)
{
    const char *list = getenv("LD_PRELOAD");
    char *kept, *at, *entry, *copy;
    Dl_info self;

    if (!list || !dladdr(&libc, &self)) {
        return;
    }
    copy = strdup(list);
    kept = calloc(1, strlen(list) + 2);
    if (copy && kept) {
        for (at = copy; (entry = strsep(&at, ": "));) {
            if (*entry && strcmp(entry, self.dli_fname)) {
                strcat(strcat(kept, *kept ? ":" : ""), entry);
            }
        }
        if (*kept) {
            setenv("LD_PRELOAD", kept, 1);
        } else {
            unsetenv("LD_PRELOAD");
        }
    }
    free(copy);
    free(kept);
}

__attribute__((constructor)) static void load(void)
{
    find_libc();
    if (qemu_present()) {
        leave_environment();
    }
}

__attribute__((destructor)) static void unload(void)
{
    if (upm.active && getpid() == upm.pid) {
        worker_stop();
    }
}

/* QEMU opens KVM: after it has become a daemon, before it has a vCPU. */
static void activate(void)
{
    static bool done;
    int error;

    if (done) {
        return;
    }
    done = true;
    if (!qemu_attach()) {
        return;
    }
    error = worker_start();
    if (error) {
        say("not in use: cannot start a thread: %s", strerror(error));
        return;
    }
    upm.pid = getpid();
    upm.active = true;
    commands_register();
}

static int create_guest_memfd(int fd, unsigned long request, void *argument)
{
    const struct upm_kvm_create_guest_memfd *create = argument;
    int result = libc.ioctl(fd, request, argument), error = errno;

    if (result >= 0 && !region_new(result, create->size)) {
        say("no memory to follow a guest_memfd of %llu bytes: its discards stay QEMU's own",
            (unsigned long long)create->size);
    }
    errno = error;
    return result;
}

static int set_region(int fd, unsigned long request, void *argument)
{
    const struct upm_kvm_region2 *set = argument;
    int result = libc.ioctl(fd, request, argument), error = errno;
    struct region *r = NULL;
    bool unknown;

    if (result) {
        return result;
    }
    pthread_mutex_lock(&upm.lock);
    if (set->flags & UPM_KVM_MEM_GUEST_MEMFD && set->memory_size) {
        r = region_by_private_fd(set->guest_memfd);
    }
    slot_set(set->slot, set->guest_phys_addr, set->memory_size, r, set->guest_memfd_offset);
    unknown = r && r->backing == BACKING_UNKNOWN;
    pthread_mutex_unlock(&upm.lock);
    if (unknown) {
        backing_learn(r, set->userspace_addr, set->guest_memfd_offset);
    }
    conversion_slot_registered(set->guest_phys_addr, set->memory_size);
    errno = error;
    return result;
}

static int create_vm(int fd, unsigned long request, void *argument)
{
    int result = libc.ioctl(fd, request, argument), error = errno;

    if (result >= 0) {
        /* A second one replaces the first: QEMU rebuilds a VM on reset. */
        pthread_mutex_lock(&upm.lock);
        upm.vm_fd = result;
        upm.vm_kind = (int)(uintptr_t)argument;
        slots_clear();
        pthread_mutex_unlock(&upm.lock);
    }
    errno = error;
    return result;
}

/* KVM_SET_MEMORY_ATTRIBUTES in any of its versions: all begin with the same four numbers. On the
 * guest_memfd itself, KVM converts in place. */
static int set_attributes(int fd, unsigned long request, void *argument)
{
    if (fd == upm.vm_fd) {
        return convert(fd, request, argument);
    }
    region_in_place(fd);
    return libc.ioctl(fd, request, argument);
}

static int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    switch (request) {
    case UPM_KVM_GET_API_VERSION:
        activate();
        break;
    case UPM_KVM_CREATE_VM:
        if (upm.active) {
            return create_vm(fd, request, argument);
        }
        break;
    case UPM_KVM_CREATE_GUEST_MEMFD:
        if (upm.active) {
            return create_guest_memfd(fd, request, argument);
        }
        break;
    case UPM_KVM_SET_REGION2:
        if (upm.active) {
            return set_region(fd, request, argument);
        }
        break;
    default:
        if (upm.active && _IOC_NR(request) == _IOC_NR(UPM_KVM_SET_ATTRIBUTES)
            && _IOC_SIZE(request) >= sizeof(struct upm_kvm_attributes)) {
            return set_attributes(fd, request, argument);
        }
        break;
    }
    return libc.ioctl(fd, request, argument);
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (__builtin_expect(!libc.ioctl, 0)) {
        find_libc();
    }
    if (_IOC_TYPE(request) != UPM_KVMIO) {
        return libc.ioctl(fd, request, argument);
    }
    if (__builtin_expect(request == UPM_KVM_RUN, 1)) {
        if (__builtin_expect(conversion_unfinished(), 0)) {
            conversion_over();
        }
        return libc.ioctl(fd, request, argument);
    }
    return kvm_ioctl(fd, request, argument);
}

EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t bytes)
{
    int result;

    if (__builtin_expect(!libc.fallocate, 0)) {
        find_libc();
    }
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) && conversion_unfinished()
        && conversion_discard_fd(fd, offset, bytes, &result)) {
        return result;
    }
    return libc.fallocate(fd, mode, offset, bytes);
}

EXPORT int madvise(void *start, size_t bytes, int advice)
{
    int result;

    if (__builtin_expect(!libc.madvise, 0)) {
        find_libc();
    }
    if (conversion_unfinished() && conversion_discard_mapping(start, bytes, advice, &result)) {
        return result;
    }
    return libc.madvise(start, bytes, advice);
}

/* A child that QEMU forks closes the same numbers, and they are not ours there. */
EXPORT int close(int fd)
{
    if (__builtin_expect(!libc.close, 0)) {
        find_libc();
    }
    if (upm.active && upm.nregions && getpid() == upm.pid) {
        region_close(fd);
    }
    return libc.close(fd);
}

EXPORT int munmap(void *start, size_t bytes)
{
    if (__builtin_expect(!libc.munmap, 0)) {
        find_libc();
    }
    if (upm.active && upm.nregions && getpid() == upm.pid) {
        region_unmap(start, bytes);
    }
    return libc.munmap(start, bytes);
}
