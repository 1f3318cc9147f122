/* Ring 0, all of it: from the 32-bit PVH entry (or a SIPI) to ring 3 in identity-mapped long mode.
 *
 * On a host that virtualises by page tables alone each of these instructions is emulated, and only plain ones can be;
 * so nothing is computed here that the assembler or the linker can compute, and everything else is done in ring 3,
 * the local APIC's registers included (they are mapped like the rest).
 *
 * Interrupts stay off for ever. Exceptions are reported on the serial port, then the vCPU halts.
 */
#define MAX_VCPUS 16
#define STACK_SIZE 8192
#define TSS_SIZE 512
#define SERIAL 0x3f8

#define CODE32 0x08
#define DATA0 0x10
#define CODE64 0x18
#define USER_DATA 0x2b
#define USER_CODE 0x33
#define FIRST_TSS 0x40

/* ---- the PVH note: where a VMM enters, in 32-bit protected mode without paging, ebx = start info */
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY; 8 bytes, as loaders read it in a 64-bit file */
    .asciz "Xen"
    .quad pvh_entry

/* ---- entry */
    .section .boot, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    movl $1, %edi
    lock xaddl %edi, next_index     /* every vCPU picks its number, however it came here */
    cmpl $MAX_VCPUS, %edi
    jae halt32
    testl %edi, %edi
    jnz 1f
    movl %ebx, start_info           /* only number 0 reads it; those that came by SIPI have none */
1:  lgdt gdt_pointer
    movl $DATA0, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %cr4, %eax
    orl $0x20, %eax                 /* PAE */
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $0x9fffffff, %eax          /* caches on: after INIT, CD and NW are set */
    orl $0x80000001, %eax
    movl %eax, %cr0
    ljmpl $CODE64, $long_mode
halt32:
    hlt
    jmp halt32

    .code64
long_mode:
    movl %edi, %edi                 /* upper half: zero */
    lidt idt_pointer
    movl %edi, %eax
    shll $4, %eax
    addl $FIRST_TSS, %eax
    ltr %ax
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %edi, %eax                 /* stack of this vCPU: stacks + (n + 1) * STACK_SIZE */
    incl %eax
    imull $STACK_SIZE, %eax
    leaq stacks(%rax), %rsi
    movq %rsi, %rsp
    pushq $USER_DATA
    pushq %rsi
    pushq $2                        /* flags: interrupts off; ports are open through the TSS, not IOPL */
    pushq $USER_CODE
    pushq $ring3
    iretq

    .text
ring3:
    xorl %ebp, %ebp
    call guest_main                 /* edi = number of this vCPU; does not return */
1:  pause
    jmp 1b

/* ---- what a SIPI starts, in real mode; copied to 0x8000 */
    .section .rodata
    .code16
    .globl trampoline, trampoline_end
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + (tramp_gdt_pointer - trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $0x8000 + (tramp32 - trampoline)
    .code32
tramp32:
    movl $DATA0, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $pvh_entry, %eax
    jmp *%eax
    .balign 8
tramp_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

/* ---- exceptions: vector number on the stack, then one reporter */
    .code64
    .section .vectors, "ax"
vector = 0
    .rept 32
    .balign 16
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17) || (vector == 21)
    .else
    pushq $0
    .endif
    pushq $vector
    jmp report
    vector = vector + 1
    .endr
    .balign 16

    .section .boot, "ax"
report:                             /* "EXCEPTION vv err eeeeeeee rip rrrrrrrr", in hexadecimal */
    leaq report_text, %rsi
    movl $SERIAL, %edx
1:  movb (%rsi), %al
    testb %al, %al
    jz 2f
    outb %al, %dx
    incq %rsi
    jmp 1b
2:  movq (%rsp), %rbx
    call report_hex
    movq 8(%rsp), %rbx
    call report_hex
    movq 16(%rsp), %rbx
    call report_hex
    movb $10, %al
    outb %al, %dx
3:  hlt
    jmp 3b
report_hex:
    movb $32, %al
    outb %al, %dx
    movl $8, %ecx
4:  roll $4, %ebx
    movl %ebx, %eax
    andl $15, %eax
    movb hex_digits(%rax), %al
    outb %al, %dx
    decl %ecx
    jnz 4b
    ret

    .section .rodata
report_text: .asciz "\nEXCEPTION vector, error, rip:"
hex_digits: .ascii "0123456789abcdef"

/* ---- tables */
    .data
    .balign 8
    .globl start_info, next_index
start_info: .long 0
next_index: .long 0
    .balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* 08 code, 32 bit, ring 0 */
    .quad 0x00cf93000000ffff        /* 10 data, ring 0 */
    .quad 0x00af9b000000ffff        /* 18 code, 64 bit, ring 0 */
    .quad 0x00cffb000000ffff        /* 20 code, 32 bit, ring 3 (unused; the place SYSRET expects) */
    .quad 0x00cff3000000ffff        /* 28 data, ring 3 */
    .quad 0x00affb000000ffff        /* 30 code, 64 bit, ring 3 */
    .quad 0
tss_address = 0x110000              /* .tss in guest.ld */
    .rept MAX_VCPUS                 /* 40.. one task state a vCPU: a busy one cannot be loaded twice */
    .word TSS_SIZE - 1
    .word tss_address & 0xffff
    .byte (tss_address >> 16) & 0xff, 0x89, 0, tss_address >> 24
    .quad 0
    tss_address = tss_address + TSS_SIZE
    .endr
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 16
idt:
vector_address = 0x100000           /* .vectors in guest.ld */
    .rept 32
    .word vector_address & 0xffff, CODE64, 0x8e00, vector_address >> 16
    .quad 0
    vector_address = vector_address + 16
    .endr
idt_end:
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

    .section .tss, "aw"
number = 1
    .rept MAX_VCPUS
    .long 0
    .quad stacks + STACK_SIZE * number  /* ring-0 stack of exceptions: nothing returns from there, so it is shared */
    .fill 102 - 12, 1, 0
    .word 104                       /* I/O bitmap follows: ports 0 to 0xbff, all allowed */
    .fill TSS_SIZE - 105, 1, 0
    .byte 0xff                      /* the byte behind the bitmap has to be there, all ones */
    number = number + 1
    .endr

/* Identity map of 64 GiB in 2 MiB pages, user, writable, accessed and dirty (so that nobody writes to the tables). */
#define MAPPED_GIB 64
    .section .pagetables, "aw"
    .balign 4096
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:
directory = 0
    .rept MAPPED_GIB
    .quad directories + directory * 4096 + 0x27
    directory = directory + 1
    .endr
    .fill 512 - MAPPED_GIB, 8, 0
directories:
large = 0
    .rept MAPPED_GIB * 512
    .quad (large << 21) + 0xe7
    large = large + 1
    .endr

    .bss
    .balign 4096
stacks: .skip STACK_SIZE * MAX_VCPUS

    .section .note.GNU-stack, "", @progbits
