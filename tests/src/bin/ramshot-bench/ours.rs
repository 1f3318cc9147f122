//! One snapshot by ramshot, as the guest and the machine saw it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::{DirtyTracking, GuestRam, Pending};
use ramshot_tests::{Accel, Backing, Guest, Memory, new_guest};

use crate::case::Boot;
use crate::machine::{self, CpuMeter, MemoryMeter};
use crate::metric::Sample;
use crate::num::{cycles_ms, float, mib, millis};
use crate::options::Load;
use crate::stats::{Gaps, History, Result, SHORT_US, STALL_US, Stats};

/// How long the guest's rate is watched before and after a snapshot.
pub(crate) const WATCH: Duration = Duration::from_millis(600);
/// Lost work is counted until so long after the image is complete.
pub(crate) const TAIL: Duration = Duration::from_millis(100);
/// Most drafts of a pre-copy.
const PASSES: u32 = 3;
/// Bytes of a pool slot, where host pages are of 4 KiB.
const SLOT: u64 = 64 << 10;

/// The guest's rate over time, around one snapshot.
#[derive(Clone)]
pub(crate) struct Trace {
    pub(crate) history: History,
    /// T0, on the guest's clock.
    pub(crate) zero: u64,
    /// Milliseconds from T0 to the image complete.
    pub(crate) total_ms: f64,
    /// Writes a second before.
    pub(crate) before: f64,
}

/// A guest of ours, booted.
pub(crate) struct OurGuest {
    // Let go before the guest, whose memory otherwise stays mapped.
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) guest: Box<dyn Guest>,
    pub(crate) ranges: Vec<Range<u64>>,
    thp: bool,
    idle: bool,
    arm_ahead: bool,
    /// For pre-copy.
    dirty: Option<Arc<DirtyTracking>>,
}

