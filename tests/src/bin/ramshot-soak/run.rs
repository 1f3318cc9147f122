//! One run: a guest, and its snapshots one after the other, each verified or seen to have left nothing behind.

use std::cell::Cell;
use std::error::Error;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ramshot::core::{RamSource, WriteTracker};
use ramshot::file::{FileSink, FileSinkOptions};
use ramshot::{
    Cause, Chain, DirtyTracking, GuestRam, LazyOptions, Live, Options, Parts, Pending, Prepared, Report,
    SnapshotFailed, SnapshotFile, Tracker, TrackerOptions,
};
use ramshot::{WhenFull, prepare_with};
use ramshot_tests::chaos::{BadRam, BadSink, BadTracker, Injected, every_vcpu_writes, protected_pages, registered};
use ramshot_tests::snapshot_run::{self, Begun, RestoreMode, causes};
use ramshot_tests::{Backing, Guest, GuestError, Memory, MemoryError, new_guest, verify};

use crate::plan::{Act, Kind, Plan, Trouble};
use crate::tally::Tally;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(60);

/// Carries out `plan`; whatever should not have happened is in `tally`. `beat` is called now and then.
pub(crate) fn run(plan: &Plan, target: &Path, tally: &mut Tally, beat: &dyn Fn()) {
    let problems = tally.problems.len();
    let run = match Run::new(plan, target) {
        Ok(run) => run,
        Err(error) => return tally.problems.push(format!("seed {}: {}", plan.seed, causes(error.as_ref()))),
    };
    for (number, act) in (1..).zip(&plan.acts) {
        beat();
        if let Err(error) = run.act(act, tally) {
            if matches!(error.downcast_ref(), Some(GuestError::Timeout { .. })) {
                tally.stuck_vcpus += 1;
            }
            tally.problems.push(format!("snapshot {number}, {act:?}: {}", causes(error.as_ref())));
        }
        if tally.problems.len() > problems {
            break;
        }
    }
    for problem in tally.problems.iter_mut().skip(problems) {
        *problem = format!("seed {}: {problem}", plan.seed);
    }
}

struct Run<'a> {
    plan: &'a Plan,
    backing: Backing,
    /// Where full snapshots go; increments lie beside it.
    target: &'a Path,
    dirty: Option<Arc<DirtyTracking>>,
    /// How many increments there are on the full snapshot.
    increments: Cell<u32>,
    // Let go before the guest, whose memory otherwise stays mapped.
    ram: Arc<GuestRam>,
    guest: Box<dyn Guest>,
}

/// What a snapshot came to.
enum End {
    Image(Box<Report>),
    /// None, and that is fine: why.
    None(&'static str),
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, target: &'a Path) -> Result<Self> {
        let (memory, backing) = match Memory::new(plan.size, plan.backing) {
            Err(error @ (MemoryError::NoHugePages { .. } | MemoryError::HugePagePool { .. })) => {
                println!("     thp instead of hugetlb: {error}");
                (Memory::new(plan.size, Backing::Thp)?, Backing::Thp)
            }
            other => (other?, plan.backing),
        };
        let guest = new_guest(plan.accel, memory, plan.config)?;
        guest.start().map_err(|error| format!("{error}; its console: {:?}", guest.console()))?;
        let ram = snapshot_run::guest_ram(guest.as_ref())?;
        let dirty = match plan.dirty {
            true => Some(DirtyTracking::start(ram.table(), guest.dirty_logs()?)?),
            false => None,
        };
        let _ = fs::remove_file(target);
        let run = Self { plan, backing, target, dirty, increments: Cell::new(0), guest, ram };
        run.remove_increments();
        Ok(run)
    }

    /// Where increment `number` is.
    fn increment(&self, number: u32) -> PathBuf {
        self.target.with_extension(format!("{number}.ramshot"))
    }

    /// They are nobody's any more.
    fn remove_increments(&self) {
        (1..).map(|number| self.increment(number)).find(|path| fs::remove_file(path).is_err());
        self.increments.set(0);
    }

    /// What the act takes: an increment needs something to build on.
    fn kind(&self, act: &Act) -> Kind {
        match (&self.dirty, act.kind) {
            (None, _) => Kind::Full,
            (Some(dirty), Kind::Increment) if dirty.base().is_none() => Kind::Full,
            (Some(_), kind) => kind,
        }
    }

