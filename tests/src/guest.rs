//! What both kinds of guest, a KVM VM and threads of this process, have in common: the [`Guest`] trait, and everything
//! that goes through the statistics area in guest RAM ([`Talk`]).

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ramshot::core::{HostRange, OsError};
use ramshot::{DirtyLog, HostAddr};
use ramshot_images::layout::{
    self, BUCKETS, CHECK_UNTOUCHED_LATE, COMMAND_QUIESCE, COMMAND_RUN, CONTROL_ADDRESS, Control, Counters, Header,
    MAX_VCPUS, PAGE, PHASE_READY, SLOTS, STATE_QUIESCED, STATS_ADDRESS, STATS_MAGIC, Slot, buckets_address,
    counters_address, slots_address,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::memory::{Memory, MemoryError};
use crate::stats::{Gaps, GuestStats, VcpuStats};

/// What the guest writes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Workload {
    /// Nothing.
    Idle,
    /// Page after page of the working set, round after round.
    Seq,
    /// Any page of the working set.
    Random,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Seq => "seq",
            Self::Random => "random",
        })
    }
}

impl FromStr for Workload {
    type Err = GuestError;

    fn from_str(s: &str) -> Result<Self, GuestError> {
        match s {
            "idle" => Ok(Self::Idle),
            "seq" => Ok(Self::Seq),
            "random" => Ok(Self::Random),
            _ => Err(GuestError::Config(format!("unknown workload {s:?}: it is one of idle, seq, random"))),
        }
    }
}

/// What the guest is told at boot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestConfig {
    /// vCPUs, 1 to 16.
    pub vcpus: u32,
    /// What they write to.
    pub workload: Workload,
    /// Bytes of the working set, for all of them together.
    pub working_set: u64,
    /// Writes per second and vCPU; `None`: as fast as they can.
    pub rate: Option<u64>,
    /// Bytes filled with the pattern at boot; `None`: all RAM but the late area. The rest is never touched.
    pub fill: Option<u64>,
    /// Bytes at the end of RAM that nobody touches before [`Guest::start_late_writes`].
    pub late: u64,
    /// Seed of patterns and random numbers.
    pub seed: u64,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self { vcpus: 1, workload: Workload::Random, working_set: 64 << 20, rate: None, fill: None, late: 0, seed: 1 }
    }
}

impl GuestConfig {
    pub(crate) fn check(&self) -> Result<(), GuestError> {
        if self.vcpus == 0 || self.vcpus as usize > MAX_VCPUS {
            return Err(GuestError::Config(format!("{} vCPUs: the guest takes 1 to {MAX_VCPUS}", self.vcpus)));
        }
        if self.rate == Some(0) {
            return Err(GuestError::Config("a rate of 0 writes per second: use the idle workload".to_owned()));
        }
        Ok(())
    }
}

/// Why the guest did not do what it was asked.
#[derive(thiserror::Error, Debug)]
pub enum GuestError {
    /// The configuration makes no sense.
    #[error("guest configuration: {0}")]
    Config(String),
    /// There is no guest image in this build.
    #[error("there is no guest image: {}", ramshot_images::IMAGE_MISSING)]
    NoImage,
    /// The guest image is not an ELF file we can load.
    #[error("the guest image cannot be loaded: {0}")]
    Image(&'static str),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A KVM call failed.
    #[error("KVM: {what} failed: {source}")]
    Kvm {
        /// Which.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for vCPU {vcpu}")]
    Thread {
        /// Of which vCPU.
        vcpu: u32,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The guest is lost: what happened.
    #[error("the guest failed: {0}")]
    Failed(String),
    /// It did not happen in time.
    #[error("{what}: not within {after:?}; {state}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        after: Duration,
        /// What the guest was doing instead.
        state: String,
    },
    /// Asked for something in the wrong state.
    #[error("{what} {needs}")]
    State {
        /// What was asked.
        what: &'static str,
        /// What it would take.
        needs: &'static str,
    },
    /// A saved state that is not one, or of another VM.
    #[error("saved state: {0}")]
    SavedState(String),
}

/// What the guest found when it checked itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Pages looked at.
    pub pages: u64,
    /// Pages (or words) that were not as they have to be.
    pub errors: u64,
    /// What the first of them was, and where.
    pub first: Option<String>,
}

impl CheckReport {
    /// It looked at something and found nothing.
    #[must_use]
    pub const fn is_ok(&self) -> bool {
        self.errors == 0 && self.pages > 0
    }
}

/// A guest that writes to its memory by the rule of [`ramshot_images::rule`].
///
/// Life: `start` or `restore`, then `pause` and `resume` as often as you like; dropping it stops it. All methods may be
/// called from any thread.
pub trait Guest: Send + Sync {
    /// Boots it and waits until RAM is filled and the workload runs.
    ///
    /// # Errors
    /// It did not get there.
    fn start(&self) -> Result<(), GuestError>;

