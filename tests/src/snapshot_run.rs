//! One live snapshot of a guest, step by step, with the copy of guest RAM at T0 to compare it with. What the end-to-end
//! program, the soak and the fault tests have in common.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::file::PageSource;
use ramshot::{
    Chain, GuestRam, LazyOptions, LazyRestore, Live, MapTarget, Options, Pending, Prepared, RamError, Report,
    SnapshotFailed,
};

use crate::{Accel, Backing, CheckReport, Guest, GuestConfig, GuestError, Memory, Workload, new_guest, verify};

/// The RAM of `guest`, as ramshot wants it described.
///
/// # Errors
/// What ramshot thinks of it.
pub fn guest_ram(guest: &dyn Guest) -> Result<Arc<GuestRam>, RamError> {
    Ok(Arc::new(GuestRam::from_guest_memory(Arc::clone(guest.memory().guest()))?))
}

/// T0 has passed and the guest runs.
pub struct Begun<L> {
    /// What `begin` said.
    pub live: L,
    /// Guest RAM at T0, region after region, copied by other means than ramshot's.
    pub t0: Vec<Vec<u8>>,
    /// Writes of the guest until T0.
    pub writes_at_t0: u64,
    /// vCPUs stopped to vCPUs running, without the time in which the copy was made.
    pub pause: Duration,
    /// When the guest ran again.
    pub resumed: Instant,
}

/// Stops the guest, copies its RAM, begins the snapshot, lets it go on (whatever `begin` said). From then on the guest
/// writes its late area, and its gaps count afresh.
///
/// The copy is made before `begin`, or the scan would be through by the time it is made.
///
/// # Errors
/// The guest does not do what it is asked.
pub fn begin(guest: &dyn Guest, prepared: Prepared) -> Result<Begun<Result<Live, SnapshotFailed>>, GuestError> {
    begin_with(guest, prepared, Pending::All)
}

/// The same with these pages.
///
/// # Errors
/// As there.
pub fn begin_with(
    guest: &dyn Guest,
    prepared: Prepared,
    pending: Pending,
) -> Result<Begun<Result<Live, SnapshotFailed>>, GuestError> {
    let stopping = Instant::now();
    guest.pause()?;
    let stopped = stopping.elapsed();
    guest.talk().reset_gaps_at_resume()?;
    guest.start_late_writes()?;
    let t0 = guest.memory().copy()?;
    let writes_at_t0 = guest.writes()?;
    let beginning = Instant::now();
    let live = guest.save_state().map(|state| prepared.begin(pending, state));
    guest.resume()?;
    let resumed = Instant::now();
    let pause = stopped + resumed.duration_since(beginning);
    Ok(Begun { live: live?, t0, writes_at_t0, pause, resumed })
}

/// Waits until every page is captured or the snapshot has ended.
pub fn wait_until_captured(live: &Live) {
    loop {
        let progress = live.progress();
        if progress.captured || progress.ended {
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A snapshot given back.
pub struct Restored {
    /// The new guest, paused.
    pub guest: Box<dyn Guest>,
    /// How long filling its RAM took.
    pub took: Duration,
    /// Pages that differ from T0.
    pub mismatched: u64,
}

/// Restores `chain` into fresh memory of `size` bytes and a new guest, which is then paused.
///
/// # Errors
/// The files, the memory or the guest: whatever does not work.
pub fn restore(
    accel: Accel,
    config: GuestConfig,
    (size, backing): (u64, Backing),
    chain: &Chain,
    t0: &[Vec<u8>],
) -> Result<Restored, Box<dyn Error>> {
    let memory = Memory::new(size, backing)?;
    let start = Instant::now();
    let ram = GuestRam::from_guest_memory(Arc::clone(memory.guest()))?;
    chain.restore_into(ram.table(), &ram, 2)?;
    let took = start.elapsed();
    drop(ram);
    let mismatched = verify::against_memory(&memory.copy()?, t0).mismatched;
    let guest = new_guest(accel, memory, config)?;
    guest.restore(chain.device_state())?;
    Ok(Restored { guest, took, mismatched })
}

/// How a snapshot is given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RestoreMode {
    /// All of it, then the guest runs.
    Eager,
    /// Mapped from the file.
    Mapped,
    /// The guest runs, its pages come in.
    Lazy,
}

impl fmt::Display for RestoreMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eager => "eager",
            Self::Mapped => "mapped",
            Self::Lazy => "lazy",
        })
    }
}

impl FromStr for RestoreMode {
    type Err = GuestError;

