/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Hazards of a discard: whose it is, and what it frees. */
#include "hazards.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/ioctl.h>

static void *punch_thread(void *argument)
{
    struct memory *m = argument;

    expect(!fallocate64(m->shared_fd, PUNCH, 33 * PAGE, PAGE));
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
    expect(fallocate64(-1, PUNCH, 0, PAGE) == -1 && errno == EBADF);
    expect(!fallocate64(disk, PUNCH, 0, PAGE));
    expect(allocated(disk) == 0);
    expect(!qemu_discard(m, 0, PAGE, true));
    expect(stale() == PAGE);
    /* Another range, and another mode, of the same file; a conversion is still unfinished. */
    expect(!convert_only(PAGE, PAGE, true));
    expect(!fallocate64(m->shared_fd, PUNCH, 16 * PAGE, PAGE));
    expect(m->shared[16 * PAGE] == 0);
    expect(!fallocate64(m->shared_fd, 0, PAGE, PAGE));
    expect(!fallocate64(m->shared_fd, PUNCH, PAGE, 17));        /* no conversion's is half a page, */
    expect(fallocate64(m->shared_fd, PUNCH, PAGE, 0) == -1);    /* or none, */
    expect(!fallocate64(m->shared_fd, PUNCH, PAGE, 2 * PAGE));  /* or longer than it */
    expect(m->shared[2 * PAGE] == 0 && stale() == PAGE);
    /* The same range once more: the conversion's own discard came already. */
    expect(!qemu_discard(m, PAGE, PAGE, true));
    expect(stale() == 2 * PAGE);
    m->shared[PAGE] = 1;
    expect(!fallocate64(m->shared_fd, PUNCH, PAGE, PAGE) && m->shared[PAGE] == 0);
    /* After the guest ran on, the very range that the conversion left. */
    expect(!convert_only(32 * PAGE, PAGE, true));
    vcpu_run();
    expect(!fallocate64(m->shared_fd, PUNCH, 32 * PAGE, PAGE));
    expect(m->shared[32 * PAGE] == 0 && query("left-alone-bytes") == PAGE);
    /* On another thread. */
    expect(!convert_only(33 * PAGE, PAGE, true));
    pthread_create(&thread, NULL, punch_thread, m);
    pthread_join(thread, NULL);
    expect(m->shared[33 * PAGE] == 0 && stale() == 2 * PAGE);
    /* A balloon's, by madvise(). */
    expect(!madvise(m->shared + 65 * PAGE, PAGE, MADV_REMOVE) && m->shared[65 * PAGE] == 0);
    expect(counter("inline-bytes") == 0 && query("discards") == 0);
}

/* 3, where there is no file */
static void other_madvise(void)
{
    struct memory *m = start(RAM_ANONYMOUS, MIB);

    defer_up_to(MIB);
    fill_shared(m, 0, MIB);
    expect(!convert_only(8 * PAGE, 4 * PAGE, true));
    expect(!madvise(m->shared + 9 * PAGE, PAGE, MADV_DONTNEED) && m->shared[9 * PAGE] == 0);
    expect(!madvise(m->shared + 8 * PAGE, PAGE, MADV_NORMAL));
    expect(!madvise(m->shared + 8 * PAGE, 5 * PAGE, MADV_DONTNEED) && m->shared[12 * PAGE] == 0);
    expect(!stale());
    fill_shared(m, 8 * PAGE, 4 * PAGE);
    /* In two pieces, one after the other. */
    expect(!madvise(m->shared + 8 * PAGE, PAGE, MADV_DONTNEED) && stale() == PAGE);
    expect(!madvise(m->shared + 9 * PAGE, 3 * PAGE, MADV_DONTNEED) && stale() == 4 * PAGE);
    expect(m->shared[8 * PAGE] == 0x5a && m->shared[11 * PAGE] == 0x5a);
    expect(!madvise(m->shared + 8 * PAGE, PAGE, MADV_DONTNEED) && m->shared[8 * PAGE] == 0);
    expect(!convert_only(64 * PAGE, PAGE, true));
    vcpu_run();
    expect(!madvise(m->shared + 64 * PAGE, PAGE, MADV_DONTNEED) && m->shared[64 * PAGE] == 0);
}

