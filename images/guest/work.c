/* The workloads and the self check. Everything a vCPU needs to go on lies in its pages of the statistics area: the
 * program can be stopped after any instruction and goes on, in this VM or in a restored one. */
#include "guest.h"
#include "rule.h"

static volatile struct vcpu *vcpu_of(uint32_t me) { return &stats.vcpu[me]; }

/* First page of [from, to) that `me` owns. */
static uint64_t first_owned(uint64_t from, uint32_t me) {
    uint64_t n = stats.header.vcpus;
    return from + (me + n - from % n) % n;
}

void fill(uint32_t me) {
    const volatile struct header *h = &stats.header;
    uint64_t seed = h->seed;
    for (uint64_t i = first_owned(0, me); i < h->fill_pages; i += h->vcpus) {
        volatile uint64_t *page = page_at(i);
        uint64_t number = (uint64_t)page / PAGE;
        uint64_t word = fill_base(number, seed);
        for (uint32_t w = 0; w < WORDS; w++, word += FILL_STEP)
            page[w] = word;
        if (i < h->ws_pages) {
            uint64_t check = check_of(number, 0, seed);
            page[0] = page[WORDS - 1] = number;
            page[1] = page[WORDS - 2] = 0;
            page[2] = page[WORDS - 3] = check;
            page[3] = page[WORDS - 4] = ~0ull;
            vcpu_of(me)->c.stamp_sum += check;
        }
    }
}

/* One write to a page: the counter goes up by one, front before back. Returns what the sum of checks changes by. */
static inline uint64_t stamp(volatile uint64_t *page, uint64_t counter, uint64_t seed) {
    uint64_t number = (uint64_t)page / PAGE;
    uint64_t old = page[2];
    uint64_t check = check_of(number, counter, seed);
    page[0] = number;
    page[1] = counter;
    page[2] = check;
    page[3] = ~counter;
    page[WORDS - 4] = ~counter;
    page[WORDS - 3] = check;
    page[WORDS - 2] = counter;
    page[WORDS - 1] = number;
    return check - old;
}

/* Four buckets to an octave of TSC cycles; below 4 one bucket a cycle. */
static inline uint32_t bucket_of(uint64_t gap) {
    if (gap < 4)
        return (uint32_t)gap;
    uint32_t octave = 63 - (uint32_t)__builtin_clzll(gap);
    return (octave - 1) * 4 + ((uint32_t)(gap >> (octave - 2)) & 3);
}

/* A write ended at `now`: into the histogram and the rate ring. The gap counts from the end of the write before, or
 * from when this one was due if that is later, so waiting on purpose is no gap. */
static inline void account(volatile struct vcpu *v, uint64_t now, uint64_t slot_cycles) {
    uint64_t last = v->c.last_tsc;
    if (v->c.due_tsc > last)
        last = v->c.due_tsc;
    if (v->c.last_tsc != 0 && now >= v->c.last_tsc) {
        uint64_t gap = now > last ? now - last : 0;
        v->bucket[bucket_of(gap)]++;
        v->c.gaps++;
        if (gap > v->c.max_gap)
            v->c.max_gap = gap;
    }
    v->c.last_tsc = now;
    if (now >= v->c.slot_end || now + 2 * slot_cycles < v->c.slot_end) {
        uint32_t slot = (v->c.slot + 1) % SLOTS;
        v->c.slot = slot;
        v->slot[slot].start = now;
        v->slot[slot].writes = 0;
        v->c.slot_end = now + slot_cycles;
    }
    v->slot[v->c.slot].writes++;
}

static void bad(volatile struct vcpu *v, enum bad kind, const volatile uint64_t *where) {
    if (v->c.check_errors++ == 0) {
        v->c.bad_kind = kind;
        v->c.bad_address = (uint64_t)where;
    }
}

/* Whether the words from..to of a filled page are as filled; NULL if so, else the first that is not. */
static const volatile uint64_t *misfilled(const volatile uint64_t *page, uint32_t from, uint32_t to, uint64_t seed) {
    uint64_t word = fill_base((uint64_t)page / PAGE, seed) + from * FILL_STEP;
    for (uint32_t w = from; w < to; w++, word += FILL_STEP)
        if (page[w] != word)
            return &page[w];
    return NULL;
}

static const volatile uint64_t *nonzero(const volatile uint64_t *page, uint32_t from, uint32_t to) {
    for (uint32_t w = from; w < to; w++)
        if (page[w] != 0)
            return &page[w];
    return NULL;
}

static enum bad check_stamp(const volatile uint64_t *page, uint64_t seed) {
    uint64_t number = (uint64_t)page / PAGE;
    for (uint32_t w = 0; w < STAMP; w++)
        if (page[w] != page[WORDS - 1 - w])
            return BAD_TORN;
    if (page[0] != number || page[2] != check_of(number, page[1], seed) || page[3] != ~page[1])
        return BAD_STAMP;
    return BAD_NONE;
}

