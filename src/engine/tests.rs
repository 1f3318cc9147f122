//! The engine on real threads, against the simulated VM: every phase, every call that can fail, every thread that can
//! die. Interleavings are `tests_shuttle`'s business.
#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ramshot_core::{Cause, HostAddr, OsError, PageId, RamSource, Treatment, WhenFull};

use super::tests_world::{Scene, World, fill, pages, value};
use super::{Pending, SnapshotFailed};
use crate::sim::{Call, Mishap, Outcome, SimVm, Trouble};
use crate::sync::{Arc, Condvar, Mutex, thread};

/// Runs `test`; what hangs fails.
fn within_seconds<R: Send + 'static>(seconds: u64, test: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, finished) = mpsc::channel();
    let running = thread::spawn(move || {
        let result = test();
        let _ = done.send(());
        result
    });
    if finished.recv_timeout(Duration::from_secs(seconds)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("hangs");
    }
    running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(10), "never happens: {what}");
        thread::sleep(Duration::from_micros(50));
    }
}

fn spawn_write(vm: &Arc<SimVm>, page: u64, value: u64) -> thread::JoinHandle<()> {
    let vm = Arc::clone(vm);
    thread::spawn(move || vm.write(PageId(page), value))
}

/// `count` vCPUs, each of which writes to its share of the pages, several times; at the end page p holds 1000 + p.
fn vcpus(vm: &Arc<SimVm>, count: u64) -> Vec<thread::JoinHandle<()>> {
    let vcpu = |number| {
        let vm = Arc::clone(vm);
        thread::spawn(move || {
            let mine = || (0..vm.table().pages()).filter(|page| page % count == number);
            for round in 1..4 {
                // From the end, against the scan.
                mine().rev().for_each(|page| vm.write(PageId(page), 10_000 * round + page));
            }
            mine().for_each(|page| vm.write(PageId(page), 1000 + page));
        })
    };
    (0..count).map(vcpu).collect()
}

/// Every vCPU comes to its end, and memory is what they wrote.
fn join_vcpus(scene: &Scene, vcpus: Vec<thread::JoinHandle<()>>) {
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    let memory = scene.vm.memory();
    (0..scene.vm.table().pages()).for_each(|page| assert_eq!(value(&memory, page), 1000 + page));
}

// ---- the image

#[test]
fn the_image_is_memory_at_t0_however_the_guest_writes() {
    within_seconds(60, || {
        for round in 0..60_u64 {
            let vm = SimVm::new(48);
            fill(&vm);
            let mut world = World::new(&vm);
            world.options.workers = 1 + usize::from(round % 2 == 1);
            world.options.writers = 1 + usize::from(round % 3 == 1);
            world.slots = [3, 5, 64][usize::try_from(round % 3).unwrap()];
            let (live, scene) = world.begin();
            let running = vcpus(&vm, 4);
            let report = live.finish();
            assert_eq!(report.as_ref().unwrap().counts.released, 48);
            assert_eq!(scene.verdict(report), None);
            join_vcpus(&scene, running);
        }
    });
}

#[test]
fn what_was_never_touched_is_zero_and_costs_nothing() {
    let vm = SimVm::new(64);
    vm.write(PageId(9), 5);
    let (live, scene) = World::new(&vm).begin();
    vm.write(PageId(20), 1);
    let report = live.finish();
    assert_eq!(report.as_ref().unwrap().counts.total, 1);
    assert_eq!(scene.verdict(report), None);
    assert_eq!(vm.counts().faults, 0);
}

#[test]
fn a_vm_without_content_is_snapshotted_at_once() {
    within_seconds(10, || {
        let (live, scene) = World::new(&SimVm::new(4)).begin();
        assert_eq!(scene.verdict(live.finish()), None);
    });
}

#[test]
fn more_vcpus_than_the_fault_queue_holds_are_all_served() {
    within_seconds(60, || {
        let vm = SimVm::new(300);
        fill(&vm);
        let world = World::new(&vm);
        world.image.hold();
        let (live, scene) = world.begin();
        let running: Vec<_> = (0..300).map(|page| spawn_write(&vm, page, 1000 + page)).collect();
        // The pool holds four pages; everybody else waits.
        until("everybody blocked", || vm.blocked() >= 290);
        scene.image.let_go();
        join_vcpus(&scene, running);
        assert_eq!(scene.verdict(live.finish()), None);
    });
}

