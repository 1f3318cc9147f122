//! Room made ahead of T0: for what a guest writes to that writes to more than the pool holds, and for nothing else.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};

use ramshot_core::{Cause, PageId};

use super::tests_world::{Scene, World, fill};
use super::{Live, Pending, Prepared, SnapshotFailed};
use crate::sim::{Call, MemoryImage, Mishap, SimVm, Trouble};
use crate::sync::{Arc, thread};

const PAGES: u64 = 64;

/// Arms ahead while a vCPU writes to the first `busy` pages, over and over.
fn arm_ahead(trouble: Trouble, busy: u64) -> (Result<Prepared, SnapshotFailed>, Arc<SimVm>, MemoryImage) {
    let vm = SimVm::new(PAGES);
    fill(&vm);
    let world = World::new(&vm);
    let image = world.image.clone();
    image.take_room();
    image.trouble(trouble);
    let prepared = world.prepare();
    let stop = Arc::new(AtomicBool::new(false));
    let guest = {
        let (vm, stop) = (Arc::clone(&vm), Arc::clone(&stop));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                (0..busy).for_each(|page| vm.write(PageId(page), page + 1000));
                thread::yield_now();
            }
        })
    };
    let prepared = prepared.arm_ahead();
    stop.store(true, Ordering::Relaxed);
    guest.join().unwrap();
    (prepared, vm, image)
}

fn finish(prepared: Result<Prepared, SnapshotFailed>, vm: Arc<SimVm>, image: MemoryImage) -> Option<Cause> {
    let scene = Scene { at_t0: vm.memory(), vm, image };
    scene.verdict(prepared.and_then(|prepared| prepared.begin(Pending::All, vec![7])).and_then(Live::finish))
}

fn pages_of(image: &MemoryImage) -> u64 {
    image.room().iter().map(|run| run.pages).sum()
}

#[test]
fn room_is_made_where_the_guest_writes() {
    let (prepared, vm, image) = arm_ahead(Trouble::default(), 48);
    assert!((5..=48).contains(&pages_of(&image)), "{:?}", image.room());
    assert!(image.room().iter().all(|run| run.end().0 <= 48), "{:?}", image.room());
    assert_eq!(finish(prepared, vm, image), None);
}

#[test]
fn none_is_made_for_what_the_pool_holds() {
    for busy in [0, 4] {
        let (prepared, vm, image) = arm_ahead(Trouble::default(), busy);
        assert_eq!(image.room(), []);
        assert_eq!(finish(prepared, vm, image), None);
    }
}

#[test]
fn where_none_can_be_made_nobody_asks_again() {
    let (prepared, vm, image) = arm_ahead(Trouble::default().on(Call::Room, 0..1, Mishap::Error(28)), 48);
    assert_eq!(image.room(), [], "one writer asks, once");
    assert_eq!(finish(prepared, vm, image), None);
}

#[test]
fn a_sink_that_panics_ends_it() {
    let (prepared, vm, image) = arm_ahead(Trouble::default().on(Call::Room, 0..1, Mishap::Panic), 48);
    assert_eq!(finish(prepared, vm, image), Some(Cause::ThreadDied));
}
