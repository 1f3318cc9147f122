/* What the two halves of the guest program share. Everything here runs in ring 3. */
#ifndef RAMSHOT_GUEST_H
#define RAMSHOT_GUEST_H

#include "layout.h"

/* Reading this port means "nothing to do for a millisecond". The test VM sleeps on it; elsewhere nobody answers and it
 * costs one exit. */
#define IDLE_PORT 0x600
#define SERIAL_PORT 0x3f8

extern volatile struct stats stats;

static inline void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static inline uint8_t in8(uint16_t port) {
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return low | (uint64_t)high << 32;
}

static inline void relax(void) { __asm__ volatile("pause"); }

void print(const char *text);
void print_number(uint64_t value);

/* Guest-physical address of page `index` of usable RAM, which is also where it is mapped. */
static inline volatile uint64_t *page_at(uint64_t index) {
    const volatile struct header *h = &stats.header;
    uint32_t r = 0;
    while (r + 1 < h->ranges && index >= h->range[r + 1].first)
        r++;
    return (volatile uint64_t *)(h->range[r].address + (index - h->range[r].first) * PAGE);
}

void fill(uint32_t me);
_Noreturn void work(uint32_t me);

#endif