#[test]
fn each_treatment_has_its_moment() {
    within_seconds(10, || {
        let blocks = [
            SimVm::block("ram", 0, 8, Treatment::Tracked),
            SimVm::block("rom", 8, 4, Treatment::ReadOnly),
            SimVm::block("shared", 12, 4, Treatment::Ignored),
            SimVm::block("flash", 16, 6, Treatment::InPause),
        ];
        let vm = SimVm::with_blocks(&blocks).unwrap();
        fill(&vm);
        assert_eq!(vm.table().pages(), 18);
        let (live, scene) = World::new(&vm).begin();
        let running: Vec<_> = (0..8).map(|page| spawn_write(&vm, page, 50)).collect();
        // Flash is written without a fault, right after the pause.
        (12..18).for_each(|page| vm.write(PageId(page), 60));
        let report = live.finish();
        assert_eq!(report.as_ref().unwrap().counts.by_pause, 6);
        assert_eq!(scene.verdict(report), None);
        running.into_iter().for_each(|writer| writer.join().unwrap());
    });
}

#[test]
fn large_host_pages_are_captured_and_released_whole() {
    within_seconds(20, || {
        let huge = ramshot_core::RamBlock { page_size: 4 * 4096, ..SimVm::block("huge", 0, 32, Treatment::Tracked) };
        let small = SimVm::block("small", 32, 8, Treatment::Tracked);
        for slots in [4, 6, 32] {
            let vm = SimVm::with_blocks(&[huge, small]).unwrap();
            fill(&vm);
            let mut world = World::new(&vm);
            world.slots = slots;
            let (live, scene) = world.begin();
            let running = vcpus(&vm, 3);
            assert_eq!(scene.verdict(live.finish()), None);
            join_vcpus(&scene, running);
        }
    });
}

// ---- the end, in every phase

#[test]
fn a_prepared_snapshot_that_is_dropped_is_undone() {
    within_seconds(10, || {
        let vm = SimVm::new(4);
        fill(&vm);
        let world = World::new(&vm);
        let image = world.image.clone();
        drop(world.prepare());
        assert_eq!(image.outcome(), Outcome::Aborted);
        assert!(vm.is_clean());
        assert_eq!(Arc::strong_count(&vm), 1, "a thread is left");
    });
}

#[test]
fn begin_that_fails_half_way_rolls_back() {
    within_seconds(10, || {
        let blocks = [SimVm::block("low", 0, 4, Treatment::Tracked), SimVm::block("high", 8, 4, Treatment::Tracked)];
        for call in [Call::Populated, Call::Protect] {
            let vm = SimVm::with_blocks(&blocks).unwrap();
            fill(&vm);
            let world = World::new(&vm);
            let image = world.image.clone();
            let prepared = world.prepare();
            vm.trouble(Trouble::default().on(call, 1..2, Mishap::Error(12)));
            let Err(SnapshotFailed::Ended { cause: Cause::Arm(OsError { errno: 12, .. }), .. }) =
                prepared.begin(Pending::All, vec![])
            else {
                panic!("begin succeeded")
            };
            assert_eq!(image.outcome(), Outcome::Aborted);
            assert!(vm.is_clean());
            assert_eq!(Arc::strong_count(&vm), 1, "a thread is left");
        }
    });
}

/// A live snapshot whose sink hangs, whose pool is full, and on which a vCPU waits.
fn stuck(when_full: WhenFull) -> (super::Live, Scene, thread::JoinHandle<()>) {
    let vm = SimVm::new(16);
    fill(&vm);
    let mut world = World::new(&vm);
    world.limits.when_full = when_full;
    world.image.hold();
    let (live, scene) = world.begin();
    // The scan leaves a slot to faults. The first vCPUs take it.
    until("the sink hangs", || scene.image.waiting() == 1 && live.progress().pages_captured >= 3);
    let vcpu = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || (8..16).for_each(|page| vm.write(PageId(page), 77)))
    };
    (live, scene, vcpu)
}

