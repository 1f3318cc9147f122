/* From the first instruction in ring 3 to the workload: command line, memory map, the other vCPUs, the fill. */
#include "guest.h"
#include "rule.h"

__attribute__((section(".stats"), aligned(4096))) volatile struct stats stats;

extern uint32_t start_info;
extern const uint8_t trampoline[], trampoline_end[];

/* The PVH boot protocol's start info, as far as we read it. */
struct pvh_start_info {
    uint32_t magic, version, flags, modules;
    uint64_t modules_address, command_line, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};
struct pvh_memory {
    uint64_t address, size;
    uint32_t type, reserved;
};
#define PVH_MAGIC 0x336ec578
#define PVH_RAM 1
#define MAPPED_END (64ull << 30)
#define TRAMPOLINE 0x8000ull
#define LOCAL_APIC_ICR 0xfee00300ull

static uint8_t start_aps = 1;

void print(const char *text) {
    for (; *text; text++) {
        for (uint32_t i = 0; i < 100000 && !(in8(SERIAL_PORT + 5) & 0x20); i++)
            relax();
        out8(SERIAL_PORT, (uint8_t)*text);
    }
}

void print_number(uint64_t value) {
    char digits[21];
    uint32_t at = 20;
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + value % 10);
    while (value /= 10);
    print(&digits[at]);
}

/* The compiler may call these. */
void *memset(void *to, int value, size_t n) {
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t n) {
    void *at = to;
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n)::"memory");
    return to;
}

/* The value of `name=` on the command line, or NULL. */
static const char *option(const char *line, const char *name) {
    while (line && *line) {
        const char *a = line, *b = name;
        while (*b && *a == *b)
            a++, b++;
        if (!*b && *a == '=')
            return a + 1;
        while (*line && *line != ' ')
            line++;
        while (*line == ' ')
            line++;
    }
    return NULL;
}

static int is(const char *value, const char *word) {
    while (*word && *value == *word)
        value++, word++;
    return !*word && (!*value || *value == ' ');
}

/* A number with an optional K, M or G behind it. */
static uint64_t number(const char *line, const char *name, uint64_t otherwise) {
    const char *value = option(line, name);
    if (!value || *value < '0' || *value > '9')
        return otherwise;
    uint64_t result = 0;
    for (; *value >= '0' && *value <= '9'; value++)
        result = result * 10 + (uint64_t)(*value - '0');
    switch (*value) {
    case 'K': return result << 10;
    case 'M': return result << 20;
    case 'G': return result << 30;
    default: return result;
    }
}

static void add_range(uint64_t from, uint64_t to, uint64_t limit) {
    volatile struct header *h = &stats.header;
    from = (from + PAGE - 1) & ~(PAGE - 1);
    to &= ~(PAGE - 1);
    if (from < FIRST_USABLE)
        from = FIRST_USABLE;
    if (to > MAPPED_END)
        to = MAPPED_END;
    if (from >= to || h->ranges == MAX_RANGES || h->pages >= limit)
        return;
    uint64_t pages = (to - from) / PAGE;
    if (pages > limit - h->pages)
        pages = limit - h->pages;
    volatile struct range *r = &h->range[h->ranges++];
    r->first = h->pages;
    r->address = from;
    r->pages = pages;
    h->pages += pages;
}