    /// Stops every vCPU; when it returns none of them writes to RAM. Paused already: nothing happens.
    ///
    /// # Errors
    /// A vCPU did not stop in time, or had failed before. The others stay stopped.
    fn pause(&self) -> Result<(), GuestError>;

    /// Lets them go on.
    ///
    /// # Errors
    /// A vCPU had failed before.
    fn resume(&self) -> Result<(), GuestError>;

    /// What is not in RAM: registers, interrupt controllers. Paused guests only.
    ///
    /// # Errors
    /// It is not paused, or a KVM call failed.
    fn save_state(&self) -> Result<Vec<u8>, GuestError>;

    /// Instead of `start`: takes over that state, and RAM as it is. The guest is paused then.
    ///
    /// # Errors
    /// The state is of another kind of guest or number of vCPUs, or a KVM call failed.
    fn restore(&self, state: &[u8]) -> Result<(), GuestError>;

    /// Logs of all that is written to its RAM from now on, by its vCPUs and by the VMM.
    ///
    /// # Errors
    /// This kind of guest has none.
    fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, GuestError>;

    /// What happened to it if it is lost (an exception, a triple fault).
    fn failure(&self) -> Option<String>;

    /// What it wrote on its console.
    fn console(&self) -> String;

    /// The statistics area.
    fn talk(&self) -> &Talk;

    /// Its memory.
    fn memory(&self) -> &Arc<Memory> {
        &self.talk().memory
    }

    /// Everything the guest counted.
    ///
    /// # Errors
    /// There is no statistics area in its RAM (not started).
    fn stats(&self) -> Result<GuestStats, GuestError> {
        self.talk().stats()
    }

    /// Writes since boot, of all vCPUs.
    ///
    /// # Errors
    /// As [`stats`](Self::stats).
    fn writes(&self) -> Result<u64, GuestError> {
        self.talk().writes()
    }

    /// Starts the histogram of gaps afresh.
    ///
    /// # Errors
    /// The guest does not answer.
    fn reset_gaps(&self) -> Result<(), GuestError> {
        self.talk().reset_gaps(&|| self.failure())
    }

    /// Writes per second of all vCPUs, over the `window` that begins now. Blocks that long.
    ///
    /// # Errors
    /// As [`stats`](Self::stats).
    fn rate(&self, window: Duration) -> Result<f64, GuestError> {
        let (start, before) = (Instant::now(), self.writes()?);
        std::thread::sleep(window);
        let writes = self.writes()?.saturating_sub(before);
        // Precision is not the point of a rate.
        #[allow(clippy::cast_precision_loss)]
        Ok(writes as f64 / start.elapsed().as_secs_f64())
    }

    /// From now on the late area is written, page after page.
    ///
    /// # Errors
    /// RAM cannot be written.
    fn start_late_writes(&self) -> Result<(), GuestError> {
        self.talk().start_late_writes()
    }

    /// Tells the vCPUs to write nothing, and waits until none does. They answer and can check themselves.
    ///
    /// # Errors
    /// The guest does not answer.
    fn quiesce(&self, timeout: Duration) -> Result<(), GuestError> {
        self.talk().quiesce(timeout, &|| self.failure())
    }

