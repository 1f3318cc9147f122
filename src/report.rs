//! What a snapshot says of itself, while it runs and afterwards.

use std::time::{Duration, SystemTime};

use ramshot_core::Counts;

use crate::sink::Committed;

/// How far a snapshot is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Pages that belong to the snapshot.
    pub pages_total: u64,
    /// Pages captured and released: the guest writes there freely again.
    pub pages_captured: u64,
    /// Of those, captured because a writer waited.
    pub pages_by_fault: u64,
    /// Write faults so far.
    pub write_faults: u64,
    /// Whether every page is captured; writing the image may go on.
    pub captured: bool,
    /// Whether the snapshot has ended without an image. `finish` says why.
    pub ended: bool,
}

/// What pre-copy did before T0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Drafts {
    /// How often pages were copied while the guest ran; 0 without pre-copy.
    pub passes: u32,
    /// Pages copied, all drafts together.
    pub pages: u64,
    /// Pages that the first one copied.
    pub first_pages: u64,
    /// How long it took.
    pub took: Duration,
}

/// A finished snapshot, in figures.
#[derive(Clone, Debug)]
pub struct Report {
    /// The moment whose memory the image shows, whatever the mode: when `begin` was called, with the VM stopped.
    pub t0: SystemTime,
    /// The whole call of `begin`: what the engine adds to the pause.
    pub begin: Duration,
    /// The part of it that found and protected the pages.
    pub arm: Duration,
    /// From `begin` to the last page released.
    pub capture: Duration,
    /// From `begin` to the image committed. (`finish` returns when the registration has ended, too: 25 to 60 ms per GiB that is mapped
    /// by small pages, from the last page released on.)
    pub total: Duration,
    /// Pages and faults.
    pub counts: Counts,
    /// What was copied before T0 (pre-copy).
    pub drafts: Drafts,
    /// Pages captured that were all zeros.
    pub pages_zero: u64,
    /// Size of the image and what was written of it.
    pub image: Committed,
    /// From a fault read by us to its writer released, copying included. The wake-up before and after is not seen here:
    /// the guest sees about 50 to 90 us more.
    pub fault_service: Latencies,
    /// Faults at addresses of no RAM block (released at once, logged).
    pub foreign_faults: u64,
}

/// A histogram of durations: buckets of an eighth of an octave, from 1 us to 2^32 us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Latencies {
    buckets: Vec<u64>,
    count: u64,
    max_us: u64,
    total: Duration,
}

const SUB: u64 = 8;

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: vec![0; 32 * 8], count: 0, max_us: 0, total: Duration::ZERO }
    }
}

impl Latencies {
    /// Adds one.
    pub fn record(&mut self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get_mut(Self::bucket(us)) {
            *bucket += 1;
        }
        self.count += 1;
        self.max_us = self.max_us.max(us);
        self.total = self.total.saturating_add(duration);
    }

    /// All of them added up.
    #[must_use]
    pub const fn total(&self) -> Duration {
        self.total
    }

    /// How many were recorded.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The longest, in microseconds.
    #[must_use]
    pub const fn max_us(&self) -> u64 {
        self.max_us
    }

    /// The duration in microseconds that `percent` of all do not exceed (the upper edge of its bucket, at most 13 %
    /// too high); 0 if there are none.
    #[must_use]
    pub fn percentile_us(&self, percent: f64) -> u64 {
        let mut below = 0;
        for (index, &bucket) in self.buckets.iter().enumerate() {
            below += bucket;
            // Counts are far below 2^52.
            #[allow(clippy::cast_precision_loss)]
            if bucket > 0 && below as f64 * 100.0 >= self.count as f64 * percent {
                return Self::upper_edge(index as u64).min(self.max_us);
            }
        }
        self.max_us
    }

    fn bucket(us: u64) -> usize {
        let us = us.clamp(1, (1 << 32) - 1);
        let octave = u64::from(us.ilog2());
        // Below 8 us an octave has fewer whole numbers than sub-buckets: some stay empty.
        let sub = ((us << 3) >> octave) - SUB;
        usize::try_from(octave * SUB + sub).unwrap_or(usize::MAX)
    }

    fn upper_edge(bucket: u64) -> u64 {
        let (octave, sub) = (bucket / SUB, bucket % SUB);
        (((SUB + sub + 1) << octave) >> 3).max(1)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_an_eighth_of_an_octave() {
        let mut latencies = Latencies::default();
        (1..=1000).for_each(|us| latencies.record(Duration::from_micros(us)));
        for (percent, exact) in [(50.0, 500), (99.0, 990), (100.0, 1000)] {
            let got = latencies.percentile_us(percent);
            assert!(got >= exact && got <= exact + exact / 7, "{percent}%: {got}");
        }
        assert_eq!((latencies.count(), latencies.max_us()), (1000, 1000));
    }

    #[test]
    fn extremes_are_counted() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.percentile_us(99.0), 0);
        latencies.record(Duration::ZERO);
        latencies.record(Duration::MAX);
        assert_eq!(latencies.count(), 2);
        assert!(latencies.percentile_us(1.0) <= 2);
    }
}
