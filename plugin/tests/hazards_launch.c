/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards between the making or rebuilding of a VM and the first KVM_RUN. */
#include "hazards.h"

#include "../kvm-abi.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Everything that makes the plugin discard, and time for it. Ends with leases run out, and modes
 * eager. */
static void urge(void)
{
    ask_discard_of_all();
    configure("{\"budget\": 0}");
    usleep(A_WHILE_US);
    configure("{\"private\": \"eager\", \"shared\": \"eager\"}");
    usleep(A_WHILE_US);
    configure("{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": 1048576, "
              "\"lease-ms\": 10, \"on-lease-expiry\": \"eager\"}");
    while (!query("lease-expiries")) {
        usleep(1000);
    }
    usleep(A_WHILE_US);
}

static void set_slots(struct memory *m)
{
    slot_plug(0, m, 0, m->bytes, 0);
}

/* 21 and 31: the launch of an SNP guest sets attributes, and then KVM reads the shared copy of the
 * same pages. The main thread discards nothing, then or later. */
static void launch_source(void)
{
    struct memory *m;
    struct vcpu *v = vcpu_new();

    fake_start();
    defer_up_to(64 * MIB);
    m = memory_new(RAM_ANONYMOUS, 0, 4 * MIB);
    set_slots(m);
    memset(m->shared, 0x12, 4 * MIB);
    expect(!convert_only(0, MIB, true));
    expect(!convert_only(2 * MIB, 16 * PAGE, true));
    expect(query_says("\"launching\": true") && !counter("conversions-to") && !query("head"));
    expect(!stale());
    urge();
    expect(!fake.punches && fake.discarded_id == 0 && query_says("\"launching\": true"));
    expect(m->shared[0] == 0x12 && m->shared[2 * MIB] == 0x12);
    /* The first KVM_RUN of any thread ends it. */
    vcpu_goes_on(v);
    expect(query_says("\"launching\": false"));
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(!fake.punches && !stale() && m->shared[0] == 0x12);
    /* The main thread's last attributes are no conversion: what it discards later, it discards. */
    defer_up_to(64 * MIB);
    expect(!madvise(m->shared + 2 * MIB, PAGE, MADV_DONTNEED) && m->shared[2 * MIB] == 0);
    expect(!madvise(m->shared + 2 * MIB, 16 * PAGE, MADV_DONTNEED));
    expect(m->shared[2 * MIB + PAGE] == 0 && !stale());
    /* Guests' conversions meet no remains of it. */
    expect(!vcpu_convert(v, m, 511, 20, false) && !vcpu_discard(v, m, 511, 20, false));
    expect(stale() == 20 * PAGE && !fake.violations);
}

/* 23: reset, with copies stale on both sides each time */
static void resets(void)
{
    const uint64_t size = 40 * MIB;
    struct memory *m = start_private(RAM_MEMFD, size);

    defer_up_to(64 * MIB);
    for (uint64_t boot = 0; boot < 16; boot++) {
        uint64_t at = boot * 2 * MIB;

        expect(!guest_convert(m, at, 2 * MIB, false));
        fill_shared(m, at, 2 * MIB);
        expect(!guest_convert(m, at, 2 * MIB, true));
        expect(!guest_convert(m, 36 * MIB, MIB, false));
        expect(query("stale-shared") == at + 2 * MIB && query("stale-private") == MIB);
        expect(allocated(m->shared_fd) == at + 2 * MIB);
        vcpu_run();
        slot_unmap(0);
        vm_reset(&m, 1);
        set_slots(m);
        expect(query_says("\"launching\": true") && query_says("\"regions\": [{\"id\": 1, "));
        expect(query_says("\"conversion\": \"two-copy\"") && !query_says("\"id\": 2, "));
        vcpu_run();
        expect(query_says("\"launching\": false"));
        /* The private side went with its file, the shared one lives on. */
        expect(query("stale-shared") == at + 2 * MIB && query("stale-private") == 0);
        expect(query("forgotten-bytes-private") == (boot + 1) * MIB);
    }
    expect(query("forgotten-bytes-shared") == 0 && query("id") == 1);
    drain();
    expect(allocated(m->shared_fd) == 0 && !fake.violations);
    /* The ledger still knows the file. */
    defer_up_to(64 * MIB);
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && query("stale-shared") == MIB);
    discard_and_wait("shared", 0, MIB);
    expect(allocated(m->shared_fd) == 0 && !fake.violations);
}

