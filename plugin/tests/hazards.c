/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a VMM that delays discards must never do, one case each: `hazards NAME`. Exit code 0: held;
 * 77: this host has not what the case needs. The tests that run them say what each is about.
 */
#include "fake.h"

#include "../kvm-abi.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/falloc.h>

#define MIB (1ull << 20)
#define PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

int ioctl(int fd, unsigned long request, ...);
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes);

/* A place where one thread is stopped, so that the test can look at what others do meanwhile. */
static struct gate {
    int shut, waiting;
} gate;

static void stop_at_gate(void)
{
    __atomic_store_n(&gate.waiting, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&gate.shut, __ATOMIC_SEQ_CST)) {
        usleep(100);
    }
    __atomic_store_n(&gate.waiting, 0, __ATOMIC_SEQ_CST);
}

static void stop_punch(int fd, uint64_t offset, uint64_t bytes)
{
    (void)fd, (void)offset, (void)bytes;
    stop_at_gate();
}

static bool somebody_waits(void)
{
    return __atomic_load_n(&gate.waiting, __ATOMIC_SEQ_CST);
}

static void open_gate(void)
{
    __atomic_store_n(&gate.shut, 0, __ATOMIC_SEQ_CST);
}

/* QEMU marks each new slot; the guest is one that boots from shared memory. */
static void map_shared(unsigned slot, const struct memory *m, uint64_t offset, uint64_t bytes,
                       uint64_t gpa)
{
    slot_map(slot, m, offset, bytes, gpa);
    expect(!convert_only(gpa, bytes, false));
}

static struct memory *start(enum kind kind, uint64_t bytes)
{
    struct memory *m;

    fake_start();
    m = memory_new(kind, 0, bytes);
    map_shared(0, m, 0, bytes, 0);
    vcpu_run();
    return m;
}

static void defer_up_to(uint64_t budget)
{
    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", \"budget\": %llu, "
              "\"notify-ms\": 1}", (unsigned long long)budget));
}

static void fill_shared(struct memory *m, uint64_t offset, uint64_t bytes)
{
    memset(m->shared + offset, 0x5a, bytes);
}

static uint64_t allocated(int fd)
{
    struct stat st;

    expect(!fstat(fd, &st));
    return st.st_blocks * 512;
}

static bool discarded(void)
{
    return __atomic_load_n(&fake.discarded_id, __ATOMIC_ACQUIRE) == 7;
}

static void discard_and_wait(const char *copy, uint64_t offset, uint64_t bytes)
{
    fake.discarded_id = 0;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"%s\", \"ranges\": [[1, %llu, %llu]]}", copy,
              (unsigned long long)offset, (unsigned long long)bytes));
    wait_for(discarded, "X_UPM_DISCARDED");
}

struct conversion {
    struct memory *m;
    uint64_t offset, bytes;
    bool to_private;
    int done;
};

static void *convert_thread(void *argument)
{
    struct conversion *c = argument;

    expect(!guest_convert(c->m, c->offset, c->bytes, c->to_private));
    __atomic_store_n(&c->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static bool is_done(const struct conversion *c)
{
    return __atomic_load_n(&c->done, __ATOMIC_SEQ_CST);
}

/* 1 */
static void flipped_back(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    struct conversion back = { .m = m, .bytes = PAGE, .to_private = false };
    pthread_t thread;

    defer_up_to(MIB);
    fill_shared(m, 0, 2 * PAGE);
    expect(!guest_convert(m, 0, 2 * PAGE, true));
    expect(stale() == 2 * PAGE);

    /* Asked for, then converted back before it is done: the conversion waits for the punch. */
    gate.shut = 1;
    fake.before_punch = stop_punch;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"shared\", \"ranges\": [[1, 0, 4096]]}"));
    wait_for(somebody_waits, "the punch");
    pthread_create(&thread, NULL, convert_thread, &back);
    usleep(20000);
    expect(!is_done(&back) && page_is_private(0));
    open_gate();
    pthread_join(thread, NULL);
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.before_punch = NULL;

    /* Converted back first: the discard finds nothing. */
    expect(!guest_convert(m, PAGE, PAGE, false));
    discard_and_wait("shared", PAGE, PAGE);
    expect(strstr(fake.discarded, "\"discarded\": 0, \"skipped\": 4096"));
    expect(m->shared[PAGE] == 0x5a);
    expect(!fake.violations);
}

