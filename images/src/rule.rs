//! The rule every page of the guest obeys (`guest/rule.h` says the same in C).
//!
//! Fill: word `i` of page `a` (guest-physical page number) is `fill_base(a) + i * FILL_STEP`. Stamp, on pages of the
//! working set and of the late area: words 0 to 3 are page number, counter, check, inverted counter; the last four are
//! the same backwards. What lies between stays as filled, or zero in the late area.

/// Words of 8 bytes in a page.
pub const WORDS: usize = 512;
/// Words a stamp takes at either end of a page.
pub const STAMP: usize = 4;
/// What the pattern goes up by from word to word.
pub const FILL_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const STAMP_SALT: u64 = 0x53_5441_4d50;

/// Mixes all bits of `x` (bijective).
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// First word of the fill pattern of `page`.
#[must_use]
pub const fn fill_base(page: u64, seed: u64) -> u64 {
    mix(page.wrapping_mul(FILL_STEP).wrapping_add(seed)) | 1
}

/// Word `index` of the fill pattern of `page`.
#[must_use]
pub const fn fill_word(page: u64, index: u64, seed: u64) -> u64 {
    fill_base(page, seed).wrapping_add(index.wrapping_mul(FILL_STEP))
}

/// The check of a stamp.
#[must_use]
pub const fn check_of(page: u64, counter: u64, seed: u64) -> u64 {
    mix((page ^ STAMP_SALT).wrapping_mul(FILL_STEP).wrapping_add(mix(counter.wrapping_add(seed))))
}

/// The first four words of the stamp of `page` at `counter`; the last four of the page are these backwards.
#[must_use]
pub const fn stamp_of(page: u64, counter: u64, seed: u64) -> [u64; STAMP] {
    [page, counter, check_of(page, counter, seed), !counter]
}
