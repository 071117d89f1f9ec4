/* Reset, faults and semihosting for Cortex-M under QEMU: what a real board's vendor code does is left out. */
#include "semihosting.h"

extern uint32_t data_start, data_end, data_load, bss_start, bss_end, stack_top;
int main(void);

int32_t semihosting(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return (int32_t)r0;
}

static void leave(uint32_t code)
{
    const uint32_t block[2] = {0x20026u, code}; /* ADP_Stopped_ApplicationExit */
    (void)semihosting(0x20u, block);            /* SYS_EXIT_EXTENDED */
    for (;;) {
    }
}

static void fault(void)
{
    leave(99u);
}

void reset_handler(void)
{
    uint32_t *from = &data_load;
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: without it the first FP or MVE instruction faults */
    __asm__ volatile("dsb\n isb");
#endif
    for (uint32_t *to = &data_start; to < &data_end; ++to) {
        *to = *from++;
    }
    for (uint32_t *to = &bss_start; to < &bss_end; ++to) {
        *to = 0u;
    }
    leave((uint32_t)main());
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &stack_top, (const void *)reset_handler, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault, 0, 0, 0, 0, (const void *)fault, (const void *)fault, 0,
    (const void *)fault, (const void *)fault,
};