/* 2 */
static void in_place(void)
{
    struct upm_kvm_attributes range = { .size = PAGE };
    struct memory *m = start(RAM_IN_PLACE, MIB);
    char *text = must("x-upm-query", "{}");

    expect(strstr(text, "\"conversion\": \"in-place\""));
    free(text);
    defer_up_to(MIB);
    memset(m->shared, 0x5a, MIB);
    range.attributes = UPM_KVM_ATTRIBUTE_PRIVATE;
    expect(!ioctl(m->private_fd, UPM_KVM_SET_ATTRIBUTES, &range));
    range.attributes = 0;
    expect(!ioctl(m->private_fd, UPM_KVM_SET_ATTRIBUTES, &range));
    expect(!convert_only(0, PAGE, true));
    expect(!convert_only(0, PAGE, false));
    expect(!stale() && !counter("deferred-bytes"));
    discard_and_wait("both", 0, MIB);
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"both\", \"all\": true}"));
    drain();
    expect(!fake.punches && m->shared[0] == 0x5a && m->shared[MIB - 1] == 0x5a);
}

/* 2, where the kernel is found to convert in place only after copies had been deferred */
static void in_place_later(void)
{
    struct {
        struct upm_kvm_attributes range;
        uint64_t error_offset, reserved[11];
    } second = { .range = { .size = PAGE } };
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    expect(stale() == MIB);
    expect(!ioctl(m->private_fd, _IOWR(UPM_KVMIO, 0xd2, second), &second));
    expect(!stale() && query("failsafe-bytes-shared") == 0);
    drain();
    expect(!fake.punches && accounting_closes());
}

static void *punch_thread(void *argument)
{
    struct memory *m = argument;

    expect(!fallocate64(m->shared_fd, PUNCH, 0, PAGE));
    return NULL;
}

/* 3 */
static void other_punches(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    int disk = memfd_create("disk", 0);
    pthread_t thread;

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!ftruncate(disk, MIB) && pwrite(disk, "data", 4, 0) == 4);

    /* Another file, at the offset that a conversion left; then the discard that it does owe. */
    expect(!convert_only(0, PAGE, true));
    expect(!fallocate64(disk, PUNCH, 0, PAGE));
    expect(allocated(disk) == 0);
    expect(!qemu_discard(m, 0, PAGE, true));
    expect(stale() == PAGE);
    /* Another range, and another mode, of the same file; a conversion is still unfinished. */
    expect(!convert_only(PAGE, PAGE, true));
    expect(!fallocate64(m->shared_fd, PUNCH, 16 * PAGE, PAGE));
    expect(m->shared[16 * PAGE] == 0);
    expect(!fallocate64(m->shared_fd, 0, 16 * PAGE, PAGE));
    expect(fallocate64(m->shared_fd, PUNCH, PAGE, 17) == 0); /* half a page is no conversion's */
    /* The same range once more: the conversion's own discard came already. */
    expect(!qemu_discard(m, PAGE, PAGE, true));
    expect(!fallocate64(m->shared_fd, PUNCH, PAGE, PAGE));
    /* After the guest ran on; and on another thread. A balloon of shared pages does this. */
    expect(!convert_only(32 * PAGE, PAGE, true));
    vcpu_run();
    expect(!fallocate64(m->shared_fd, PUNCH, 64 * PAGE, PAGE));
    expect(m->shared[64 * PAGE] == 0);
    fill_shared(m, 0, PAGE);
    expect(!convert_only(33 * PAGE, PAGE, true));
    pthread_create(&thread, NULL, punch_thread, m);
    pthread_join(thread, NULL);
    expect(m->shared[0] == 0);
    expect(!madvise(m->shared + 65 * PAGE, PAGE, MADV_REMOVE) && m->shared[65 * PAGE] == 0);
    expect(counter("inline-bytes") == 0 && query("discards") == 0 && accounting_closes());
}

