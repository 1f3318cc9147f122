//! Where guest and VMM meet: the statistics area at a fixed guest-physical address (`guest/layout.h` says the same in C).
//!
//! The header is written once at boot; the control page by the VMM only; the pages of vCPU n by vCPU n only. A vCPU keeps
//! everything it needs to go on in its own pages, so whatever captures RAM and registers captures the workload.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Guest-physical address of [`Header`].
pub const STATS_ADDRESS: u64 = 0x20_0000;
/// Guest-physical address of [`Control`].
pub const CONTROL_ADDRESS: u64 = STATS_ADDRESS + 0x1000;
/// First RAM that the guest fills and works on; what lies below is the image, its stacks and these statistics.
pub const FIRST_USABLE: u64 = 0x40_0000;
/// [`Header::magic`]: `RAMSTS1` in memory order.
pub const STATS_MAGIC: u64 = 0x31_5354_534d_4152;
/// [`Header::version`].
pub const LAYOUT_VERSION: u32 = 1;
/// Most vCPUs the guest can use.
pub const MAX_VCPUS: usize = 16;
/// Most pieces of usable RAM.
pub const MAX_RANGES: usize = 8;
/// Buckets of the histogram of gaps: see [`bucket_of`].
pub const BUCKETS: usize = 256;
/// Slots of the ring of rates.
pub const SLOTS: usize = 1024;
/// Length of a slot in milliseconds.
pub const SLOT_MS: u64 = 10;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// [`Header::phase`]: RAM is being filled.
pub const PHASE_FILLING: u32 = 1;
/// [`Header::phase`]: RAM is filled, the workload runs.
pub const PHASE_READY: u32 = 2;
/// [`Header::workload`]: no writes (but the late ones).
pub const WORKLOAD_IDLE: u32 = 0;
/// [`Header::workload`]: page after page, round after round.
pub const WORKLOAD_SEQ: u32 = 1;
/// [`Header::workload`]: any page.
pub const WORKLOAD_RANDOM: u32 = 2;
/// [`Control::command`]: do the workload.
pub const COMMAND_RUN: u32 = 0;
/// [`Control::command`]: write nothing, but answer.
pub const COMMAND_QUIESCE: u32 = 1;
/// [`Control::check_flags`]: read the late pages nobody wrote yet, too; they have to be zero.
pub const CHECK_UNTOUCHED_LATE: u64 = 1;
/// [`Counters::state`]: filling its pages.
pub const STATE_FILLING: u32 = 1;
/// [`Counters::state`]: at work.
pub const STATE_RUNNING: u32 = 2;
/// [`Counters::state`]: told to write nothing.
pub const STATE_QUIESCED: u32 = 3;
/// [`Counters::state`]: checking its pages.
pub const STATE_CHECKING: u32 = 4;
/// [`Counters::bad_kind`]: a word of the fill pattern.
pub const BAD_FILL: u32 = 1;
/// [`Counters::bad_kind`]: a stamp of another page, or damaged.
pub const BAD_STAMP: u32 = 2;
/// [`Counters::bad_kind`]: front and back of a page differ.
pub const BAD_TORN: u32 = 3;
/// [`Counters::bad_kind`]: not the counter that this place of the pass has to have (seq).
pub const BAD_ORDER: u32 = 4;
/// [`Counters::bad_kind`]: every page is fine by itself, but one of them is older or newer than the vCPU's own count.
pub const BAD_SUM: u32 = 5;
/// [`Counters::bad_kind`]: a late page: not zero before its first write, or not as written.
pub const BAD_LATE: u32 = 6;

/// What [`Counters::bad_kind`] means.
#[must_use]
pub const fn bad_kind_text(kind: u32) -> &'static str {
    match kind {
        0 => "nothing",
        BAD_FILL => "a word that is not the fill pattern",
        BAD_STAMP => "a stamp that is damaged or of another page",
        BAD_TORN => "a page whose front and back differ",
        BAD_ORDER => "a counter out of order",
        BAD_SUM => "pages older or newer than the count of the vCPU",
        BAD_LATE => "a late page that is not zero, or not as written",
        _ => "an unknown kind of error",
    }
}