/* 6 */
static void memory_is_freed(void)
{
    struct memory *m = start(RAM_MEMFD, 4 * MIB), *anonymous, *file;

    anonymous = plug(1, RAM_ANONYMOUS, 64 * MIB, MIB);
    file = plug(2, RAM_FILE, 128 * MIB, MIB);
    expect(query_says("\"backing\": \"memfd\"") && query_says("\"backing\": \"anonymous\"")
           && query_says("\"backing\": \"file\""));
    defer_up_to(8 * MIB);
    fill_shared(m, 0, 4 * MIB);
    fill_shared(anonymous, 0, MIB);
    fill_shared(file, 0, MIB);
    expect(!guest_convert(m, 0, 4 * MIB, true) && !guest_convert(anonymous, 0, MIB, true)
           && !guest_convert(file, 0, MIB, true));
    expect(allocated(m->shared_fd) == 4 * MIB && resident(anonymous->shared));
    expect(allocated(file->shared_fd) >= MIB);
    drain();
    expect(allocated(m->shared_fd) == 0 && !resident(anonymous->shared));
    expect(allocated(file->shared_fd) == 0);
    /* Eager now: QEMU's own. */
    fill_shared(m, 0, MIB);
    memset(m->private, 1, MIB);
    expect(!guest_convert(m, 0, MIB, false) && allocated(m->private_fd) == 0);
    fill_shared(m, 0, MIB);
    expect(!guest_convert(m, 0, MIB, true) && allocated(m->shared_fd) == 0);
    expect(!fake.violations && query("inline-bytes-shared") == MIB);
    expect(query("inline-bytes-private") == MIB);
}

/* 7 */
static void huge_pages(void)
{
    struct memory *m;
    int fd = memfd_create("probe", MFD_HUGETLB);

    if (fd < 0) {
        exit(NOT_THIS_HOST);
    }
    /* No page is ever touched: none need be reserved. */
    m = start(RAM_HUGETLB, 4 * MIB);
    defer_up_to(4 * MIB);
    expect(query("page-size") == 4096 && query_says("\"backing\": \"hugetlb\""));
    expect(!guest_convert(m, 0, PAGE, true));
    expect(!stale() && query("left-alone-bytes") == PAGE && query("head") == 1);
    memset(m->private, 1, PAGE);
    expect(!guest_convert(m, 0, PAGE, false));
    expect(stale() == PAGE && query("stale-private") == PAGE);
    discard_and_wait("both", 0, 4 * MIB);
    expect(!stale() && fake.punches == 1);
}

/* 10 */
static void short_stalls(void)
{
    struct memory *m = start(RAM_MEMFD, 128 * MIB);
    struct vcpu *beside = vcpu_new();

    defer_up_to(256 * MIB);
    fill_shared(m, 0, 64 * MIB);
    expect(!guest_convert(m, 0, 64 * MIB, true));
    shut_gate();
    fake.before_punch = stop_punch;
    ask_discard_of_all();
    wait_for(somebody_waits, "the punch");
    /* A punch is under way: neighbours convert meanwhile. */
    expect(!vcpu_convert(beside, m, 127 * 256, 1, true) && somebody_waits());
    expect(!vcpu_convert(beside, m, 512, 1, false) && somebody_waits());
    open_gate();
    wait_for(discarded, "X_UPM_DISCARDED");
    expect(fake.punches >= 32 && fake.longest_punch <= 2 * MIB && !fake.violations);
    /* QEMU's own call for a long range goes in chunks too. */
    fill_shared(m, 64 * MIB, 16 * MIB);
    configure("{\"shared\": \"eager\"}");
    fake.punches = 0;
    expect(!guest_convert(m, 64 * MIB, 16 * MIB, true));
    expect(fake.punches == 8 && fake.longest_punch == 2 * MIB);
    expect(query("inline-bytes-shared") == 16 * MIB);
}

/* 12 and 21: KVM converts, QEMU has the device's mappings taken away, then it discards. */
static void notifications_pass(void)
{
    struct memory *m = start(RAM_MEMFD, 2 * MIB);
    struct vcpu *beside = vcpu_new();
    int notified = open("/dev/null", O_RDWR);

    defer_up_to(2 * MIB);
    for (int eager = 0; eager < 2; eager++) {
        fill_shared(m, 0, 2 * MIB);
        expect(!convert_only(0, PAGE, true));
        /* Whatever happens now, the copy stays until QEMU asks for its discard. */
        expect(!vcpu_convert(beside, m, 300, 1, true) && !vcpu_discard(beside, m, 300, 1, true));
        ask_discard_of_all();
        wait_for(discarded, "X_UPM_DISCARDED");
        drain();
        usleep(A_WHILE_US);
        expect(!stale() && m->shared[0] == 0x5a);
        /* VFIO's unmapping: type ';'. It reaches the kernel now, not with the discard, and ends
         * nothing. */
        errno = 0;
        expect(ioctl(notified, _IO(';', 114), 0) == -1 && errno == ENOTTY);
        defer_up_to(eager ? 0 : 2 * MIB);
        fake.punches = 0;
        expect(!qemu_discard(m, 0, PAGE, true));
        expect(stale() == (eager ? 0 : PAGE) && (int)fake.punches == eager);
        drain();
        expect(m->shared[0] == 0);
        expect(!guest_convert(m, 0, 2 * MIB, false));
        vcpu_run();
    }
    expect(!fake.violations);
}

