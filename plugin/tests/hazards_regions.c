/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of RAM that comes, moves and goes. */
#include "hazards.h"

#include "../kvm-abi.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* 2 */
static void in_place(void)
{
    struct upm_kvm_attributes range = { .size = PAGE };
    struct memory *m = start(RAM_IN_PLACE, MIB);

    expect(query_says("\"conversion\": \"in-place\""));
    defer_up_to(MIB);
    memset(m->shared, 0x5a, MIB);
    range.attributes = UPM_KVM_ATTRIBUTE_PRIVATE;
    expect(!ioctl(m->private_fd, UPM_KVM_SET_ATTRIBUTES, &range));
    range.attributes = 0;
    expect(!ioctl(m->private_fd, UPM_KVM_SET_ATTRIBUTES, &range));
    expect(!guest_convert(m, 0, PAGE, false));
    vcpu_run();
    expect(!convert_only(0, PAGE, true));
    expect(!convert_only(0, PAGE, false));
    expect(!stale() && !counter("deferred-bytes"));
    discard_and_wait("both", 0, MIB);
    ask_discard_of_all();
    wait_for(discarded, "X_UPM_DISCARDED");
    drain();
    expect(m->shared[PAGE] == 0x5a && m->shared[MIB - 1] == 0x5a);
}

/* 2, where the kernel is found to convert in place only after copies had been deferred */
static void in_place_later(void)
{
    struct {
        struct upm_kvm_attributes range;
        uint64_t error_offset, reserved[11];
    } second = { .range = { .size = PAGE } };
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *v = vcpu_new(), *back = vcpu_new();

    defer_up_to(2 * MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB / 2, true));
    expect(stale() == MIB / 2);
    expect(!vcpu_convert(v, m, 128, 8, true) && !vcpu_convert(back, m, 64, 8, false));
    expect(!ioctl(m->private_fd, _IOWR(UPM_KVMIO, 0xd2, second), &second));
    expect(!stale() && query("failsafe-bytes-shared") == 0);
    expect(query("forgotten-bytes-shared") == MIB / 2 - 8 * PAGE);
    expect(query_says("\"conversion\": \"in-place\""));
    /* What came before the finding is QEMU's own affair, and what comes after it too. */
    expect(!vcpu_discard(v, m, 128, 8, true) && m->shared[128 * PAGE] == 0 && !stale());
    expect(!vcpu_discard(back, m, 64, 8, false) && !stale());
    expect(!guest_convert(m, 0, PAGE, false) && !stale());
    fake.punches = 0;
    drain();
    expect(!fake.punches);
}

static void map_without_guest_memfd(unsigned slot, uint64_t gpa, uint64_t bytes)
{
    struct upm_kvm_region2 set = {
        .slot = slot, .guest_phys_addr = gpa, .memory_size = bytes, .userspace_addr = 4096,
    };

    expect(!ioctl(fake.vm_fd, UPM_KVM_SET_REGION2, &set));
}