#[test]
fn cancel_frees_the_guest_although_the_sink_hangs() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        until("the vCPU waits", || scene.vm.blocked() == 1);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(scene.vm.blocked(), 1, "the policy is to wait");
        live.cancel();
        vcpu.join().unwrap();
        until("disarmed", || scene.vm.is_clean());
        scene.image.let_go();
        assert_eq!(scene.verdict(live.finish()), Some(Cause::Cancelled));
    });
}

#[test]
fn dropping_a_live_snapshot_cancels_it() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        let dropper = thread::spawn(move || drop(live));
        vcpu.join().unwrap();
        scene.image.let_go();
        dropper.join().unwrap();
        assert_eq!(scene.image.outcome(), Outcome::Aborted);
        scene.undisturbed();
        assert_eq!(Arc::strong_count(&scene.vm), 1, "a thread is left");
    });
}

#[test]
fn a_full_pool_cancels_if_that_is_the_policy() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Cancel);
        vcpu.join().unwrap();
        scene.image.let_go();
        assert_eq!(scene.verdict(live.finish()), Some(Cause::PoolFull));
    });
}

#[test]
fn a_full_pool_stalls_the_writer_until_there_is_room() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        let held = || live.running.shared.lock().core.as_ref().map_or(0, |core| core.counts().faults_held);
        until("the fault is held", || held() > 0);
        scene.image.let_go();
        vcpu.join().unwrap();
        let report = live.finish();
        assert!(report.as_ref().unwrap().counts.faults_held > 0);
        assert_eq!(scene.verdict(report), None);
    });
}

// The fault thread used to wait for room with its back to the kernel: discards hung as long as the disk, and a release
// that the kernel had put off because of them never came.
#[test]
fn a_full_pool_does_not_stop_the_reading_of_events() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        until("the vCPU waits", || scene.vm.blocked() == 1);
        // Captured long ago: discarding it is harmless, and must not wait for the disk.
        scene.vm.discard(pages(&scene.vm, 0, 1));
        scene.image.let_go();
        vcpu.join().unwrap();
        assert_eq!(scene.verdict(live.finish()), None);
    });
}

#[test]
fn releases_put_off_while_the_pool_is_full_are_tried_again() {
    within_seconds(10, || {
        let vm = SimVm::new(16);
        fill(&vm);
        let mut world = World::new(&vm);
        (world.slots, world.limits.reserve_slots) = (2, 0);
        vm.trouble(Trouble::default().on(Call::Release, 0..12, Mishap::Again));
        let (live, scene) = world.begin();
        let running = vcpus(&vm, 4);
        assert_eq!(scene.verdict(live.finish()), None);
        join_vcpus(&scene, running);
    });
}

#[test]
fn cancel_after_the_capture_drops_the_image_and_after_the_writing_is_too_late() {
    within_seconds(10, || {
        let vm = SimVm::new(4);
        fill(&vm);
        let mut world = World::new(&vm);
        world.slots = 16;
        world.image.hold();
        let (live, scene) = world.begin();
        until("captured", || live.progress().captured);
        until("disarmed", || vm.is_clean());
        live.cancel();
        scene.image.let_go();
        assert_eq!(scene.verdict(live.finish()), Some(Cause::Cancelled));

        let (live, scene) = World::new(&vm).begin();
        until("written", || live.running.shared.lock().is_written());
        live.cancel();
        assert!(!live.progress().ended);
        assert_eq!(scene.verdict(live.finish()), None);
    });
}

#[test]
fn no_thread_and_no_memory_is_left() {
    within_seconds(10, || {
        let vm = SimVm::new(4);
        fill(&vm);
        let (live, scene) = World::new(&vm).begin();
        let handle = live.handle();
        assert_eq!(scene.verdict(live.finish()), None);
        assert_eq!(vm.counts().disarms, 1);
        drop(scene);
        // The handle keeps what is shared, so the threads' own references are gone if it has the only one.
        assert_eq!(Arc::strong_count(&handle.shared), 1);
        assert!(handle.before_discard(pages(&vm, 0, 4)).is_ok());
        drop(handle);
        assert_eq!(Arc::strong_count(&vm), 1);
    });
}

// ---- whatever fails, whenever

