//! Other threads of the same process change mappings all the time while snapshots are taken: `madvise` on guest RAM that
//! holds nothing, `mmap`, `mremap`, `munmap` elsewhere, `fork`, `fork` and `exec`. The kernel answers EAGAIN then; the
//! snapshot succeeds and is T0. And guest RAM that is discarded, announced and not.

#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ramshot::{Cause, Parts, SnapshotFailed};
use ramshot_tests::chaos::{BadSink, Injected, Rig, Tap, accels, alone, say};
use ramshot_tests::{Accel, Backing, GuestConfig, Workload};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Guest-physical: RAM that the guest never touches, to the end.
const SCRATCH: u64 = 24 * MIB;
const SIZE: u64 = 32 * MIB;

/// A guest that works on 8 MiB and has 8 MiB it never touches.
fn rig(accel: Accel, backing: Backing) -> Rig {
    let config = GuestConfig {
        vcpus: 2,
        workload: Workload::Random,
        working_set: 8 * MIB,
        fill: Some(16 * MIB),
        ..GuestConfig::default()
    };
    Rig::new(accel, SIZE, backing, config).unwrap()
}

/// The address of guest RAM in this process.
fn host(rig: &Rig, guest: u64) -> *mut libc::c_void {
    let region = rig.guest.memory().regions().iter().find(|r| (r.guest..r.guest + r.len).contains(&guest)).unwrap();
    ptr::with_exposed_provenance_mut(usize::try_from(region.host + (guest - region.guest)).unwrap())
}

/// Discards a piece of guest RAM the way a VMM does for that backing.
fn discard(rig: &Rig, guest: u64, len: u64, backing: Backing) {
    let advice = if backing == Backing::Memfd { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: a part of guest RAM that holds nothing anybody still wants.
    let answer = unsafe { libc::madvise(host(rig, guest), usize::try_from(len).unwrap(), advice) };
    assert_eq!(answer, 0, "madvise: {}", std::io::Error::last_os_error());
}

/// What a storm consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Storm {
    Discard,
    Remap,
    Fork,
    ForkAndExec,
}

/// Does it once.
fn blow(rig: &Rig, storm: Storm, backing: Backing, turn: u64) {
    match storm {
        // A page here and a page there: there is nothing in it.
        Storm::Discard => discard(rig, SCRATCH + turn % 64 * 4096, 4096, backing),
        Storm::Remap => remap(),
        Storm::Fork => {
            // SAFETY: the child does nothing but end.
            let child = unsafe { libc::fork() };
            assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
            if child == 0 {
                // SAFETY: ends the child at once, without running anything of the parent's.
                unsafe { libc::_exit(0) };
            }
            // SAFETY: a child of ours; nobody wants its status.
            unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
        }
        Storm::ForkAndExec => {
            assert!(Command::new("/bin/true").status().unwrap().success());
        }
    }
}

fn remap() {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: mappings of this function's own, of an address that the kernel chooses, unmapped before it returns.
    unsafe {
        let mapped = libc::mmap(ptr::null_mut(), 1 << 16, access, flags, -1, 0);
        assert!(mapped != libc::MAP_FAILED);
        mapped.cast::<u8>().write(1);
        let moved = libc::mremap(mapped, 1 << 16, 1 << 20, libc::MREMAP_MAYMOVE);
        assert!(moved != libc::MAP_FAILED);
        libc::munmap(moved, 1 << 20);
    }
}

