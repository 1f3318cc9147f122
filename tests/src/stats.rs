//! What the guest counted, in units a person reads.

use std::time::Duration;

use ramshot_images::layout::{BUCKETS, Counters, Header, SLOTS, Slot, bucket_top};

/// Everything the guest counted.
#[derive(Clone, Debug)]
pub struct GuestStats {
    /// Writes to the working set since boot.
    pub writes: u64,
    /// Pages of the late area written.
    pub late_writes: u64,
    /// Gaps between the writes of one vCPU, of all vCPUs.
    pub gaps: Gaps,
    /// vCPU by vCPU.
    pub vcpus: Vec<VcpuStats>,
}

/// What one vCPU counted.
#[derive(Clone, Debug)]
pub struct VcpuStats {
    /// Writes to the working set since boot.
    pub writes: u64,
    /// Pages of the late area written.
    pub late_writes: u64,
    /// Gaps between its writes.
    pub gaps: Gaps,
    /// Writes over time, oldest first, 10 ms each (or more, if it did not write for longer); about 10 s are kept.
    pub history: Vec<RateSlot>,
}

/// A piece of the history of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RateSlot {
    /// When it began, on the guest's clock (TSC).
    pub start: Duration,
    /// Writes in the 10 ms from then.
    pub writes: u64,
}

impl VcpuStats {
    pub(crate) fn new(header: &Header, vcpu: u64, c: &Counters, gaps: Gaps, slots: &[Slot; SLOTS]) -> Self {
        let vcpus = u64::from(header.vcpus).max(1);
        let late_first = header.pages - header.late_pages;
        let first = late_first + (vcpu + vcpus - late_first % vcpus) % vcpus;
        let mut history: Vec<RateSlot> = slots
            .iter()
            .filter(|slot| slot.start != 0)
            .map(|slot| RateSlot { start: cycles_to_time(slot.start, header.tsc_khz), writes: slot.writes })
            .collect();
        history.sort_by_key(|slot| slot.start);
        Self { writes: c.writes, late_writes: c.late_next.saturating_sub(first) / vcpus, gaps, history }
    }
}

fn cycles_to_time(cycles: u64, khz: u64) -> Duration {
    let nanos = u128::from(cycles) * 1_000_000 / u128::from(khz.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// How long writes were apart: a histogram, and the longest. A gap counts from the end of the write before, or from
/// when the write was due (with a rate) if that is later: waiting on purpose is no gap.
#[derive(Clone, Debug)]
pub struct Gaps {
    buckets: [u64; BUCKETS],
    max: u64,
    khz: u64,
}

impl Gaps {
    pub(crate) const fn new(khz: u64) -> Self {
        Self { buckets: [0; BUCKETS], max: 0, khz }
    }

    pub(crate) fn add(&mut self, buckets: &[u64; BUCKETS], max: u64) {
        for (mine, theirs) in self.buckets.iter_mut().zip(buckets) {
            *mine += theirs;
        }
        self.max = self.max.max(max);
    }

    /// Gaps counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        cycles_to_time(self.max, self.khz)
    }

    /// The gap that `per_mille` of 1000 gaps do not exceed; up to 25 % high, never more than the longest.
    #[must_use]
    pub fn per_mille(&self, per_mille: u64) -> Duration {
        let count = u128::from(self.count());
        let mut seen = 0;
        for (bucket, &gaps) in self.buckets.iter().enumerate() {
            seen += u128::from(gaps);
            if gaps > 0 && seen * 1000 >= count * u128::from(per_mille) {
                return cycles_to_time(bucket_top(bucket).min(self.max), self.khz);
            }
        }
        Duration::ZERO
    }

    /// Half of the gaps are shorter.
    #[must_use]
    pub fn p50(&self) -> Duration {
        self.per_mille(500)
    }

    /// 99 % are shorter.
    #[must_use]
    pub fn p99(&self) -> Duration {
        self.per_mille(990)
    }

    /// 99.9 % are shorter.
    #[must_use]
    pub fn p999(&self) -> Duration {
        self.per_mille(999)
    }

    /// How many gaps were longer than `than`, counted by bucket: those that share its bucket are not among them.
    #[must_use]
    pub fn longer_than(&self, than: Duration) -> u64 {
        let longer = |&(bucket, _): &(usize, &u64)| {
            let bottom = if bucket == 0 { 0 } else { bucket_top(bucket - 1) };
            cycles_to_time(bottom, self.khz) > than
        };
        self.buckets.iter().enumerate().filter(longer).map(|(_, gaps)| gaps).sum()
    }
}
