//! The end of a snapshot, in every phase, on real threads: dropped, failed, cancelled, stuck.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use ramshot_core::{Cause, OsError, Treatment, WhenFull};

use super::tests_threads::{join_vcpus, stuck, until, vcpus, within_seconds};
use super::tests_world::{World, fill, pages};
use super::{Pending, SnapshotFailed};
use crate::sim::{Call, Mishap, Outcome, SimVm, Trouble};
use crate::sync::{Arc, thread};

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
