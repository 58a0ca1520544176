/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's firmware: loads what QEMU's -kernel names (multiboot) through fw_cfg's DMA, and
 * enters it. It takes no interrupt and moves no memory slot; SeaBIOS, which does both, lost itself
 * before the guest began about once in fifty boots under nested emulation with two processors.
 */
    .set KERNEL_ADDR, 0x07
    .set KERNEL_SIZE, 0x08
    .set INFO_ADDR, 0x0a
    .set INFO_SIZE, 0x0b
    .set KERNEL_ENTRY, 0x10
    .set KERNEL_DATA, 0x11
    .set INFO_DATA, 0x12
    .set DMA_HIGH, 0x514
    .set DMA_LOW, 0x518
    .set DMA_READ_SELECTED, 0x0a
    .set MULTIBOOT_MAGIC, 0x2badb002
    /* In low RAM, below where anything is loaded: */
    .set REQUEST, 0x1000
    .set NUMBER, 0x1010
    .set STACK, 0x2000

    .section .reset, "ax"
    .code16
    jmp start

    .section .text
start:
    cli
    lgdtl %cs:(gdt_pointer - start)
    movl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $protected

    .macro number key
    movl $\key, %eax
    movl $4, %ecx
    movl $NUMBER, %edi
    call fetch
    movl NUMBER, %eax
    .endm

    .macro load address, size, data
    number \size
    pushl %eax
    number \address
    movl %eax, %edi
    movl %eax, %ebx
    popl %ecx
    movl $\data, %eax
    call fetch
    .endm

    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $STACK, %esp
    load KERNEL_ADDR, KERNEL_SIZE, KERNEL_DATA
    load INFO_ADDR, INFO_SIZE, INFO_DATA
    number KERNEL_ENTRY
    movl %eax, %edx
    movl $MULTIBOOT_MAGIC, %eax
    jmp *%edx

/* %ecx bytes of the item %eax to %edi; the device reads a big-endian request. */
fetch:
    shll $16, %eax
    orl $DMA_READ_SELECTED, %eax
    bswapl %eax
    bswapl %ecx
    bswapl %edi
    movl %eax, REQUEST
    movl %ecx, REQUEST + 4
    movl $0, REQUEST + 8
    movl %edi, REQUEST + 12
    movw $DMA_HIGH, %dx
    xorl %eax, %eax
    outl %eax, %dx
    movw $DMA_LOW, %dx
    movl $REQUEST, %eax
    bswapl %eax
    outl %eax, %dx
    ret

/* With the accessed bits set: a processor that had to set them would write to the ROM. */
    .align 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .section .note.GNU-stack, "", @progbits