    /// One snapshot, and everything that has to be true afterwards.
    fn act(&self, act: &Act, tally: &mut Tally) -> Result<()> {
        let kind = self.kind(act);
        let target = match kind {
            Kind::Increment => self.increment(self.increments.get() + 1),
            Kind::Full | Kind::Precopy(_) => self.target.to_owned(),
        };
        // What others may build on stays until there is another.
        if !act.options.replace && self.dirty.is_none() {
            let _ = fs::remove_file(&target);
        }
        let before = there(&target)?;
        let injected = Injected::default();
        let (end, t0) = self.snapshot(act, kind, &target, &injected, tally)?;
        tally.injected_errors += injected.count();

        // First of all, the guest.
        if let Err(why) = every_vcpu_writes(self.guest.as_ref(), self.plan.config.workload, PATIENCE) {
            tally.stuck_vcpus += 1;
            return Err(why.into());
        }
        let regions = self.guest.memory().regions();
        let (left, protected) = (registered(regions)?, protected_pages(regions)?);
        if !left.is_empty() || protected > 0 {
            return Err(format!("{protected} pages left protected, left registered: {left:?}").into());
        }
        let who = "the guest that was snapshotted";
        snapshot_run::self_check(self.guest.as_ref(), who, PATIENCE, &mut tally.problems)?;
        tally.self_checks += 1;

        match end {
            End::Image(report) => {
                tally.write_faults += report.counts.faults;
                tally.fault_service_us_max = tally.fault_service_us_max.max(report.fault_service.max_us());
                match kind {
                    Kind::Increment => {
                        self.increments.set(self.increments.get() + 1);
                        tally.increments += 1;
                    }
                    Kind::Full | Kind::Precopy(_) => self.remove_increments(),
                }
                tally.precopies += u64::from(matches!(kind, Kind::Precopy(_)));
                self.verify(act, &target, &t0, tally)?;
                tally.snapshots += 1;
            }
            End::None(_) if before == there(&target)? => {}
            End::None(why) => return Err(format!("{why}, and the previous file is not what it was").into()),
        }
        let mut partial = target.into_os_string();
        partial.push(".partial");
        if Path::new(&partial).exists() {
            return Err("a partial file was left behind".into());
        }
        Ok(())
    }

    fn prepare(&self, act: &Act, kind: Kind, target: &Path, injected: &Injected) -> Result<Prepared> {
        let table = Arc::clone(self.ram.table());
        let Act { options, trouble, .. } = act;
        let replace = options.replace || self.dirty.is_some();
        let file = FileSinkOptions { replace, sync: options.sync, direct: options.direct };
        let base = self.dirty.as_ref().and_then(|dirty| dirty.base()).filter(|_| kind == Kind::Increment);
        let sink = match base {
            Some(base) => FileSink::create_child(target, &table, &file, base)?,
            None => FileSink::create(target, &table, &file)?,
        };
        let mut sink = BadSink::new(Box::new(sink), injected);
        if let Some(slow) = act.slow {
            sink = sink.slow(slow);
        }
        sink = match *trouble {
            Trouble::Sink(nth, how) => sink.failing_at(nth, how),
            Trouble::Commit(how) => sink.failing_to_commit(how),
            _ => sink,
        };
        let mut ram = Arc::clone(&self.ram) as Arc<dyn RamSource>;
        if let Trouble::Ram(nth, panics) = *trouble {
            ram = Arc::new(BadRam::new(ram, nth, panics, injected));
        }
        let tracker = Tracker::open(Arc::clone(&self.ram), &TrackerOptions::default())?;
        let mut tracker = Arc::new(tracker) as Arc<dyn WriteTracker>;
        if let Trouble::Tracker(nth, fault) = *trouble {
            tracker = Arc::new(BadTracker::new(tracker, fault, nth, injected));
        }
        let options = Options { dirty: self.dirty.clone(), ..options.clone() };
        Ok(prepare_with(Parts { tracker, ram, table, sink: Box::new(sink) }, &options)?)
    }

