/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How much of the plugin's memory is resident once 1 % of a guest's pages are stale, at random: the
 * worst spread. The guest's memory is a hole; no page of it is touched. */
#include "../plugin/tests/fake.h"
#include "../plugin/upm.h"

#include <stdio.h>
#include <stdlib.h>

#define GUEST_BYTES (1ull << 40)

int ioctl(int fd, unsigned long request, ...);

static uint64_t resident(void)
{
    unsigned long long total, pages;
    FILE *f = fopen("/proc/self/statm", "r");

    if (!f || fscanf(f, "%llu %llu", &total, &pages) != 2) {
        fail("cannot read /proc/self/statm");
    }
    fclose(f);
    return pages * PAGE;
}

int main(void)
{
    uint64_t before = resident(), pages = GUEST_BYTES / PAGE, r = 1;
    struct region *region;

    fake_start();
    region = region_new(-2, GUEST_BYTES);
    upm_lock();
    for (uint64_t i = 0; i < pages / 100; i++) {
        r ^= r << 13;
        r ^= r >> 7;
        r ^= r << 17;
        ledger_add(region, i % 2 ? PRIVATE : SHARED, r % pages, 1ull << r % pages % WORD_BITS);
    }
    upm_unlock();
    printf("{\"resident_bytes\": %llu, \"guest_ram_bytes\": %llu}\n",
           (unsigned long long)(resident() - before), GUEST_BYTES);
    return 0;
}