/* 4 */
static void slot_registration(void)
{
    struct memory *m = start_private(RAM_MEMFD, MIB);
    char *reply;

    defer_up_to(4 * MIB);
    memset(m->private, 0x33, MIB);
    for (int i = 0; i < 3; i++) {
        slot_unmap(0);
        slot_plug(0, m, 0, MIB, 0);
        vcpu_run();
    }
    expect(!counter("conversions-to") && !stale() && query("head") == 0);
    expect(query("left-alone-bytes") == 0);
    /* The same range again is the guest's. */
    expect(!guest_convert(m, 0, MIB, false));
    expect(counter("conversions-to") == 1 && query("stale-private") == MIB);
    expect(query("converted-bytes-to-shared") == MIB);
    /* What a registration makes live is stale no more. */
    slot_unmap(0);
    slot_plug(0, m, 0, MIB, 0);
    expect(!stale() && query("reused-bytes-private") == MIB && m->private[0] == 0x33);
    reply = must("x-upm-read", "{\"cursor\": 1, \"max\": 10}");
    expect(strstr(reply, "\"records\": [[1, 0, 1048576, 1, 0, ") && strstr(reply, ", 0]]"));
    free(reply);
    expect(counter("conversions-to") == 1);
    drain();
    /* Slots that QEMU marks not: the guest's next conversion is one, even of the same range. */
    defer_up_to(4 * MIB);
    map_without_guest_memfd(7, 0, 16 * PAGE);
    expect(!guest_convert(m, 0, 16 * PAGE, false));
    slot_unmap(7);
    expect(counter("conversions-to") == 2 && stale() == 16 * PAGE);
    /* Nor do slots of another address space count: SMM has one, and no private memory. */
    slot_map(1 << 16 | 3, m, 0, MIB, 64 * MIB);
    expect(!query_says("\"gpa\": 67108864") && query_says("\"gpa\": 0"));
    /* A slot registered, and a part of it converted; or more than it. */
    slot_map(0, m, 0, MIB, 0);
    expect(!guest_convert(m, 0, 32 * PAGE, true) && counter("conversions-to") == 3);
    slot_map(0, m, 0, MIB, 0);
    expect(!guest_convert(m, PAGE, MIB - PAGE, true) && counter("conversions-to") == 4);
    expect(!fake.violations);
}

/* 5 */
static void slot_moves(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, 16 * PAGE, true));
    slot_unmap(0);
    expect(stale() == 16 * PAGE);
    /* Elsewhere, and only a part of it. */
    m->gpa = 64 * MIB;
    expect(!convert_only(m->gpa, 16 * PAGE, true));
    slot_plug(3, m, 8 * PAGE, 16 * PAGE, m->gpa + 8 * PAGE);
    expect(query_says("\"gpa\": 67141632, \"size\": 65536, \"offset\": 32768"));
    expect(!guest_convert(m, 8 * PAGE, 8 * PAGE, false));
    expect(query("reused-bytes-shared") == 8 * PAGE && m->shared[8 * PAGE] == 0x5a);
    expect(query("stale-shared") == 8 * PAGE);
    /* Before and behind the slot there is nothing of ours. */
    expect(!guest_convert(m, 0, 8 * PAGE, false) && query("stale-shared") == 8 * PAGE);
    expect(!guest_convert(m, 24 * PAGE, 8 * PAGE, true) && query("stale-shared") == 8 * PAGE);
    expect(!convert_only(0, 16 * PAGE, false) && query("stale-shared") == 8 * PAGE);
    fake.violations = 0;   /* those were QEMU's own discards, of pages that it has no slot for */
    expect(!convert_only(m->gpa, 8 * PAGE, true));
    drain();
    expect(!fake.violations);
}

/* 13 */
static void closed_region(void)
{
    struct memory *m = start(RAM_MEMFD, MIB), *next;
    struct vcpu *closing = vcpu_new();
    int number = m->shared_fd, later;

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard_of_all();
    wait_for(somebody_waits, "the punch");
    vcpu_begin_free(closing, m);
    usleep(A_WHILE_US);
    expect(!vcpu_is_done(closing) && fcntl(number, F_GETFD) >= 0);
    open_gate();
    vcpu_finish(closing);
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.before_punch = NULL;
    expect(query_says("\"regions\": []") && query_says("\"conversion\": \"none\""));
    expect(query_says("\"launching\": false"));

    /* The number is another file's now. */
    later = memfd_create("later", 0);
    expect(later == number && pwrite(later, "later", 5, 0) == 5);
    drain();
    expect(allocated(later) == PAGE);

    /* Its place in the guest is nobody's, and then another's. */
    expect(!convert_only(0, MIB, false) && !stale());
    next = plug(4, RAM_MEMFD, 0, MIB);
    defer_up_to(MIB);
    fill_shared(next, 0, MIB);
    expect(!guest_convert(next, 0, PAGE, true));
    expect(stale() == PAGE && query("id") == 2 && !fake.violations);
}

