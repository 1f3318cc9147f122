//! What a snapshot would have cost in the other modes, by what it has seen of the guest.

use std::time::Duration;

use crate::report::Report;

/// What a first write to a page costs the guest while a dirty log is on: 4 to 5 us with KVM's (docs/PERFORMANCE.md).
const LOGGED_WRITE: Duration = Duration::from_nanos(4500);
/// What protecting a page of 4 KiB costs: 15 to 20 ms per GiB.
const PROTECTED_PAGE: Duration = Duration::from_nanos(70);

/// The price of a snapshot in one mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// How long no vCPU runs.
    pub pause: Duration,
    /// How long vCPUs wait outside the pause, all added up: for pages that are captured, and for the dirty log. What we see of
    /// it: the wake-ups, 50 to 90 us a fault, come on top.
    pub waiting: Duration,
    /// Pages copied.
    pub pages: u64,
}

/// What one snapshot costs in each mode. That of the mode in which it was made is measured, but for the dirty log; the others
/// are estimates, good for a choice between them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Costs {
    /// The VM stopped until the image is complete.
    pub stopped: Cost,
    /// Copied after T0, while the VM runs: what [`prepare`](crate::prepare) does.
    pub background: Cost,
    /// Copied ahead of T0 ([`Prepared::precopy`](crate::Prepared::precopy)). Estimated with one draft, after which is copied
    /// once more what this snapshot captured by faults.
    pub precopy: Cost,
}

impl Report {
    /// What this snapshot, of this guest doing what it did, costs in each mode.
    #[must_use]
    pub fn costs(&self) -> Costs {
        let drafted = self.drafts.passes > 0;
        let all = if drafted { self.drafts.first_pages } else { self.counts.total };
        let copied = self.drafts.pages + self.counts.total;
        let copying = self.drafts.took + self.total;
        // Per mille, so that nothing overflows.
        let share = u32::try_from((all * 1000).checked_div(copied).unwrap_or(1000)).unwrap_or(1000);
        let without_arming = self.begin.saturating_sub(self.arm);
        let waiting = self.fault_service.total();
        let again = if drafted { copied.saturating_sub(all) } else { self.counts.by_fault };
        let pause = if drafted { self.begin } else { without_arming + times(PROTECTED_PAGE, again) };
        Costs {
            stopped: Cost { pause: without_arming + copying / 1000 * share, waiting: Duration::ZERO, pages: all },
            background: Cost { pause: self.begin, waiting, pages: all },
            precopy: Cost { pause, waiting: waiting + times(LOGGED_WRITE, again), pages: all + again },
        }
    }
}

fn times(duration: Duration, count: u64) -> Duration {
    duration.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::SystemTime;

    use ramshot_core::Counts;

    use super::*;
    use crate::report::{Drafts, Latencies};
    use crate::sink::Committed;

    const MS: Duration = Duration::from_millis(1);

    fn report(total: u64, by_fault: u64, drafts: Drafts) -> Report {
        let mut fault_service = Latencies::default();
        (0..10).for_each(|_| fault_service.record(MS));
        Report {
            t0: SystemTime::UNIX_EPOCH,
            begin: 3 * MS,
            arm: 2 * MS,
            capture: 80 * MS,
            total: 100 * MS,
            counts: Counts { total, released: total, by_fault, ..Counts::default() },
            drafts,
            pages_zero: 0,
            image: Committed { image_bytes: 0, written_bytes: 0, snapshot: None },
            fault_service,
            foreign_faults: 0,
        }
    }

    #[test]
    fn of_a_background_snapshot() {
        let costs = report(1000, 200, Drafts::default()).costs();
        assert_eq!(costs.background, Cost { pause: 3 * MS, waiting: 10 * MS, pages: 1000 });
        assert_eq!(costs.stopped, Cost { pause: 101 * MS, waiting: Duration::ZERO, pages: 1000 });
        assert_eq!(costs.precopy.pages, 1200);
        assert_eq!(costs.precopy.pause, MS + 200 * PROTECTED_PAGE);
        assert_eq!(costs.precopy.waiting, 10 * MS + 200 * LOGGED_WRITE);
    }

    #[test]
    fn of_a_pre_copy() {
        let drafts = Drafts { passes: 2, pages: 1500, first_pages: 1000, took: 300 * MS };
        let costs = report(500, 100, drafts).costs();
        assert_eq!(costs.precopy, Cost { pause: 3 * MS, waiting: 10 * MS + 1000 * LOGGED_WRITE, pages: 2000 });
        // 2000 pages took 400 ms.
        assert_eq!(costs.stopped, Cost { pause: 201 * MS, waiting: Duration::ZERO, pages: 1000 });
        assert_eq!(costs.background.pages, 1000);
    }

    #[test]
    fn of_nothing() {
        let costs = report(0, 0, Drafts::default()).costs();
        assert_eq!((costs.precopy.pages, costs.background.pages), (0, 0));
        let many = report(u64::MAX / 2000, u64::MAX / 2000, Drafts::default()).costs();
        assert_eq!(many.precopy.pages, u64::MAX / 2000 * 2);
    }
}