/* 31: what the last boot left stale is where QEMU writes the next launch's source */
static void reset_source(void)
{
    struct memory *m = start_private(RAM_MEMFD, 4 * MIB);
    struct vcpu *v = vcpu_new();

    defer_up_to(8 * MIB);
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    slot_unmap(0);
    vm_reset(&m, 1);
    expect(query_says("\"launching\": true"));
    set_slots(m);
    memset(m->shared, 0x90, 2 * MIB);
    expect(!convert_only(0, 2 * MIB, true));
    fake.punches = 0;
    urge();
    expect(!fake.punches && fake.discarded_id == 0 && !fake.violations);
    expect(m->shared[0] == (char)0x90 && m->shared[MIB - 1] == (char)0x90);
    expect(query("stale-shared") == MIB && query_says("\"launching\": true"));
    vcpu_goes_on(v);
    wait_for(discarded, "X_UPM_DISCARDED");
    wait_for(ledger_is_empty, "the drain");
    /* And not a page more than was stale. */
    expect(m->shared[0] == 0 && m->shared[MIB - 1] == 0 && m->shared[MIB] == (char)0x90);
    expect(!fake.violations);
}

/* 31, where the new VM comes after the guest_memfds have gone */
static void closed_before_the_vm(void)
{
    struct upm_kvm_create_guest_memfd create = { .size = MIB };
    struct memory *m = start_private(RAM_MEMFD, MIB);

    defer_up_to(8 * MIB);
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    slot_unmap(0);
    close(m->private_fd);
    expect(query_says("\"launching\": true") && query("stale-shared") == MIB);
    ask_discard_of_all();
    configure("{\"budget\": 0}");
    usleep(A_WHILE_US);
    expect(!fake.punches && m->shared[0] == 0x5a);
    m->private_fd = ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    set_slots(m);
    expect(query("id") == 1 && !query_says("\"id\": 2"));
    vcpu_run();
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(allocated(m->shared_fd) == 0 && !fake.violations);
}

static _Atomic bool rebuilt;

static void *rebuild(void *argument)
{
    struct memory *m = argument;

    vm_new();
    rebuilt = true;
    set_slots(m);
    return NULL;
}

/* 31: a discard is under way when QEMU begins to rebuild: QEMU goes on when it is over. */
static void reset_during_a_discard(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    pthread_t thread;

    defer_up_to(8 * MIB);
    fill_shared(m, 0, 4 * MIB);
    expect(!guest_convert(m, 0, 4 * MIB, true));
    vcpu_run();
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard("shared", 0, 4 * MIB);
    wait_for(somebody_waits, "the punch");
    slot_unmap(0);
    pthread_create(&thread, NULL, rebuild, m);
    usleep(A_WHILE_US);
    expect(!rebuilt);
    open_gate();
    pthread_join(thread, NULL);
    expect(rebuilt);
    usleep(A_WHILE_US);
    /* The chunk that was under way is gone, and no more. */
    expect(stale() == 2 * MIB && !fake.violations && fake.discarded_id == 0);
    vcpu_run();
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(!stale() && !fake.violations);
}

/* 23: two blocks of RAM of the same size keep their own copies apart, one more comes, and one that
 * is unplugged while the VM is rebuilt takes what was stale with it */