#[test]
fn whichever_call_fails_there_is_the_image_or_none_and_the_guest_runs_on() {
    within_seconds(120, || {
        let calls = [
            Call::Populated,
            Call::Protect,
            Call::Release,
            Call::NextEvents,
            Call::Disarm,
            Call::Read,
            Call::Write,
            Call::Commit,
        ];
        for call in calls {
            for how in [Mishap::Error(5), Mishap::Panic, Mishap::Again, Mishap::Early] {
                for nth in 0..16 {
                    fail_at(call, how, nth);
                }
            }
        }
    });
}

fn fail_at(call: Call, how: Mishap, nth: u64) {
    let vm = SimVm::new(16);
    fill(&vm);
    let world = World::new(&vm);
    let trouble = Trouble::default().on(call, nth..nth + 1, how);
    vm.trouble(trouble.clone());
    world.image.trouble(trouble);
    let image = world.image.clone();
    let at_t0 = vm.memory();
    let prepared = world.prepare();
    let scene = Scene { vm: Arc::clone(&vm), image, at_t0 };
    let begun = catch_unwind(AssertUnwindSafe(|| prepared.begin(Pending::All, vec![7])));
    let running = vcpus(&vm, 3);
    let finished = match begun {
        Ok(Ok(live)) => catch_unwind(AssertUnwindSafe(|| live.finish())),
        Ok(Err(failed)) => Ok(Err(failed)),
        Err(panic) => Err(panic),
    };
    join_vcpus(&scene, running);
    match finished {
        // A thread of ours panicked, and that is all the VMM hears of it; or it could be borne.
        Ok(result) => {
            let failed = result.is_err();
            let cause = scene.verdict(result);
            let because = matches!(
                (call, how, cause),
                (_, _, None)
                    | (Call::Populated | Call::Protect, _, Some(Cause::Arm(_)))
                    | (Call::Release, Mishap::Error(5), Some(Cause::Release(_)))
                    | (Call::NextEvents, Mishap::Error(5) | Mishap::Again, Some(Cause::Events(_)))
                    | (Call::Read, Mishap::Error(5) | Mishap::Again, Some(Cause::Capture(_)))
                    | (Call::Write | Call::Commit, _, Some(Cause::Sink))
                    | (_, Mishap::Panic, Some(Cause::ThreadDied))
            );
            assert!(because, "{call:?} number {nth}, {how:?}: {cause:?}");
            let harmless = how == Mishap::Early || (how, call) == (Mishap::Again, Call::Release);
            assert!(!(harmless && failed), "{call:?} number {nth}, {how:?}: {cause:?}");
        }
        // The panic came on a thread of the VMM's: it is the VMM's.
        Err(_) => {
            assert!(
                how == Mishap::Panic && matches!(call, Call::Populated | Call::Protect | Call::Commit | Call::Disarm)
            );
            assert_ne!(scene.image.outcome(), Outcome::Committed);
            scene.undisturbed();
        }
    }
    drop(scene);
    assert_eq!(Arc::strong_count(&vm), 1, "{call:?} number {nth}, {how:?}: a thread is left");
}

#[test]
fn the_first_cause_is_the_one_kept() {
    within_seconds(10, || {
        let vm = SimVm::new(16);
        fill(&vm);
        let world = World::new(&vm);
        vm.trouble(Trouble::default().on(Call::Release, 1..100, Mishap::Error(5)));
        world.image.trouble(Trouble::default().on(Call::Write, 1..100, Mishap::Error(28)));
        world.image.hold();
        let (live, scene) = world.begin();
        until("ended", || live.progress().ended);
        scene.image.let_go();
        live.cancel();
        let cause = scene.verdict(live.finish());
        assert!(matches!(cause, Some(Cause::Release(OsError { errno: 5, .. }))), "{cause:?}");
    });
}

#[test]
fn a_disk_that_is_full_is_named() {
    let vm = SimVm::new(4);
    fill(&vm);
    let world = World::new(&vm);
    world.image.trouble(Trouble::default().on(Call::Write, 0..1, Mishap::Error(28)));
    let (live, _scene) = world.begin();
    let Err(SnapshotFailed::Ended { cause: Cause::Sink, sink: Some(error) }) = live.finish() else { panic!() };
    assert_eq!(error.source.raw_os_error(), Some(28));
}

