//! A guest that runs, a snapshot of it that was committed before, and the question asked after every fault: was anybody
//! harmed?

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::core::{RamSource, WriteTracker};
use ramshot::file::{FileSink, FileSinkOptions};
use ramshot::{
    Chain, GuestRam, Live, Options, Parts, Pending, Prepared, Report, SnapshotFailed, SnapshotFile, Tracker,
};
use ramshot::{TrackerOptions, prepare_with};
use tempfile::TempDir;

use super::residue::{Residue, protected_pages, registered};
use crate::snapshot_run::{Begun, begin, causes, guest_ram};
use crate::{Accel, Backing, Guest, GuestConfig, Memory, Workload, new_guest, verify};

const MIB: u64 = 1 << 20;
/// How long something may take that ought to take milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// See the module.
pub struct Rig {
    /// Who runs the guest.
    pub accel: Accel,
    /// Its RAM. Let go before the guest, whose memory otherwise stays mapped.
    pub ram: Arc<GuestRam>,
    /// The guest, running.
    pub guest: Box<dyn Guest>,
    config: GuestConfig,
    backing: Backing,
    directory: TempDir,
    previous: Vec<u8>,
    before: Residue,
}

impl Rig {
    /// The usual one: 32 MiB, 2 vCPUs that write at random as fast as they can, 16 MiB filled, the rest untouched but
    /// for a late area of 2 MiB.
    ///
    /// # Errors
    /// It does not come up.
    pub fn usual(accel: Accel) -> Result<Self> {
        let config = GuestConfig {
            vcpus: 2,
            workload: Workload::Random,
            working_set: 8 * MIB,
            fill: Some(16 * MIB),
            late: 2 * MIB,
            ..GuestConfig::default()
        };
        Self::new(accel, 32 * MIB, Backing::Anon, config)
    }

    /// Starts a guest in `size` bytes and takes the first snapshot of it, under [`target`](Self::target).
    ///
    /// # Errors
    /// It does not come up.
    pub fn new(accel: Accel, size: u64, backing: Backing, config: GuestConfig) -> Result<Self> {
        super::hush();
        let guest = new_guest(accel, Memory::new(size, backing)?, config)?;
        guest.start().map_err(|error| format!("{accel}: {error}; its console: {:?}", guest.console()))?;
        let ram = guest_ram(guest.as_ref())?;
        let mut rig = Self {
            accel,
            guest,
            ram,
            config,
            backing,
            directory: tempfile::tempdir()?,
            previous: Vec::new(),
            before: Residue { descriptors: Vec::new(), threads: Vec::new() },
        };
        rig.exact_snapshot()?;
        rig.before = Residue::now()?;
        Ok(rig)
    }

    /// Where snapshots go: the name of the one that was committed before.
    #[must_use]
    pub fn target(&self) -> PathBuf {
        self.directory.path().join("vm.ramshot")
    }

    /// The folder of [`target`](Self::target), where nothing else should be.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A small pool, so that there are many writes and it gets full.
    #[must_use]
    pub fn options(&self) -> Options {
        Options { replace: true, sync: false, pool_bytes: 2 << 20, workers: 2, writers: 2, ..Options::default() }
    }

    /// The usual parts, with the target as the image.
    ///
    /// # Errors
    /// They cannot be had.
    pub fn parts(&self) -> Result<Parts> {
        self.parts_into(&self.target())
    }

    /// The usual parts, with the image in a file of another name.
    ///
    /// # Errors
    /// They cannot be had.
    pub fn parts_into(&self, path: &Path) -> Result<Parts> {
        let table = Arc::clone(self.ram.table());
        let sink = FileSink::create(path, &table, &FileSinkOptions { replace: true, sync: false, direct: true })?;
        let tracker = Tracker::open(Arc::clone(&self.ram), &TrackerOptions::default())?;
        Ok(Parts {
            tracker: Arc::new(tracker) as Arc<dyn WriteTracker>,
            ram: Arc::clone(&self.ram) as Arc<dyn RamSource>,
            table,
            sink: Box::new(sink),
        })
    }

    /// Prepares a snapshot with parts that were tampered with.
    ///
    /// # Errors
    /// It cannot be prepared.
    pub fn prepare(&self, options: &Options, change: impl FnOnce(Parts) -> Parts) -> Result<Prepared> {
        Ok(prepare_with(change(self.parts()?), options)?)
    }

    /// Pause, `begin`, resume. No copy of guest RAM is made.
    ///
    /// # Errors
    /// The guest does not pause or resume. What `begin` says is inside.
    pub fn begin(&self, prepared: Prepared) -> Result<std::result::Result<Live, SnapshotFailed>> {
        self.guest.pause()?;
        let live = self.guest.save_state().map(|state| prepared.begin(Pending::All, state));
        self.guest.resume()?;
        Ok(live?)
    }

    /// All of it, with parts that were tampered with.
    ///
    /// # Errors
    /// The rig does not work. What the snapshot says is inside.
    pub fn snapshot(
        &self,
        options: &Options,
        change: impl FnOnce(Parts) -> Parts,
    ) -> Result<std::result::Result<Report, SnapshotFailed>> {
        let prepared = self.prepare(options, change)?;
        Ok(self.begin(prepared)?.and_then(Live::finish))
    }

