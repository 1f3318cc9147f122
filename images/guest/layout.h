/* Where guest and VMM meet: the statistics area, at a fixed guest-physical address. The same layout stands in
 * ../src/layout.rs; both assert every offset, so a change in one alone does not compile.
 *
 * Who writes what: the header page is written once at boot; the control page by the VMM only; the pages of vCPU n by
 * vCPU n only. A vCPU keeps everything it needs to go on in its own pages, so they are part of every snapshot. */
#ifndef RAMSHOT_LAYOUT_H
#define RAMSHOT_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#define STATS_ADDRESS 0x200000ull
#define STATS_MAGIC 0x315354534d4152ull /* "RAMSTS1" */
#define LAYOUT_VERSION 1
#define MAX_VCPUS 16
#define MAX_RANGES 8
#define FIRST_USABLE 0x400000ull /* RAM below holds the image, these statistics and what the loader left */
#define PAGE 4096ull
#define WORDS 512

enum phase { PHASE_BOOT = 0, PHASE_FILLING = 1, PHASE_READY = 2 };
enum workload { WORKLOAD_IDLE = 0, WORKLOAD_SEQ = 1, WORKLOAD_RANDOM = 2 };
enum command { COMMAND_RUN = 0, COMMAND_QUIESCE = 1 };
enum state { STATE_OFF = 0, STATE_FILLING = 1, STATE_RUNNING = 2, STATE_QUIESCED = 3, STATE_CHECKING = 4 };
enum bad { BAD_NONE = 0, BAD_FILL = 1, BAD_STAMP = 2, BAD_TORN = 3, BAD_ORDER = 4, BAD_SUM = 5, BAD_LATE = 6 };
#define CHECK_UNTOUCHED_LATE 1 /* also read the late pages nobody wrote yet: they have to be zero */

/* Usable RAM is numbered in pages, range after range. The working set is the first `ws_pages`, the fill goes from 0 to
 * `fill_pages`, the late area is the last `late_pages`. Page i belongs to vCPU i % vcpus. */
struct range {
    uint64_t first;
    uint64_t address;
    uint64_t pages;
};

struct header {
    uint64_t magic;
    uint32_t version;
    uint32_t phase;
    uint32_t vcpus;
    uint32_t workload;
    uint64_t tsc_khz;
    uint64_t rate; /* writes per second and vCPU, 0 = as fast as it can */
    uint64_t seed;
    uint64_t pages;
    uint64_t ws_pages;
    uint64_t fill_pages;
    uint64_t late_pages;
    uint32_t ranges;
    uint32_t report;
    uint64_t spare;
    struct range range[MAX_RANGES];
};

/* The VMM changes a word, then adds 1 to the doorbell. */
struct control {
    uint64_t doorbell;
    uint32_t command;
    uint32_t late_go;
    uint64_t check_request; /* a number; the vCPU answers with the same number in check_done */
    uint64_t check_flags;
    uint64_t reset_request; /* likewise: gaps and writes since reset to zero */
};

struct counters {
    uint32_t state;
    uint32_t filled;
    uint64_t doorbell_seen;
    uint64_t writes;      /* stamps written to the working set since boot */
    uint64_t stamp_sum;   /* sum of the checks of the latest stamp of every owned page of the working set */
    uint64_t position;    /* next page of the pass, as a page number of the working set (seq) */
    uint64_t pass;        /* counter that this pass writes (seq) */
    uint64_t random;      /* state of the generator */
    uint64_t late_next;   /* next late page to write */
    uint64_t last_tsc;    /* end of the last write; 0 = start afresh */
    uint64_t due_tsc;     /* when the next write is due */
    uint64_t max_gap;     /* since reset */
    uint64_t gaps;        /* gaps counted since reset */
    uint64_t check_done;
    uint64_t check_pages;
    uint64_t check_errors;
    uint64_t bad_address; /* of the first error */
    uint32_t bad_kind;
    uint32_t slot;        /* slot of the rate ring in use */
    uint64_t reset_done;
    uint64_t slot_end;    /* TSC at which it ends */
    uint64_t checks;      /* checks done since boot */
};

#define BUCKETS 256 /* four to an octave: see bucket_of */
#define SLOTS 1024
struct slot {
    uint64_t start; /* TSC; 0 = never used */
    uint64_t writes;
};
#define SLOT_MS 10

struct vcpu {
    struct counters c;
    uint8_t pad0[PAGE - sizeof(struct counters)];
    uint64_t bucket[BUCKETS];
    uint8_t pad1[PAGE - BUCKETS * 8];
    struct slot slot[SLOTS];
    uint8_t pad2[2 * PAGE];
};

struct stats {
    struct header header;
    uint8_t pad0[PAGE - sizeof(struct header)];
    struct control control;
    uint8_t pad1[7 * PAGE - sizeof(struct control)];
    struct vcpu vcpu[MAX_VCPUS];
};

#define AT(type, field, offset) _Static_assert(offsetof(struct type, field) == (offset), #type "." #field)
AT(header, phase, 12);
AT(header, workload, 20);
AT(header, tsc_khz, 24);
AT(header, rate, 32);
AT(header, seed, 40);
AT(header, pages, 48);
AT(header, ws_pages, 56);
AT(header, fill_pages, 64);
AT(header, late_pages, 72);
AT(header, ranges, 80);
AT(header, range, 96);
AT(control, command, 8);
AT(control, late_go, 12);
AT(control, check_request, 16);
AT(control, check_flags, 24);
AT(control, reset_request, 32);
AT(counters, doorbell_seen, 8);
AT(counters, writes, 16);
AT(counters, stamp_sum, 24);
AT(counters, position, 32);
AT(counters, pass, 40);
AT(counters, random, 48);
AT(counters, late_next, 56);
AT(counters, last_tsc, 64);
AT(counters, due_tsc, 72);
AT(counters, max_gap, 80);
AT(counters, gaps, 88);
AT(counters, check_done, 96);
AT(counters, check_pages, 104);
AT(counters, check_errors, 112);
AT(counters, bad_address, 120);
AT(counters, bad_kind, 128);
AT(counters, slot, 132);
AT(counters, reset_done, 136);
AT(counters, slot_end, 144);
AT(counters, checks, 152);
AT(vcpu, bucket, 0x1000);
AT(vcpu, slot, 0x2000);
AT(stats, control, 0x1000);
AT(stats, vcpu, 0x8000);
_Static_assert(sizeof(struct header) == 288, "header");
_Static_assert(sizeof(struct vcpu) == 0x8000, "vcpu");
_Static_assert(sizeof(struct stats) == 0x88000, "stats");
_Static_assert(STATS_ADDRESS + sizeof(struct stats) <= FIRST_USABLE, "statistics and usable RAM overlap");

#endif