    /// Tells them to work again.
    ///
    /// # Errors
    /// RAM cannot be written.
    fn unquiesce(&self) -> Result<(), GuestError> {
        self.talk().unquiesce()
    }

    /// Has every vCPU check all its pages. Late pages that nobody wrote yet are looked at (they have to be zero) only
    /// when late writes have begun or the guest was restored: before, reading them would touch them.
    ///
    /// # Errors
    /// The guest does not answer. What it finds is in the report.
    fn self_check(&self, timeout: Duration) -> Result<CheckReport, GuestError> {
        self.talk().self_check(timeout, &|| self.failure())
    }
}

/// What the VMM asked so far.
#[derive(Debug, Default)]
struct Asked {
    control: Control,
    untouched_may_be_read: bool,
}

/// The VMM's side of the statistics area. Works the same whoever writes the other side.
#[derive(Debug)]
pub struct Talk {
    memory: Arc<Memory>,
    asked: Mutex<Asked>,
}

/// Asked while waiting: what happened to the guest.
type Failure<'a> = &'a dyn Fn() -> Option<String>;

/// What the VMM writes to guest RAM: the control area. It does so at any time, so it is always dirty.
pub(crate) struct WrittenByUs(HostRange);

impl DirtyLog for WrittenByUs {
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        each(self.0);
        Ok(())
    }
}

impl Talk {
    pub(crate) fn written_by_us(&self) -> Result<WrittenByUs, GuestError> {
        let inside =
            |region: &&crate::memory::RegionInfo| (region.guest..region.guest + region.len).contains(&CONTROL_ADDRESS);
        let region = self.memory.regions().iter().find(inside);
        let region = region.ok_or_else(|| GuestError::Config("no RAM at the control area".to_owned()))?;
        let start = (region.host + (CONTROL_ADDRESS - region.guest)) & !4095;
        Ok(WrittenByUs(HostRange::new(HostAddr(start), 4096)))
    }