    fn snapshot(
        &self,
        act: &Act,
        kind: Kind,
        target: &Path,
        injected: &Injected,
        tally: &mut Tally,
    ) -> Result<(End, Vec<Vec<u8>>)> {
        let prepared = self.prepare(act, kind, target, injected)?;
        let prepared = match kind {
            Kind::Precopy(passes) => prepared.precopy(passes),
            Kind::Full | Kind::Increment => Ok(prepared),
        };
        let prepared = prepared.and_then(|prepared| if act.ahead { prepared.arm_ahead() } else { Ok(prepared) });
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Ok((fine(act, injected, error, tally)?, Vec::new())),
        };
        let pending = if kind == Kind::Full { Pending::All } else { Pending::Dirty };
        let Begun { live, t0, pause, .. } = snapshot_run::begin_with(self.guest.as_ref(), prepared, pending)?;
        tally.pause(pause);
        let live = match live {
            Ok(live) => live,
            Err(error) => return Ok((fine(act, injected, error, tally)?, t0)),
        };
        let result = match act.trouble {
            Trouble::Cancel(after) => {
                let handle = live.handle();
                std::thread::scope(|scope| {
                    scope.spawn(move || {
                        std::thread::sleep(after);
                        handle.cancel();
                    });
                    live.finish()
                })
            }
            Trouble::Drop(after) => {
                std::thread::sleep(after);
                drop(live);
                tally.cancels += 1;
                return Ok((End::None("it was dropped"), t0));
            }
            _ => self.finish(live, tally)?,
        };
        let end = match result {
            Ok(report) => End::Image(Box::new(report)),
            Err(error) => fine(act, injected, error, tally)?,
        };
        Ok((end, t0))
    }

    fn finish(&self, live: Live, tally: &mut Tally) -> Result<std::result::Result<Report, SnapshotFailed>> {
        snapshot_run::wait_until_captured(&live);
        tally.stall(self.guest.stats()?.gaps.max());
        Ok(live.finish())
    }

    /// The snapshot at `target`, with what it builds on, is T0, and what is restored from it as well.
    fn verify(&self, act: &Act, target: &Path, t0: &[Vec<u8>], tally: &mut Tally) -> Result<()> {
        let paths =
            std::iter::once(self.target.to_owned()).chain((1..=self.increments.get()).map(|n| self.increment(n)));
        let files = paths.map(SnapshotFile::open).collect::<std::result::Result<Vec<_>, _>>()?;
        let verified = verify::against_chain(&files, t0)?;
        tally.pages_verified += verified.pages;
        tally.mismatches += verified.mismatched;
        if let Some(page) = verified.first_mismatch {
            return Err(format!("{} pages differ from T0, the first is {page}", verified.mismatched).into());
        }
        let Some(mode) = act.restore else { return Ok(()) };
        let chain = Arc::new(Chain::open(target)?);
        match self.restore((mode, act.again), &chain, self.backing, t0, tally) {
            // The pool of huge pages may be exhausted: the first guest has them.
            Err(error) if error.downcast_ref::<MemoryError>().is_some() => {
                self.restore((mode, act.again), &chain, Backing::Anon, t0, tally)
            }
            other => other,
        }
    }

    fn restore(
        &self,
        (mode, again): (RestoreMode, bool),
        chain: &Arc<Chain>,
        backing: Backing,
        t0: &[Vec<u8>],
        tally: &mut Tally,
    ) -> Result<()> {
        let (accel, config, memory) = (self.plan.accel, self.plan.config, (self.plan.size, backing));
        let (guest, lazy) = if mode == RestoreMode::Eager {
            let restored = snapshot_run::restore(accel, config, memory, chain, t0)?;
            tally.mismatches += restored.mismatched;
            if restored.mismatched > 0 {
                return Err(format!("{} pages differ from T0 after the restore", restored.mismatched).into());
            }
            restored.guest.resume()?;
            (restored.guest, None)
        } else {
            let how = (mode, &LazyOptions::default());
            let running = snapshot_run::restore_and_run(accel, config, memory, chain, how)?;
            if again && running.lazy.is_some() {
                let path = self.target.with_extension("again");
                running.snapshot(&path, &Options { replace: true, ..Options::default() })?;
                let again = Chain::open(&path)?;
                again.verify(2, &mut |_, _| {})?;
                let anon = (self.plan.size, Backing::Anon);
                let restored = snapshot_run::restore(accel, config, anon, &again, &[])?;
                fs::remove_file(&path)?;
                restored.guest.resume()?;
                let who = "the guest restored a second time";
                snapshot_run::self_check(restored.guest.as_ref(), who, PATIENCE, &mut tally.problems)?;
                tally.snapshots_while_lazy += 1;
            }
            (running.guest, running.lazy)
        };
        if let Err(why) = every_vcpu_writes(guest.as_ref(), config.workload, PATIENCE) {
            tally.stuck_vcpus += 1;
            return Err(format!("the guest restored {mode}: {why}").into());
        }
        let who = format!("the guest restored {mode}");
        snapshot_run::self_check(guest.as_ref(), &who, PATIENCE, &mut tally.problems)?;
        if let Some(lazy) = lazy {
            lazy.finish()?;
        }
        (tally.restores, tally.self_checks) = (tally.restores + 1, tally.self_checks + 1);
        tally.restores_mapped += u64::from(mode == RestoreMode::Mapped);
        tally.restores_lazy += u64::from(mode == RestoreMode::Lazy);
        Ok(())
    }
}

/// Which file is at `target`, and what is in it, as its own checksum says.
fn there(target: &Path) -> Result<Option<(u64, i64, u32)>> {
    if !target.exists() {
        return Ok(None);
    }
    let data = fs::metadata(target)?;
    Ok(Some((data.ino(), data.mtime_nsec(), SnapshotFile::open(target)?.checksum())))
}

/// Whether it is right that there is no image.
fn fine(act: &Act, injected: &Injected, error: SnapshotFailed, tally: &mut Tally) -> Result<End> {
    let cause = match &error {
        SnapshotFailed::Ended { cause, .. } => Some(*cause),
        _ => None,
    };
    match (cause, act.trouble) {
        (Some(Cause::Cancelled), Trouble::Cancel(_)) => {
            tally.cancels += 1;
            Ok(End::None("it was cancelled"))
        }
        (Some(Cause::PoolFull), _) if act.options.when_full == WhenFull::Cancel => {
            tally.pool_full += 1;
            Ok(End::None("the pool was full"))
        }
        (_, Trouble::Tracker(_, fault)) if fault.is_survived() => Err(error.into()),
        _ if injected.count() > 0 => Ok(End::None("an error was injected")),
        _ => Err(error.into()),
    }
}
