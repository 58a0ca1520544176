/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "fake.h"

#include "../kvm-abi.h"
#include "../upm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/falloc.h>

#define KVM_FD 1000000 /* no file: the fake answers for it */
#define GUEST_MEMFD_MAPPABLE 3 /* GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED */
#define HUGE_PAGE (2ull << 20)
#define MEMORIES_MOST 64
#define WAIT_SECONDS 60

/* The interposers of interpose.c, as QEMU calls them. */
int ioctl(int fd, unsigned long request, ...);
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes);

struct fake fake = { .vm_fd = -1 };
__thread bool in_plugin;

static uint8_t is_private[FAKE_PAGES];
static pthread_mutex_t attributes_lock = PTHREAD_MUTEX_INITIALIZER, fake_lock = PTHREAD_MUTEX_INITIALIZER;
static struct memory *memories[MEMORIES_MOST];
static struct libc real;
static int real_vm = -1;
static struct { const char *name; command_fn *fn; } registered[16];

void fail(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(1);
}

static int plugin_ioctl(int fd, unsigned long request, void *argument)
{
    int result;

    in_plugin = true;
    result = ioctl(fd, request, argument);
    in_plugin = false;
    return result;
}

/* qemu.c's interface */

bool qemu_present(void)
{
    return true;
}

bool qemu_attach(void)
{
    return true;
}

void say(const char *format, ...)
{
    va_list args;

    pthread_mutex_lock(&fake_lock);
    va_start(args, format);
    vsnprintf(fake.last_said, sizeof(fake.last_said), format, args);
    va_end(args);
    fake.said++;
    pthread_mutex_unlock(&fake_lock);
}

void qemu_register(const char *name, command_fn *fn)
{
    unsigned i = 0;

    while (registered[i].name) {
        i++;
    }
    registered[i].name = name;
    registered[i].fn = fn;
}

char *qemu_arguments(struct qdict *arguments)
{
    return strdup((const char *)arguments);
}

void qemu_return(struct qobject **result, const char *json, struct qerror **error)
{
    *result = (struct qobject *)strdup(json);
    if (!*result) {
        qemu_fail(error, "no memory");
    }
}

void qemu_fail(struct qerror **error, const char *format, ...)
{
    va_list args;
    char *text = NULL;

    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) {
        abort();
    }
    va_end(args);
    *error = (struct qerror *)text;
}

