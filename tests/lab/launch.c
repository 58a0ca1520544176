/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload: answers what QEMU asks of KVM and of the processor's firmware while it
 * launches an SEV-SNP or a TDX guest, on a machine that has neither.
 *
 * It stands behind the plugin, as the kernel does. It keeps the measurement: a hash over each page
 * that it is given, in order, with its address and type, read after the time that the answer takes.
 * Virtual processors never run: KVM_RUN is answered with EINTR after a millisecond.
 *
 * LAUNCH_LOG       file to which a line is added when a launch begins, and when it is done
 * LAUNCH_STEP_US   time that each answer takes; it takes at most STEP_PAGES pages (default 0)
 * LAUNCH_HOLD      file that holds up a launch that has begun, while it is there; HOLD_MS at most
 * LAUNCH_REAL      if set, KVM has attributes, and software-protected VMs stand in for the kinds
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../plugin/kvm-abi.h"

#define PAGE 4096ull
#define STEP_PAGES 32
#define HOLD_MS 5000
#define CHECK_EXTENSION _IO(UPM_KVMIO, 0x03)
#define CAP_MEMORY_ATTRIBUTES 233
#define CAP_VM_TYPES 235
#define ALL_VM_TYPES 0x3f
#define DEFAULT_VM 0
#define SW_PROTECTED_VM 1
#define TDX_VM 5

#define MEMORY_ENCRYPT_OP _IOWR(UPM_KVMIO, 0xba, unsigned long)
#define GET_DEVICE_ATTR _IOW(UPM_KVMIO, 0xe2, struct device_attr)
#define HAS_DEVICE_ATTR _IOW(UPM_KVMIO, 0xe3, struct device_attr)
#define SEV_GROUP 1
#define SEV_ISSUE_CMD 0xc0105300

/* Of struct kvm_sev_cmd and struct kvm_tdx_cmd, which begin alike. */
struct encrypt_op {
    uint32_t id, flags;
    uint64_t data;
};

enum { SNP_LAUNCH_UPDATE = 101, SNP_LAUNCH_FINISH = 102 };
enum { SNP_PAGE_NORMAL = 1, SNP_PAGE_CPUID = 6 };
/* All that QEMU writes of a CPUID page and that the firmware looks at: 64 entries and a count. */
#define SNP_CPUID_BYTES (16 + 64 * 48)

struct snp_update {
    uint64_t gfn, source, bytes;
    uint8_t type, pad0;
    uint16_t flags;
    uint32_t pad1;
    uint64_t pad2[4];
};

enum {
    TDX_CAPABILITIES = 0, TDX_INIT_MEM_REGION = 3, TDX_FINALIZE_VM = 4, TDX_GET_CPUID = 5,
};
#define TDX_SEPT_VE_DISABLE (1ull << 28)
#define TDX_X87_SSE_AVX 7
#define SET_TSC_KHZ _IO(UPM_KVMIO, 0xa2)
#define GET_TSC_KHZ _IO(UPM_KVMIO, 0xa3)
#define TDX_TSC_UNIT_KHZ 25000
#define GET_CPUID2 _IOWR(UPM_KVMIO, 0x91, struct cpuid2)
#define CPUID_1_EDX_APIC (1u << 9)

struct cpuid2 {
    uint32_t entries, pad;
};

struct cpuid_entry {
    uint32_t function, index, flags, eax, ebx, ecx, edx, pad[3];
};

struct tdx_capabilities {
    uint64_t attributes, xfam, calls[4], reserved[250];
    struct cpuid2 cpuid;
};

struct tdx_region {
    uint64_t source, gpa, pages;
};

struct device_attr {
    uint32_t flags, group;
    uint64_t attr, addr;
};

/* QEMU launches on its main thread, with the BQL held. */
static struct {
    unsigned pages, zero_pages;
    uint64_t hash;
    bool begun;
} launch;
static int (*next_ioctl)(int fd, unsigned long request, ...);
static bool is_tdx;

