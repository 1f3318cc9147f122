//! The image cannot be written: at every write, at the commit, for good or for a while, with a real full disk and a
//! real short write among the reasons. There is no image then, the one before is untouched, and the guest runs.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::file::{FileSink, FileSinkOptions};
use ramshot::{Cause, Live, Options, Parts, Report, SnapshotFailed, WhenFull};
use ramshot_tests::chaos::{
    BadSink, Injected, Rig, SinkFault, Tap, TinyFs, accels, alone, every_vcpu_writes, say, skipped,
};
use ramshot_tests::{Accel, Workload};

const PATIENCE: Duration = Duration::from_secs(60);

/// Parts whose sink is wrapped.
fn with_sink(injected: &Injected, change: impl FnOnce(BadSink) -> BadSink) -> impl FnOnce(Parts) -> Parts {
    move |parts| Parts { sink: Box::new(change(BadSink::new(parts.sink, injected))), ..parts }
}

fn says(result: Result<Report, SnapshotFailed>, what: &str) -> String {
    let Err(error) = result else { panic!("there is an image, after {what}") };
    ramshot_tests::snapshot_run::causes(&error)
}

#[test]
fn any_write_may_fail() {
    let _alone = alone();
    for accel in accels("any_write_may_fail") {
        let start = Instant::now();
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        for how in [SinkFault::NoSpace, SinkFault::Io, SinkFault::Short, SinkFault::Panic] {
            // Until there are no more writes to fail: how many there are depends on who is faster.
            for nth in 1.. {
                let before = injected.count();
                let result =
                    rig.snapshot(&rig.options(), with_sink(&injected, |sink| sink.failing_at(nth, how))).unwrap();
                if injected.count() == before {
                    result.unwrap();
                    rig.adopt().unwrap();
                    assert!(nth > 4, "{accel}: only {nth} writes: this proved little");
                    break;
                }
                let said = says(result, &format!("write {nth} failed"));
                let expected = match how {
                    SinkFault::NoSpace => "No space left",
                    SinkFault::Io => "Input/output error",
                    SinkFault::Short => "injected",
                    SinkFault::Panic => "died",
                };
                assert!(said.contains(expected), "{accel}: {how:?} is reported as {said:?}");
                rig.unharmed().unwrap_or_else(|why| panic!("write {nth}, {how:?}: {why}"));
            }
        }
        rig.exact_snapshot().unwrap();
        say(&format!("any_write_may_fail, {accel}: {} errors in {:.1?}", injected.count(), start.elapsed()));
    }
}

#[test]
fn the_commit_may_fail() {
    let _alone = alone();
    for accel in accels("the_commit_may_fail") {
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        for how in [SinkFault::NoSpace, SinkFault::Io, SinkFault::Short] {
            let result =
                rig.snapshot(&rig.options(), with_sink(&injected, |sink| sink.failing_to_commit(how))).unwrap();
            assert!(matches!(result, Err(SnapshotFailed::Commit(_))), "{accel}: {result:?}");
            rig.unharmed().unwrap();
        }
        assert_eq!(injected.count(), 3);
        rig.exact_snapshot().unwrap();
    }
}

/// A panic in the commit is in the caller's own thread: whether it arrives there or becomes an error, nobody is harmed.
#[test]
fn the_commit_may_panic() {
    let _alone = alone();
    for accel in accels("the_commit_may_panic") {
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        let change = with_sink(&injected, |sink| sink.failing_to_commit(SinkFault::Panic));
        let live = rig.begin(rig.prepare(&rig.options(), change).unwrap()).unwrap().unwrap();
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| live.finish()));
        assert!(!matches!(finished, Ok(Ok(_))), "{accel}: there is an image");
        assert_eq!(injected.count(), 1);
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}

