/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Where the guest sees the regions: KVM's memory slots, in the order of guest addresses. */
#include "upm.h"

#include <stdlib.h>
#include <string.h>

static void slot_remove(unsigned at)
{
    memmove(&upm.slots[at], &upm.slots[at + 1], (upm.nslots - at - 1) * sizeof(*upm.slots));
    upm.nslots--;
}

/* Only the first address space: guests with more of them have no private memory. */
bool slot_set(uint32_t slot, uint64_t gpa, uint64_t bytes, struct region *region, uint64_t offset)
{
    unsigned at = 0;

    if (slot >> 16) {
        return true;
    }
    for (unsigned i = 0; i < upm.nslots; i++) {
        if (upm.slots[i].id == slot) {
            slot_remove(i);
            break;
        }
    }
    if (!bytes || !region) {
        return true;
    }
    if (upm.nslots == upm.slots_capacity) {
        unsigned capacity = upm.slots_capacity ? 2 * upm.slots_capacity : 64;
        struct slot *slots = realloc(upm.slots, capacity * sizeof(*slots));

        if (!slots) {
            return false;
        }
        upm.slots = slots;
        upm.slots_capacity = capacity;
    }
    while (at < upm.nslots && upm.slots[at].gpa < gpa) {
        at++;
    }
    memmove(&upm.slots[at + 1], &upm.slots[at], (upm.nslots - at) * sizeof(*upm.slots));
    upm.slots[at] = (struct slot) {
        .id = slot, .region = region, .gpa = gpa, .bytes = bytes, .offset = offset,
    };
    upm.nslots++;
    return true;
}

/* The first slot that ends after `gpa`, or the end of them. */
struct slot *slot_ending_after(uint64_t gpa)
{
    unsigned low = 0, high = upm.nslots;

    while (low < high) {
        unsigned middle = (low + high) / 2;

        if (upm.slots[middle].gpa + upm.slots[middle].bytes <= gpa) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return upm.slots + low;
}

void slots_forget(const struct region *r)
{
    unsigned kept = 0;

    for (unsigned i = 0; i < upm.nslots; i++) {
        if (upm.slots[i].region != r) {
            upm.slots[kept++] = upm.slots[i];
        }
    }
    upm.nslots = kept;
}

void slots_clear(void)
{
    upm.nslots = 0;
}
