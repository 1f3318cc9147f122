/* The rule every page obeys, so that the guest can tell later whether its memory is what it wrote. The same rule stands
 * in ../src/rule.rs.
 *
 * Fill: word i of page a (a = guest-physical page number) is fill_base(a) + i * FILL_STEP.
 * Stamp, on the pages of the working set and the late area: words 0 to 3 are page, counter, check, ~counter, words 508
 * to 511 the same backwards; check mixes page, counter and seed. The words between stay as filled (late: zero).
 * A page put in the wrong place has the wrong page number, a torn one two counters, a stale or early one breaks the sum
 * of all checks that its owner keeps. */
#ifndef RAMSHOT_RULE_H
#define RAMSHOT_RULE_H

#include "layout.h"

#define STAMP 4
#define FILL_STEP 0x9e3779b97f4a7c15ull
#define STAMP_SALT 0x5354414d50ull

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline uint64_t fill_base(uint64_t page, uint64_t seed) { return mix(page * FILL_STEP + seed) | 1; }

static inline uint64_t check_of(uint64_t page, uint64_t counter, uint64_t seed) {
    return mix((page ^ STAMP_SALT) * FILL_STEP + mix(counter + seed));
}

#endif