/* 4 */
static void slot_registration(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    for (int i = 0; i < 3; i++) {
        slot_unmap(0);
        slot_map(0, m, 0, MIB, 0);
        expect(!convert_only(0, MIB, true));
    }
    expect(!counter("conversions-to") && !stale() && query("head") == 0);
    /* The same range again is the guest's. */
    expect(!guest_convert(m, 0, MIB, false));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    expect(counter("conversions-to") == 2 && query("stale-shared") == MIB);
    /* What a registration makes live is stale no more. */
    expect(!guest_convert(m, 0, MIB, false));
    slot_unmap(0);
    slot_map(0, m, 0, MIB, 0);
    expect(!convert_only(0, MIB, true));
    drain();
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
    slot_map(3, m, 8 * PAGE, 16 * PAGE, m->gpa + 8 * PAGE);
    expect(!guest_convert(m, 8 * PAGE, 8 * PAGE, false));
    expect(counter("reused-bytes") == 8 * PAGE && m->shared[8 * PAGE] == 0x5a);
    expect(query("stale-shared") == 8 * PAGE && accounting_closes());
    drain();
    expect(!fake.violations);
}

static bool resident(const char *start)
{
    unsigned char in;

    expect(!mincore((void *)start, PAGE, &in));
    return in & 1;
}

/* 6 */
static void memory_is_freed(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB), *anonymous;

    anonymous = memory_new(RAM_ANONYMOUS, 64 * MIB, MIB);
    map_shared(1, anonymous, 0, MIB, anonymous->gpa);
    defer_up_to(8 * MIB);
    fill_shared(m, 0, 4 * MIB);
    fill_shared(anonymous, 0, MIB);
    expect(!guest_convert(m, 0, 4 * MIB, true));
    expect(!guest_convert(anonymous, 0, MIB, true));
    expect(allocated(m->shared_fd) == 4 * MIB && resident(anonymous->shared));
    drain();
    expect(allocated(m->shared_fd) == 0 && !resident(anonymous->shared));
    /* Eager now: QEMU's own. */
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, false) && !guest_convert(m, 0, MIB, true));
    expect(allocated(m->shared_fd) == 0);
}

/* 7 */
static void huge_pages(void)
{
    struct memory *m;
    int fd = memfd_create("probe", MFD_HUGETLB);

    if (fd < 0) {
        exit(77);
    }
    fake_start();
    /* No page is ever touched: none need be reserved. */
    m = memory_new(RAM_HUGETLB, 0, 4 * MIB);
    map_shared(0, m, 0, 4 * MIB, 0);
    vcpu_run();
    defer_up_to(4 * MIB);
    expect(query("page-size") == 4096);
    expect(!guest_convert(m, 0, PAGE, true));
    expect(!stale() && query("left-alone-bytes") == PAGE);
    memset(m->private, 1, PAGE);
    expect(!guest_convert(m, 0, PAGE, false));
    expect(stale() == PAGE && query("stale-private") == PAGE);
    discard_and_wait("both", 0, 4 * MIB);
    expect(!stale() && fake.punches == 1);
}

/* 8 */
static void spans_regions(void)
{
    struct memory *first = start(RAM_MEMFD, MIB), *second = memory_new(RAM_ANONYMOUS, MIB, MIB);
    struct memory *third = memory_new(RAM_MEMFD, 4 * MIB, MIB);

    map_shared(1, second, 0, MIB / 2, MIB);
    map_shared(2, second, MIB / 2, MIB / 2, MIB + MIB / 2);
    map_shared(3, third, 0, MIB, 4 * MIB);
    defer_up_to(8 * MIB);
    fill_shared(first, 0, MIB);
    fill_shared(second, 0, MIB);
    fill_shared(third, 0, MIB);
    /* The end of one, all of another with two slots, a hole, and the beginning of a third. */
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, true));
    expect(!stale() && counter("conversions-to") == 1);
    expect(!qemu_discard(first, MIB - PAGE, PAGE, true));
    expect(!qemu_discard(second, 0, MIB, true));
    expect(!qemu_discard(third, 0, PAGE, true));
    expect(!fake.punches && stale() == PAGE + MIB + PAGE);
    /* And eagerly, in another order. */
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, false));
    vcpu_run();
    drain();
    expect(!convert_only(MIB - PAGE, 3 * MIB + 2 * PAGE, true));
    expect(!qemu_discard(third, 0, PAGE, true));
    expect(!qemu_discard(second, 0, MIB, true));
    expect(!qemu_discard(first, MIB - PAGE, PAGE, true));
    expect(query("inline-bytes-shared") == PAGE + MIB + PAGE && !stale());
    expect(!fake.violations && accounting_closes());
}

