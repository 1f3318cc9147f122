//! One run: boot, snapshot live, verify, restore, self check.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::file::PageSource;
use ramshot::restore::order_path;
use ramshot::{DirtyTracking, GuestRam, LazyOptions, Pending, SnapshotFile};
use ramshot_tests::snapshot_run::RestoreMode;
use ramshot_tests::{Accel, Gaps, Guest, GuestConfig, Memory, Workload, new_guest, snapshot_run, verify};

use crate::options::{Arm, Mode, Options};
use crate::outcome::{GuestRate, Increment, Outcome, Restore, SelfCheck, Stall};

/// How long the guest's rate is watched before and after.
const WATCH: Duration = Duration::from_millis(300);
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the guest runs between two snapshots of a chain.
const BETWEEN: Duration = Duration::from_millis(50);
/// Most drafts of a pre-copy.
const PASSES: u32 = 3;
/// Memory that the guest writes for the first time after T0: zero in the image, or a write was not trapped.
const LATE: u64 = 4 << 20;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

pub(crate) fn run(options: &Options, accel: Accel, seed: u64) -> Result<Outcome> {
    let mut outcome = Outcome::new(options, accel, seed);
    let config = GuestConfig {
        vcpus: options.vcpus,
        workload: options.workload,
        working_set: options.working_set,
        rate: options.rate.0,
        late: LATE,
        seed,
        ..GuestConfig::default()
    };
    let target = Target::new(options, seed)?;

    let guest = new_guest(accel, Memory::new(options.mem, options.backing)?, config)?;
    guest.start()?;
    outcome.guest_rate.before = guest.rate(WATCH)?;
    let source = Source::new(options, guest.as_ref())?;
    let t0 = source.snapshot(&target.path, &mut outcome)?;
    outcome.guest_rate.after = guest.rate(WATCH)?;
    let mut increments = Vec::new();
    for number in 1..=options.increments()? {
        std::thread::sleep(BETWEEN);
        increments.push(source.increment(&target.increment(number), &mut outcome)?);
    }
    outcome.source_self_check = self_check(guest.as_ref(), "the guest that was snapshotted", &mut outcome.problems)?;
    drop(source);
    drop(guest);

    let file = Arc::new(SnapshotFile::open(&target.path)?);
    let verified = verify::against_file(&file, &t0)?;
    (outcome.pages_total, outcome.pages_verified) = (file.pages(), verified.pages);
    (outcome.pages_mismatched, outcome.pages_zero) = (verified.mismatched, verified.zero);
    if let Some(page) = verified.first_mismatch {
        outcome.problems.push(format!("{} pages differ from T0, the first is {page}", verified.mismatched));
    }
    if !verify::flat(&target.path, &t0)? {
        outcome.problems.push("the file does not begin with guest RAM".to_owned());
    }
    restore(options, accel, config, &file, &t0, &mut outcome)?;
    let mut files = vec![SnapshotFile::open(&target.path)?];
    for (number, t0) in (1..).zip(&increments) {
        files.push(SnapshotFile::open(target.increment(number))?);
        let verified = verify::against_chain(&files, t0)?;
        if let Some(page) = verified.first_mismatch {
            let wrong = verified.mismatched;
            outcome.problems.push(format!("increment {number}: {wrong} pages differ from its T0, the first is {page}"));
        }
        let (took, check) = restore_increment(options, accel, config, &files, t0, &mut outcome.problems)?;
        if let Some(increment) = outcome.chain.get_mut(number as usize - 1) {
            (increment.pages_verified, increment.pages_mismatched) = (verified.pages, verified.mismatched);
            (increment.restore_ms, increment.guest_self_check) = (took, check);
        }
    }

    if options.workload != Workload::Idle && outcome.write_faults == 0 {
        outcome.problems.push("the workload writes, but no write fault was seen: this proved nothing".to_owned());
    }
    outcome.ok = outcome.problems.is_empty();
    Ok(outcome)
}

/// A guest, and how its snapshots are taken.
struct Source<'a> {
    options: &'a Options,
    guest: &'a dyn Guest,
    ram: Arc<GuestRam>,
    settings: ramshot::Options,
}