static uint64_t setting(const char *name)
{
    const char *text = getenv(name);

    return text ? strtoull(text, NULL, 10) : 0;
}

static void log_line(const char *event)
{
    static int fd = -1;
    struct timespec now;
    char line[200];
    int length;

    clock_gettime(CLOCK_MONOTONIC, &now);
    length = snprintf(line, sizeof(line),
                      "{\"event\": \"%s\", \"mono_ns\": %lld, \"pages\": %u, \"zero_pages\": %u, "
                      "\"measurement\": \"%016llx\"}\n", event,
                      now.tv_sec * 1000000000ll + now.tv_nsec, launch.pages, launch.zero_pages,
                      (unsigned long long)launch.hash);
    if (fd < 0) {
        fd = open(getenv("LAUNCH_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    }
    if (write(fd, line, length) != length) {
        perror("launch: LAUNCH_LOG");
        exit(1);
    }
}

/* FNV-1a, by words. */
static void hash(uint64_t word)
{
    launch.hash = (launch.hash ^ word) * 0x100000001b3ull;
}

/* Until somebody has asked the plugin for what it must not do now. */
static void hold(void)
{
    const char *file = getenv("LAUNCH_HOLD");

    for (int ms = 0; file && ms < HOLD_MS && !access(file, F_OK); ms++) {
        usleep(1000);
    }
}

/* Takes pages in, with their contents if KVM reads them, when the time for it is over; how many. */
static uint64_t take_in(uint64_t gpa, uint64_t pages, unsigned type, const uint64_t *source,
                        size_t page_bytes)
{
    if (!launch.begun) {
        launch.begun = true;
        launch.pages = launch.zero_pages = 0;
        launch.hash = 0xcbf29ce484222325ull;
        log_line("begin");
        hold();
    }
    if (pages > STEP_PAGES) {
        pages = STEP_PAGES;
    }
    usleep(setting("LAUNCH_STEP_US"));
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t any = 0;

        hash(gpa + page * PAGE);
        hash(type);
        launch.pages++;
        if (!source) {
            continue;
        }
        for (size_t i = 0; i < page_bytes / sizeof(*source); i++) {
            hash(source[i]);
            any |= source[i];
        }
        launch.zero_pages += !any;
        source += PAGE / sizeof(*source);
    }
    return pages;
}

static void launched(void)
{
    launch.begun = false;
    log_line("end");
}

/* KVM copies normal and CPUID pages; the firmware makes up the others. */
static void snp_launch_update(struct snp_update *u)
{
    bool read = u->type == SNP_PAGE_NORMAL || u->type == SNP_PAGE_CPUID;
    uint64_t pages = take_in(u->gfn * PAGE, u->bytes / PAGE, u->type,
                             read ? (const uint64_t *)(uintptr_t)u->source : NULL,
                             u->type == SNP_PAGE_CPUID ? SNP_CPUID_BYTES : PAGE);

    u->gfn += pages;
    u->source += pages * PAGE;
    u->bytes -= pages * PAGE;
}

static int snp_op(const struct encrypt_op *op)
{
    switch (op->id) {
    case SNP_LAUNCH_UPDATE:
        snp_launch_update((struct snp_update *)(uintptr_t)op->data);
        break;
    case SNP_LAUNCH_FINISH:
        launched();
        break;
    default: /* KVM_SEV_INIT2, LAUNCH_START */
        break;
    }
    return 0;
}

/* As KVM, which goes on where it was when it is called again. */
static int tdx_init_mem_region(struct tdx_region *r, uint32_t flags)
{
    uint64_t pages = take_in(r->gpa, r->pages, flags, (const uint64_t *)(uintptr_t)r->source,
                             PAGE);

    r->gpa += pages * PAGE;
    r->source += pages * PAGE;
    r->pages -= pages;
    if (r->pages) {
        errno = EAGAIN;
        return -1;
    }
    return 0;
}

static int tdx_op(const struct encrypt_op *op)
{
    void *data = (void *)(uintptr_t)op->data;
    struct tdx_capabilities *capabilities = data;

    switch (op->id) {
    case TDX_CAPABILITIES:
        memset(capabilities, 0, sizeof(*capabilities));
        capabilities->attributes = TDX_SEPT_VE_DISABLE;
        capabilities->xfam = TDX_X87_SSE_AVX;
        break;
    case TDX_GET_CPUID:
        ((struct cpuid2 *)data)->entries = 0;
        break;
    case TDX_INIT_MEM_REGION:
        return tdx_init_mem_region(data, op->flags);
    case TDX_FINALIZE_VM:
        launched();
        break;
    default: /* INIT_VM, INIT_VCPU */
        break;
    }
    return 0;
}

/* The features of an SNP guest that KVM knows of; -1 if the question is not one of these. */
static int device_attr(unsigned long request, const struct device_attr *attr)
{
    if (attr->group != SEV_GROUP) {
        return -1;
    }
    if (request == GET_DEVICE_ATTR) {
        *(uint64_t *)(uintptr_t)attr->addr = attr->attr ? ~0ull : 0;
    }
    return 0;
}

static int extension(int fd, uintptr_t which)
{
    if (which == CAP_MEMORY_ATTRIBUTES) {
        return UPM_KVM_ATTRIBUTE_PRIVATE;
    }
    if (which == CAP_VM_TYPES) {
        return ALL_VM_TYPES;
    }
    return next_ioctl(fd, CHECK_EXTENSION, which);
}

/* A TDX guest's time-stamp counter runs at a multiple of 25 MHz; QEMU refuses others at a reset. */
static int tsc_khz(int fd, unsigned long request, void *argument)
{
    int khz;

    if (is_tdx && request == SET_TSC_KHZ) {
        return 0;
    }
    khz = next_ioctl(fd, request, argument);
    return is_tdx && khz > 0 ? khz / TDX_TSC_UNIT_KHZ * TDX_TSC_UNIT_KHZ : khz;
}

/*
 * QEMU reads SNP's CPUID page from a virtual processor. That its APIC is enabled KVM tells there
 * once QEMU has set the processor's registers, which at a reset may be before or after.
 */
static int get_cpuid(int fd, struct cpuid2 *cpuid)
{
    struct cpuid_entry *entry = (struct cpuid_entry *)(cpuid + 1);
    int result = next_ioctl(fd, GET_CPUID2, cpuid);

    for (unsigned i = 0; !result && i < cpuid->entries; i++) {
        if (entry[i].function == 1) {
            entry[i].edx |= CPUID_1_EDX_APIC;
        }
    }
    return result;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    void *argument;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (!next_ioctl) {
        next_ioctl = dlsym(RTLD_NEXT, "ioctl");
    }
    switch (request) {
    case UPM_KVM_RUN:
        usleep(1000);
        errno = EINTR;
        return -1;
    case UPM_KVM_CREATE_VM:
        is_tdx = (uintptr_t)argument == TDX_VM;
        return next_ioctl(fd, request, getenv("LAUNCH_REAL") ? SW_PROTECTED_VM : DEFAULT_VM);
    case UPM_KVM_SET_ATTRIBUTES:
        return getenv("LAUNCH_REAL") ? next_ioctl(fd, request, argument) : 0;
    case CHECK_EXTENSION:
        return extension(fd, (uintptr_t)argument);
    case SEV_ISSUE_CMD:
        return 0;
    case GET_CPUID2:
        return get_cpuid(fd, argument);
    case SET_TSC_KHZ:
    case GET_TSC_KHZ:
        return tsc_khz(fd, request, argument);
    case MEMORY_ENCRYPT_OP:
        return is_tdx ? tdx_op(argument) : snp_op(argument);
    case HAS_DEVICE_ATTR:
    case GET_DEVICE_ATTR:
        if (!device_attr(request, argument)) {
            return 0;
        }
        /* fall through */
    default:
        return next_ioctl(fd, request, argument);
    }
}
