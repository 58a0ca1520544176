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

/* Other libraries' constructors may come before ours. A C library may lack one of the names: then
 * nobody calls it. */
static void find_libc(void)
{
    if (!libc.close) {
        libc.ioctl = dlsym(RTLD_NEXT, "ioctl");
        libc.fallocate = dlsym(RTLD_NEXT, "fallocate64");
        libc.madvise = dlsym(RTLD_NEXT, "madvise");
        libc.munmap = dlsym(RTLD_NEXT, "munmap");
        libc.close = dlsym(RTLD_NEXT, "close");
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
    if (__atomic_load_n(&upm.active, __ATOMIC_ACQUIRE) && getpid() == upm.pid) {
        worker_stop();
    }
}

static bool is_active(void)
{
    return __atomic_load_n(&upm.active, __ATOMIC_ACQUIRE);
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
    __atomic_store_n(&upm.active, true, __ATOMIC_RELEASE);
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

/* What the RAM is made of, once, when its first slot is registered. */
static void learn_backing(struct region *r, const struct upm_kvm_region2 *set)
{
    struct backing_facts f = backing_look(set->guest_memfd, set->userspace_addr,
                                          set->guest_memfd_offset);

    upm_lock();
    if (f.found && region_by_private_fd(set->guest_memfd) == r) {
        region_is_mapped(r, (char *)(set->userspace_addr - set->guest_memfd_offset), &f);
    }
    upm_unlock();
}

static int set_region(int fd, unsigned long request, void *argument)
{
    const struct upm_kvm_region2 *set = argument;
    int result = libc.ioctl(fd, request, argument), error = errno;
    bool has_memfd = set->flags & UPM_KVM_MEM_GUEST_MEMFD && set->memory_size;
    bool unknown = false, stored;
    struct region *r = NULL;

    if (result) {
        return result;
    }
    upm_lock();
    if (has_memfd) {
        r = region_by_private_fd(set->guest_memfd);
    }
    if (r) {
        r = region_adopt(r, (char *)(set->userspace_addr - set->guest_memfd_offset));
        unknown = !r->host;
    } else if (has_memfd) {
        region_lose_at((char *)set->userspace_addr, set->memory_size);
    }
    stored = slot_set(set->slot, set->guest_phys_addr, set->memory_size, r,
                      set->guest_memfd_offset);
    if (!stored) {
        region_lose(r);
    }
    upm_unlock();
    if (unknown) {
        learn_backing(r, set);
    }
    if (r) {
        conversion_slot_registered(set->guest_phys_addr, set->memory_size);
    }
    if (!stored) {
        say("no memory to follow a memory slot: the discards of its RAM stay QEMU's own");
    }
    errno = error;
    return result;
}

static int create_vm(int fd, unsigned long request, void *argument)
{
    int result = libc.ioctl(fd, request, argument), error = errno;

    if (result >= 0) {
        /* A second one replaces the first: QEMU rebuilds a VM on reset. */
        upm_lock();
        __atomic_store_n(&upm.vm_fd, result, __ATOMIC_RELAXED);
        upm.vm_kind = (int)(uintptr_t)argument;
        slots_clear();
        launch_begin();
        upm_unlock();
    }
    errno = error;
    return result;
}

/* KVM_SET_MEMORY_ATTRIBUTES in any of its versions: all begin with the same four numbers. On the
 * guest_memfd itself, KVM converts in place. */
static int set_attributes(int fd, unsigned long request, void *argument)
{
    if (fd == __atomic_load_n(&upm.vm_fd, __ATOMIC_RELAXED)) {
        return convert(fd, request, argument);
    }
    region_in_place(fd);
    return libc.ioctl(fd, request, argument);
}

static bool is_set_attributes(unsigned number)
{
    return _IOC_NR(number) == _IOC_NR(UPM_KVM_SET_ATTRIBUTES)
           && _IOC_SIZE(number) >= sizeof(struct upm_kvm_attributes);
}

/* The kernel looks at 32 bits of the request. QEMU 9.1 passes an int: with bit 31 set, it arrives
 * here with all the bits above set too. */
static int kvm_ioctl(int fd, unsigned long request, void *argument)
{
    unsigned number = request;

    if (number == UPM_KVM_GET_API_VERSION) {
        activate();
    }
    if (!is_active()) {
        return libc.ioctl(fd, request, argument);
    }
    if (is_set_attributes(number)) {
        return set_attributes(fd, request, argument);
    }
    if (conversion_unfinished()) {
        conversion_over();
    }
    switch (number) {
    case UPM_KVM_CREATE_VM:
        return create_vm(fd, request, argument);
    case UPM_KVM_CREATE_GUEST_MEMFD:
        return create_guest_memfd(fd, request, argument);
    case UPM_KVM_SET_REGION2:
        return set_region(fd, request, argument);
    default:
        return libc.ioctl(fd, request, argument);
    }
}

static void before_run(void)
{
    conversion_over();
    if (__atomic_load_n(&upm.launching, __ATOMIC_RELAXED)) {
        launch_end();
    }
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
        if (__builtin_expect(conversion_unfinished()
                             || __atomic_load_n(&upm.launching, __ATOMIC_RELAXED), 0)) {
            before_run();
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
        && discard_in_file(fd, offset, bytes, &result)) {
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
    if (conversion_unfinished() && discard_in_mapping(start, bytes, advice, &result)) {
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
    if (is_active() && region_has_file(fd) && getpid() == upm.pid) {
        region_close(fd);
    }
    return libc.close(fd);
}

EXPORT int munmap(void *start, size_t bytes)
{
    if (__builtin_expect(!libc.munmap, 0)) {
        find_libc();
    }
    if (is_active() && region_is_in(start, bytes) && getpid() == upm.pid) {
        region_unmap(start, bytes);
    }
    return libc.munmap(start, bytes);
}