    /// A snapshot with nothing wrong, compared with T0 byte for byte. It replaces the previous one.
    ///
    /// # Errors
    /// It fails, or is not T0.
    pub fn exact_snapshot(&mut self) -> Result<Report> {
        let prepared = self.prepare(&self.options(), |parts| parts)?;
        let begun = begin(self.guest.as_ref(), prepared)?;
        let t0 = begun.t0;
        let report = begun.live?.finish()?;
        self.is_exact(&t0)?;
        self.adopt()?;
        Ok(report)
    }

    /// Pause, copy of guest RAM, `begin`, resume.
    ///
    /// # Errors
    /// The guest does not pause or resume. What `begin` says is inside.
    pub fn begin_with_copy(&self, prepared: Prepared) -> Result<Begun<std::result::Result<Live, SnapshotFailed>>> {
        Ok(begin(self.guest.as_ref(), prepared)?)
    }

    /// What is at the target is the previous snapshot from now on.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn adopt(&mut self) -> Result<()> {
        self.previous = fs::read(self.target())?;
        Ok(())
    }

    /// What is at the target is T0, byte for byte.
    ///
    /// # Errors
    /// It is not, or cannot be read.
    pub fn is_exact(&self, t0: &[Vec<u8>]) -> Result<()> {
        let file = SnapshotFile::open(self.target())?;
        let verified = verify::against_file(&file, t0)?;
        if verified.mismatched > 0 || !verify::flat(&self.target(), t0)? {
            let first = verified.first_mismatch.map_or(0, |page| page.0);
            return Err(format!("{} pages differ from T0, the first is {first}", verified.mismatched).into());
        }
        Ok(())
    }

    /// What is at the target is the previous snapshot, byte for byte.
    ///
    /// # Errors
    /// It is not.
    pub fn is_untouched(&self) -> std::result::Result<(), String> {
        match fs::read(self.target()) {
            Ok(bytes) if bytes == self.previous => Ok(()),
            Ok(_) => Err("the previous snapshot is not what it was".to_owned()),
            Err(error) => Err(format!("the previous snapshot: {error}")),
        }
    }

    /// After a snapshot that came to nothing: guest memory is what the guest wrote, every vCPU writes, nothing is
    /// registered or protected, there is no file but the previous snapshot and that is what it was, no descriptor and no
    /// thread is left.
    ///
    /// # Errors
    /// All that is not so.
    pub fn unharmed(&self) -> std::result::Result<(), String> {
        let mut problems = Vec::new();
        self.look(&mut problems).unwrap_or_else(|error| problems.push(causes(error.as_ref())));
        if problems.is_empty() { Ok(()) } else { Err(format!("{}: {}", self.accel, problems.join("; "))) }
    }

    fn look(&self, problems: &mut Vec<String>) -> Result<()> {
        let regions = self.guest.memory().regions();
        let registered = registered(regions)?;
        if !registered.is_empty() {
            problems.push(format!("left registered: {registered:?}"));
        }
        let protected = protected_pages(regions)?;
        if protected > 0 {
            problems.push(format!("{protected} pages left write-protected"));
        }
        every_vcpu_writes(self.guest.as_ref(), self.config.workload, PATIENCE)?;
        let report = self.guest.self_check(PATIENCE)?;
        if !report.is_ok() {
            problems.push(format!("the guest's memory is not what it wrote: {report:?}"));
        }
        problems.extend(self.is_untouched().err());
        for entry in fs::read_dir(self.directory())? {
            let path = entry?.path();
            if path != self.target() {
                let opens = SnapshotFile::open(&path).is_ok();
                problems
                    .push(format!("{path:?} was left behind, and {}", if opens { "opens" } else { "does not open" }));
            }
        }
        let start = Instant::now();
        // A thread that was joined may be listed for a moment still.
        while self.before != Residue::now()? {
            if start.elapsed() > Duration::from_secs(10) {
                problems.push(format!("before it was {:?}, now there is {:?}", self.before, Residue::now()?));
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Restores the previous snapshot into a guest of its own and has that check itself.
    ///
    /// # Errors
    /// It does not work, or finds something.
    pub fn restores(&self) -> Result<()> {
        let chain = Chain::open(self.target())?;
        let size = self.guest.memory().size();
        let t0 = Vec::new();
        let restored = crate::snapshot_run::restore(self.accel, self.config, (size, self.backing), &chain, &t0)?;
        restored.guest.resume()?;
        let report = restored.guest.self_check(PATIENCE)?;
        if report.is_ok() { Ok(()) } else { Err(format!("the restored guest: {report:?}").into()) }
    }
}

/// Every vCPU writes to its working set (or, if its workload is to do nothing, answers).
///
/// # Errors
/// One did not within `patience`: which.
pub fn every_vcpu_writes(guest: &dyn Guest, workload: Workload, patience: Duration) -> std::result::Result<(), String> {
    let text = |error: crate::GuestError| error.to_string();
    if workload == Workload::Idle {
        return guest.reset_gaps().map_err(text);
    }
    let writes = || -> std::result::Result<Vec<u64>, String> {
        Ok(guest.talk().counters().map_err(text)?.iter().map(|counters| counters.writes).collect())
    };
    let (start, before) = (Instant::now(), writes()?);
    loop {
        let now = writes()?;
        if now.iter().zip(&before).all(|(now, before)| now > before) {
            return Ok(());
        }
        if let Some(why) = guest.failure() {
            return Err(format!("the guest failed: {why}"));
        }
        if start.elapsed() > patience {
            return Err(format!("a vCPU does not write: writes {before:?} and, {patience:?} later, {now:?}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