    pub(crate) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, asked: Mutex::default() }
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// After a restore: go on from the words that are in RAM.
    pub(crate) fn adopt(&self) -> Result<(), GuestError> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.control = self.read(CONTROL_ADDRESS)?;
        asked.untouched_may_be_read = true;
        Ok(())
    }

    fn read<T: FromZeros + FromBytes + IntoBytes>(&self, address: u64) -> Result<T, GuestError> {
        let mut value = T::new_zeroed();
        self.memory.read(address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Changes control words, then rings.
    fn ask(&self, change: impl FnOnce(&mut Asked)) -> Result<Control, GuestError> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut asked);
        let words = asked.control.as_bytes();
        self.memory.write(CONTROL_ADDRESS + 8, &words[8..])?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        asked.control.doorbell += 1;
        self.memory.write(CONTROL_ADDRESS, &asked.control.doorbell.to_ne_bytes())?;
        Ok(asked.control)
    }

    /// What the guest wrote down at boot, or `None` before that.
    ///
    /// # Errors
    /// RAM ends before the statistics area.
    pub fn header(&self) -> Result<Option<Header>, GuestError> {
        let header: Header = self.read(STATS_ADDRESS)?;
        Ok((header.magic == STATS_MAGIC && header.version == layout::LAYOUT_VERSION).then_some(header))
    }

    fn booted(&self) -> Result<Header, GuestError> {
        self.header()?.ok_or(GuestError::State { what: "statistics:", needs: "the guest has to be started first" })
    }

    pub(crate) fn is_ready(&self) -> Result<bool, GuestError> {
        Ok(self.header()?.is_some_and(|header| header.phase == PHASE_READY))
    }

    /// The counters of every vCPU.
    ///
    /// # Errors
    /// The guest was not started.
    pub fn counters(&self) -> Result<Vec<Counters>, GuestError> {
        let vcpus = u64::from(self.booted()?.vcpus);
        (0..vcpus).map(|vcpu| self.read(counters_address(vcpu))).collect()
    }

    pub(crate) fn writes(&self) -> Result<u64, GuestError> {
        Ok(self.counters()?.iter().map(|c| c.writes).sum())
    }

    fn stats(&self) -> Result<GuestStats, GuestError> {
        let header = self.booted()?;
        let mut all = Gaps::new(header.tsc_khz);
        let mut vcpus = Vec::new();
        for (vcpu, counters) in (0..).zip(self.counters()?) {
            let buckets: [u64; BUCKETS] = self.read(buckets_address(vcpu))?;
            let slots: [Slot; SLOTS] = self.read(slots_address(vcpu))?;
            let mut gaps = Gaps::new(header.tsc_khz);
            gaps.add(&buckets, counters.max_gap);
            all.add(&buckets, counters.max_gap);
            vcpus.push(VcpuStats::new(&header, vcpu, &counters, gaps, &slots));
        }
        Ok(GuestStats {
            writes: vcpus.iter().map(|v| v.writes).sum(),
            late_writes: vcpus.iter().map(|v| v.late_writes).sum(),
            gaps: all,
            vcpus,
        })
    }

    /// Waits until all vCPUs are as `done` wants them.
    fn wait(
        &self,
        what: &'static str,
        after: Duration,
        failure: Failure<'_>,
        done: impl Fn(&Counters) -> bool,
    ) -> Result<Vec<Counters>, GuestError> {
        let start = Instant::now();
        loop {
            let counters = self.counters()?;
            if counters.iter().all(&done) {
                return Ok(counters);
            }
            if let Some(why) = failure() {
                return Err(GuestError::Failed(why));
            }
            if start.elapsed() > after {
                let states: Vec<u32> = counters.iter().map(|c| c.state).collect();
                return Err(GuestError::Timeout { what, after, state: format!("states of the vCPUs: {states:?}") });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn reset_gaps(&self, failure: Failure<'_>) -> Result<(), GuestError> {
        let asked = self.ask(|asked| asked.control.reset_request += 1)?;
        let reset = |c: &Counters| c.reset_done == asked.reset_request;
        self.wait("resetting the gaps", Duration::from_secs(10), failure, reset).map(drop)
    }

    /// Has the gaps start afresh when a paused guest goes on: the pause itself is then not among them. Does not wait.
    ///
    /// # Errors
    /// Guest RAM could not be written.
    pub fn reset_gaps_at_resume(&self) -> Result<(), GuestError> {
        self.ask(|asked| asked.control.reset_request += 1).map(drop)
    }

    fn start_late_writes(&self) -> Result<(), GuestError> {
        self.ask(|asked| {
            asked.control.late_go = 1;
            asked.untouched_may_be_read = true;
        })
        .map(drop)
    }

    fn quiesce(&self, timeout: Duration, failure: Failure<'_>) -> Result<(), GuestError> {
        let asked = self.ask(|asked| asked.control.command = COMMAND_QUIESCE)?;
        let quiet = |c: &Counters| c.state == STATE_QUIESCED && c.doorbell_seen >= asked.doorbell;
        self.wait("quiescing the guest", timeout, failure, quiet).map(drop)
    }

    fn unquiesce(&self) -> Result<(), GuestError> {
        self.ask(|asked| asked.control.command = COMMAND_RUN).map(drop)
    }

    fn self_check(&self, timeout: Duration, failure: Failure<'_>) -> Result<CheckReport, GuestError> {
        let asked = self.ask(|asked| {
            asked.control.check_request += 1;
            asked.control.check_flags = if asked.untouched_may_be_read { CHECK_UNTOUCHED_LATE } else { 0 };
        })?;
        let checked = |c: &Counters| c.check_done == asked.check_request;
        let counters = self.wait("self check of the guest", timeout, failure, checked)?;
        let mut report = CheckReport::default();
        for (vcpu, c) in counters.iter().enumerate() {
            report.pages += c.check_pages;
            report.errors += c.check_errors;
            if c.check_errors > 0 && report.first.is_none() {
                let kind = layout::bad_kind_text(c.bad_kind);
                let page = c.bad_address / PAGE;
                report.first =
                    Some(format!("vCPU {vcpu}: {kind}, at guest address {:#x} (page {page:#x})", c.bad_address));
            }
        }
        Ok(report)
    }
}
