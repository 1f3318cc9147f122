//! Cancelled, or simply dropped, at every phase of a snapshot's life: no image, no trace, and the guest runs.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::{Cause, Live, Options, Parts, Prepared, SnapshotFailed};
use ramshot_tests::chaos::{BadSink, Injected, Rig, Tap, accels, alone, protected_pages, registered, say};

const PATIENCE: Duration = Duration::from_secs(60);

/// Where a snapshot that is under way can stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Right after `begin`.
    Early,
    /// Some of it is captured, the pool is full, the writers are stuck.
    Middle,
    /// All is captured, the last bytes are not written.
    Captured,
    /// All is written, nothing is committed.
    Written,
}

/// A snapshot in that phase; the tap, closed or open.
fn at(rig: &Rig, phase: Phase) -> (Live, Arc<Tap>) {
    let tap = Arc::new(Tap::closed());
    // The pool holds everything (beside what is kept for faults), or next to nothing.
    let pool_bytes = if phase == Phase::Captured { 128 << 20 } else { 2 << 20 };
    let options = Options { pool_bytes, ..rig.options() };
    let behind = |parts: Parts| {
        let sink = BadSink::new(parts.sink, &Injected::default()).behind(&tap);
        Parts { sink: Box::new(sink), ..parts }
    };
    let live = rig.begin(rig.prepare(&options, behind).unwrap()).unwrap().unwrap();
    let until = |what: &str, done: &dyn Fn(&Live) -> bool| {
        let start = Instant::now();
        while !done(&live) {
            if start.elapsed() > PATIENCE {
                // Dropping `live` waits for the writers.
                tap.open();
                panic!("{}: not {what}: {:?}", rig.accel, live.progress());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    };
    match phase {
        Phase::Early => {}
        Phase::Middle => {
            assert!(tap.somebody_waits(PATIENCE));
            until("half-way", &|live| live.progress().pages_captured > 0);
            assert!(!live.progress().captured, "{}: captured with a full pool", rig.accel);
        }
        Phase::Captured => until("captured", &|live| live.progress().captured),
        Phase::Written => {
            tap.open();
            until("captured", &|live| live.progress().captured);
            // What is captured last is written within moments; nobody says when.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    (live, tap)
}

fn is_cancelled(result: &Result<ramshot::Report, SnapshotFailed>) -> bool {
    matches!(result, Err(SnapshotFailed::Ended { cause: Cause::Cancelled, .. }))
}

#[test]
fn cancelled_at_every_phase() {
    let _alone = alone();
    for accel in accels("cancelled_at_every_phase") {
        let mut rig = Rig::usual(accel).unwrap();
        for phase in [Phase::Early, Phase::Middle, Phase::Captured] {
            for _ in 0..3 {
                let (live, tap) = at(&rig, phase);
                live.cancel();
                assert!(live.progress().ended);
                // Twice does no harm.
                live.handle().cancel();
                tap.open();
                let result = live.finish();
                assert!(is_cancelled(&result), "{accel}, {phase:?}: {result:?}");
                rig.unharmed().unwrap_or_else(|why| panic!("{phase:?}: {why}"));
            }
        }
        // Too late: everything is in the image.
        let (live, _tap) = at(&rig, Phase::Written);
        live.cancel();
        let result = live.finish();
        if is_cancelled(&result) {
            say("cancelled_at_every_phase: the last write took longer than expected: the cancel was not too late");
        } else {
            result.unwrap();
            rig.adopt().unwrap();
        }
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}

#[test]
fn dropped_at_every_phase() {
    let _alone = alone();
    for accel in accels("dropped_at_every_phase") {
        let mut rig = Rig::usual(accel).unwrap();
        let ahead = |prepared: Prepared| prepared.arm_ahead().unwrap();
        drop(rig.prepare(&rig.options(), |parts| parts).unwrap());
        rig.unharmed().unwrap();
        drop(ahead(rig.prepare(&rig.options(), |parts| parts).unwrap()));
        rig.unharmed().unwrap();
        // With some of the faults of arming ahead.
        let prepared = ahead(rig.prepare(&rig.options(), |parts| parts).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        drop(prepared);
        rig.unharmed().unwrap();
        for phase in [Phase::Early, Phase::Middle, Phase::Captured, Phase::Written] {
            for _ in 0..3 {
                let (live, tap) = at(&rig, phase);
                // Dropping waits for the writers, which are behind the tap.
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(5));
                        tap.open();
                    });
                    drop(live);
                });
                rig.unharmed().unwrap_or_else(|why| panic!("{phase:?}: {why}"));
            }
        }
        // A handle that outlives it is harmless.
        let (live, tap) = at(&rig, Phase::Early);
        let handle = live.handle();
        tap.open();
        drop(live);
        handle.cancel();
        assert!(handle.progress().ended);
        // It may keep the descriptor open, not the registration.
        let regions = rig.guest.memory().regions();
        assert_eq!((registered(regions).unwrap(), protected_pages(regions).unwrap()), (Vec::new(), 0), "{accel}");
        drop(handle);
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}

/// Parts of the engine that end while `begin` runs are in `faults_threads.rs`; there is no handle to cancel by before it
/// returns.
#[test]
fn cancelled_while_finish_waits() {
    let _alone = alone();
    for accel in accels("cancelled_while_finish_waits") {
        let mut rig = Rig::usual(accel).unwrap();
        // It surely waits: the writers are behind a tap.
        for phase in [Phase::Early, Phase::Middle, Phase::Captured] {
            let (live, tap) = at(&rig, phase);
            let handle = live.handle();
            let result = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(20));
                    handle.cancel();
                    tap.open();
                });
                live.finish()
            });
            drop(handle);
            assert!(is_cancelled(&result), "{accel}, {phase:?}: {result:?}");
            rig.unharmed().unwrap();
        }
        // At any moment of it, the commit included.
        let (mut cancelled, mut committed) = (0, 0);
        let mut longest = Duration::from_millis(20);
        for round in 0..60u32 {
            let begun = rig.begin_with_copy(rig.prepare(&rig.options(), |parts| parts).unwrap()).unwrap();
            let live = begun.live.unwrap();
            let handle = live.handle();
            let start = Instant::now();
            let result = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(longest * (round * 37 % 60) / 60);
                    handle.cancel();
                });
                live.finish()
            });
            drop(handle);
            if is_cancelled(&result) {
                cancelled += 1;
                // A slow machine: one that never gets through proves half of it.
                if committed == 0 && round % 5 == 4 {
                    longest *= 2;
                }
            } else {
                let report = result.unwrap();
                longest = start.elapsed().min(report.total * 2);
                rig.is_exact(&begun.t0).unwrap();
                rig.adopt().unwrap();
                committed += 1;
            }
            rig.unharmed().unwrap_or_else(|why| panic!("round {round}: {why}"));
        }
        say(&format!("cancelled_while_finish_waits, {accel}: {cancelled} cancelled in time, {committed} too late"));
        assert!(cancelled > 0 && committed > 0, "{accel}: {cancelled} and {committed}: one side was not tested");
        rig.exact_snapshot().unwrap();
    }
}

/// The guest may be gone before the snapshot is.
#[test]
fn the_guest_may_end_first() {
    let _alone = alone();
    for accel in accels("the_guest_may_end_first") {
        let rig = Rig::usual(accel).unwrap();
        let (live, tap) = at(&rig, Phase::Middle);
        // Its vCPUs wait for pages; they are told to end, and the snapshot is what lets them.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                tap.open();
            });
            drop(rig);
        });
        live.cancel();
        assert!(live.finish().is_err());
        assert!(ramshot_tests::chaos::engine_threads().unwrap().iter().all(|name| !name.starts_with("ramshot-")));
    }
}