#[test]
fn events_may_come_twice_late_in_any_order_and_one_by_one() {
    within_seconds(30, || {
        let plans = [
            Trouble::default().events_twice(),
            Trouble::default().newest_first(),
            Trouble::default().one_by_one(),
            Trouble::default().on(Call::NextEvents, 3..40, Mishap::Early),
            Trouble::default().events_twice().newest_first().one_by_one().on(Call::Release, 5..25, Mishap::Again),
        ];
        for plan in plans {
            for _ in 0..10 {
                let vm = SimVm::new(48);
                fill(&vm);
                vm.trouble(plan.clone());
                let (live, scene) = World::new(&vm).begin();
                let running = vcpus(&vm, 4);
                assert_eq!(scene.verdict(live.finish()), None);
                join_vcpus(&scene, running);
            }
        }
    });
}

// The fault thread used to interrupt itself with every release put off, and spun.
#[test]
fn a_storm_of_again_is_waited_out_not_spun_through() {
    within_seconds(20, || {
        let vm = SimVm::new(1);
        fill(&vm);
        vm.trouble(Trouble::default().on(Call::Release, 0..40, Mishap::Again));
        let start = Instant::now();
        let (live, scene) = World::new(&vm).begin();
        assert_eq!(scene.verdict(live.finish()), None);
        assert!(start.elapsed() >= Duration::from_millis(35), "{:?}", start.elapsed());
        assert_eq!(vm.counts().releases, 41);
    });
}

// ---- discards

#[test]
fn an_unannounced_discard_ends_the_snapshot_and_is_not_held_up() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        scene.vm.discard(pages(&scene.vm, 6, 2));
        vcpu.join().unwrap();
        scene.image.let_go();
        let cause = scene.verdict(live.finish());
        assert!(matches!(cause, Some(Cause::Discarded(_))), "{cause:?}");
    });
}

#[test]
fn memory_unmapped_under_the_snapshot_ends_it() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        scene.vm.unmap(pages(&scene.vm, 6, 2));
        vcpu.join().unwrap();
        scene.image.let_go();
        let cause = scene.verdict(live.finish());
        assert!(matches!(cause, Some(Cause::Unmapped(_))), "{cause:?}");
    });
}

#[test]
fn an_announced_discard_is_captured_first() {
    within_seconds(20, || {
        for _ in 0..50 {
            let vm = SimVm::new(32);
            fill(&vm);
            let (live, scene) = World::new(&vm).begin();
            let running = vcpus(&vm, 2);
            let balloon = {
                let (handle, vm) = (live.handle(), Arc::clone(&vm));
                thread::spawn(move || {
                    for first in (0..32).step_by(4) {
                        handle.before_discard(pages(&vm, first, 3)).unwrap();
                        vm.discard(pages(&vm, first, 3));
                    }
                })
            };
            assert_eq!(scene.verdict(live.finish()), None);
            balloon.join().unwrap();
            running.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        }
    });
}

#[test]
fn a_panic_below_before_discard_ends_the_snapshot_not_the_caller() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        until("the vCPU waits", || scene.vm.blocked() == 1);
        scene.vm.trouble(Trouble::default().on(Call::Read, 0..100, Mishap::Panic));
        let balloon = {
            let (handle, range) = (live.handle(), pages(&scene.vm, 6, 1));
            thread::spawn(move || handle.before_discard(range))
        };
        scene.image.let_go();
        assert_eq!(balloon.join().unwrap(), Err(Cause::ThreadDied));
        vcpu.join().unwrap();
        assert_eq!(scene.verdict(live.finish()), Some(Cause::ThreadDied));
    });
}

// ---- others

#[test]
fn a_fault_outside_ram_is_released_and_reported() {
    within_seconds(10, || {
        let vm = SimVm::new(16);
        fill(&vm);
        let world = World::new(&vm);
        world.image.hold();
        let (live, scene) = world.begin();
        vm.fault(HostAddr(0x1234_5678));
        scene.image.let_go();
        let report = live.finish();
        assert_eq!(report.as_ref().unwrap().foreign_faults, 1);
        assert_eq!(scene.verdict(report), None);
    });
}