    fn from_str(s: &str) -> Result<Self, GuestError> {
        match s {
            "eager" => Ok(Self::Eager),
            "mapped" => Ok(Self::Mapped),
            "lazy" => Ok(Self::Lazy),
            _ => Err(GuestError::Config(format!("unknown restore mode {s:?}: it is one of eager, mapped, lazy"))),
        }
    }
}

/// Maps `chain` into `memory`, which nobody has touched.
///
/// # Errors
/// What ramshot says.
pub fn map_into(chain: &Chain, memory: &Memory) -> Result<(), Box<dyn Error>> {
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest()))?);
    // SAFETY: `Memory` owns its mappings and unmaps them by address; no guest is in them yet, and no reference is ever made.
    let target = unsafe { MapTarget::new(ram) };
    chain.map_into(&target)?;
    Ok(())
}

/// A guest that was given back and runs.
pub struct Running {
    /// Its memory as ramshot sees it, if pages come in. First, so that it is dropped before the memory is.
    pub ram: Option<Arc<GuestRam>>,
    /// The guest.
    pub guest: Box<dyn Guest>,
    /// From the call that restores to the guest's first write that can be seen (if it writes; else to its resume).
    pub first_instruction: Duration,
    /// How long the call took that restores its memory.
    pub call: Duration,
    /// What brings its pages in.
    pub lazy: Option<LazyRestore>,
}

impl Running {
    /// Takes a snapshot of the guest at once, while its pages come in, to `path`; returns how long the guest was paused
    /// and what `finish` says.
    ///
    /// # Errors
    /// The guest or the snapshot; there is nothing that brings its pages in.
    pub fn snapshot(&self, path: &Path, options: &Options) -> Result<(Duration, Report), Box<dyn Error>> {
        let (lazy, ram) = self.lazy.as_ref().zip(self.ram.as_ref()).ok_or("nothing is coming in")?;
        let prepared = lazy.prepare(ram, path, options)?.arm_ahead()?;
        let stopping = Instant::now();
        self.guest.pause()?;
        let state = self.guest.save_state()?;
        let live = prepared.begin(Pending::All, state);
        self.guest.resume()?;
        let pause = stopping.elapsed();
        Ok((pause, live?.finish()?))
    }
}

/// Restores `chain` into fresh memory and a new guest, which runs as soon as `mode` lets it.
///
/// # Errors
/// The files, the memory or the guest: whatever does not work.
pub fn restore_and_run(
    accel: Accel,
    config: GuestConfig,
    (size, backing): (u64, Backing),
    chain: &Arc<Chain>,
    (mode, options): (RestoreMode, &LazyOptions),
) -> Result<Running, Box<dyn Error>> {
    let memory = Memory::new(size, backing)?;
    let guest = new_guest(accel, Arc::clone(&memory), config)?;
    let start = Instant::now();
    let (mut lazy, mut lazy_ram) = (None, None);
    if mode == RestoreMode::Mapped {
        map_into(chain, &memory)?;
    } else {
        let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest()))?);
        if mode == RestoreMode::Lazy {
            lazy = Some(ramshot::lazy(Arc::clone(chain) as Arc<dyn PageSource>, &ram, options)?);
            lazy_ram = Some(ram);
        } else {
            chain.restore_into(ram.table(), ram.as_ref(), 2)?;
        }
    }
    let call = start.elapsed();
    guest.restore(chain.device_state())?;
    let before = guest.writes()?;
    guest.resume()?;
    let patience = Duration::from_secs(20);
    while config.workload != Workload::Idle && guest.writes()? == before {
        if start.elapsed() > patience {
            return Err(format!("the restored guest does not write within {patience:?}").into());
        }
        std::hint::spin_loop();
    }
    Ok(Running { guest, first_instruction: start.elapsed(), call, lazy, ram: lazy_ram })
}

/// Has the guest check its memory; what it found wrong is added to `problems`.
///
/// # Errors
/// It does not answer within `timeout`.
pub fn self_check(
    guest: &dyn Guest,
    who: &str,
    timeout: Duration,
    problems: &mut Vec<String>,
) -> Result<CheckReport, GuestError> {
    let report = guest.self_check(timeout)?;
    if !report.is_ok() {
        let first = report.first.clone().unwrap_or_else(|| "it checked no page".to_owned());
        problems.push(format!("{who} found {} errors in its memory: {first}", report.errors));
    }
    if let Some(failure) = guest.failure() {
        problems.push(format!("{who} failed: {failure}"));
    }
    Ok(report)
}

/// An error with its causes.
#[must_use]
pub fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