impl OurGuest {
    /// Boots it; its snapshots protect memory ahead of the pause if `arm_ahead`, or are made by pre-copy.
    pub(crate) fn boot(boot: &Boot, arm_ahead: bool, precopy: bool) -> Result<Self> {
        let memory = Memory::new(boot.mem, boot.backing)?;
        let ranges = memory.regions().iter().map(|region| region.host..region.host + region.len).collect();
        let guest = new_guest(Accel::Kvm, memory, boot.config())?;
        guest.start()?;
        let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(guest.memory().guest()))?);
        let dirty = match precopy {
            true => Some(DirtyTracking::start(ram.table(), guest.dirty_logs()?)?),
            false => None,
        };
        let (thp, idle) = (boot.backing == Backing::Thp, boot.load == Load::Idle);
        Ok(Self { guest, ram, ranges, thp, idle, arm_ahead, dirty })
    }

    pub(crate) fn stats(&self) -> Result<Stats<'_>> {
        Stats::new(self.guest.memory().as_ref())?.ok_or_else(|| "the guest has not booted".into())
    }

    fn huge(&self) -> Result<Option<f64>> {
        self.thp.then(|| Ok(mib(machine::huge_pages(std::process::id(), &self.ranges)?))).transpose()
    }

    /// Takes one, into a fresh file.
    pub(crate) fn snapshot(&self, path: &Path, options: &ramshot::Options) -> Result<(Sample, Trace)> {
        if self.thp {
            machine::collapse(std::process::id(), &self.ranges);
        }
        let guest = self.guest.as_ref();
        let stats = self.stats()?;
        let mut sample = Sample::new();
        sample.insert("load", machine::load());
        put(&mut sample, "huge_before_mib", self.huge()?);
        let (before, drift) = stats.rate_before(WATCH, self.idle)?;
        let mut history = History::default();

        machine::make_way(path)?;
        if !self.idle {
            stats.reset()?;
        }
        let memory = MemoryMeter::start()?;
        let cpu = CpuMeter::start()?;
        let (preparing, at_start) = (Instant::now(), stats.counters()?);
        let options = ramshot::Options { dirty: self.dirty.clone(), ..options.clone() };
        let prepared = ramshot::prepare(&self.ram, path, &options)?;
        let prepared = if self.dirty.is_some() { prepared.precopy(PASSES)? } else { prepared };
        let prepared = if self.arm_ahead { prepared.arm_ahead()? } else { prepared };
        let pending = if self.dirty.is_some() { Pending::Dirty } else { Pending::All };
        let prepare = preparing.elapsed();

        let stopping = Instant::now();
        guest.pause()?;
        let stopped = stopping.elapsed();
        // The bench's own doing, not part of the pause.
        stats.collect(&mut history)?;
        let arming = stats.gaps()?;
        stats.ask_reset()?;
        stats.cut_history()?;
        let at_t0 = stats.counters()?;
        let beginning = Instant::now();
        let begun = guest.save_state().map(|state| prepared.begin(pending, state));
        guest.resume()?;
        let pause = stopped + beginning.elapsed();

        let report = begun??.finish()?;
        let (ended, during) = (beginning.elapsed(), stats.writes()?);
        let gaps = stats.gaps()?;
        sample.insert("cpu_ms", millis(cpu.used()?));
        sample.insert("memory_peak_mib", mib(memory.peak()?));
        std::thread::sleep(TAIL);
        let (window, writes) = (preparing.elapsed(), stats.writes()? - at_start.writes);
        sample.insert("rate_after", stats.rate(WATCH)?);
        put(&mut sample, "huge_after_mib", self.huge()?);
        stats.collect(&mut history)?;

        let total = stopped + report.total;
        sample.insert("prepare_ms", millis(prepare));
        sample.insert("pause_ms", millis(pause));
        sample.insert("arm_ms", millis(report.arm));
        sample.insert("begin_ms", millis(report.begin));
        sample.insert("capture_ms", millis(report.capture));
        sample.insert("total_ms", millis(total));
        sample.insert("gb_per_s", float(report.counts.total * ramshot::core::PAGE_SIZE) / total.as_secs_f64() / 1e9);
        sample.insert("faults", float(report.counts.faults));
        sample.insert("pages_by_fault", float(report.counts.by_fault));
        sample.insert("pool_peak_mib", mib(report.counts.slots_peak * SLOT));
        sample.insert("service_p50_us", float(report.fault_service.percentile_us(50.0)));
        sample.insert("service_p99_us", float(report.fault_service.percentile_us(99.0)));
        sample.insert("service_max_us", float(report.fault_service.max_us()));
        if self.idle {
            sample.remove("rate_after");
        } else {
            sample.insert("rate_before", before);
            sample.insert("drift_percent", drift);
            sample.insert("rate_during", float(during - at_t0.writes) / ended.as_secs_f64());
            sample.insert("lost_ms", lost(window, writes, before));
            stalls(&mut sample, &gaps);
            // The first write after T0 began a new piece of history.
            let first = history.slots.range(at_t0.last_tsc + 1..).next().map_or(at_t0.last_tsc, |(&tsc, _)| tsc);
            let over_pause = cycles_ms(first - at_t0.last_tsc, stats.khz());
            sample.insert("arming_gap_ms", arming.max_us() / 1e3);
            sample.insert("gap_ms", over_pause.max(gaps.max_us() / 1e3).max(arming.max_us() / 1e3));
        }
        Ok((sample, Trace { history, zero: at_t0.last_tsc, total_ms: millis(total), before }))
    }
}

/// Milliseconds of work that `writes` fall short of, at the rate `before`.
pub(crate) fn lost(window: Duration, writes: u64, before: f64) -> f64 {
    millis(window) - float(writes) / before * 1e3
}

/// The stalls, and the percentiles of all gaps.
pub(crate) fn stalls(sample: &mut Sample, gaps: &Gaps) {
    sample.insert("stalls", float(gaps.count(STALL_US)));
    sample.insert("short_gaps", float(gaps.count(SHORT_US) - gaps.count(STALL_US)));
    sample.insert("stalled_ms", gaps.sum_ms(STALL_US, f64::INFINITY));
    sample.insert("short_ms", gaps.sum_ms(SHORT_US, STALL_US));
    sample.insert("stall_max_us", gaps.max_us());
    let keys = [("stall_p50_us", "all_p50_us"), ("stall_p99_us", "all_p99_us"), ("stall_p999_us", "all_p999_us")];
    for ((stall, all), percent) in keys.into_iter().zip([50.0, 99.0, 99.9]) {
        put(sample, stall, gaps.percentile_us(percent, STALL_US));
        put(sample, all, gaps.percentile_us(percent, 0.0));
    }
}

pub(crate) fn put(sample: &mut Sample, key: &'static str, value: Option<f64>) {
    value.into_iter().for_each(|value| {
        sample.insert(key, value);
    });
}
