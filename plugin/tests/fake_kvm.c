/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The kernel, as far as the plugin and QEMU call it for conversions. */
#include "fake.h"
#include "fake_kvm.h"

#include "../kvm-abi.h"
#include "../upm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/falloc.h>

#define GUEST_MEMFD_MAPPABLE 3 /* GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED */
#define MEMORIES_MOST 64

/* The interposer, as QEMU calls it. */
int ioctl(int fd, unsigned long request, ...);

static uint8_t is_private[FAKE_PAGES];
static pthread_mutex_t attributes_lock = PTHREAD_MUTEX_INITIALIZER;
static struct memory *memories[MEMORIES_MOST];
static struct libc real;
static int real_vm = -1;

int plugin_ioctl(int fd, unsigned long request, void *argument)
{
    int result;

    if (fake.int_requests) {
        request = (int)request;
    }
    in_plugin = true;
    result = ioctl(fd, request, argument);
    in_plugin = false;
    return result;
}

static bool strikes(struct fault *f)
{
    bool hit = false;

    pthread_mutex_lock(&fake_lock);
    if (f->skip) {
        f->skip--;
    } else if (f->count) {
        f->count--;
        hit = true;
    }
    pthread_mutex_unlock(&fake_lock);
    if (hit) {
        errno = f->error;
    }
    return hit;
}

void fail_next(struct fault *fault, int error, unsigned skip, unsigned count)
{
    pthread_mutex_lock(&fake_lock);
    *fault = (struct fault) { .error = error, .skip = skip, .count = count };
    pthread_mutex_unlock(&fake_lock);
}

bool page_is_private(uint64_t gpa)
{
    return __atomic_load_n(&is_private[gpa / PAGE], __ATOMIC_SEQ_CST);
}

static void look_for_live(uint64_t gpa, uint64_t bytes, bool private_copy)
{
    for (uint64_t at = gpa; at < gpa + bytes; at += PAGE) {
        fake.violations += fake.launching
                           || (at / PAGE < FAKE_PAGES && page_is_private(at) == private_copy);
    }
}

static bool same_file(int fd, int other)
{
    struct stat st, st_other;

    return other >= 0 && !fstat(fd, &st) && !fstat(other, &st_other) && st.st_ino == st_other.st_ino
           && st.st_dev == st_other.st_dev;
}

void memory_know(struct memory *m)
{
    unsigned i = 0;

    pthread_mutex_lock(&fake_lock);
    while (memories[i]) {
        i++;
    }
    memories[i] = m;
    pthread_mutex_unlock(&fake_lock);
}

void memory_forget(const struct memory *m)
{
    pthread_mutex_lock(&fake_lock);
    for (unsigned i = 0; i < MEMORIES_MOST; i++) {
        if (memories[i] == m) {
            memories[i] = NULL;
        }
    }
    pthread_mutex_unlock(&fake_lock);
}

static bool has_number(const struct memory *m, int fd, const char *start)
{
    return fd < 0 ? start >= m->shared && start < m->shared + m->bytes
                  : m->private_fd == fd || m->shared_fd == fd;
}

static bool has_file(const struct memory *m, int fd, const char *start)
{
    (void)start;
    return same_file(fd, m->private_fd) || same_file(fd, m->shared_fd);
}

static bool look_up(bool (*has)(const struct memory *, int, const char *), int fd,
                    const char *start, struct memory *found)
{
    for (unsigned i = 0; i < MEMORIES_MOST; i++) {
        if (memories[i] && has(memories[i], fd, start)) {
            *found = *memories[i];
            return true;
        }
    }
    return false;
}

/* The memory that a discard is meant for: a copy, since another thread may be about to free it. */
static bool memory_of(int fd, const char *start, struct memory *found)
{
    bool hit;

    pthread_mutex_lock(&fake_lock);
    hit = look_up(has_number, fd, start, found) || (fd >= 0 && look_up(has_file, fd, start, found));
    pthread_mutex_unlock(&fake_lock);
    return hit;
}

static void account_punch(uint64_t bytes)
{
    pthread_mutex_lock(&fake_lock);
    fake.punches++;
    if (bytes > fake.longest_punch) {
        fake.longest_punch = bytes;
    }
    pthread_mutex_unlock(&fake_lock);
}

/* Returns whether the kernel refuses, with errno set. */
static bool refused(int fd, uint64_t offset, uint64_t bytes)
{
    int (*refuse)(int, uint64_t, uint64_t) = fake.refuse_punch;
    void (*before)(int, uint64_t, uint64_t) = fake.before_punch;
    int error = refuse ? refuse(fd, offset, bytes) : 0;

    if (error) {
        errno = error;
        return true;
    }
    if (strikes(&fake.punch)) {
        return true;
    }
    if (before) {
        before(fd, offset, bytes);
    }
    return false;
}