/* 9 */
static void not_ram(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    expect(!convert_only(100 * MIB, 16 * PAGE, false));
    expect(convert_only(100 * MIB, 17, false) == -1 && errno == EINVAL);
    expect(convert_only(100 * MIB, 0, false) == -1 && errno == EINVAL);
    expect(convert_only(-PAGE, 2 * PAGE, false) == -1 && errno == EINVAL);
    expect(!counter("conversions-to") && !query("head"));
    /* Partly: what is RAM is followed. */
    fill_shared(m, 0, MIB);
    expect(!convert_only(MIB - PAGE, 2 * PAGE, true));
    expect(!stale() && !qemu_discard(m, MIB - PAGE, PAGE, true));
    expect(stale() == PAGE);
}

/* 10 */
static void short_stalls(void)
{
    struct memory *m = start(RAM_MEMFD, 128 * MIB);
    struct conversion beside = { .m = m, .offset = 127 * MIB, .bytes = PAGE, .to_private = true };
    pthread_t thread;

    defer_up_to(256 * MIB);
    fill_shared(m, 0, 64 * MIB);
    expect(!guest_convert(m, 0, 64 * MIB, true));
    gate.shut = 1;
    fake.before_punch = stop_punch;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"shared\", \"all\": true}"));
    wait_for(somebody_waits, "the punch");
    /* A punch is under way: neighbours convert meanwhile. */
    pthread_create(&thread, NULL, convert_thread, &beside);
    pthread_join(thread, NULL);
    expect(is_done(&beside) && somebody_waits());
    open_gate();
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(fake.punches >= 32 && fake.longest_punch <= 2 * MIB && !fake.violations);
    /* QEMU's own call for a long range goes in chunks too. */
    fill_shared(m, 64 * MIB, 16 * MIB);
    free(must("x-upm-configure", "{\"shared\": \"eager\"}"));
    fake.punches = 0;
    expect(!guest_convert(m, 64 * MIB, 16 * MIB, true));
    expect(fake.punches >= 8 && fake.longest_punch <= 2 * MIB);
}

/* 11 */
static void budget(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, 4 * MIB);
    for (uint64_t at = 0; at < 4 * MIB; at += 64 * 1024) {
        expect(!guest_convert(m, at, 64 * 1024, true));
        expect(stale() <= MIB);
    }
    expect(stale() == MIB && query("peak") == MIB && query("inline-bytes-shared") == 3 * MIB);
    expect(query("over-budget-bytes") == 3 * MIB);
    /* A smaller one takes effect at once. */
    free(must("x-upm-configure", "{\"budget\": 65536}"));
    while (stale() > 65536) {
        usleep(200);
    }
    expect(!fake.violations && accounting_closes());
}

/* 12 */
static void notifications_pass(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);
    int notified = open("/dev/null", O_RDWR);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!convert_only(0, PAGE, true));
    /* VFIO's unmapping: type ';'. It reaches the kernel now, not with the discard. */
    errno = 0;
    expect(ioctl(notified, _IO(';', 114), 0) == -1 && errno == ENOTTY);
    expect(!qemu_discard(m, 0, PAGE, true) && !fake.punches && stale() == PAGE);
    free(must("x-upm-configure", "{\"private\": \"eager\", \"shared\": \"eager\"}"));
    expect(!convert_only(PAGE, PAGE, true));
    expect(ioctl(notified, _IO(';', 114), 0) == -1 && errno == ENOTTY);
    expect(!qemu_discard(m, PAGE, PAGE, true));
    expect(query("inline-bytes-shared") == PAGE);
}