#[test]
fn a_writer_blocked_on_a_page_that_is_released_already_is_woken() {
    within_seconds(10, || {
        let (live, scene, vcpu) = stuck(WhenFull::Stall);
        scene.vm.fault(pages(&scene.vm, 0, 1).start);
        scene.image.let_go();
        vcpu.join().unwrap();
        let report = live.finish();
        assert!(report.as_ref().unwrap().counts.stale_faults > 0);
        assert_eq!(scene.verdict(report), None);
    });
}

#[test]
fn memory_cannot_be_tracked_twice_at_a_time() {
    let vm = SimVm::new(4);
    fill(&vm);
    let world = World::new(&vm);
    world.image.hold();
    let (live, scene) = world.begin();
    live.cancel();
    scene.image.let_go();
    assert_eq!(scene.verdict(live.finish()), Some(Cause::Cancelled));
    let prepared = World::new(&vm).prepare();
    assert_eq!(vm.track().unwrap_err().errno, 16);
    drop(prepared);
    assert!(vm.is_clean());
}

/// RAM whose reads (from `only` there, or all) wait at a gate, after the bytes are read.
struct Gated {
    vm: Arc<SimVm>,
    only: Option<HostAddr>,
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicBool,
}

impl Gated {
    fn new(vm: &Arc<SimVm>, only: Option<HostAddr>) -> Arc<Self> {
        let (open, opened) = (Mutex::new(false), Condvar::new());
        Arc::new(Self { vm: Arc::clone(vm), only, open, opened, waiting: AtomicBool::new(false) })
    }

    fn is_waited_at(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl RamSource for Gated {
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        self.vm.read(from, into)?;
        if self.only.is_none_or(|only| only == from) {
            let mut open = self.open.lock().unwrap();
            self.waiting.store(true, Ordering::SeqCst);
            while !*open {
                open = self.opened.wait(open).unwrap();
            }
        }
        Ok(())
    }
}

#[test]
fn a_fault_that_waits_for_room_needs_no_worker_to_be_served() {
    within_seconds(10, || {
        let vm = SimVm::new(8);
        fill(&vm);
        let gated = Gated::new(&vm, Some(pages(&vm, 1, 1).start));
        let mut world = World::new(&vm);
        (world.slots, world.limits.reserve_slots, world.limits.scan_pages) = (2, 0, 1);
        world.ram = Arc::clone(&gated) as Arc<dyn RamSource>;
        world.image.hold();
        let (live, scene) = world.begin();
        until("page 0 hangs in the sink, page 1 in a worker", || gated.is_waited_at() && scene.image.waiting() == 1);
        let vcpu = spawn_write(&vm, 5, 9);
        let held = || live.running.shared.lock().core.as_ref().map_or(0, |core| core.counts().faults_held);
        until("the fault is held", || held() > 0);
        scene.image.let_go();
        vcpu.join().unwrap();
        gated.open();
        assert_eq!(scene.verdict(live.finish()), None);
    });
}

// The kernel lifts a protection whoever put it on. A worker that was late used to release, with the descriptor of a
// snapshot that was over, what the next one had just protected.
#[test]
fn a_worker_that_is_late_does_not_disturb_the_next_snapshot() {
    within_seconds(10, || {
        let vm = SimVm::new(8);
        fill(&vm);
        let gated = Gated::new(&vm, None);
        let mut first = World::new(&vm);
        first.ram = Arc::clone(&gated) as Arc<dyn RamSource>;
        let (first, first_scene) = first.begin();
        until("a worker is late", || gated.is_waited_at());
        first.cancel();
        until("disarmed", || vm.is_clean());

        let mut second = World::new(&vm);
        let late = Gated::new(&vm, None);
        second.ram = Arc::clone(&late) as Arc<dyn RamSource>;
        let (second, scene) = second.begin();
        gated.open();
        assert!(matches!(first.finish(), Err(SnapshotFailed::Ended { cause: Cause::Cancelled, .. })));
        assert_eq!(first_scene.image.outcome(), Outcome::Aborted);
        let running = vcpus(&vm, 2);
        until("the vCPUs wait", || vm.blocked() == 2);
        late.open();
        assert_eq!(scene.verdict(second.finish()), None);
        join_vcpus(&scene, running);
    });
}