void qemu_event(const char *name, const char *data)
{
    pthread_mutex_lock(&fake_lock);
    fake.events++;
    if (!strcmp(name, "X_UPM_DISCARDED")) {
        snprintf(fake.discarded, sizeof(fake.discarded), "%s", data);
        __atomic_store_n(&fake.discarded_id, strtoll(strchr(data, ':') + 1, NULL, 10),
                         __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&fake_lock);
}

char *command(const char *name, const char *arguments, char **error)
{
    struct qobject *result = NULL;
    unsigned i = 0;

    *error = NULL;
    while (strcmp(registered[i].name, name)) {
        i++;
    }
    in_plugin = true;
    registered[i].fn((struct qdict *)arguments, &result, (struct qerror **)error);
    in_plugin = false;
    if (!result && !*error) {
        result = (struct qobject *)strdup("{}");
    }
    return (char *)result;
}

char *must(const char *name, const char *format, ...)
{
    char *arguments, *error, *reply;
    va_list args;

    va_start(args, format);
    if (vasprintf(&arguments, format, args) < 0) {
        abort();
    }
    va_end(args);
    reply = command(name, arguments, &error);
    if (!reply) {
        fail("%s %s: %s", name, arguments, error);
    }
    free(arguments);
    return reply;
}

static uint64_t number_after(const char *text, const char *key)
{
    char quoted[128];
    const char *at;

    snprintf(quoted, sizeof(quoted), "\"%s\": ", key);
    at = strstr(text, quoted);
    if (!at) {
        fail("no %s in %s", key, text);
    }
    return strtoull(at + strlen(quoted), NULL, 10);
}

uint64_t query(const char *key)
{
    char *text = must("x-upm-query", "{}");
    uint64_t value = number_after(text, key);

    free(text);
    return value;
}

static uint64_t both(const char *text, const char *name)
{
    char key[2][64];

    snprintf(key[0], sizeof(key[0]), "%s-private", name);
    snprintf(key[1], sizeof(key[1]), "%s-shared", name);
    return number_after(text, key[0]) + number_after(text, key[1]);
}

uint64_t counter(const char *name)
{
    char *text = must("x-upm-query", "{}");
    uint64_t value = both(text, name);

    free(text);
    return value;
}

static uint64_t stale_of(const char *text, const char *copy)
{
    return number_after(strstr(text, "\"stale\": {"), copy);
}

uint64_t stale(void)
{
    char *text = must("x-upm-query", "{}");
    uint64_t bytes = stale_of(text, "private") + stale_of(text, "shared");

    free(text);
    return bytes;
}

bool accounting_closes(void)
{
    static const char *const became[] = {
        "reused", "requested", "failsafe", "forgotten",
    };
    char *text = must("x-upm-query", "{}"), key[64];
    bool closes = true;

    for (int c = 0; c < COPIES; c++) {
        uint64_t left = stale_of(text, copy_names[c]);

        for (unsigned i = 0; i < sizeof(became) / sizeof(*became); i++) {
            snprintf(key, sizeof(key), "%s-bytes-%s", became[i], copy_names[c]);
            left += number_after(text, key);
        }
        snprintf(key, sizeof(key), "deferred-bytes-%s", copy_names[c]);
        closes = closes && left == number_after(text, key);
    }
    free(text);
    return closes;
}

void wait_for(bool (*come)(void), const char *what)
{
    uint64_t end = now_ns() + WAIT_SECONDS * NSEC;

    while (!come()) {
        if (now_ns() > end) {
            fail("waited %d s for %s", WAIT_SECONDS, what);
        }
        usleep(200);
    }
}

static bool drained(void)
{
    return !stale();
}

void drain(void)
{
    free(must("x-upm-configure", "{\"private\": \"eager\", \"shared\": \"eager\"}"));
    wait_for(drained, "the ledger to be empty");
}

/* The kernel's side */

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

bool page_is_private(uint64_t gpa)
{
    return __atomic_load_n(&is_private[gpa / PAGE], __ATOMIC_SEQ_CST);
}

static void look_for_live(uint64_t gpa, uint64_t bytes, bool private_copy)
{
    for (uint64_t at = gpa; at < gpa + bytes; at += PAGE) {
        if (page_is_private(at) == private_copy) {
            __atomic_fetch_add(&fake.violations, 1, __ATOMIC_RELAXED);
        }
    }
}

/* The memory that a discard is meant for. Not under fake_lock: a block that is discarded exists. */
static const struct memory *memory_of(int fd, const char *start)
{
    const struct memory *found = NULL;

    pthread_mutex_lock(&fake_lock);
    for (unsigned i = 0; i < MEMORIES_MOST; i++) {
        const struct memory *m = memories[i];

        if (m && ((fd >= 0 && (m->private_fd == fd || m->shared_fd == fd))
                  || (fd < 0 && start >= m->shared && start < m->shared + m->bytes))) {
            found = m;
        }
    }
    pthread_mutex_unlock(&fake_lock);
    return found;
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

static int fake_fallocate(int fd, int mode, off64_t offset, off64_t bytes)
{
    const struct memory *m = memory_of(fd, NULL);
    bool private_copy = m && m->private_fd == fd;
    int result;

    if (mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) || !m) {
        return real.fallocate(fd, mode, offset, bytes);
    }
    if (strikes(&fake.punch)) {
        return -1;
    }
    if (fake.before_punch) {
        fake.before_punch(fd, offset, bytes);
    }
    account_punch(bytes);
    look_for_live(m->gpa + offset, bytes, private_copy);
    result = real.fallocate(fd, mode, offset, bytes);
    look_for_live(m->gpa + offset, bytes, private_copy);
    return result;
}

static int fake_madvise(void *start, size_t bytes, int advice)
{
    const struct memory *m = memory_of(-1, start);
    int result;

    if (!m) {
        return real.madvise(start, bytes, advice);
    }
    if (strikes(&fake.punch)) {
        return -1;
    }
    if (fake.before_punch) {
        fake.before_punch(-1, (char *)start - m->shared, bytes);
    }
    if (m->kind != RAM_ANONYMOUS) {
        return real.madvise(start, bytes, advice); /* of a file: unmaps, and discards nothing */
    }
    account_punch(bytes);
    look_for_live(m->gpa + ((char *)start - m->shared), bytes, false);
    result = real.madvise(start, bytes, advice);
    look_for_live(m->gpa + ((char *)start - m->shared), bytes, false);
    return result;
}

static int set_attributes(const struct upm_kvm_attributes *a)
{
    if (fake.before_attributes) {
        fake.before_attributes();
    }
    if (strikes(&fake.attributes)) {
        return -1;
    }
    if (!a->size || (a->address | a->size) % PAGE || a->address + a->size < a->address) {
        errno = EINVAL;
        return -1;
    }
    pthread_mutex_lock(&attributes_lock); /* KVM's slots_lock */
    for (uint64_t at = a->address; at < a->address + a->size; at += PAGE) {
        if (at / PAGE < FAKE_PAGES) {
            __atomic_store_n(&is_private[at / PAGE], !!(a->attributes & UPM_KVM_ATTRIBUTE_PRIVATE),
                             __ATOMIC_SEQ_CST);
        }
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
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (fd != KVM_FD && fd != fake.vm_fd && !memory_of(fd, NULL)) {
        return real.ioctl(fd, request, argument);
    }
    switch (request) {
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
    fake.vm_fd = ioctl(KVM_FD, UPM_KVM_CREATE_VM, (void *)1);
    expect(fake.vm_fd >= 0);
}

/* RAM, as QEMU's memory backends make it */

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

struct memory *memory_new(enum kind kind, uint64_t gpa, uint64_t bytes)
{
    struct upm_kvm_create_guest_memfd create = { .size = bytes };
    struct memory *m = calloc(1, sizeof(*m));
    unsigned i = 0;

    *m = (struct memory) { .kind = kind, .gpa = gpa, .bytes = bytes };
    m->shared_fd = shared_file(kind, bytes);
    m->private_fd = plugin_ioctl(fake.vm_fd, UPM_KVM_CREATE_GUEST_MEMFD, &create);
    expect(m->private_fd >= 0);
    m->private = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->private_fd, 0);
    if (kind == RAM_IN_PLACE) {
        m->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->private_fd, 0);
    } else {
        m->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                         m->shared_fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS
                                          : MAP_SHARED | MAP_NORESERVE,
                         m->shared_fd, 0);
    }
    expect(m->private != MAP_FAILED);
    expect(m->shared != MAP_FAILED);
    pthread_mutex_lock(&fake_lock);
    while (memories[i]) {
        i++;
    }
    memories[i] = m;
    pthread_mutex_unlock(&fake_lock);
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
    pthread_mutex_lock(&fake_lock);
    for (unsigned i = 0; i < MEMORIES_MOST; i++) {
        if (memories[i] == m) {
            memories[i] = NULL;
        }
    }
    pthread_mutex_unlock(&fake_lock);
    free(m);
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

    expect(!ioctl(fake.vm_fd, UPM_KVM_SET_REGION2, &set));
}

int convert_only(uint64_t gpa, uint64_t bytes, bool to_private)
{
    struct upm_kvm_attributes a = {
        .address = gpa, .size = bytes, .attributes = to_private ? UPM_KVM_ATTRIBUTE_PRIVATE : 0,
    };

    return ioctl(fake.vm_fd, UPM_KVM_SET_ATTRIBUTES, &a);
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
    ioctl(fake.vm_fd, UPM_KVM_RUN, 0);
}