/* 13, with a conversion whose discard QEMU has yet to ask for */
static void closed_while_pending(void)
{
    struct memory *m = start(RAM_MEMFD, MIB), *gone, *next;
    struct vcpu *v = vcpu_new();
    int private_fd, shared_fd;
    uint64_t head;

    expect(m->bytes == MIB);
    defer_up_to(8 * MIB);
    for (int to_private = 0; to_private < 2; to_private++) {
        gone = plug(1, RAM_MEMFD, 4 * MIB, MIB);
        private_fd = gone->private_fd;
        shared_fd = gone->shared_fd;
        expect(!convert_only(4 * MIB, MIB, !to_private));
        vcpu_run();
        expect(!vcpu_convert(v, gone, 0, 8, to_private));
        head = query("head");
        slot_unmap(1);
        memory_free(gone);
        expect(query("head") == head + 1);   /* it is on record */
        next = plug(1, RAM_MEMFD, 4 * MIB, MIB);
        expect(next->private_fd == private_fd && next->shared_fd == shared_fd);
        expect(!convert_only(4 * MIB, MIB, to_private));
        vcpu_run();
        memset(to_private ? next->shared : next->private, 1, 8 * PAGE);
        /* A call that comes so late is none of that conversion's: other memory has its number. */
        expect(!vcpu_discard(v, next, 0, 8, to_private) && !stale());
        expect((to_private ? next->shared : next->private)[7 * PAGE] == 0);
        vcpu_goes_on(v);
        slot_unmap(1);
        memory_free(next);
    }
    expect(!fake.violations);
}

/* 13 and 23: only the file of the RAM, or only its mapping, goes */
static void half_closed(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct vcpu *v = vcpu_new();
    uint64_t missed;
    int kept;

    defer_up_to(8 * MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, 16 * PAGE, true));
    kept = dup(m->shared_fd);
    /* The file's number is free for another file; the RAM is still there, and so are its copies. */
    close(m->shared_fd);
    expect(query("stale-shared") == 16 * PAGE);
    expect(open("/dev/null", O_RDWR) == m->shared_fd);
    discard_and_wait("shared", 0, 8 * PAGE);
    expect(m->shared[8 * PAGE] == 0x5a && strstr(fake.discarded, "\"discarded\": 32768"));
    close(m->shared_fd);
    m->shared_fd = kept;
    /* A conversion is pending when the mapping goes. */
    expect(!vcpu_convert(v, m, 32, 8, true));
    missed = query("dropped");
    munmap(m->shared, MIB);
    /* The record can't tell what has gone: its reader is told to read the ledger. */
    expect(query("dropped") > missed);
    expect(query_says("\"backing\": \"unknown\""));
    expect(query("stale-shared") == 0 && query("forgotten-bytes-shared") == 8 * PAGE);
    expect(allocated(m->shared_fd) == MIB - 8 * PAGE);
    vcpu_discard(v, m, 32, 8, true);   /* QEMU's own: its madvise() finds no mapping */
    expect(!stale() && allocated(m->shared_fd) == MIB - 16 * PAGE);
    vcpu_goes_on(v);
    expect(!query("left-alone-bytes"));
    /* The private side is still followed. */
    expect(!convert_only(0, 4 * PAGE, false));
    expect(!fallocate64(m->private_fd, PUNCH, 0, 4 * PAGE) && query("stale-private") == 4 * PAGE);
    discard_and_wait("both", 0, MIB);
    expect(!stale());
    missed = query("dropped");
    close(m->private_fd);
    expect(query_says("\"regions\": []") && query("dropped") == missed);
}

/* A part of the mapping, one page before it, and one behind. */
static void unmapped_in_part(void)
{
    char *around = mmap(NULL, 3 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct memory *m;

    expect(around != MAP_FAILED);
    fake_start();
    m = memory_new(RAM_MEMFD, 0, MIB);
    munmap(m->shared, MIB);
    m->shared = mmap(around + MIB, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                     m->shared_fd, 0);
    expect(m->shared == around + MIB);
    slot_plug(0, m, 0, MIB, 0);
    expect(!convert_only(0, MIB, false));
    vcpu_run();
    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && stale() == MIB);
    munmap(around, MIB);
    munmap(around + 2 * MIB, MIB);
    expect(stale() == MIB);
    munmap(m->shared + MIB - PAGE, PAGE);
    expect(!stale());
}

