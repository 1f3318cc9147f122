//! How far a claim reaches. Policy only: whatever these numbers are, the image is the same.

use crate::units::{HostAddr, PAGE_SIZE, PageId, Run};

/// Bounds and preferences of one snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Limits {
    /// Pages in one pool slot. The default is 16 (64 KiB).
    pub slot_pages: u64,
    /// Slots the scan never takes, so that faults find room, and so that what is scanned is still in the cache when it is written.
    /// At most three quarters of the pool. The engine keeps 48 MiB.
    pub reserve_slots: u64,
    /// Most pages a scan claim takes. The default is 512 (2 MiB): it keeps huge mappings whole, and at 10 GB/s
    /// a writer waits 0.2 ms for one.
    pub scan_pages: u64,
    /// Fewest pages a fault takes, if they are pending: 16 (64 KiB). Releasing 64 KiB costs 1.7 us more than releasing
    /// 4 KiB, a fault costs 50 to 90 us.
    pub around_min: u64,
    /// Most pages a fault takes: the stall budget. The default is 512 (2 MiB): 0.25 ms of copying and unprotecting at
    /// worst.
    pub around_max: u64,
    /// What to do when a writer waits and no slot is free.
    pub when_full: WhenFull,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            slot_pages: 16,
            reserve_slots: 256,
            scan_pages: 512,
            around_min: 16,
            around_max: 512,
            when_full: WhenFull::Stall,
        }
    }
}

/// What to do when a writer waits for a page and the pool has no slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum WhenFull {
    /// The writer waits until the image writer has freed a slot.
    #[default]
    Stall,
    /// The snapshot is cancelled, the writer goes on at once.
    Cancel,
}

/// How far a fault takes its neighbours along.
///
/// It grows while faults come one after the other, and shrinks when they come one by one. Core has no clock: the
/// embedder says when there was a lull between two faults.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct FaultAround {
    pages: u64,
    lull: bool,
}

impl FaultAround {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self { pages: limits.around_min, lull: true }
    }

    /// For a while nobody faulted.
    pub(crate) fn lull(&mut self) {
        self.lull = true;
    }

    #[cfg(test)]
    pub(crate) fn is_lull(&self) -> bool {
        self.lull
    }

    /// A fault is about to be claimed: how many pages around it.
    pub(crate) fn faulted(&mut self, limits: &Limits) -> u64 {
        let pages = if self.lull { self.pages / 2 } else { self.pages.saturating_mul(2) };
        self.pages = pages.clamp(limits.around_min.max(1), limits.around_max.max(limits.around_min).max(1));
        self.lull = false;
        self.pages
    }
}

/// The window of `want` pages (rounded up to a power of two), aligned in host address space so that a window of 2 MiB
/// is one huge page, that holds `page`; cut to its block.
pub(crate) fn window(page: PageId, want: u64, host: HostAddr, block: Run) -> Run {
    let size = want.checked_next_power_of_two().unwrap_or(1 << 63);
    let base = host.0 / PAGE_SIZE;
    let start = (base + (page.0 - block.first.0)) & !(size - 1);
    let from = start.saturating_sub(base);
    let to = (start.saturating_add(size) - base).min(block.pages);
    Run::new(PageId(block.first.0 + from), to - from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_grows_under_a_storm_and_shrinks_after_it() {
        let limits = Limits::default();
        let mut around = FaultAround::new(&limits);
        assert_eq!(around.faulted(&limits), 16, "an isolated fault takes 64 KiB");
        let grown: std::vec::Vec<u64> = (0..7).map(|_| around.faulted(&limits)).collect();
        assert_eq!(grown, [32, 64, 128, 256, 512, 512, 512]);
        for expected in [256, 128, 64, 32, 16, 16] {
            around.lull();
            assert_eq!(around.faulted(&limits), expected);
        }
    }

    #[test]
    fn absurd_limits_still_give_at_least_a_page() {
        let limits = Limits { around_min: 0, around_max: 0, ..Limits::default() };
        assert_eq!(FaultAround::new(&limits).faulted(&limits), 1);
        let limits = Limits { around_min: 64, around_max: 1, ..Limits::default() };
        assert_eq!(FaultAround::new(&limits).faulted(&limits), 64);
    }
}