/* 21: whatever else happens, what QEMU does not ask for stays */
static void not_asked_for(void)
{
    static const char *const modes[] = { "eager", "defer" };
    struct memory *m = start(RAM_MEMFD, 4 * MIB);

    fill_shared(m, 0, 4 * MIB);
    for (unsigned i = 0; i < 2; i++) {
        uint64_t before = query("left-alone-bytes");

        free(must("x-upm-configure", "{\"shared\": \"%s\", \"private\": \"%s\", "
                  "\"budget\": 4194304}", modes[i], modes[i]));
        expect(!convert_only(0, MIB, true));
        /* Only a part is asked for; the other calls of KVM's end the thread's conversion too. */
        expect(!qemu_discard(m, 0, 16 * PAGE, true));
        expect(!convert_only(2 * MIB, MIB, true));
        expect(!qemu_discard(m, 16 * PAGE, PAGE, true));   /* too late: QEMU's own affair */
        expect(m->shared[16 * PAGE] == 0);
        slot_unmap(9);
        expect(!qemu_discard(m, 2 * MIB, PAGE, true) && m->shared[2 * MIB] == 0);
        expect(stale() == (i ? 16 * PAGE : 0));
        expect(query("left-alone-bytes") == before + 2 * MIB - 16 * PAGE);
        configure("{\"budget\": 0}");
        ask_discard_of_all();
        wait_for(discarded, "X_UPM_DISCARDED");
        drain();
        expect(m->shared[17 * PAGE] == 0x5a && m->shared[2 * MIB + PAGE] == 0x5a);
        expect(!guest_convert(m, 0, 4 * MIB, false));
        vcpu_run();
        fill_shared(m, 0, 4 * MIB);
    }
    expect(!fake.violations);
}

/* 25 and 32: a guest that accepts its memory converts what is private already */
static void acceptance(void)
{
    const uint64_t size = 64 * MIB;
    struct memory *m = start_private(RAM_MEMFD, size);

    defer_up_to(8 * MIB);
    fill_shared(m, 0, size);   /* prealloc=on */
    for (uint64_t at = 0; at < size; at += 2 * MIB) {
        expect(!guest_convert(m, at, 2 * MIB, true));
        expect(!stale() && allocated(m->shared_fd) == size - at - 2 * MIB);
    }
    expect(query("peak") == 0 && query("over-budget-bytes") == 0 && fake.punches == 32);
    /* What is in the ledger stays there, and the rest of the range goes. */
    expect(!guest_convert(m, 2 * MIB, MIB, false));
    fill_shared(m, 0, 4 * MIB);
    expect(!guest_convert(m, 2 * MIB, MIB, true));
    expect(query("stale-shared") == MIB);
    expect(!guest_convert(m, 0, 4 * MIB, true));
    expect(query("stale-shared") == MIB && allocated(m->shared_fd) == MIB);
    expect(m->shared[2 * MIB] == 0x5a && m->shared[3 * MIB - 1] == 0x5a);
    /* The same the other way: shared once more. */
    expect(!guest_convert(m, 32 * MIB, MIB, false));
    vcpu_run();
    memset(m->private + 32 * MIB, 1, MIB);
    expect(!guest_convert(m, 32 * MIB, MIB, false));
    expect(query("stale-private") == MIB && allocated(m->private_fd) >= MIB);
    expect(!fake.violations);
}

const struct hazard discard_hazards[] = {
    { "other-punches", other_punches }, { "other-madvise", other_madvise },
    { "memory-is-freed", memory_is_freed }, { "huge-pages", huge_pages },
    { "short-stalls", short_stalls }, { "notifications-pass", notifications_pass },
    { "not-asked-for", not_asked_for }, { "acceptance", acceptance }, { NULL, NULL },
};
