/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of files and mappings that go in an order of their own, or while a discard is under way. */
#include "hazards.h"

#include "../kvm-abi.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *close_file(void *number)
{
    close(*(int *)number);
    return NULL;
}

/* Closes the file while the worker is stopped before it discards the copy that is in it. */
static void close_during_discard(const char *copy, int fd)
{
    pthread_t thread;

    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard(copy, 0, MIB);
    wait_for(somebody_waits, "the punch");
    pthread_create(&thread, NULL, close_file, &fd);
    usleep(A_WHILE_US);
    expect(fcntl(fd, F_GETFD) >= 0);
    open_gate();
    pthread_join(thread, NULL);
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.before_punch = NULL;
    expect(fcntl(fd, F_GETFD) < 0 && strstr(fake.discarded, "\"discarded\": 1048576"));
}

/* 13: the RAM's file is closed and its mapping stays; then the mapping goes, and the guest_memfd
 * after it. Each close waits for the discard that has the file's number. */
static void closed_during_a_discard(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(4 * MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    vcpu_run();
    close_during_discard("shared", m->shared_fd);
    m->shared_fd = -1;
    expect(!guest_convert(m, 0, MIB, false) && query("stale-private") == MIB);
    vcpu_run();
    munmap(m->shared, MIB);
    close_during_discard("private", m->private_fd);
    expect(query_says("\"regions\": []") && !counter("forgotten-bytes") && !fake.violations);
}

static void *set_in_place(void *argument)
{
    struct upm_kvm_attributes range = { .size = PAGE, .attributes = UPM_KVM_ATTRIBUTE_PRIVATE };
    const struct memory *m = argument;

    expect(!ioctl(m->private_fd, UPM_KVM_SET_ATTRIBUTES, &range));
    return NULL;
}

/* 2: the kernel is found to convert in place while a discard is under way. That one was made. */
static void in_place_during_a_discard(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    pthread_t thread;

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    vcpu_run();
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard("shared", 0, MIB);
    wait_for(somebody_waits, "the punch");
    pthread_create(&thread, NULL, set_in_place, m);
    usleep(A_WHILE_US);
    expect(stale() == MIB);
    open_gate();
    pthread_join(thread, NULL);
    expect(query("requested-bytes-shared") == MIB && !counter("forgotten-bytes"));
}

/* 13 and 23: a guest_memfd is closed by a call that we do not see, such as close_range(), and its
 * number comes again: nothing of the old one is stale in the new. */
static void closed_unseen(void)
{
    struct upm_kvm_create_guest_memfd create = { .size = MIB };
    struct memory *m = start_private(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    expect(!guest_convert(m, 0, MIB, false) && query("stale-private") == MIB);
    vcpu_run();
    slot_unmap(0);
    expect(!syscall(SYS_close, m->private_fd));
    expect(ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create) == m->private_fd);
    expect(!query("stale-private") && query("forgotten-bytes-private") == MIB);
    expect(pwrite(m->private_fd, "next", 4, 0) == 4);
    slot_plug(0, m, 0, MIB, 0);
    vcpu_run();
    expect(query_says("\"id\": 1,") && !query_says("\"id\": 2,"));
    drain();
    expect(allocated(m->private_fd) == PAGE && !fake.violations);
}

/* 23: the RAM has its next guest_memfd, and a slot with it, before QEMU closes the one before. The
 * next slot keeps to what the first one began. */
static void next_before_the_close(void)
{
    struct upm_kvm_create_guest_memfd create = { .size = MIB };
    struct memory *m = start_private(RAM_MEMFD, MIB), next = *m;

    defer_up_to(MIB);
    next.private_fd = ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    slot_unmap(0);
    slot_plug(0, &next, 0, MIB / 2, 0);
    close(m->private_fd);
    vcpu_run();
    expect(!guest_convert(&next, 0, PAGE, false) && stale() == PAGE);
    slot_plug(1, &next, MIB / 2, MIB / 2, MIB / 2);
    vcpu_run();
    expect(query_says("\"id\": 2,") && stale() == PAGE);
    expect(!guest_convert(&next, 0, PAGE, true) && query("reused-bytes-private") == PAGE);
}

/* 5 and 23: RAM is unmapped while it has a slot, and its guest_memfd then put beside other RAM that
 * has lost its own. What is left of the first slot belongs to no region. */
static void slot_outlives_its_ram(void)
{
    struct memory *m = start_private(RAM_MEMFD, MIB), *gone = plug(5, RAM_MEMFD, 4 * MIB, MIB);
    uint64_t converted;

    defer_up_to(MIB);
    slot_unmap(0);
    close(m->private_fd);
    munmap(gone->shared, MIB);
    m->private_fd = gone->private_fd;
    slot_plug(0, m, 0, MIB, 0);
    vcpu_run();
    expect(query_says("\"id\": 1,") && !query_says("\"id\": 2,"));
    converted = counter("converted-bytes-to");
    expect(!convert_only(4 * MIB, MIB, true));
    vcpu_run();
    expect(counter("converted-bytes-to") == converted);
    expect(!guest_convert(m, 0, PAGE, false) && query("stale-private") == PAGE);
}

/* 23: memory without a file takes the place of RAM whose file stays open: what is stale there is
 * given back, and nothing of the file. */
static void ram_replaced(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    int file = m->shared_fd;

    defer_up_to(4 * MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, PAGE, true) && stale() == PAGE);
    vcpu_run();
    slot_unmap(0);
    munmap(m->shared, MIB);
    expect(!stale() && query_says("\"backing\": \"unknown\""));
    m->shared = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(m->shared != MAP_FAILED);
    m->kind = RAM_ANONYMOUS;
    m->shared_fd = -1;
    slot_plug(0, m, 0, MIB, 0);
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && query("stale-shared") == MIB);
    vcpu_run();
    drain();
    expect(!resident(m->shared) && allocated(file) == MIB && !fake.violations);
}

const struct hazard closing_hazards[] = {
    { "closed-during-a-discard", closed_during_a_discard },
    { "in-place-during-a-discard", in_place_during_a_discard },
    { "closed-unseen", closed_unseen }, { "next-before-the-close", next_before_the_close },
    { "slot-outlives-its-ram", slot_outlives_its_ram }, { "ram-replaced", ram_replaced },
    { NULL, NULL },
};
