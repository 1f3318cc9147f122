//! "It is done": said once, when `finish` has nothing to wait for any more, however the snapshot ends.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use ramshot_core::{Cause, PageId, WhenFull};

use super::Live;
use super::tests_world::{World, fill};
use crate::sim::SimVm;

const PATIENCE: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(100);

fn told(live: &Live) -> Receiver<std::thread::ThreadId> {
    let (tell, told) = mpsc::channel();
    live.when_done(move || tell.send(std::thread::current().id()).unwrap());
    told
}

#[test]
fn it_is_said_once_when_the_image_is_written_and_not_before() {
    let vm = SimVm::new(16);
    fill(&vm);
    let world = World::new(&vm);
    world.image.hold();
    let (live, scene) = world.begin();
    let (first, second) = (told(&live), told(&live));
    assert!(first.recv_timeout(SHORT).is_err(), "nothing is written yet");
    assert!(!live.progress().captured);
    scene.image.let_go();
    let by = first.recv_timeout(PATIENCE).unwrap();
    assert_ne!(by, std::thread::current().id());
    second.recv_timeout(PATIENCE).unwrap();
    assert_eq!(scene.verdict(live.finish()), None);
    assert!(first.recv_timeout(SHORT).is_err() && second.recv_timeout(SHORT).is_err(), "said twice");
}

#[test]
fn it_is_said_of_an_image_of_zeros_which_no_writer_sees() {
    let vm = SimVm::new(16);
    // Written with zeros: populated, so they are captured, and dropped by the thread that looks at them.
    (0..16).for_each(|page| vm.write(PageId(page), 0));
    for _ in 0..50 {
        let (live, scene) = World::new(&vm).begin();
        told(&live).recv_timeout(PATIENCE).unwrap();
        assert_eq!(scene.verdict(live.finish()), None);
    }
}

#[test]
fn it_is_said_when_it_is_cancelled_and_when_it_is_dropped() {
    for drops in [false, true] {
        let vm = SimVm::new(16);
        fill(&vm);
        let mut world = World::new(&vm);
        world.limits.when_full = WhenFull::Stall;
        world.image.hold();
        let (live, scene) = world.begin();
        let told = told(&live);
        live.cancel();
        // The writer that would say it is inside the sink, for which `finish` waits, too.
        scene.image.let_go();
        if drops {
            drop(live);
            told.recv_timeout(PATIENCE).unwrap();
        } else {
            told.recv_timeout(PATIENCE).unwrap();
            assert_eq!(scene.verdict(live.finish()), Some(Cause::Cancelled));
        }
    }
}

#[test]
fn who_asks_too_late_is_told_at_once_by_himself() {
    let vm = SimVm::new(4);
    fill(&vm);
    let (live, scene) = World::new(&vm).begin();
    told(&live).recv_timeout(PATIENCE).unwrap();
    assert_eq!(told(&live).try_recv().unwrap(), std::thread::current().id());
    let handle = live.handle();
    assert_eq!(scene.verdict(live.finish()), None);
    let (tell, told) = mpsc::channel();
    handle.when_done(move || tell.send(()).unwrap());
    told.try_recv().unwrap();
}

#[test]
fn one_that_panics_takes_nothing_with_it() {
    let vm = SimVm::new(16);
    fill(&vm);
    let world = World::new(&vm);
    world.image.hold();
    let (live, scene) = world.begin();
    live.when_done(|| panic!("on purpose"));
    let told = told(&live);
    scene.image.let_go();
    told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(scene.verdict(live.finish()), None);
}

#[test]
fn every_thread_is_ready_when_it_is_prepared() {
    let mut world = World::new(&SimVm::new(4));
    (world.options.workers, world.options.writers) = (3, 2);
    let prepared = world.prepare();
    assert_eq!((prepared.running.threads.len(), prepared.running.guard.is_some()), (5, true));
    assert_eq!(prepared.running.shared.lock().ready, 6);
}
