/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The part of KVM's interface that conversions use, as of Linux 6.8 and later.
 *
 * Written out here because the headers of a stable distribution are older than the interface.
 * Source: Documentation/virt/kvm/api.rst.
 */
#ifndef UPM_KVM_ABI_H
#define UPM_KVM_ABI_H

#include <linux/ioctl.h>
#include <stdint.h>

#define UPM_KVMIO 0xAE

struct upm_kvm_region2 {
    uint32_t slot; /* address space in the upper 16 bits */
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size; /* 0 deletes the slot */
    uint64_t userspace_addr;
    uint64_t guest_memfd_offset;
    uint32_t guest_memfd;
    uint32_t pad1;
    uint64_t pad2[14];
};

struct upm_kvm_attributes {
    uint64_t address;
    uint64_t size;
    uint64_t attributes;
    uint64_t flags;
};

struct upm_kvm_create_guest_memfd {
    uint64_t size;
    uint64_t flags;
    uint64_t reserved[6];
};

#define UPM_KVM_GET_API_VERSION _IO(UPM_KVMIO, 0x00)
#define UPM_KVM_CREATE_VM _IO(UPM_KVMIO, 0x01)
#define UPM_KVM_RUN _IO(UPM_KVMIO, 0x80)
#define UPM_KVM_SET_REGION2 _IOW(UPM_KVMIO, 0x49, struct upm_kvm_region2)
#define UPM_KVM_SET_ATTRIBUTES _IOW(UPM_KVMIO, 0xd2, struct upm_kvm_attributes)
#define UPM_KVM_CREATE_GUEST_MEMFD _IOWR(UPM_KVMIO, 0xd4, struct upm_kvm_create_guest_memfd)

#define UPM_KVM_MEM_GUEST_MEMFD (1u << 2)
#define UPM_KVM_ATTRIBUTE_PRIVATE (1ull << 3)

#endif