/* Every page that `me` owns against the rule. */
static void check(uint32_t me, uint64_t flags) {
    const volatile struct header *h = &stats.header;
    volatile struct vcpu *v = vcpu_of(me);
    uint64_t seed = h->seed, sum = 0, counted = 0, pages = 0;
    v->c.check_errors = 0;
    v->c.bad_kind = BAD_NONE;
    v->c.bad_address = 0;
    for (uint64_t i = first_owned(0, me); i < h->fill_pages; i += h->vcpus, pages++) {
        const volatile uint64_t *page = page_at(i), *wrong;
        if (i >= h->ws_pages) {
            if ((wrong = misfilled(page, 0, WORDS, seed)))
                bad(v, BAD_FILL, wrong);
            continue;
        }
        enum bad kind = check_stamp(page, seed);
        if (kind != BAD_NONE)
            bad(v, kind, page);
        if ((wrong = misfilled(page, STAMP, WORDS - STAMP, seed)))
            bad(v, BAD_FILL, wrong);
        sum += page[2];
        counted += page[1];
        if (h->workload == WORKLOAD_SEQ && page[1] != v->c.pass - (i >= v->c.position))
            bad(v, BAD_ORDER, page);
    }
    if (sum != v->c.stamp_sum || counted != v->c.writes)
        bad(v, BAD_SUM, &v->c.stamp_sum);
    for (uint64_t i = first_owned(h->pages - h->late_pages, me); i < h->pages; i += h->vcpus) {
        const volatile uint64_t *page = page_at(i), *wrong;
        int written = i < v->c.late_next;
        if (!written && !(flags & CHECK_UNTOUCHED_LATE))
            break;
        pages++;
        if (written && (check_stamp(page, seed) != BAD_NONE || page[1] != 1))
            bad(v, BAD_LATE, page);
        if ((wrong = written ? nonzero(page, STAMP, WORDS - STAMP) : nonzero(page, 0, WORDS)))
            bad(v, BAD_LATE, wrong);
    }
    v->c.check_pages = pages;
    v->c.checks++;
}

/* The doorbell rang: do what the control page asks, until it asks to run. */
static void serve(uint32_t me) {
    volatile struct control *control = &stats.control;
    volatile struct vcpu *v = vcpu_of(me);
    for (;;) {
        v->c.doorbell_seen = control->doorbell;
        if (v->c.reset_done != control->reset_request) {
            uint64_t request = control->reset_request;
            for (uint32_t b = 0; b < BUCKETS; b++)
                v->bucket[b] = 0;
            v->c.max_gap = v->c.gaps = v->c.last_tsc = 0;
            v->c.reset_done = request;
        }
        if (v->c.check_done != control->check_request) {
            uint64_t request = control->check_request;
            v->c.state = STATE_CHECKING;
            check(me, control->check_flags);
            v->c.last_tsc = 0;
            v->c.check_done = request;
        }
        if (control->command != COMMAND_QUIESCE)
            break;
        v->c.state = STATE_QUIESCED;
        v->c.last_tsc = 0;
        while (v->c.doorbell_seen == control->doorbell)
            in8(IDLE_PORT);
    }
    v->c.due_tsc = 0;
    v->c.state = STATE_RUNNING;
}

/* Waits until the next write is due; says whether there is something to write now (the doorbell ends the wait). */
static int wait_due(volatile struct vcpu *v, uint64_t period, uint64_t khz) {
    uint64_t now = tsc();
    if (v->c.due_tsc == 0 || now > v->c.due_tsc + 100 * khz || v->c.due_tsc > now + 2 * period + 100 * khz)
        v->c.due_tsc = now; /* start afresh: a hole longer than 100 ms is not made up for */
    else
        v->c.due_tsc += period;
    while ((now = tsc()) < v->c.due_tsc) {
        if (v->c.doorbell_seen != stats.control.doorbell)
            return 0;
        if (v->c.due_tsc - now > 2 * khz)
            in8(IDLE_PORT);
        else
            relax();
    }
    return 1;
}

static void report(volatile struct vcpu *v, uint64_t *next, uint64_t *before, uint64_t khz) {
    uint64_t now = tsc();
    if (now < *next && *next - now <= 1000 * khz)
        return;
    if (*next != 0) {
        print("rate ");
        print_number(v->c.writes - *before);
        print("\n");
    }
    *before = v->c.writes;
    *next = now + 1000 * khz;
}

_Noreturn void work(uint32_t me) {
    const volatile struct header *h = &stats.header;
    volatile struct vcpu *v = vcpu_of(me);
    uint64_t seed = h->seed, khz = h->tsc_khz, slot_cycles = SLOT_MS * khz, n = h->vcpus;
    uint64_t period = h->rate ? khz * 1000 / h->rate : 0;
    uint64_t owned = h->ws_pages > me ? (h->ws_pages - me + n - 1) / n : 0;
    uint32_t workload = owned ? h->workload : WORKLOAD_IDLE;
    uint64_t report_next = 0, report_before = 0;

    v->c.state = STATE_RUNNING;
    for (;;) {
        if (v->c.doorbell_seen != stats.control.doorbell)
            serve(me);
        if (h->report && me == 0)
            report(v, &report_next, &report_before, khz);
        if (stats.control.late_go && v->c.late_next < h->pages) {
            stamp(page_at(v->c.late_next), 1, seed);
            v->c.late_next += n;
        } else if (workload == WORKLOAD_IDLE) {
            in8(IDLE_PORT);
        }
        if (workload == WORKLOAD_IDLE || (period && !wait_due(v, period, khz)))
            continue;

        uint64_t index = v->c.position;
        if (workload == WORKLOAD_RANDOM) {
            uint64_t x = v->c.random;
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            v->c.random = x;
            index = (uint64_t)(((unsigned __int128)x * owned) >> 64) * n + me;
        }
        volatile uint64_t *page = page_at(index);
        v->c.stamp_sum += stamp(page, page[1] + 1, seed);
        v->c.writes++;
        if (workload == WORKLOAD_SEQ) {
            index += n;
            if (index >= h->ws_pages) {
                index = me;
                v->c.pass++;
            }
            v->c.position = index;
        }
        account(v, tsc(), slot_cycles);
    }
}