static void *close_thread(void *argument)
{
    struct conversion *c = argument;

    memory_free(c->m);
    __atomic_store_n(&c->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* 13 */
static void closed_region(void)
{
    struct memory *m = start(RAM_MEMFD, MIB), *rebuilt;
    struct conversion closing = { .m = m };
    int number = m->shared_fd, later;
    pthread_t thread;
    char *text;

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    gate.shut = 1;
    fake.before_punch = stop_punch;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"shared\", \"all\": true}"));
    wait_for(somebody_waits, "the punch");
    pthread_create(&thread, NULL, close_thread, &closing);
    usleep(20000);
    expect(!is_done(&closing) && fcntl(number, F_GETFD) >= 0);
    open_gate();
    pthread_join(thread, NULL);
    wait_for(discarded, "X_UPM_DISCARDED");
    fake.before_punch = NULL;
    text = must("x-upm-query", "{}");
    expect(strstr(text, "\"regions\": []"));
    free(text);

    /* The number is another file's now. */
    later = memfd_create("later", 0);
    expect(later == number && pwrite(later, "later", 5, 0) == 5);
    drain();
    expect(allocated(later) == PAGE && accounting_closes());

    /* QEMU rebuilds the VM on reset: the first one's descriptor means nothing any more. */
    close(fake.vm_fd);
    fake.vm_fd = ioctl(1000000, UPM_KVM_CREATE_VM, (void *)1);
    rebuilt = memory_new(RAM_MEMFD, 0, MIB);
    map_shared(0, rebuilt, 0, MIB, 0);
    vcpu_run();
    defer_up_to(MIB);
    fill_shared(rebuilt, 0, MIB);
    expect(!guest_convert(rebuilt, 0, PAGE, true));
    expect(stale() == PAGE && !fake.violations);
}

/* 14 */
static void vcpus_do_not_wait(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    struct conversion here = { .m = m, .bytes = PAGE, .to_private = true }, there = here, over = here;
    pthread_t thread[3];

    there.offset = 2 * MIB;
    over.bytes = 2 * PAGE;
    over.to_private = false;
    defer_up_to(4 * MIB);
    fill_shared(m, 0, 4 * MIB);
    gate.shut = 1;
    fake.before_attributes = stop_at_gate;
    pthread_create(&thread[0], NULL, convert_thread, &here);
    wait_for(somebody_waits, "KVM");
    fake.before_attributes = NULL;
    /* Another range converts while KVM has the first; the same range has to wait. */
    pthread_create(&thread[1], NULL, convert_thread, &there);
    pthread_join(thread[1], NULL);
    pthread_create(&thread[2], NULL, convert_thread, &over);
    usleep(20000);
    expect(is_done(&there) && !is_done(&here) && !is_done(&over));
    open_gate();
    pthread_join(thread[0], NULL);
    pthread_join(thread[2], NULL);
    expect(!page_is_private(0) && m->shared[0] == 0x5a);
    drain();
    expect(!fake.violations && accounting_closes());
}

/* 15 */
static void commands_do_not_wait(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB);
    struct conversion here = { .m = m, .offset = 2 * MIB, .bytes = PAGE, .to_private = true };
    pthread_t thread;

    defer_up_to(4 * MIB);
    fill_shared(m, 0, 4 * MIB);
    expect(!guest_convert(m, 0, MIB, true));
    gate.shut = 1;
    fake.before_punch = stop_punch;
    free(must("x-upm-discard", "{\"id\": 7, \"copy\": \"shared\", \"all\": true}"));
    wait_for(somebody_waits, "the punch");
    fake.before_attributes = stop_at_gate;
    pthread_create(&thread, NULL, convert_thread, &here);
    usleep(20000);
    /* One vCPU is in KVM and the worker in a punch: every command answers. */
    expect(stale() == MIB);
    free(must("x-upm-read", "{\"cursor\": 0, \"max\": 10}"));
    free(must("x-upm-stale", "{\"copy\": \"shared\", \"region\": 1, \"cursor\": 0, \"max\": 10}"));
    free(must("x-upm-discard", "{\"id\": 8, \"copy\": \"both\", \"all\": true}"));
    free(must("x-upm-configure", "{\"budget\": 1048576}"));
    expect(somebody_waits() && !is_done(&here));
    open_gate();
    pthread_join(thread, NULL);
}

static bool ledger_is_empty(void)
{
    return !stale();
}

static bool four_failed(void)
{
    return query("failed-discards") >= 4;
}