static void reset_of_two(void)
{
    struct memory *m[2] = { start_private(RAM_MEMFD, MIB), NULL }, *more;
    char *pages;

    m[1] = memory_new(RAM_ANONYMOUS, MIB, MIB);
    slot_plug(1, m[1], 0, MIB, MIB);
    defer_up_to(8 * MIB);
    for (int i = 0; i < 2; i++) {
        expect(!guest_convert(m[i], i * PAGE, PAGE, false));
        fill_shared(m[i], i * PAGE, PAGE);
        expect(!guest_convert(m[i], i * PAGE, PAGE, true));
    }
    vcpu_run();
    slot_unmap(0);
    slot_unmap(1);
    vm_reset(m, 2);
    slot_plug(1, m[1], 0, MIB, MIB);
    slot_plug(0, m[0], 0, MIB, 0);
    more = memory_new(RAM_MEMFD, 2 * MIB, MIB);
    slot_plug(2, more, 0, MIB, 2 * MIB);
    vcpu_run();
    pages = ledger_of(1, "shared", 3);
    expect(!strcmp(pages, "x.."));
    free(pages);
    pages = ledger_of(2, "shared", 3);
    expect(!strcmp(pages, ".x."));
    free(pages);
    expect(stale() == 2 * PAGE);
    slot_unmap(0);
    slot_unmap(1);
    slot_unmap(2);
    close(fake.vm_fd);
    vm_new();
    close(m[0]->private_fd);
    munmap(m[0]->shared, MIB);
    expect(stale() == PAGE && query("forgotten-bytes-shared") == PAGE);
    expect(!query_says("\"id\": 1,") && query_says("\"id\": 2,"));
    vcpu_run();
    drain();
    expect(!resident(m[1]->shared + PAGE));
}

/* 23 and 31: the reset's guest_memfd is one too many to follow: no copy of the last boot is stale any
 * more, since nobody would see it become live in the next */
static void no_room_at_reset(void)
{
    enum { ROOM = 512 };
    struct upm_kvm_create_guest_memfd create = { .size = PAGE };
    struct memory *m = start_private(RAM_MEMFD, MIB);

    defer_up_to(8 * MIB);
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    vcpu_run();
    for (int i = 1; i < ROOM; i++) {
        expect(ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create) >= 0 && !fake.said);
    }
    slot_unmap(0);
    vm_reset(&m, 1);
    expect(fake.said == 1 && strstr(fake.last_said, "no memory to follow"));
    set_slots(m);
    vcpu_run();
    expect(!guest_convert(m, 0, MIB, false));
    memset(m->shared, 0x77, MIB);
    vcpu_run();
    ask_discard_of_all();
    wait_for(discarded, "X_UPM_DISCARDED");
    drain();
    expect(m->shared[0] == 0x77 && m->shared[MIB - 1] == 0x77 && !fake.violations);
    /* Its discards are QEMU's own. */
    defer_up_to(8 * MIB);
    expect(!guest_convert(m, 0, MIB, true) && !stale() && allocated(m->shared_fd) == 0);
}

/* 27: QEMU 9.1 passes an ioctl's number as an int, and bit 31 fills the upper half */
static void int_requests(void)
{
    struct memory *m;

    fake.int_requests = true;
    m = start(RAM_MEMFD, MIB);
    expect(query_says("\"conversion\": \"two-copy\"") && query("size") == MIB);
    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    expect(stale() == MIB && m->shared[0] == 0x5a);
    drain();
    expect(allocated(m->shared_fd) == 0 && !fake.violations);
}

const struct hazard launch_hazards[] = {
    { "launch-source", launch_source }, { "resets", resets }, { "reset-source", reset_source },
    { "closed-before-the-vm", closed_before_the_vm }, { "reset-of-two", reset_of_two },
    { "no-room-at-reset", no_room_at_reset },
    { "reset-during-a-discard", reset_during_a_discard },
    { "int-requests", int_requests }, { NULL, NULL },
};