/// A disk that hangs: the snapshot waits, and so may the guest. After `cancel` the guest runs, though the disk still
/// hangs.
#[test]
fn a_cancel_frees_the_guest_while_the_disk_hangs() {
    let _alone = alone();
    for accel in accels("a_cancel_frees_the_guest_while_the_disk_hangs") {
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        let tap = Arc::new(Tap::closed());
        let prepared = rig.prepare(&rig.options(), with_sink(&injected, |sink| sink.behind(&tap))).unwrap();
        let live = rig.begin(prepared).unwrap().unwrap();
        assert!(tap.somebody_waits(PATIENCE), "{accel}: no write");
        // The pool holds 2 MiB, the guest writes all over 8 MiB: before long every vCPU waits.
        wait_until_nobody_writes(&rig);
        live.cancel();
        every_vcpu_writes(rig.guest.as_ref(), Workload::Random, PATIENCE).unwrap();
        assert!(live.progress().ended);
        tap.open();
        assert!(says(live.finish(), "a cancel").contains("cancelled"));
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}

fn wait_until_nobody_writes(rig: &Rig) {
    let start = Instant::now();
    loop {
        let before = rig.guest.writes().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        if rig.guest.writes().unwrap() == before {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{}: the guest writes on, though the pool is full", rig.accel);
    }
}

/// The same disk, with the other policy: the snapshot ends by itself and the guest never waits for the disk.
#[test]
fn when_the_pool_is_full_it_may_end_by_itself() {
    let _alone = alone();
    for accel in accels("when_the_pool_is_full_it_may_end_by_itself") {
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        let tap = Arc::new(Tap::closed());
        let options = Options { when_full: WhenFull::Cancel, ..rig.options() };
        let prepared = rig.prepare(&options, with_sink(&injected, |sink| sink.behind(&tap))).unwrap();
        let live = rig.begin(prepared).unwrap().unwrap();
        let start = Instant::now();
        while !live.progress().ended {
            assert!(start.elapsed() < PATIENCE, "{accel}: it goes on with a full pool");
            std::thread::sleep(Duration::from_millis(1));
        }
        every_vcpu_writes(rig.guest.as_ref(), Workload::Random, PATIENCE).unwrap();
        tap.open();
        let result = live.finish();
        assert!(matches!(result, Err(SnapshotFailed::Ended { cause: Cause::PoolFull, .. })), "{accel}: {result:?}");
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}

/// A tmpfs with room for none of it, for a part, for all but the trailer, for the old image but not for a second one.
#[test]
fn the_file_system_is_full() {
    // Mounts belong to the thread: one of its own, or the others would be in its namespace.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("full-fs".to_owned());
        thread.spawn_scoped(scope, full_file_systems).unwrap().join().unwrap();
    });
}

fn full_file_systems() {
    let _alone = alone();
    for accel in accels("the_file_system_is_full") {
        let mut rig = Rig::usual(accel).unwrap();
        let needed = fs::metadata(rig.target()).unwrap();
        let (pages, whole) = {
            let file = ramshot::SnapshotFile::open(rig.target()).unwrap();
            // Late pages may have been written since, so a later image can have this many more.
            (file.data_pages() * 4096, file.image_bytes() - file.ram_bytes() + (file.data_pages() + 512) * 4096)
        };
        assert!(needed.len() > pages);
        let mount = rig.directory().parent().unwrap().join(format!("ramshot-full-{}-{accel}", std::process::id()));
        fs::create_dir(&mount).unwrap();
        let mut failures = 0;
        for size in [64 << 10, 1 << 20, pages / 2, pages - (64 << 10), pages, pages + (3 << 12), 2 * whole] {
            let fs = match TinyFs::mount(&mount, size) {
                Ok(fs) => fs,
                Err(error) => {
                    fs::remove_dir(&mount).unwrap();
                    return skipped("the_file_system_is_full", &format!("a tmpfs cannot be mounted: {error}"));
                }
            };
            let target = mount.join("vm.ramshot");
            let sink = || {
                let options = FileSinkOptions { replace: true, sync: true, direct: true };
                Box::new(FileSink::create(&target, rig.ram.table(), &options).unwrap())
            };
            let take = || rig.snapshot(&rig.options(), |parts| Parts { sink: sink(), ..parts }).unwrap();
            let first = take();
            if size == 2 * whole {
                first.unwrap();
                // Not enough for a second one: fill up what is left, so that it fits in no case.
                fs::write(mount.join("filler"), vec![1; usize::try_from(whole / 2).unwrap()]).unwrap();
                let before = fs::read(&target).unwrap();
                assert!(says(take(), "the disk was full").contains("No space left"));
                assert!(before == fs::read(&target).unwrap(), "{accel}: the previous image was touched");
                assert!(ramshot::SnapshotFile::open(&target).unwrap().verify(1, &mut |_, _| {}).is_ok());
            } else {
                let said = says(first, &format!("a disk of {size} bytes"));
                assert!(said.contains("No space left"), "{accel}, {size} bytes: {said}");
                failures += 1;
                assert_eq!(fs::read_dir(&mount).unwrap().count(), 0, "{accel}, {size} bytes: something is left");
            }
            drop(fs);
            rig.unharmed().unwrap();
        }
        fs::remove_dir(&mount).unwrap();
        rig.exact_snapshot().unwrap();
        say(&format!("the_file_system_is_full, {accel}: {failures} sizes too small, one full at the second image"));
    }
}

/// The file may not grow beyond a limit (RLIMIT_FSIZE): `pwrite` is cut short by the kernel, then refused.
#[test]
fn a_write_is_cut_short_by_the_kernel() {
    let _alone = alone();
    // SAFETY: ignoring a signal; the tests of this program do not use it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    for accel in accels("a_write_is_cut_short_by_the_kernel") {
        let mut rig = Rig::usual(accel).unwrap();
        // In the middle of a page, of a run; at the very end (32 MiB of RAM), where the trailer begins.
        for limit in [(4 << 20) + 100, (9 << 20) + 4096, (20 << 20) - 1, 32 << 20, (32 << 20) + 64] {
            let live = {
                let prepared = rig.prepare(&rig.options(), |parts| parts).unwrap();
                let _limit = FileLimit::set(limit);
                let live = rig.begin(prepared).unwrap();
                live.and_then(Live::finish)
            };
            let said = says(live, &format!("a limit of {limit} bytes"));
            assert!(said.contains("File too large"), "{accel}, {limit} bytes: {said}");
            rig.unharmed().unwrap();
        }
        rig.exact_snapshot().unwrap();
    }
}

/// A soft limit on the size of files this process writes, as long as it lives.
struct FileLimit(libc::rlimit);

impl FileLimit {
    fn set(bytes: u64) -> Self {
        let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut old) }, 0);
        let new = libc::rlimit { rlim_cur: bytes, ..old };
        // SAFETY: a valid limit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const new) }, 0);
        Self(old)
    }
}

impl Drop for FileLimit {
    fn drop(&mut self) {
        // SAFETY: what it was before.
        unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const self.0) };
    }
}

/// A slow disk harms nobody either, and the image is T0.
#[test]
fn a_slow_disk_is_waited_for() {
    let _alone = alone();
    for accel in accels("a_slow_disk_is_waited_for") {
        let rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        let change = with_sink(&injected, |sink| sink.slow(Duration::from_millis(10)));
        let begun = rig.begin_with_copy(rig.prepare(&rig.options(), change).unwrap()).unwrap();
        let report = begun.live.unwrap().finish().unwrap();
        rig.is_exact(&begun.t0).unwrap();
        assert!(report.counts.faults > 0, "{accel}: nobody wrote meanwhile: this proved nothing");
        if accel == Accel::Threads {
            rig.restores().unwrap();
        }
    }
}