/* 16: each way in which a discard is made, and each error */
static void failed_discards(void)
{
    static const int errors[] = { EIO, ENOSPC, EPERM, ENOMEM, EINVAL, EBADF };
    struct memory *m = start(RAM_MEMFD, MIB);
    uint64_t failed = 0;

    for (unsigned i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
        /* At the conversion: the guest and QEMU see success, the copy goes to the ledger. */
        free(must("x-upm-configure", "{\"shared\": \"eager\", \"budget\": 1048576}"));
        fill_shared(m, 0, PAGE);
        fake.punch = (struct fault) { .error = errors[i], .count = 1 };
        expect(!guest_convert(m, 0, PAGE, true));
        expect(query("failed-discards") == ++failed);
        wait_for(ledger_is_empty, "another try");
        expect(allocated(m->shared_fd) == 0 && !guest_convert(m, 0, PAGE, false));

        /* By request: said in the event, and still stale. */
        defer_up_to(MIB);
        fill_shared(m, 0, PAGE);
        expect(!guest_convert(m, 0, PAGE, true));
        fake.punch = (struct fault) { .error = errors[i], .count = 1 };
        discard_and_wait("shared", 0, PAGE);
        expect(strstr(fake.discarded, strerror(errors[i])) && stale() == PAGE);
        expect(query("failed-discards") == ++failed);
        discard_and_wait("shared", 0, PAGE);
        expect(!stale() && !guest_convert(m, 0, PAGE, false));
        drain();
    }
    /* Interrupted: made again, and nobody told. */
    defer_up_to(MIB);
    fill_shared(m, 0, PAGE);
    expect(!guest_convert(m, 0, PAGE, true));
    fake.punch = (struct fault) { .error = EINTR, .count = 3 };
    discard_and_wait("shared", 0, PAGE);
    expect(!stale() && query("failed-discards") == failed);

    /* Draining: tried with growing pauses, and said once. */
    expect(!guest_convert(m, 0, PAGE, false));
    fill_shared(m, 0, PAGE);
    expect(!guest_convert(m, 0, PAGE, true));
    fake.said = 0;
    fake.punch = (struct fault) { .error = EIO, .count = 4 };
    free(must("x-upm-configure", "{\"shared\": \"eager\"}"));
    failed = query("failed-discards");
    wait_for(ledger_is_empty, "the fourth try");
    expect(four_failed() && fake.said == 1 && strstr(fake.last_said, "trying again"));
    expect(!fake.violations && accounting_closes());
}

/* 16: KVM refuses */
static void failed_conversions(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, 2 * PAGE, true));
    fake.attributes = (struct fault) { .error = ENOMEM, .count = 2 };
    expect(convert_only(0, 4 * PAGE, false) == -1 && errno == ENOMEM);
    expect(convert_only(8 * PAGE, PAGE, true) == -1 && errno == ENOMEM);
    expect(stale() == 2 * PAGE && counter("conversions-to") == 1);
    /* QEMU does not discard then; if it did, it would be its own affair. */
    expect(!fallocate64(m->private_fd, PUNCH, 32 * PAGE, PAGE) && fake.punches == 1);
    expect(!guest_convert(m, 0, 2 * PAGE, false) && m->shared[0] == 0x5a);
}

/* 19 */
static void lease_runs_out(void)
{
    struct memory *m = start(RAM_MEMFD, MIB);

    free(must("x-upm-configure", "{\"private\": \"defer\", \"shared\": \"defer\", "
              "\"budget\": 1048576, \"lease-ms\": 30, \"on-lease-expiry\": \"eager\"}"));
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true));
    wait_for(ledger_is_empty, "the lease to run out");
    expect(query("lease-expiries") == 1 && allocated(m->shared_fd) == 0);
    expect(!guest_convert(m, 0, MIB, false) && !stale());
}

static const struct { const char *name; void (*run)(void); } cases[] = {
    { "flipped-back", flipped_back }, { "in-place", in_place },
    { "in-place-later", in_place_later }, { "other-punches", other_punches },
    { "slot-registration", slot_registration }, { "slot-moves", slot_moves },
    { "memory-is-freed", memory_is_freed }, { "huge-pages", huge_pages },
    { "spans-regions", spans_regions }, { "not-ram", not_ram }, { "short-stalls", short_stalls },
    { "budget", budget }, { "notifications-pass", notifications_pass },
    { "closed-region", closed_region }, { "vcpus-do-not-wait", vcpus_do_not_wait },
    { "commands-do-not-wait", commands_do_not_wait }, { "failed-discards", failed_discards },
    { "failed-conversions", failed_conversions }, { "lease-runs-out", lease_runs_out },
};

int main(int argc, char **argv)
{
    for (unsigned i = 0; argc == 2 && i < sizeof(cases) / sizeof(*cases); i++) {
        if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            return 0;
        }
    }
    fail("usage: hazards CASE");
}
