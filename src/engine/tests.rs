//! The engine on real threads, against the simulated VM: every phase, every call that can fail, every thread that can
//! die. Interleavings are `tests_shuttle`'s business.
#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramshot_core::{Cause, HostAddr, OsError, PageId, RamSource, Treatment, WhenFull};

use super::tests_threads::{join_vcpus, spawn_write, stuck, until, vcpus, within_seconds};
use super::tests_world::{Scene, World, fill, pages};
use super::{Pending, SnapshotFailed};
use crate::sim::{Call, Mishap, Outcome, SimVm, Trouble};
use crate::sync::{Arc, Condvar, Mutex, thread};

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