/// A piece of usable RAM. Its pages are numbered range after range; page i belongs to vCPU `i % vcpus`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Range {
    /// Number of its first page.
    pub first: u64,
    /// Guest-physical address of it.
    pub address: u64,
    /// Pages.
    pub pages: u64,
}

/// What the guest found and was told, written at boot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Header {
    /// [`STATS_MAGIC`].
    pub magic: u64,
    /// [`LAYOUT_VERSION`].
    pub version: u32,
    /// 0, [`PHASE_FILLING`], [`PHASE_READY`].
    pub phase: u32,
    /// vCPUs that take part.
    pub vcpus: u32,
    /// [`WORKLOAD_IDLE`] and so on.
    pub workload: u32,
    /// TSC frequency in kHz: the unit of all times here is the TSC cycle.
    pub tsc_khz: u64,
    /// Writes per second and vCPU; 0 = as fast as it can.
    pub rate: u64,
    /// Of pattern, checks and random numbers.
    pub seed: u64,
    /// Pages of usable RAM.
    pub pages: u64,
    /// The first so many are the working set.
    pub ws_pages: u64,
    /// The first so many were filled, working set included.
    pub fill_pages: u64,
    /// The last so many are the late area.
    pub late_pages: u64,
    /// How many of `range` count.
    pub ranges: u32,
    /// Whether the rate is reported on the serial port.
    pub report: u32,
    /// 0.
    pub spare: u64,
    /// Usable RAM.
    pub range: [Range; MAX_RANGES],
}

impl Header {
    /// Guest-physical address of page `index` of usable RAM.
    #[must_use]
    pub fn page_address(&self, index: u64) -> Option<u64> {
        let ranges = self.range.get(..usize::try_from(self.ranges).ok()?)?;
        let range = ranges.iter().find(|r| index >= r.first && index - r.first < r.pages)?;
        range.address.checked_add((index - range.first).checked_mul(PAGE)?)
    }
}

/// What the VMM asks: it changes a word, then adds 1 to the doorbell.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Control {
    /// Goes up with every change.
    pub doorbell: u64,
    /// [`COMMAND_RUN`] or [`COMMAND_QUIESCE`].
    pub command: u32,
    /// Not 0: the late area may be written.
    pub late_go: u32,
    /// A new number asks for a self check; the answer is the same number in [`Counters::check_done`].
    pub check_request: u64,
    /// [`CHECK_UNTOUCHED_LATE`].
    pub check_flags: u64,
    /// A new number resets the gaps; the answer is in [`Counters::reset_done`].
    pub reset_request: u64,
}

/// What one vCPU counts and needs to go on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Counters {
    /// [`STATE_RUNNING`] and so on.
    pub state: u32,
    /// 1 when its share of RAM is filled.
    pub filled: u32,
    /// The doorbell it last looked at.
    pub doorbell_seen: u64,
    /// Writes to the working set since boot.
    pub writes: u64,
    /// Sum of the checks of the latest stamps of its pages of the working set.
    pub stamp_sum: u64,
    /// Next page of the pass (seq).
    pub position: u64,
    /// Counter that this pass writes (seq).
    pub pass: u64,
    /// State of the generator (random).
    pub random: u64,
    /// Next late page it writes.
    pub late_next: u64,
    /// TSC at the end of the last write; 0 = the next write has no gap.
    pub last_tsc: u64,
    /// TSC at which the next write is due (with a rate).
    pub due_tsc: u64,
    /// Longest gap since the reset, in TSC cycles.
    pub max_gap: u64,
    /// Gaps counted since the reset.
    pub gaps: u64,
    /// Number of the last self check done.
    pub check_done: u64,
    /// Pages it looked at.
    pub check_pages: u64,
    /// Errors it found.
    pub check_errors: u64,
    /// Guest-physical address of the first.
    pub bad_address: u64,
    /// What the first was.
    pub bad_kind: u32,
    /// Slot of the ring of rates in use.
    pub slot: u32,
    /// Number of the last reset done.
    pub reset_done: u64,
    /// TSC at which the slot ends.
    pub slot_end: u64,
    /// Self checks done since boot.
    pub checks: u64,
}

/// 10 ms of writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Slot {
    /// TSC of the first write in it; 0 = never used.
    pub start: u64,
    /// Writes in it.
    pub writes: u64,
}

