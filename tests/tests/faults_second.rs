//! A second snapshot while one runs: of the same RAM, to the same file. It is refused, it says why, and the first one
//! does not notice.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use ramshot::{GuestRam, Options, Parts, PrepareError, prepare};
use ramshot_tests::chaos::{BadSink, Injected, Rig, Tap, accels, alone};
use ramshot_tests::snapshot_run::causes;
use ramshot_tests::{Backing, Memory};

#[test]
fn of_the_same_ram() {
    let _alone = alone();
    for accel in accels("of_the_same_ram") {
        let mut rig = Rig::usual(accel).unwrap();
        let other = rig.directory().join("other.ramshot");
        let again = |when: &str| {
            // By the same description, and by a new one of the same memory.
            let ram = GuestRam::from_guest_memory(Arc::clone(rig.guest.memory().guest())).unwrap();
            for ram in [&rig.ram, &Arc::new(ram)] {
                let Err(error) = prepare(ram, &other, &Options::default()) else { panic!("{when}: not refused") };
                let said = causes(&error);
                assert!(matches!(error, PrepareError::Track(_)), "{accel}, {when}: {said}");
                assert!(said.contains("EBUSY") && said.contains("another userfaultfd"), "{accel}, {when}: {said}");
                assert!(!other.exists() && !other.with_extension("ramshot.partial").exists(), "{accel}: left behind");
            }
        };
        let tap = Arc::new(Tap::closed());
        let behind = |parts: Parts| {
            let sink = BadSink::new(parts.sink, &Injected::default()).behind(&tap);
            Parts { sink: Box::new(sink), ..parts }
        };
        let prepared = rig.prepare(&rig.options(), behind).unwrap();
        again("prepared");
        let prepared = prepared.arm_ahead().unwrap();
        again("armed ahead");
        let begun = rig.begin_with_copy(prepared).unwrap();
        let live = begun.live.unwrap();
        for _ in 0..10 {
            again("live");
        }
        assert!(tap.somebody_waits(Duration::from_secs(60)));
        again("half-way");
        tap.open();
        let report = live.finish().unwrap();
        assert!(report.counts.faults > 0, "{accel}: nobody wrote meanwhile: this proved little");
        rig.is_exact(&begun.t0).unwrap();
        rig.adopt().unwrap();
        rig.unharmed().unwrap();
        // And now it may.
        drop(prepare(&rig.ram, &other, &Options::default()).unwrap());
        rig.exact_snapshot().unwrap();
    }
}

#[test]
fn to_the_same_file() {
    let _alone = alone();
    for accel in accels("to_the_same_file") {
        let mut rig = Rig::usual(accel).unwrap();
        let others = Memory::new(8 << 20, Backing::Anon).unwrap();
        others.write(4096, &[1; 4096]).unwrap();
        let others = Arc::new(GuestRam::from_guest_memory(Arc::clone(others.guest())).unwrap());
        let again = |when: &str| {
            for replace in [true, false] {
                let options = Options { replace, ..Options::default() };
                let Err(error) = prepare(&others, rig.target(), &options) else { panic!("{when}: not refused") };
                let said = causes(&error);
                let expected = if replace { "another snapshot is being written" } else { "it exists" };
                assert!(said.contains(expected), "{accel}, {when}: {said}");
            }
        };
        let prepared = rig.prepare(&rig.options(), |parts| parts).unwrap();
        again("prepared");
        let begun = rig.begin_with_copy(prepared).unwrap();
        let live = begun.live.unwrap();
        again("live");
        live.finish().unwrap();
        rig.is_exact(&begun.t0).unwrap();
        rig.adopt().unwrap();
        rig.unharmed().unwrap();
        // Two at once, of two memories, to two files: nothing to refuse.
        let other = rig.directory().join("other.ramshot");
        let first = rig.begin_with_copy(rig.prepare(&rig.options(), |parts| parts).unwrap()).unwrap();
        let second = prepare(&others, &other, &rig.options()).unwrap();
        let second = second.begin(ramshot::Pending::All, Vec::new()).unwrap();
        first.live.unwrap().finish().unwrap();
        rig.is_exact(&first.t0).unwrap();
        assert_eq!(second.finish().unwrap().counts.total, 1);
        std::fs::remove_file(&other).unwrap();
        rig.adopt().unwrap();
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}
