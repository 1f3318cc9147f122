//! The engine's own parts fail: guest RAM that cannot be read, a tracker that refuses or panics, in every thread that
//! calls them, the caller's among them.

#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::{Live, Parts, Pending, SnapshotFailed};
use ramshot_tests::chaos::{BadRam, BadTracker, Injected, Rig, TrackerFault, accels, alone, say};

#[test]
fn any_read_of_guest_ram_may_fail_or_panic() {
    let _alone = alone();
    for accel in accels("any_read_of_guest_ram_may_fail_or_panic") {
        let start = Instant::now();
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        for panics in [false, true] {
            let mut nth = 1;
            loop {
                let before = injected.count();
                let bad = |parts: Parts| {
                    let ram = Arc::new(BadRam::new(parts.ram, nth, panics, &injected));
                    Parts { ram, ..parts }
                };
                let result = rig.snapshot(&rig.options(), bad).unwrap();
                if injected.count() == before {
                    result.unwrap();
                    rig.adopt().unwrap();
                    break;
                }
                let said = format!("{}", result.unwrap_err());
                let expected = if panics { "died" } else { "could not be read" };
                assert!(said.contains(expected), "{accel}: read {nth} is reported as {said:?}");
                rig.unharmed().unwrap_or_else(|why| panic!("read {nth}, panics {panics}: {why}"));
                // There are some hundreds; the first ones each.
                nth += 1 + nth / 4;
            }
            assert!(nth > 20, "{accel}: only {nth} reads: this proved little");
        }
        rig.exact_snapshot().unwrap();
        say(&format!("any_read..., {accel}: {} errors in {:.1?}", injected.count(), start.elapsed()));
    }
}

#[test]
fn any_call_of_the_tracker_may_fail_or_panic() {
    let _alone = alone();
    let kinds = [
        TrackerFault::Populated,
        TrackerFault::Protect,
        TrackerFault::ProtectPanics,
        TrackerFault::Release,
        TrackerFault::ReleasePanics,
        TrackerFault::ReleaseAgain,
        TrackerFault::Events,
        TrackerFault::EventsPanic,
        TrackerFault::Disarm,
    ];
    for accel in accels("any_call_of_the_tracker_may_fail_or_panic") {
        let start = Instant::now();
        let mut rig = Rig::usual(accel).unwrap();
        let injected = Injected::default();
        for fault in kinds {
            for ahead in [false, true] {
                let mut failed = 0;
                for nth in [1, 2, 5, 13, 34] {
                    let before = injected.count();
                    let result = one(&rig, fault, nth, ahead, &injected);
                    let hit = injected.count() > before;
                    match result {
                        Some(Ok(_)) => {
                            assert!(!hit || fault.is_survived(), "{accel}: an image in spite of {fault:?} {nth}");
                            rig.adopt().unwrap();
                        }
                        Some(Err(_)) | None => assert!(hit, "{accel}: {fault:?} {nth}: failed for nothing"),
                    }
                    failed += u32::from(hit);
                    rig.unharmed().unwrap_or_else(|why| panic!("{fault:?} {nth}, ahead {ahead}: {why}"));
                    if !hit {
                        break;
                    }
                }
                assert!(failed > 0, "{accel}: {fault:?} never happened");
            }
        }
        rig.exact_snapshot().unwrap();
        say(&format!("any_call..., {accel}: {} errors in {:.1?}", injected.count(), start.elapsed()));
    }
}

/// One snapshot with a bad tracker. `None`: a panic arrived in the caller's thread.
fn one(
    rig: &Rig,
    fault: TrackerFault,
    nth: u64,
    ahead: bool,
    injected: &Injected,
) -> Option<Result<ramshot::Report, SnapshotFailed>> {
    let bad = |parts: Parts| {
        let tracker = Arc::new(BadTracker::new(parts.tracker, fault, nth, injected));
        Parts { tracker, ..parts }
    };
    let prepared = rig.prepare(&rig.options(), bad).unwrap();
    let prepared = if ahead {
        match catch_unwind(AssertUnwindSafe(|| prepared.arm_ahead())).ok()? {
            Ok(prepared) => prepared,
            Err(error) => return Some(Err(error)),
        }
    } else {
        prepared
    };
    rig.guest.pause().unwrap();
    let state = rig.guest.save_state().unwrap();
    let begun = catch_unwind(AssertUnwindSafe(|| prepared.begin(Pending::All, state)));
    rig.guest.resume().unwrap();
    let live = begun.ok()?;
    if ahead {
        std::thread::sleep(Duration::from_millis(1));
    }
    Some(live.and_then(Live::finish))
}
