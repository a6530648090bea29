/* Preloaded into a program, makes its CPUID instructions report a processor with fewer instruction sets.

   PERSIMMON_MASK_CPUID=avx2 hides AVX-512, AMX and AVX-VNNI; =avx512 hides AMX and AVX-512 FP16.  The kernel makes CPUID
   fault (arch_prctl(2), ARCH_SET_CPUID); the handler executes it with the fault off, clears bits, and goes on behind it.
   Bits are those of the Intel SDM, volume 2, CPUID, leaf 7.  /proc/cpuinfo still shows everything. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012 };

#define BIT(number) (UINT32_C(1) << (number))

/* Leaf 7.0: EBX, ECX, EDX; leaf 7.1: EAX, EDX. */
struct mask {
    uint32_t b0, c0, d0, a1, d1;
};

static const struct mask AMX_AND_FP16 = {
    .d0 = BIT(22) | BIT(23) | BIT(24) | BIT(25), /* AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
    .a1 = BIT(21),                               /* AMX-FP16 */
    .d1 = BIT(8) | BIT(19),                      /* AMX-COMPLEX, AVX10 */
};

static const struct mask ABOVE_AVX2 = {
    /* AVX512: F, DQ, IFMA, PF, ER, CD, BW, VL */
    .b0 = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31),
    .c0 = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14), /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    /* 4VNNIW, 4FMAPS, VP2INTERSECT; then as above */
    .d0 = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25),
    .a1 = BIT(4) | BIT(5) | BIT(21) | BIT(23),       /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
    .d1 = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19), /* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX, AVX-VNNI-INT16, AVX10 */
};

static const struct mask *hidden;

static void set_fault(int enabled) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, !enabled); }

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        /* Another fault: it happens again, and ends the program. */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], a, b, c, d;
    set_fault(0);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
    set_fault(1);
    if (leaf == 7 && subleaf == 0) {
        b &= ~hidden->b0;
        c &= ~hidden->c0;
        d &= ~hidden->d0;
    } else if (leaf == 7 && subleaf == 1) {
        a &= ~hidden->a1;
        d &= ~hidden->d1;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    const char *wanted = getenv("PERSIMMON_MASK_CPUID");
    if (wanted == NULL) return;
    hidden = strcmp(wanted, "avx2") == 0 ? &ABOVE_AVX2 : strcmp(wanted, "avx512") == 0 ? &AMX_AND_FP16 : NULL;
    if (hidden == NULL) {
        fprintf(stderr, "PERSIMMON_MASK_CPUID is %s; expected avx2 or avx512\n", wanted);
        _exit(2);
    }
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
        perror("this processor or kernel cannot make CPUID fault (arch_prctl ARCH_SET_CPUID)");
        _exit(2);
    }
}
