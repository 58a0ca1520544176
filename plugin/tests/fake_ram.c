/* SPDX-License-Identifier: GPL-2.0-or-later */
/* RAM, slots and conversions, as QEMU makes them. */
#include "fake.h"
#include "fake_kvm.h"

#include "../kvm-abi.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/falloc.h>

/* The interposers of interpose.c, as QEMU calls them. */
int ioctl(int fd, unsigned long request, ...);
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes);

static int shared_file(enum kind kind, uint64_t bytes)
{
    char name[] = "/tmp/upm-ram-XXXXXX";
    int fd;

    switch (kind) {
    case RAM_MEMFD:
        fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC);
        break;
    case RAM_HUGETLB:
        fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC | MFD_HUGETLB);
        break;
    case RAM_FILE:
        fd = mkstemp(name);
        unlink(name);
        break;
    default:
        return -1;
    }
    if (fd < 0 || ftruncate(fd, bytes)) {
        fail("cannot make RAM: %s", strerror(errno));
    }
    return fd;
}

static void private_side(struct memory *m)
{
    struct upm_kvm_create_guest_memfd create = { .size = m->bytes };

    m->private_fd = plugin_ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    expect(m->private_fd >= 0);
    m->private = mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->private_fd, 0);
    expect(m->private != MAP_FAILED);
}

struct memory *memory_new(enum kind kind, uint64_t gpa, uint64_t bytes)
{
    struct memory *m = calloc(1, sizeof(*m));
    int fd;

    *m = (struct memory) { .kind = kind, .gpa = gpa, .bytes = bytes };
    m->shared_fd = shared_file(kind, bytes);
    private_side(m);
    fd = kind == RAM_IN_PLACE ? m->private_fd : m->shared_fd;
    m->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                     fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_NORESERVE, fd, 0);
    expect(m->shared != MAP_FAILED);
    memory_know(m);
    return m;
}

void memory_free(struct memory *m)
{
    munmap(m->shared, m->bytes);
    if (m->shared_fd >= 0) {
        close(m->shared_fd);
    }
    munmap(m->private, m->bytes);
    close(m->private_fd);
    memory_forget(m);
    free(m);
}

void vm_reset(struct memory *const *blocks, unsigned count)
{
    close(fake.vm_fd);
    vm_new();
    for (unsigned i = 0; i < count; i++) {
        munmap(blocks[i]->private, blocks[i]->bytes);
        close(blocks[i]->private_fd);
        private_side(blocks[i]);
    }
}

void slot_map(unsigned slot, const struct memory *m, uint64_t offset, uint64_t bytes, uint64_t gpa)
{
    struct upm_kvm_region2 set = {
        .slot = slot, .flags = UPM_KVM_MEM_GUEST_MEMFD, .guest_phys_addr = gpa,
        .memory_size = bytes, .userspace_addr = (uintptr_t)m->shared + offset,
        .guest_memfd = m->private_fd, .guest_memfd_offset = offset,
    };

    expect(!plugin_ioctl(fake.vm_fd, UPM_KVM_SET_REGION2, &set));
}

void slot_unmap(unsigned slot)
{
    struct upm_kvm_region2 set = { .slot = slot };

    expect(!plugin_ioctl(fake.vm_fd, UPM_KVM_SET_REGION2, &set));
}

void slot_plug(unsigned slot, const struct memory *m, uint64_t offset, uint64_t bytes,
               uint64_t gpa)
{
    slot_map(slot, m, offset, bytes, gpa);
    expect(!convert_only(gpa, bytes, true));
}

int convert_only(uint64_t gpa, uint64_t bytes, bool to_private)
{
    struct upm_kvm_attributes a = {
        .address = gpa, .size = bytes, .attributes = to_private ? UPM_KVM_ATTRIBUTE_PRIVATE : 0,
    };

    return plugin_ioctl(fake.vm_fd, UPM_KVM_SET_ATTRIBUTES, &a);
}

int qemu_discard(const struct memory *m, uint64_t offset, uint64_t bytes, bool now_private)
{
    const int punch_hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int result;

    if (!now_private) {
        return fallocate64(m->private_fd, punch_hole, offset, bytes);
    }
    if (m->kind == RAM_HUGETLB) {
        return 0; /* QEMU leaves huge pages alone */
    }
    if (m->shared_fd >= 0) {
        result = fallocate64(m->shared_fd, punch_hole, offset, bytes);
        if (result) {
            return result;
        }
    }
    return madvise(m->shared + offset, bytes, MADV_DONTNEED);
}

int guest_convert(const struct memory *m, uint64_t offset, uint64_t bytes, bool to_private)
{
    int result = convert_only(m->gpa + offset, bytes, to_private);

    return result ? result : qemu_discard(m, offset, bytes, to_private);
}

void vcpu_run(void)
{
    fake.launching = false; /* QEMU has done its part of it before it calls */
    expect(!ioctl(fake.vm_fd, UPM_KVM_RUN, NULL));
}