impl<'a> Source<'a> {
    fn new(options: &'a Options, guest: &'a dyn Guest) -> Result<Self> {
        let ram = snapshot_run::guest_ram(guest)?;
        let mut settings = ramshot::Options {
            replace: true,
            workers: options.workers,
            writers: options.writers,
            pool_bytes: options.pool,
            ..ramshot::Options::default()
        };
        if options.mode != Mode::Full {
            settings.dirty = Some(DirtyTracking::start(ram.table(), guest.dirty_logs()?)?);
        }
        Ok(Self { options, guest, ram, settings })
    }

    /// Takes the snapshot. Returns guest RAM at T0.
    fn snapshot(&self, path: &Path, outcome: &mut Outcome) -> Result<Vec<Vec<u8>>> {
        let guest = self.guest;
        let prepared = ramshot::prepare(&self.ram, path, &self.settings)?;
        let prepared = if self.options.mode == Mode::Precopy { prepared.precopy(PASSES)? } else { prepared };
        let prepared = if self.options.arm == Arm::Ahead { prepared.arm_ahead()? } else { prepared };
        let pending = if self.options.mode == Mode::Precopy { Pending::Dirty } else { Pending::All };
        let begun = snapshot_run::begin_with(guest, prepared, pending)?;
        outcome.pause_us = micros(begun.pause);

        let live = begun.live?;
        snapshot_run::wait_until_captured(&live);
        let seconds = begun.resumed.elapsed().as_secs_f64();
        outcome.guest_writes_during = guest.writes()? - begun.writes_at_t0;
        outcome.stall_us = stall(&guest.stats()?.gaps);
        let during = per_second(outcome.guest_writes_during, seconds);
        outcome.guest_rate = GuestRate { during, ..GuestRate::default() }.with_before(outcome.guest_rate.before);
        let report = live.finish()?;
        outcome.arm_us = micros(report.arm);
        outcome.capture_ms = millis(report.capture);
        outcome.total_ms = millis(report.total);
        outcome.pages_captured = report.counts.released;
        outcome.dirty_pages = report.counts.total;
        (outcome.draft_pages, outcome.draft_passes) = (report.drafts.pages, report.drafts.passes);
        outcome.write_faults = report.counts.faults;
        outcome.pages_by_fault = report.counts.by_fault;
        outcome.bytes_written = report.image.written_bytes;
        Ok(begun.t0)
    }

    /// Takes an increment on the one before. Returns guest RAM at its T0.
    fn increment(&self, path: &Path, outcome: &mut Outcome) -> Result<Vec<Vec<u8>>> {
        let prepared = ramshot::prepare_increment(&self.ram, path, &self.settings)?;
        let prepared = if self.options.arm == Arm::Ahead { prepared.arm_ahead()? } else { prepared };
        let begun = snapshot_run::begin_with(self.guest, prepared, Pending::Dirty)?;
        let report = begun.live?.finish()?;
        outcome.chain.push(Increment {
            dirty_pages: report.counts.total,
            pause_us: micros(begun.pause),
            total_ms: millis(report.total),
            bytes_written: report.image.written_bytes,
            write_faults: report.counts.faults,
            ..Increment::default()
        });
        Ok(begun.t0)
    }
}

/// Into fresh memory, which is compared, and into a fresh VM, which then runs and checks itself.
fn restore(
    options: &Options,
    accel: Accel,
    config: GuestConfig,
    file: &Arc<SnapshotFile>,
    t0: &[Vec<u8>],
    outcome: &mut Outcome,
) -> Result<()> {
    compare(options, accel, config, file, t0, outcome)?;
    let order = order_path(file.path());
    let settings = LazyOptions { order: Some(order.clone()), ..LazyOptions::default() };
    for _ in 0..options.restores {
        run_restored(options, accel, config, file, &settings, outcome)?;
    }
    if options.out.is_none() {
        let _ = std::fs::remove_file(order);
    }
    Ok(())
}

/// Every page of restored memory against T0.
fn compare(
    options: &Options,
    accel: Accel,
    config: GuestConfig,
    file: &Arc<SnapshotFile>,
    t0: &[Vec<u8>],
    outcome: &mut Outcome,
) -> Result<()> {
    let mismatched = if options.restore == RestoreMode::Eager {
        let restored = snapshot_run::restore(accel, config, (options.mem, options.backing), file, t0)?;
        outcome.restore_ms = millis(restored.took);
        restored.mismatched
    } else {
        let start = Instant::now();
        let memory = Memory::new(options.mem, options.backing)?;
        if options.restore == RestoreMode::Mapped {
            snapshot_run::map_into(file, &memory)?;
        } else {
            let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest()))?);
            ramshot::lazy(Arc::clone(file) as Arc<dyn PageSource>, &ram, &LazyOptions::default())?.finish()?;
        }
        outcome.restore_ms = millis(start.elapsed());
        verify::against_memory(&memory.read_all()?, t0).mismatched
    };
    if mismatched > 0 {
        outcome.problems.push(format!("{mismatched} pages differ from T0 after the restore"));
    }
    Ok(())
}

