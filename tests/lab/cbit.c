/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Prints the position of SEV's encryption bit on this processor, 0 if it has none. */
#include <cpuid.h>
#include <stdio.h>

int main(void)
{
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

    __get_cpuid_count(0x8000001f, 0, &eax, &ebx, &ecx, &edx);
    printf("%u\n", ebx & 0x3f);
    return 0;
}