static int fake_fallocate(int fd, int mode, off64_t offset, off64_t bytes)
{
    struct memory m;
    bool private_copy;
    int result;

    if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) || !memory_of(fd, NULL, &m)) {
        return real.fallocate(fd, mode, offset, bytes);
    }
    if (refused(fd, offset, bytes)) {
        return -1;
    }
    private_copy = m.private_fd == fd || same_file(fd, m.private_fd);
    account_punch(bytes);
    look_for_live(m.gpa + offset, bytes, private_copy);
    result = real.fallocate(fd, mode, offset, bytes);
    look_for_live(m.gpa + offset, bytes, private_copy);
    return result;
}

static int fake_madvise(void *start, size_t bytes, int advice)
{
    struct memory m;
    int result;

    if (!memory_of(-1, start, &m)) {
        fake.not_huge += advice == MADV_NOHUGEPAGE ? bytes : 0;
        return real.madvise(start, bytes, advice);
    }
    if (refused(-1, (char *)start - m.shared, bytes)) {
        return -1;
    }
    if (m.kind != RAM_ANONYMOUS && advice == MADV_DONTNEED) {
        return real.madvise(start, bytes, advice); /* of a file: unmaps, and discards nothing */
    }
    account_punch(bytes);
    look_for_live(m.gpa + ((char *)start - m.shared), bytes, false);
    result = real.madvise(start, bytes, advice);
    look_for_live(m.gpa + ((char *)start - m.shared), bytes, false);
    return result;
}

static int set_attributes(const struct upm_kvm_attributes *a)
{
    void (*before)(void) = fake.before_attributes;
    int (*refuse)(void) = fake.refuse_attributes;
    uint64_t end;
    int error;

    if (before) {
        before();
    }
    error = refuse ? refuse() : 0;
    if (error) {
        errno = error;
        return -1;
    }
    if (strikes(&fake.attributes)) {
        return -1;
    }
    if (!a->size || (a->address | a->size) % PAGE || a->address + a->size < a->address) {
        errno = EINVAL;
        return -1;
    }
    pthread_mutex_lock(&attributes_lock); /* KVM's slots_lock */
    end = a->address + a->size < FAKE_PAGES * PAGE ? a->address + a->size : FAKE_PAGES * PAGE;
    for (uint64_t at = a->address; at < end; at += PAGE) {
        __atomic_store_n(&is_private[at / PAGE], !!(a->attributes & UPM_KVM_ATTRIBUTE_PRIVATE),
                         __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&attributes_lock);
    return 0;
}

static int create_guest_memfd(const struct upm_kvm_create_guest_memfd *create)
{
    if (fake.real_guest_memfd) {
        struct upm_kvm_create_guest_memfd mappable = {
            .size = create->size, .flags = GUEST_MEMFD_MAPPABLE,
        };

        return real.ioctl(real_vm, UPM_KVM_CREATE_GUEST_MEMFD, &mappable);
    }
    int fd = memfd_create("guest_memfd", MFD_CLOEXEC);

    return fd >= 0 && ftruncate(fd, create->size) ? -1 : fd;
}

static int fake_ioctl(int fd, unsigned long request, ...)
{
    struct memory m;
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (fd != KVM_FD && fd != fake.vm_fd && !memory_of(fd, NULL, &m)) {
        return real.ioctl(fd, request, argument);
    }
    switch ((unsigned)request) {
    case UPM_KVM_GET_API_VERSION:
        return 12;
    case UPM_KVM_CREATE_VM:
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    case UPM_KVM_CREATE_GUEST_MEMFD:
        return create_guest_memfd(argument);
    case UPM_KVM_SET_ATTRIBUTES:
        return set_attributes(argument);
    default:
        return 0;
    }
}

/* Opens a VM of the default type, if its guest_memfds can be mapped (Linux 6.18). */
static bool have_real_guest_memfd(void)
{
    struct upm_kvm_create_guest_memfd create = { .size = PAGE, .flags = GUEST_MEMFD_MAPPABLE };
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), fd;

    if (kvm < 0) {
        return false;
    }
    real_vm = real.ioctl(kvm, UPM_KVM_CREATE_VM, 0);
    fd = real_vm < 0 ? -1 : real.ioctl(real_vm, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    if (fd >= 0) {
        real.close(fd);
    }
    return fd >= 0;
}

/* What is under way in the VM before it is over when this one has been made. */
void vm_new(void)
{
    fake.vm_fd = plugin_ioctl(KVM_FD, UPM_KVM_CREATE_VM, (void *)1);
    expect(fake.vm_fd >= 0);
    for (unsigned i = 0; i < FAKE_PAGES; i++) {
        __atomic_store_n(&is_private[i], 0, __ATOMIC_SEQ_CST);
    }
    fake.launching = true;
}

void fake_start(void)
{
    real = libc;
    if (fake.real_guest_memfd && !have_real_guest_memfd()) {
        fputs("guest_memfds can't be mapped on this host\n", stderr);
        _exit(77);
    }
    libc.ioctl = fake_ioctl;
    libc.fallocate = fake_fallocate;
    libc.madvise = fake_madvise;
    expect(plugin_ioctl(KVM_FD, UPM_KVM_GET_API_VERSION, NULL) == 12);
    vm_new();
}
