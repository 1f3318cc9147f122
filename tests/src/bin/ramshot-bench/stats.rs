//! The guest's own statistics, read the same way whoever runs the guest: straight from its RAM.

use std::collections::BTreeMap;
use std::error::Error;
use std::mem::offset_of;
use std::time::{Duration, Instant};

use ramshot_images::layout::{
    BUCKETS, CONTROL_ADDRESS, Control, Counters, Header, SLOTS, STATS_ADDRESS, STATS_MAGIC, Slot, bucket_top,
    buckets_address, counters_address, slots_address,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::num::{cycles_ms, float};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// From which gap on a write counts as held up by a fault that somebody had to serve. A write takes well under 1 us. A
/// second-level fault, which KVM serves alone (the first write to a page after its release), takes some 5 to 15 us on a
/// nested host. A fault that a thread serves takes 40 to 100.
pub(crate) const STALL_US: f64 = 25.0;
/// From which gap on it was at least a second-level fault.
pub(crate) const SHORT_US: f64 = 2.0;

/// Guest RAM from outside, by guest-physical address.
pub(crate) trait GuestMemory {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()>;
    fn write(&self, at: u64, from: &[u8]) -> Result<()>;
}

impl GuestMemory for ramshot_tests::Memory {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        Ok(Self::read(self, at, into)?)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<()> {
        Ok(Self::write(self, at, from)?)
    }
}

/// The statistics of vCPU 0 (there is no other), and the bell to ring.
pub(crate) struct Stats<'a> {
    memory: &'a dyn GuestMemory,
    khz: u64,
}

impl<'a> Stats<'a> {
    /// Of a guest that has booted; `None` if it has not yet.
    pub(crate) fn new(memory: &'a dyn GuestMemory) -> Result<Option<Self>> {
        let header: Header = read(memory, STATS_ADDRESS)?;
        let ready = header.magic == STATS_MAGIC && header.phase == ramshot_images::layout::PHASE_READY;
        Ok(ready.then_some(Self { memory, khz: header.tsc_khz }))
    }

    pub(crate) fn counters(&self) -> Result<Counters> {
        read(self.memory, counters_address(0))
    }

    pub(crate) fn writes(&self) -> Result<u64> {
        Ok(self.counters()?.writes)
    }

    /// Asks for the histogram to start afresh. It does as soon as the guest runs.
    pub(crate) fn ask_reset(&self) -> Result<u64> {
        let mut control: Control = read(self.memory, CONTROL_ADDRESS)?;
        control.reset_request += 1;
        let bytes = control.as_bytes();
        self.memory.write(CONTROL_ADDRESS + 8, bytes.get(8..).unwrap_or_default())?;
        control.doorbell += 1;
        self.memory.write(CONTROL_ADDRESS, &control.doorbell.to_ne_bytes())?;
        Ok(control.reset_request)
    }