/* A duplicate of the RAM's descriptor with a lower number, as QEMU's fd sets have it. */
static void duplicate(void)
{
    int hole = open("/dev/null", O_RDWR), lower;
    struct memory *m;

    fake_start();
    m = memory_new(RAM_MEMFD, 0, MIB);
    close(hole);
    lower = dup(m->shared_fd);
    expect(lower == hole);
    slot_plug(0, m, 0, MIB, 0);
    expect(!convert_only(0, MIB, false));
    vcpu_run();
    defer_up_to(2 * MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    expect(stale() == MIB && allocated(m->shared_fd) == MIB && !fake.punches);
    close(lower);
    expect(stale() == MIB);
    drain();
    expect(allocated(m->shared_fd) == 0 && fake.punches >= 1 && !fake.violations);
}

/* More RAM than there is room for: what is too much is QEMU's own. */
static void too_many(void)
{
    enum { ROOM = 512 };
    struct upm_kvm_create_guest_memfd create = { .size = PAGE }, large = { .size = 16ull << 30 };
    int fd[ROOM + 1];
    uint64_t before;

    fake_start();
    for (int i = 0; i < ROOM; i++) {
        fd[i] = ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
        expect(fd[i] >= 0 && !fake.said);
    }
    fd[ROOM] = ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    expect(fd[ROOM] >= 0 && fake.said == 1 && strstr(fake.last_said, "no memory to follow"));
    close(fd[ROOM]);
    close(fd[100]);
    expect(ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create) == fd[100] && fake.said == 1);
    expect(!query_says("\"id\": 101,") && query_says("\"id\": 513,"));
    /* The plugin keeps no memory for those. */
    before = mapped();
    for (int i = 0; i < 20; i++) {
        expect(ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &large) >= 0);
    }
    expect(fake.said == 21 && (SANITIZED || mapped() < before + 4 * MIB));
}

static int ending;

static void *opens_and_closes(void *unused)
{
    (void)unused;
    while (!__atomic_load_n(&ending, __ATOMIC_RELAXED)) {
        int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
        void *at = mmap(NULL, 64 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        munmap(at, 64 * PAGE);
        close(fd);
    }
    return NULL;
}

/* Other threads of QEMU's close files and unmap memory while RAM is plugged and unplugged. */
static void strangers_close(void)
{
    pthread_t thread[3];
    struct memory *m = start(RAM_MEMFD, MIB);

    expect(m->bytes == MIB);
    defer_up_to(16 * MIB);
    for (int i = 0; i < 3; i++) {
        pthread_create(&thread[i], NULL, opens_and_closes, NULL);
    }
    for (int i = 0; i < 300; i++) {
        struct memory *more = plug(1, RAM_MEMFD, 2 * MIB, (1 + i % 7) * 16 * PAGE);

        expect(!guest_convert(more, 0, 16 * PAGE, true));
        expect(stale() == 16 * PAGE);
        slot_unmap(1);
        memory_free(more);
        expect(!stale());
    }
    __atomic_store_n(&ending, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < 3; i++) {
        pthread_join(thread[i], NULL);
    }
    expect(!fake.violations);
}

const struct hazard region_hazards[] = {
    { "in-place", in_place }, { "in-place-later", in_place_later },
    { "slot-registration", slot_registration }, { "slot-moves", slot_moves },
    { "closed-region", closed_region }, { "closed-while-pending", closed_while_pending },
    { "half-closed", half_closed }, { "unmapped-in-part", unmapped_in_part },
    { "duplicate", duplicate }, { "too-many", too_many }, { "strangers-close", strangers_close },
    { NULL, NULL },
};
