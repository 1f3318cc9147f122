//! One run: boot, snapshot live, verify, restore, self check.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::file::PageSource;
use ramshot::restore::order_path;
use ramshot::{Chain, DirtyTracking, GuestRam, LazyOptions, LazyRestore, Pending, SnapshotFile};
use ramshot_tests::snapshot_run::{RestoreMode, Running};
use ramshot_tests::{Accel, Gaps, Guest, GuestConfig, Memory, Scratch, Workload, new_guest, snapshot_run, verify};

use crate::options::{Arm, Mode, Options};
use crate::outcome::{Again, Cost, Costs, GuestRate, Increment, Outcome, Restore, SelfCheck, Stall};

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

    let file = SnapshotFile::open(&target.path)?;
    let verified = verify::against_file(&file, &t0)?;
    (outcome.pages_total, outcome.pages_verified) = (file.pages(), verified.pages);
    (outcome.pages_mismatched, outcome.pages_zero) = (verified.mismatched, verified.zero);
    if let Some(page) = verified.first_mismatch {
        outcome.problems.push(format!("{} pages differ from T0, the first is {page}", verified.mismatched));
    }
    if !verify::flat(&target.path, &t0)? {
        outcome.problems.push("the file does not begin with guest RAM".to_owned());
    }
    let giver = Giver { options, accel, config };
    let given = giver.give_back(&target.path, 1, &t0, &mut outcome.problems)?;
    (outcome.restore_ms, outcome.restore, outcome.guest_self_check) = (given.took_ms, given.restore, given.self_check);
    let mut files = vec![file];
    for (number, t0) in (1..).zip(&increments) {
        let path = target.increment(number);
        files.push(SnapshotFile::open(&path)?);
        let verified = verify::against_chain(&files, t0)?;
        if let Some(page) = verified.first_mismatch {
            let wrong = verified.mismatched;
            outcome.problems.push(format!("increment {number}: {wrong} pages differ from its T0, the first is {page}"));
        }
        let given = giver.give_back(&path, files.len(), t0, &mut outcome.problems)?;
        if let Some(increment) = outcome.chain.get_mut(number as usize - 1) {
            (increment.pages_verified, increment.pages_mismatched) = (verified.pages, verified.mismatched);
            increment.restore_ms = given.took_ms;
            (increment.restore, increment.guest_self_check) = (given.restore, given.self_check);
        }
    }

    // After pre-copy there may be too little left to protect for anybody to meet it.
    let seen = if options.mode == Mode::Precopy { outcome.dirty_pages } else { outcome.write_faults };
    if options.workload != Workload::Idle && seen == 0 {
        outcome.problems.push("the workload writes, but no write was seen: this proved nothing".to_owned());
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
        let costs = report.costs();
        outcome.costs =
            Costs { stopped: cost(costs.stopped), background: cost(costs.background), precopy: cost(costs.precopy) };
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

/// Gives snapshots back: into fresh memory, which is compared, and into a fresh VM, which then runs and checks itself.
struct Giver<'a> {
    options: &'a Options,
    accel: Accel,
    config: GuestConfig,
}

/// How a snapshot was given back.
struct Given {
    /// Filling the memory that was compared, in milliseconds.
    took_ms: f64,
    restore: Restore,
    self_check: SelfCheck,
}