    /// Has the histogram start afresh and waits until it has.
    pub(crate) fn reset(&self) -> Result<()> {
        let request = self.ask_reset()?;
        let start = Instant::now();
        while self.counters()?.reset_done != request {
            if start.elapsed() > Duration::from_secs(10) {
                return Err("the guest does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// For a paused guest: the next write begins a new piece of history, whose start then is the time of that write.
    pub(crate) fn cut_history(&self) -> Result<()> {
        let at = counters_address(0) + u64::try_from(offset_of!(Counters, slot_end))?;
        self.memory.write(at, &0u64.to_ne_bytes())
    }

    pub(crate) fn gaps(&self) -> Result<Gaps> {
        let buckets: [u64; BUCKETS] = read(self.memory, buckets_address(0))?;
        Ok(Gaps { buckets, max: self.counters()?.max_gap, khz: self.khz })
    }

    /// Adds what the guest remembers (10 s) to `history`.
    pub(crate) fn collect(&self, history: &mut History) -> Result<()> {
        let slots: [Slot; SLOTS] = read(self.memory, slots_address(0))?;
        history.khz = self.khz;
        history.slots.extend(slots.iter().filter(|slot| slot.start != 0).map(|slot| (slot.start, slot.writes)));
        Ok(())
    }

    /// Writes a second, over the `window` that begins now.
    pub(crate) fn rate(&self, window: Duration) -> Result<f64> {
        let (start, before) = (Instant::now(), self.writes()?);
        std::thread::sleep(window);
        let writes = self.writes()? - before;
        Ok(float(writes) / start.elapsed().as_secs_f64())
    }

    /// The rate before a snapshot, and how much it changed by itself from the first half to the second, in percent.
    /// A guest that is meant to write and does not (its vCPU gets no CPU) has no rate to compare with: watched again.
    pub(crate) fn rate_before(&self, window: Duration, idle: bool) -> Result<(f64, f64)> {
        for _ in 0..10 {
            let (first, second) = (self.rate(window / 2)?, self.rate(window / 2)?);
            if first > 0.0 && second > 0.0 {
                return Ok((f64::midpoint(first, second), (second / first - 1.0) * 100.0));
            }
            if idle {
                return Ok((0.0, 0.0));
            }
        }
        Err("the guest does not write".into())
    }

    pub(crate) const fn khz(&self) -> u64 {
        self.khz
    }
}

fn read<T: FromZeros + FromBytes + IntoBytes>(memory: &dyn GuestMemory, at: u64) -> Result<T> {
    let mut value = T::new_zeroed();
    memory.read(at, value.as_mut_bytes())?;
    Ok(value)
}

/// Histogram of the gaps between the guest's writes.
pub(crate) struct Gaps {
    buckets: [u64; BUCKETS],
    max: u64,
    khz: u64,
}

impl Gaps {
    /// How many gaps were longer than `above` microseconds.
    pub(crate) fn count(&self, above: f64) -> u64 {
        self.above(above).map(|(_, _, n)| n).sum()
    }

    /// Milliseconds that the gaps between `from` and `to` microseconds add up to, each taken as the middle of its bucket.
    pub(crate) fn sum_ms(&self, from: f64, to: f64) -> f64 {
        let within = self.above(from).filter(|&(bottom, ..)| bottom < to);
        within.map(|(bottom, top, n)| f64::midpoint(bottom, top.min(self.max_us())) * float(n)).sum::<f64>() / 1e3
    }

    /// The longest, in microseconds.
    pub(crate) fn max_us(&self) -> f64 {
        self.us(self.max)
    }

    /// Of those longer than `above` microseconds, the one that `percent` do not exceed; interpolated inside its bucket,
    /// which is 25 % wide. `None` if there are none.
    pub(crate) fn percentile_us(&self, percent: f64, above: f64) -> Option<f64> {
        let wanted = float(self.count(above)) * percent / 100.0;
        let mut below = 0.0;
        for (bottom, top, n) in self.above(above) {
            let n = float(n);
            if n > 0.0 && below + n >= wanted {
                let within = ((wanted - below) / n).clamp(0.0, 1.0);
                return Some((bottom + (top - bottom) * within).min(self.max_us()));
            }
            below += n;
        }
        None
    }

    /// Buckets that begin above `above` us: bottom, top, gaps.
    fn above(&self, above: f64) -> impl Iterator<Item = (f64, f64, u64)> + '_ {
        self.buckets.iter().enumerate().filter_map(move |(bucket, &n)| {
            let bottom = if bucket == 0 { 0.0 } else { self.us(bucket_top(bucket - 1)) };
            (bottom >= above).then(|| (bottom, self.us(bucket_top(bucket)), n))
        })
    }

    fn us(&self, cycles: u64) -> f64 {
        cycles_ms(cycles, self.khz) * 1e3
    }
}

/// Writes over time: TSC of the first write of a piece (10 ms, or longer if there was none) to writes in it.
#[derive(Clone, Default, Debug)]
pub(crate) struct History {
    pub(crate) slots: BTreeMap<u64, u64>,
    pub(crate) khz: u64,
}

impl History {
    /// Seconds after `zero` (TSC) at which a piece began and ended, and writes a second in it. The last piece, which is
    /// not over, is left out.
    pub(crate) fn rates(&self, zero: u64) -> Vec<(f64, f64, f64)> {
        let at = |tsc: u64| {
            let ms = if tsc >= zero { cycles_ms(tsc - zero, self.khz) } else { -cycles_ms(zero - tsc, self.khz) };
            ms / 1e3
        };
        let pieces = self.slots.iter().zip(self.slots.keys().skip(1));
        pieces.map(|((&start, &n), &end)| (at(start), at(end), float(n) / (at(end) - at(start)))).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ramshot_images::layout::bucket_of;

    use super::*;

    #[test]
    fn percentiles_are_of_stalls_alone() {
        // 1 GHz: a cycle is 1 ns.
        let mut gaps = Gaps { buckets: [0; BUCKETS], max: 90_000, khz: 1_000_000 };
        gaps.buckets[bucket_of(100)] = 1_000_000;
        gaps.buckets[bucket_of(80_000)] = 10;
        assert_eq!(gaps.count(STALL_US), 10);
        let p50 = gaps.percentile_us(50.0, STALL_US).unwrap();
        assert!((70.0..90.0).contains(&p50), "{p50}");
        assert!(gaps.percentile_us(50.0, 0.0).unwrap() < 0.2);
        assert!(gaps.percentile_us(50.0, 1e6).is_none());
    }

    #[test]
    fn history_has_the_rate_of_each_piece() {
        let slots = BTreeMap::from([(1_000, 5), (2_000, 10), (4_000, 1)]);
        let history = History { slots, khz: 1 };
        assert_eq!(history.rates(2_000), [(-1.0, 0.0, 5.0), (0.0, 2.0, 5.0)]);
    }
}