fn run_restored(
    options: &Options,
    accel: Accel,
    config: GuestConfig,
    file: &Arc<SnapshotFile>,
    settings: &LazyOptions,
    outcome: &mut Outcome,
) -> Result<()> {
    let memory = (options.mem, options.backing);
    let running = snapshot_run::restore_and_run(accel, config, memory, file, (options.restore, settings))?;
    let guest = running.guest;
    outcome.restore = Restore {
        mode: options.restore.to_string(),
        first_instruction_us: micros(running.first_instruction),
        call_us: micros(running.call),
        // When the call returns all is in, unless pages come in lazily.
        all_in_ms: millis(running.call),
        ..Restore::default()
    };
    let before = guest.writes()?;
    std::thread::sleep(WATCH);
    if options.workload != Workload::Idle && guest.writes()? == before {
        outcome.problems.push("the restored guest does not write".to_owned());
    }
    outcome.guest_self_check = self_check(guest.as_ref(), "the restored guest", &mut outcome.problems)?;
    if let Some(lazy) = running.lazy {
        let report = lazy.finish()?;
        outcome.restore.all_in_ms = millis(report.all_in);
        outcome.restore.faults = report.progress.faults;
        outcome.restore.prefetched = report.progress.prefetched;
        if report.progress.faults == 0 {
            outcome
                .problems
                .push("the guest ran while its pages came in, but no fault was seen: this proved nothing".to_owned());
        }
    }
    Ok(())
}

/// An increment and all below it into a fresh VM, which then runs and checks itself. Returns how long filling its RAM
/// took, in milliseconds.
fn restore_increment(
    options: &Options,
    accel: Accel,
    config: GuestConfig,
    files: &[SnapshotFile],
    t0: &[Vec<u8>],
    problems: &mut Vec<String>,
) -> Result<(f64, SelfCheck)> {
    let restored = snapshot_run::restore_chain(accel, config, (options.mem, options.backing), files, t0)?;
    if restored.mismatched > 0 {
        problems.push(format!("{} pages differ from T0 after the restore", restored.mismatched));
    }
    let guest = restored.guest;
    let before = guest.writes()?;
    guest.resume()?;
    std::thread::sleep(WATCH);
    if options.workload != Workload::Idle && guest.writes()? == before {
        problems.push("the restored guest does not write".to_owned());
    }
    Ok((millis(restored.took), self_check(guest.as_ref(), "the restored guest", problems)?))
}

fn self_check(guest: &dyn Guest, who: &str, problems: &mut Vec<String>) -> Result<SelfCheck> {
    let report = snapshot_run::self_check(guest, who, CHECK_TIMEOUT, problems)?;
    Ok(SelfCheck { ok: report.is_ok(), pages: report.pages, errors: report.errors })
}

fn stall(gaps: &Gaps) -> Stall {
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    Stall { p50: us(gaps.p50()), p99: us(gaps.p99()), p999: us(gaps.p999()), max: us(gaps.max()) }
}

impl GuestRate {
    fn with_before(self, before: f64) -> Self {
        Self { before, ..self }
    }
}

// Counts of writes are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Where the image goes; removed again unless the user named a folder.
struct Target {
    path: PathBuf,
    keep: bool,
}

impl Target {
    fn new(options: &Options, seed: u64) -> Result<Self> {
        let keep = options.out.is_some();
        let folder = options.out.clone().unwrap_or_else(std::env::temp_dir);
        std::fs::create_dir_all(&folder).map_err(|error| format!("--out {}: {error}", folder.display()))?;
        let name = format!("e2e-{}-{seed}.ramshot", if keep { 0 } else { std::process::id() });
        Ok(Self { path: folder.join(name), keep })
    }

    /// Where increment `number` goes.
    fn increment(&self, number: u32) -> PathBuf {
        self.path.with_extension(format!("{number}.ramshot"))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_file(&self.path);
            (1..).map(|number| self.increment(number)).find(|path| std::fs::remove_file(path).is_err());
        }
    }
}
