/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Multiboot entry of the guest, and where its other processors come up. */
    .set MAGIC, 0x1BADB002
    .set FLAGS, 0x3
    .set TRAMPOLINE, 0x8000
    .set STACK, 0x4000

    .section .multiboot, "a"
    .align 4
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)

    .text
    .globl _start
_start:
    cli
    movl $(stacks + STACK), %esp
    lgdt gdt_pointer
    ljmp $8, $1f
1:  movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    pushl %ebx
    call guest_main
2:  cli
    hlt
    jmp 2b

/* Copied to TRAMPOLINE; runs in real mode there. */
    .code16
    .globl trampoline, trampoline_end
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl (gdt_pointer_low - trampoline + TRAMPOLINE)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $processor_entry
    .align 8
gdt_pointer_low:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
processor_entry:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $1, %eax
    lock xaddl %eax, processors
    movl %eax, %ecx
    incl %ecx
    imull $STACK, %ecx
    leal stacks(%ecx), %esp
    pushl %eax
    call processor_main
3:  cli
    hlt
    jmp 3b

    .data
    .align 8
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .globl processors
processors:
    .long 1

    .bss
    .align 16
stacks:
    .skip STACK * 8

    .section .note.GNU-stack, "", @progbits
