//! What the tests on real threads have in common: vCPUs, and patience that ends.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc;
use std::time::{Duration, Instant};

use ramshot_core::{PageId, WhenFull};

use super::Live;
use super::tests_world::{Scene, World, fill, value};
use crate::sim::SimVm;
use crate::sync::{Arc, thread};

/// Runs `test`; what hangs fails.
pub(super) fn within_seconds<R: Send + 'static>(seconds: u64, test: impl FnOnce() -> R + Send + 'static) -> R {
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

pub(super) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(10), "never happens: {what}");
        thread::sleep(Duration::from_micros(50));
    }
}

pub(super) fn spawn_write(vm: &Arc<SimVm>, page: u64, value: u64) -> thread::JoinHandle<()> {
    let vm = Arc::clone(vm);
    thread::spawn(move || vm.write(PageId(page), value))
}

/// `count` vCPUs, each of which writes to its share of the pages, several times; at the end page p holds 1000 + p.
pub(super) fn vcpus(vm: &Arc<SimVm>, count: u64) -> Vec<thread::JoinHandle<()>> {
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
pub(super) fn join_vcpus(scene: &Scene, vcpus: Vec<thread::JoinHandle<()>>) {
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    let memory = scene.vm.memory();
    (0..scene.vm.table().pages()).for_each(|page| assert_eq!(value(&memory, page), 1000 + page));
}

/// A live snapshot whose sink hangs, whose pool is full, and on which a vCPU waits.
pub(super) fn stuck(when_full: WhenFull) -> (Live, Scene, thread::JoinHandle<()>) {
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
