/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test-only preload: makes a stock QEMU run KVM's software-protected VM.
 *
 * Preloaded before the plugin, so that the plugin sees the calls as the kernel does. It adds a
 * QOM type whose object is the machine's confidential-guest-support, and mends what firmware meant
 * for a real confidential guest would do by itself: the guest boots from shared memory.
 *
 * LAB_KVM_TYPE    index of the class callback `kvm_type`, counted from `kvm_init`
 * LAB_BACKENDS    how many memory backends get a guest_memfd (default 1)
 * LAB_PRIVATE     guest memory from this address on stays private, as that of a guest is which is
 *                 to accept it (default: none)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../plugin/kvm-abi.h"

#define TYPE_NAME "lab-guest"
#define SW_PROTECTED_VM 1
#define MEM_READONLY (1u << 1)
#define CAP_EXIT_HYPERCALL 201
#define HC_MAP_GPA_RANGE 12
/* Of QEMU 10.0 to 11.1: sizes of ObjectClass and Object. */
#define CLASS_HEADER 96
#define OBJECT_HEADER 40

struct enable_cap {
    uint32_t cap, flags;
    uint64_t args[4];
    uint8_t pad[64];
};

/* QEMU's TypeInfo. */
struct type_info {
    const char *name, *parent;
    size_t instance_size, instance_align;
    void (*instance_init)(void *), (*instance_post_init)(void *), (*instance_finalize)(void *);
    bool is_abstract;
    size_t class_size;
    void (*class_init)(void *class, const void *data);
    void (*class_base_init)(void *class, const void *data);
    const void *class_data, *interfaces;
};

static int (*next_ioctl)(int fd, unsigned long request, ...);
static uint8_t *guest;
static int vm_fd = -1, backends_left;
static uint64_t private_from = UINT64_MAX;
static __thread uint64_t new_slot_gpa, new_slot_bytes;

static void *symbol(const char *name)
{
    void *found = dlsym(RTLD_DEFAULT, name);

    if (!found) {
        fprintf(stderr, "lab shim: QEMU does not export %s\n", name);
        exit(1);
    }
    return found;
}

static void require_guest_memfd(bool on)
{
    __atomic_store_n(&guest[OBJECT_HEADER], on, __ATOMIC_SEQ_CST);
}

static int guest_kvm_type(void *object)
{
    (void)object;
    return SW_PROTECTED_VM;
}

static int guest_kvm_init(void *object, void **error)
{
    struct enable_cap cap = {
        .cap = CAP_EXIT_HYPERCALL, .args = { 1u << HC_MAP_GPA_RANGE },
    };

    (void)object;
    (void)error;
    if (next_ioctl(vm_fd, _IOW(UPM_KVMIO, 0xa3, struct enable_cap), &cap)) {
        perror("lab shim: KVM_CAP_EXIT_HYPERCALL");
        exit(1);
    }
    require_guest_memfd(true);
    guest[OBJECT_HEADER + 1] = true; /* ready */
    return 0;
}

static void guest_class_init(void *class, const void *data)
{
    void **callback = (void **)((char *)class + CLASS_HEADER);

    (void)data;
    callback[0] = guest_kvm_init;
    callback[atoi(getenv("LAB_KVM_TYPE"))] = guest_kvm_type;
}

static void make_guest(void)
{
    static const struct type_info type = {
        .name = TYPE_NAME, .parent = "x86-confidential-guest", .class_init = guest_class_init,
    };
    void *(*type_register_static)(const struct type_info *) = symbol("type_register_static");
    void *(*object_new)(const char *) = symbol("object_new");
    void *(*resolve)(const char *, bool *) = symbol("object_resolve_path");
    void *(*add_child)(void *, const char *, void *) = symbol("object_property_add_child");
    bool (*set_link)(void *, const char *, void *, void **) = symbol("object_property_set_link");
    void **current_machine = symbol("current_machine");

    if (guest || !*current_machine || !getenv("LAB_KVM_TYPE")) {
        return;
    }
    type_register_static(&type);
    guest = object_new(TYPE_NAME);
    add_child(resolve("/objects", NULL), TYPE_NAME, guest);
    if (!set_link(*current_machine, "confidential-guest-support", guest, NULL)) {
        fprintf(stderr, "lab shim: the machine takes no confidential guest\n");
        exit(1);
    }
    backends_left = getenv("LAB_BACKENDS") ? atoi(getenv("LAB_BACKENDS")) : 1;
    if (getenv("LAB_PRIVATE")) {
        private_from = strtoull(getenv("LAB_PRIVATE"), NULL, 0);
    }
}

static void before_region(struct upm_kvm_region2 *r)
{
    new_slot_gpa = r->guest_phys_addr;
    new_slot_bytes = r->memory_size;
    if (r->flags & MEM_READONLY) {
        r->flags &= ~UPM_KVM_MEM_GUEST_MEMFD;
    }
}

/* "Mark the new slot private", unless it is a conversion of the guest's: what the guest boots from
 * becomes shared. Of a slot that reaches into private memory that is done by a call of its own. */
static int set_attributes(int fd, unsigned long request, struct upm_kvm_attributes *a)
{
    bool registers = new_slot_bytes && a->address == new_slot_gpa && a->size == new_slot_bytes;
    struct upm_kvm_attributes boot = *a;
    int result;

    new_slot_bytes = 0;
    if (!registers || a->address >= private_from) {
        return next_ioctl(fd, request, a);
    }
    boot.attributes = 0;
    if (a->size <= private_from - a->address) {
        return next_ioctl(fd, request, &boot);
    }
    boot.size = private_from - a->address;
    result = next_ioctl(fd, request, a);
    return result ? result : next_ioctl(fd, request, &boot);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    void *argument;
    int result;

    va_start(args, request);
    argument = va_arg(args, void *);
    va_end(args);
    if (!next_ioctl) {
        next_ioctl = dlsym(RTLD_NEXT, "ioctl");
    }
    if (request == UPM_KVM_GET_API_VERSION) {
        make_guest();
    } else if (guest && request == UPM_KVM_SET_REGION2) {
        before_region(argument);
    } else if (guest && request == UPM_KVM_SET_ATTRIBUTES) {
        return set_attributes(fd, request, argument);
    } else if (guest && request == UPM_KVM_RUN && !guest[OBJECT_HEADER]) {
        require_guest_memfd(true);
    }
    result = next_ioctl(fd, request, argument);
    if (guest && result >= 0 && request == UPM_KVM_CREATE_VM) {
        vm_fd = result;
    } else if (guest && result >= 0 && request == UPM_KVM_CREATE_GUEST_MEMFD
               && --backends_left == 0) {
        /* Firmware and option ROMs are set up next, as for any guest. */
        require_guest_memfd(false);
    }
    return result;
}