/// Storms until told to stop, one after the other or all at once.
fn storm(rig: &Rig, storms: &[Storm], backing: Backing, stop: &AtomicBool, blown: &AtomicU64) {
    std::thread::scope(|scope| {
        for &storm in storms {
            scope.spawn(move || {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    blow(rig, storm, backing, turn);
                    blown.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
}

/// Stops the storm also if the test fails.
struct Calm<'a>(&'a AtomicBool);

impl Drop for Calm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn in_any_storm_the_image_is_t0() {
    let _alone = alone();
    let all = [Storm::Discard, Storm::Remap, Storm::Fork, Storm::ForkAndExec];
    for accel in accels("in_any_storm_the_image_is_t0") {
        for backing in [Backing::Anon, Backing::Memfd] {
            let start = Instant::now();
            let mut rig = rig(accel, backing);
            let (mut blown_in_all, mut faults) = (0, 0);
            for storms in [&all[0..1], &all[1..2], &all[2..3], &all[3..4], &all] {
                for ahead in [false, true] {
                    let (stop, blown) = (AtomicBool::new(false), AtomicU64::new(0));
                    std::thread::scope(|scope| {
                        let _calm = Calm(&stop);
                        scope.spawn(|| storm(&rig, storms, backing, &stop, &blown));
                        for round in 0..2 {
                            let prepared = rig.prepare(&rig.options(), |parts| parts).unwrap();
                            let prepared = if ahead { prepared.arm_ahead().unwrap() } else { prepared };
                            let begun = rig.begin_with_copy(prepared).unwrap();
                            let report = begun.live.and_then(ramshot::Live::finish);
                            let report = report.unwrap_or_else(|error| {
                                let said = ramshot_tests::snapshot_run::causes(&error);
                                panic!("{accel} {backing}, {storms:?}, round {round}: {said}")
                            });
                            rig.is_exact(&begun.t0).unwrap();
                            faults += report.counts.faults;
                        }
                    });
                    blown_in_all += blown.load(Ordering::Relaxed);
                    rig.adopt().unwrap();
                    rig.unharmed().unwrap_or_else(|why| panic!("{backing}, {storms:?}: {why}"));
                }
            }
            assert!(faults > 0 && blown_in_all > 100, "{faults} faults, {blown_in_all} changes: this proved little");
            say(&format!("storms, {accel} {backing}: 20 snapshots, {blown_in_all} changes in {:.1?}", start.elapsed()));
            rig.exact_snapshot().unwrap();
        }
    }
}

/// Fills the scratch area, so that there is something to lose.
fn fill_scratch(rig: &Rig, value: u8) {
    for at in (SCRATCH..SIZE).step_by(1 << 20) {
        rig.guest.memory().write(at, &vec![value; 1 << 20]).unwrap();
    }
}

/// A balloon that says so first: every page is captured, then discarded.
#[test]
fn an_announced_discard_is_captured_first() {
    let _alone = alone();
    for accel in accels("an_announced_discard_is_captured_first") {
        for backing in [Backing::Anon, Backing::Memfd] {
            let mut rig = rig(accel, backing);
            for round in 1..=3 {
                fill_scratch(&rig, round);
                // A slow disk and a small pool, or the scan is through before the balloon has begun.
                let slow = |parts: Parts| {
                    let sink = BadSink::new(parts.sink, &Injected::default()).slow(Duration::from_millis(20));
                    Parts { sink: Box::new(sink), ..parts }
                };
                let begun = rig.begin_with_copy(rig.prepare(&rig.options(), slow).unwrap()).unwrap();
                let live = begun.live.unwrap();
                let handle = live.handle();
                // From the end, against the scan.
                for piece in (0..(SIZE - SCRATCH) >> 16).rev() {
                    let at = SCRATCH + (piece << 16);
                    handle.before_discard_guest(ramshot::GuestAddr(at), 1 << 16).unwrap();
                    discard(&rig, at, 1 << 16, backing);
                }
                drop(handle);
                let report = live.finish().unwrap();
                assert!(report.counts.by_discard > 0, "{accel} {backing}: the scan was faster: this proved nothing");
                rig.is_exact(&begun.t0).unwrap();
                rig.adopt().unwrap();
                rig.unharmed().unwrap();
                let mut byte = [1];
                rig.guest.memory().read(SCRATCH + 5, &mut byte).unwrap();
                assert_eq!(byte, [0], "{accel} {backing}: it was not discarded at all");
            }
            rig.exact_snapshot().unwrap();
        }
    }
}

/// One that does not: the snapshot cannot be had any more, and says so.
#[test]
fn an_unannounced_discard_ends_the_snapshot() {
    let _alone = alone();
    for accel in accels("an_unannounced_discard_ends_the_snapshot") {
        let mut rig = rig(accel, Backing::Anon);
        fill_scratch(&rig, 9);
        let tap = Arc::new(Tap::closed());
        let behind = |parts: Parts| {
            let sink = BadSink::new(parts.sink, &Injected::default()).behind(&tap);
            Parts { sink: Box::new(sink), ..parts }
        };
        // The last page of RAM, with a pool that holds no more than 2 of 24 MiB.
        let live = rig.begin(rig.prepare(&rig.options(), behind).unwrap()).unwrap().unwrap();
        discard(&rig, SIZE - 4096, 4096, Backing::Anon);
        let start = Instant::now();
        while !live.progress().ended {
            assert!(start.elapsed() < PATIENCE, "{accel}: a discard of pending pages went unnoticed");
            std::thread::sleep(Duration::from_millis(1));
        }
        tap.open();
        let result = live.finish();
        assert!(matches!(result, Err(SnapshotFailed::Ended { cause: Cause::Discarded(_), .. })), "{accel}: {result:?}");
        rig.unharmed().unwrap();
        rig.exact_snapshot().unwrap();
    }
}
