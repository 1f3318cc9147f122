//! Mappings that change all the time, and releases that must get through nevertheless.
//!
//! While any thread is inside `madvise(MADV_DONTNEED)`, `munmap` or `mremap` on registered memory, the kernel answers
//! WRITEPROTECT with EAGAIN. It is over when the thread goes on, a few microseconds; but a thread that discards page
//! after page (a balloon being inflated) is inside again at once, and where the scheduler has it share a processor with the
//! thread that reads events, neither ever sees the gap between two calls: measured, a writer was kept waiting for more
//! than 10 s, until the discards ended. So after [`BEARABLE`] a release does without WRITEPROTECT.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ramshot_core::HostRange;

use crate::maps::intersection;

/// How long nothing but EAGAIN is borne: far longer than one change takes, and short for a guest.
const BEARABLE: Duration = Duration::from_millis(2);

/// Whether EAGAIN has become a storm, and what was given up in it.
#[derive(Debug)]
pub(crate) struct Storm {
    epoch: Instant,
    /// Nanoseconds after `epoch` of the first EAGAIN after the last success, plus one; 0: the last was a success.
    since: AtomicU64,
    given_up: Mutex<Vec<HostRange>>,
}

impl Storm {
    pub(crate) fn new() -> Self {
        Self { epoch: Instant::now(), since: AtomicU64::new(0), given_up: Mutex::new(Vec::new()) }
    }

    /// A call got through.
    pub(crate) fn calm(&self) {
        if self.since.load(Ordering::Relaxed) != 0 {
            self.since.store(0, Ordering::Relaxed);
        }
    }

    /// A call was answered EAGAIN: whether that has been so for too long.
    pub(crate) fn is_unbearable(&self) -> bool {
        let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        match self.since.compare_exchange(0, now.saturating_add(1), Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => false,
            Err(since) => Duration::from_nanos(now.saturating_sub(since)) >= BEARABLE,
        }
    }

    /// `range` was unregistered to get a release through.
    pub(crate) fn give_up(&self, range: HostRange) {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner).push(range);
    }

    /// What was given up in `range`, given up no longer.
    pub(crate) fn take_back(&self, range: HostRange) -> Vec<HostRange> {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        given_up.extract_if(.., |gone| gone.overlaps(range)).collect()
    }

    /// The parts of `range` that were not given up; `None` if that is all of it.
    pub(crate) fn without_given_up(&self, range: HostRange) -> Option<Vec<HostRange>> {
        let given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parts = vec![range];
        for &gone in given_up.iter() {
            parts = parts.into_iter().flat_map(|part| cut(part, gone)).flatten().collect();
        }
        (parts != [range]).then_some(parts)
    }
}

/// What is left of `range` before and behind `gone`.
pub(crate) fn cut(range: HostRange, gone: HostRange) -> [Option<HostRange>; 2] {
    let Some(common) = intersection(range, gone) else { return [Some(range), None] };
    let (before, behind) = (common.start.0 - range.start.0, range.end().0 - common.end().0);
    let part = |start, len| (len > 0).then_some(HostRange::new(start, len));
    [part(range.start, before), part(common.end(), behind)]
}

#[cfg(test)]
mod tests {
    use ramshot_core::HostAddr;

    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::new(HostAddr(start), end - start)
    }

    #[test]
    fn ranges_are_cut() {
        assert_eq!(cut(range(4, 8), range(0, 4)), [Some(range(4, 8)), None]);
        assert_eq!(cut(range(4, 8), range(5, 6)), [Some(range(4, 5)), Some(range(6, 8))]);
        assert_eq!(cut(range(4, 8), range(0, 6)), [None, Some(range(6, 8))]);
        assert_eq!(cut(range(4, 8), range(0, 9)), [None, None]);
    }

    #[test]
    fn what_was_given_up_is_left_out() {
        let storm = Storm::new();
        assert_eq!(storm.without_given_up(range(0, 9)), None);
        storm.give_up(range(2, 3));
        storm.give_up(range(6, 8));
        assert_eq!(storm.without_given_up(range(0, 9)), Some(vec![range(0, 2), range(3, 6), range(8, 9)]));
        assert_eq!(storm.without_given_up(range(6, 7)), Some(vec![]));
        assert_eq!(storm.without_given_up(range(3, 6)), None);
        assert_eq!(storm.take_back(range(0, 3)), [range(2, 3)]);
        assert_eq!(storm.without_given_up(range(0, 6)), None);
        assert_eq!(storm.take_back(range(7, 9)), [range(6, 8)]);
    }

    #[test]
    fn a_storm_is_ended_by_one_success() {
        let storm = Storm::new();
        assert!(!storm.is_unbearable());
        std::thread::sleep(BEARABLE);
        assert!(storm.is_unbearable());
        storm.calm();
        assert!(!storm.is_unbearable());
    }
}