static void set_up(const char *line, const struct pvh_start_info *info) {
    volatile struct header *h = &stats.header;
    uint64_t limit = number(line, "mem", ~0ull) / PAGE;
    if (info && info->version >= 1 && info->memory_map_entries) {
        const struct pvh_memory *map = (const void *)info->memory_map;
        for (uint32_t i = 0; i < info->memory_map_entries; i++)
            if (map[i].type == PVH_RAM)
                add_range(map[i].address, map[i].address + map[i].size, limit);
    } else if (limit != ~0ull / PAGE) {
        add_range(FIRST_USABLE, limit * PAGE, limit);
    }

    const char *workload = option(line, "workload");
    h->workload = WORKLOAD_RANDOM;
    if (workload && is(workload, "idle"))
        h->workload = WORKLOAD_IDLE;
    if (workload && is(workload, "seq"))
        h->workload = WORKLOAD_SEQ;
    uint64_t vcpus = number(line, "vcpus", 1);
    h->vcpus = (uint32_t)(vcpus < 1 ? 1 : vcpus > MAX_VCPUS ? MAX_VCPUS : vcpus);
    h->tsc_khz = number(line, "tsc_khz", 0);
    if (h->tsc_khz == 0) {
        print("ramshot-guest: no tsc_khz= given, 2000000 assumed\n");
        h->tsc_khz = 2000000;
    }
    h->rate = number(line, "rate", 0); /* "max" is no number: 0 */
    h->seed = number(line, "seed", 1);
    h->report = number(line, "report", 0) != 0;
    const char *ap = option(line, "ap");
    start_aps = !(ap && is(ap, "vmm"));

    uint64_t late = number(line, "late", 0) / PAGE, ws = number(line, "ws", 16 << 20) / PAGE;
    h->late_pages = late > h->pages ? h->pages : late;
    uint64_t left = h->pages - h->late_pages;
    h->ws_pages = ws > left ? left : ws;
    uint64_t filled = number(line, "fill", ~0ull) / PAGE; /* "all" is no number */
    h->fill_pages = filled > left ? left : filled < h->ws_pages ? h->ws_pages : filled;

    for (uint32_t i = 0; i < h->vcpus; i++) {
        volatile struct counters *c = &stats.vcpu[i].c;
        uint64_t late_first = h->pages - h->late_pages, n = h->vcpus;
        c->position = i;
        c->pass = 1;
        c->random = mix(h->seed + i + 1) | 1;
        c->late_next = late_first + (i + n - late_first % n) % n;
    }
    h->magic = STATS_MAGIC;
    h->version = LAYOUT_VERSION;
}

static void wait_us(uint64_t us) {
    uint64_t start = tsc();
    while ((tsc() - start) * 1000 < us * stats.header.tsc_khz)
        relax();
}

/* INIT-SIPI-SIPI to all but this one, by hand through the local APIC. `ap=vmm` leaves it to the VMM, which then starts
 * every vCPU at the PVH entry. */
static void start_others(void) {
    volatile uint32_t *icr = (volatile uint32_t *)LOCAL_APIC_ICR;
    volatile uint8_t *to = (volatile uint8_t *)TRAMPOLINE;
    for (const uint8_t *from = trampoline; from < trampoline_end; from++)
        *to++ = *from;
    *icr = 0xc4500; /* INIT */
    wait_us(10000);
    for (uint32_t i = 0; i < 2; i++) {
        *icr = 0xc4600 | TRAMPOLINE >> 12;
        wait_us(200);
    }
}

_Noreturn void guest_main(uint32_t me);
_Noreturn void guest_main(uint32_t me) {
    volatile struct header *h = &stats.header;
    if (me == 0) {
        const struct pvh_start_info *info = (const void *)(uint64_t)start_info;
        if (info && info->magic != PVH_MAGIC)
            info = NULL;
        set_up(info ? (const char *)info->command_line : NULL, info);
        h->phase = PHASE_FILLING;
        if (h->vcpus > 1 && start_aps)
            start_others();
    }
    while (h->phase == PHASE_BOOT)
        relax();
    while (me >= h->vcpus) /* more vCPUs than the command line wants: HLT is not for ring 3, so this is all rest there is */
        in8(IDLE_PORT);

    stats.vcpu[me].c.state = STATE_FILLING;
    fill(me);
    stats.vcpu[me].c.filled = 1;
    if (me == 0) {
        for (uint32_t i = 0; i < h->vcpus; i++)
            while (!stats.vcpu[i].c.filled)
                relax();
        print("ramshot-guest: ready, vcpus ");
        print_number(h->vcpus);
        print(", pages ");
        print_number(h->pages);
        print(", filled ");
        print_number(h->fill_pages);
        print(", working set ");
        print_number(h->ws_pages);
        print("\n");
        h->phase = PHASE_READY;
    }
    while (h->phase != PHASE_READY)
        relax();
    work(me);
}