/// Guest-physical address of the [`Counters`] of a vCPU.
#[must_use]
pub const fn counters_address(vcpu: u64) -> u64 {
    STATS_ADDRESS + 0x8000 + vcpu * 0x8000
}

/// Guest-physical address of its histogram of gaps, [`BUCKETS`] words of 8 bytes.
#[must_use]
pub const fn buckets_address(vcpu: u64) -> u64 {
    counters_address(vcpu) + 0x1000
}

/// Guest-physical address of its ring of rates, [`SLOTS`] [`Slot`]s.
#[must_use]
pub const fn slots_address(vcpu: u64) -> u64 {
    counters_address(vcpu) + 0x2000
}

/// The bucket that counts a gap of so many cycles: four to an octave, so a figure read from it is at most 25 % high.
#[must_use]
pub const fn bucket_of(gap: u64) -> usize {
    // At most 251: the casts cannot lose anything.
    #[allow(clippy::cast_possible_truncation)]
    if gap < 4 {
        gap as usize
    } else {
        let octave = 63 - gap.leading_zeros() as usize;
        (octave - 1) * 4 + ((gap >> (octave - 2)) & 3) as usize
    }
}

/// The longest gap that `bucket` counts.
#[must_use]
pub const fn bucket_top(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let octave = bucket / 4 + 1;
    if octave > 63 {
        return u64::MAX;
    }
    let step = 1u64 << (octave - 2);
    (1u64 << octave).wrapping_add((bucket as u64 % 4 + 1).wrapping_mul(step)).wrapping_sub(1)
}

const _: () = {
    assert!(size_of::<Header>() == 288);
    assert!(offset_of!(Header, phase) == 12);
    assert!(offset_of!(Header, workload) == 20);
    assert!(offset_of!(Header, tsc_khz) == 24);
    assert!(offset_of!(Header, rate) == 32);
    assert!(offset_of!(Header, seed) == 40);
    assert!(offset_of!(Header, pages) == 48);
    assert!(offset_of!(Header, ws_pages) == 56);
    assert!(offset_of!(Header, fill_pages) == 64);
    assert!(offset_of!(Header, late_pages) == 72);
    assert!(offset_of!(Header, ranges) == 80);
    assert!(offset_of!(Header, range) == 96);
    assert!(offset_of!(Control, command) == 8);
    assert!(offset_of!(Control, late_go) == 12);
    assert!(offset_of!(Control, check_request) == 16);
    assert!(offset_of!(Control, check_flags) == 24);
    assert!(offset_of!(Control, reset_request) == 32);
    assert!(offset_of!(Counters, doorbell_seen) == 8);
    assert!(offset_of!(Counters, writes) == 16);
    assert!(offset_of!(Counters, stamp_sum) == 24);
    assert!(offset_of!(Counters, position) == 32);
    assert!(offset_of!(Counters, pass) == 40);
    assert!(offset_of!(Counters, random) == 48);
    assert!(offset_of!(Counters, late_next) == 56);
    assert!(offset_of!(Counters, last_tsc) == 64);
    assert!(offset_of!(Counters, due_tsc) == 72);
    assert!(offset_of!(Counters, max_gap) == 80);
    assert!(offset_of!(Counters, gaps) == 88);
    assert!(offset_of!(Counters, check_done) == 96);
    assert!(offset_of!(Counters, check_pages) == 104);
    assert!(offset_of!(Counters, check_errors) == 112);
    assert!(offset_of!(Counters, bad_address) == 120);
    assert!(offset_of!(Counters, bad_kind) == 128);
    assert!(offset_of!(Counters, slot) == 132);
    assert!(offset_of!(Counters, reset_done) == 136);
    assert!(offset_of!(Counters, slot_end) == 144);
    assert!(offset_of!(Counters, checks) == 152);
    assert!(size_of::<Slot>() == 16);
    assert!(counters_address(MAX_VCPUS as u64) <= FIRST_USABLE);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_ends_where_the_next_begins() {
        for bucket in 0..251 {
            assert_eq!(bucket_of(bucket_top(bucket)), bucket);
            assert_eq!(bucket_of(bucket_top(bucket) + 1), bucket + 1);
        }
        assert_eq!(bucket_of(u64::MAX), 251);
        assert_eq!(bucket_top(251), u64::MAX);
    }
}