impl Giver<'_> {
    /// The snapshot at `path`, which is the last of `depth`; its parents are found by its path alone.
    fn give_back(&self, path: &Path, depth: usize, t0: &[Vec<u8>], problems: &mut Vec<String>) -> Result<Given> {
        let chain = Arc::new(Chain::open(path)?);
        if chain.depth() != depth {
            problems.push(format!("a chain of {depth} snapshots is one of {} on disk", chain.depth()));
        }
        let took_ms = self.compare(&chain, t0, problems)?;
        let order = order_path(path);
        let settings = LazyOptions { order: Some(order), ..LazyOptions::default() };
        let mut run = self.run(&chain, &settings, problems)?;
        for _ in 1..self.options.restores {
            run = self.run(&chain, &settings, problems)?;
        }
        let (restore, self_check) = run;
        Ok(Given { took_ms, restore, self_check })
    }

    /// Every page of restored memory against T0. Returns the milliseconds that filling it took.
    fn compare(&self, chain: &Arc<Chain>, t0: &[Vec<u8>], problems: &mut Vec<String>) -> Result<f64> {
        let memory = (self.options.mem, self.options.backing);
        let (took, mismatched) = if self.options.restore == RestoreMode::Eager {
            let restored = snapshot_run::restore(self.accel, self.config, memory, chain, t0)?;
            (restored.took, restored.mismatched)
        } else {
            let start = Instant::now();
            let memory = Memory::new(memory.0, memory.1)?;
            if self.options.restore == RestoreMode::Mapped {
                snapshot_run::map_into(chain, &memory)?;
            } else {
                let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest()))?);
                ramshot::lazy(Arc::clone(chain) as Arc<dyn PageSource>, &ram, &LazyOptions::default())?.finish()?;
            }
            (start.elapsed(), verify::against_memory(&memory.read_all()?, t0).mismatched)
        };
        if mismatched > 0 {
            problems.push(format!("{mismatched} pages differ from T0 after the restore"));
        }
        Ok(millis(took))
    }

    fn run(
        &self,
        chain: &Arc<Chain>,
        settings: &LazyOptions,
        problems: &mut Vec<String>,
    ) -> Result<(Restore, SelfCheck)> {
        let memory = (self.options.mem, self.options.backing);
        let mode = self.options.restore;
        let running = snapshot_run::restore_and_run(self.accel, self.config, memory, chain, (mode, settings))?;
        let mut restore = Restore {
            mode: mode.to_string(),
            first_instruction_us: micros(running.first_instruction),
            call_us: micros(running.call),
            // When the call returns all is in, unless pages come in lazily.
            all_in_ms: millis(running.call),
            ..Restore::default()
        };
        if self.options.again {
            restore.again = Some(self.again(chain, &running, problems)?);
        }
        let guest = running.guest;
        let before = guest.writes()?;
        std::thread::sleep(WATCH);
        if self.options.workload != Workload::Idle && guest.writes()? == before {
            problems.push("the restored guest does not write".to_owned());
        }
        let self_check = self_check(guest.as_ref(), "the restored guest", problems)?;
        if let Some(lazy) = running.lazy {
            let report = lazy.finish()?;
            restore.all_in_ms = millis(report.all_in);
            (restore.faults, restore.prefetched) = (report.progress.faults, report.progress.prefetched);
            if report.progress.faults == 0 {
                problems
                    .push("the guest ran while its pages came in, but no fault was seen: this proved nothing".into());
            }
        }
        Ok((restore, self_check))
    }

    /// A snapshot of the guest that `chain` is being restored into, and a guest restored from that.
    fn again(&self, chain: &Chain, running: &Running, problems: &mut Vec<String>) -> Result<Again> {
        let path = chain.tip().path().with_extension("again.ramshot");
        let progress = running.lazy.as_ref().map(LazyRestore::progress).unwrap_or_default();
        let settings = ramshot::Options { replace: true, pool_bytes: self.options.pool, ..ramshot::Options::default() };
        let (pause, report) = running.snapshot(&path, &settings)?;
        let memory = (self.options.mem, self.options.backing);
        let again = Chain::open(&path)?;
        again.verify(2, &mut |_, _| {})?;
        let restored = snapshot_run::restore(self.accel, self.config, memory, &again, &[])?;
        if self.options.out.is_none() {
            std::fs::remove_file(&path)?;
        }
        restored.guest.resume()?;
        let guest_self_check = self_check(restored.guest.as_ref(), "the guest restored a second time", problems)?;
        Ok(Again {
            pause_us: micros(pause),
            total_ms: millis(report.total),
            pages_captured: report.counts.released,
            write_faults: report.counts.faults,
            in_before: progress.by_fault + progress.prefetched,
            guest_self_check,
        })
    }
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

/// Where the images go: a folder that the user named, or one that is removed again.
struct Target {
    path: PathBuf,
    _scratch: Option<Scratch>,
}

impl Target {
    fn new(options: &Options, seed: u64) -> Result<Self> {
        let (scratch, folder) = match &options.out {
            Some(folder) => {
                std::fs::create_dir_all(folder).map_err(|error| format!("--out {}: {error}", folder.display()))?;
                (None, folder.clone())
            }
            None => {
                let scratch = Scratch::new_in(&std::env::temp_dir(), "ramshot-e2e-")?;
                let folder = scratch.path().to_owned();
                (Some(scratch), folder)
            }
        };
        Ok(Self { path: folder.join(format!("e2e-0-{seed}.ramshot")), _scratch: scratch })
    }

    /// Where increment `number` goes.
    fn increment(&self, number: u32) -> PathBuf {
        self.path.with_extension(format!("{number}.ramshot"))
    }
}

fn cost(cost: ramshot::Cost) -> Cost {
    Cost { pause_us: micros(cost.pause), waiting_us: micros(cost.waiting), pages: cost.pages }
}
