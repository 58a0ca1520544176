/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Prints the position of SEV's encryption bit as QEMU finds it on this processor: without a look at
 * which leaves there are, so that it may be anything where SEV is not known.
 */
#include <cpuid.h>
#include <stdio.h>

int main(void)
{
    unsigned eax, ebx, ecx, edx;

    __cpuid_count(0x8000001f, 0, eax, ebx, ecx, edx);
    printf("%u\n", ebx & 0x3f);
    return 0;
}
