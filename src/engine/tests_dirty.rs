//! Increments and pre-copy, in a simulated VM: every image of a chain is memory at its T0.
#![allow(clippy::unwrap_used)]

use ramshot_core::{PageId, RamSource, WriteTracker};

use super::tests_world::{fill, pages};
use super::{Parts, Pending, Prepared, SetupFailed, SnapshotFailed, prepare_with};
use crate::dirty::{DirtyError, DirtyTracking};
use crate::options::Options;
use crate::report::Report;
use crate::sim::{MemoryImage, MemorySink, SimVm};
use crate::sync::{Arc, thread};

/// Many enough to be interesting; few under a scheduler that looks at every step.
const PAGES: u64 = if cfg!(ramshot_shuttle) { 12 } else { 24 };

struct World {
    vm: Arc<SimVm>,
    options: Options,
}

fn world() -> World {
    let vm = SimVm::new(PAGES);
    fill(&vm);
    let tracking = DirtyTracking::start(vm.table(), vec![vm.dirty_log()]).unwrap();
    World { vm, options: Options { dirty: Some(tracking), pool_bytes: 1 << 20, ..Options::default() } }
}

impl World {
    fn prepare(&self, sink: MemorySink) -> Result<Prepared, SetupFailed> {
        let tracker = self.vm.track().unwrap() as Arc<dyn WriteTracker>;
        let ram = Arc::clone(&self.vm) as Arc<dyn RamSource>;
        let parts = Parts { tracker, ram, table: Arc::clone(self.vm.table()), sink: Box::new(sink) };
        prepare_with(parts, &self.options)
    }

    fn full(&self) -> (Prepared, MemoryImage) {
        let (sink, image) = MemorySink::new(self.vm.table());
        (self.prepare(sink).unwrap(), image)
    }

    fn increment(&self, parent: &MemoryImage) -> (Prepared, MemoryImage) {
        let (sink, image) = MemorySink::child(self.vm.table(), parent);
        (self.prepare(sink).unwrap(), image)
    }

    /// Begins, has the guest write pages 3 to 9 at once, finishes; the image must be memory at T0.
    fn take(&self, prepared: Prepared, pending: Pending, image: &MemoryImage) -> Report {
        let at_t0 = self.vm.memory();
        let live = prepared.begin(pending, Vec::new()).unwrap();
        let vm = Arc::clone(&self.vm);
        let guest = thread::spawn(move || (3..10).for_each(|page| vm.write(PageId(page), 1000 + page)));
        let report = live.finish().unwrap();
        guest.join().unwrap();
        assert_eq!(image.violations(), [""; 0]);
        assert!(image.memory().unwrap() == at_t0, "the image is not memory at T0");
        assert!(self.vm.is_clean());
        report
    }
}

pub(super) fn chain_of_increments() {
    let world = world();
    let (prepared, mut image) = world.full();
    assert_eq!(world.take(prepared, Pending::All, &image).counts.total, PAGES);
    for round in 0..3 {
        // Seven pages were written during the last snapshot, two are written now, one of them in an increment that fails.
        world.vm.write(PageId(PAGES - 2), round);
        let (cancelled, child) = world.increment(&image);
        let live = cancelled.begin(Pending::Dirty, Vec::new()).unwrap();
        live.cancel();
        let mut expected = 9;
        if live.finish().is_ok() {
            // It was through before: the next one builds on it.
            (image, expected) = (child, 1);
        }
        world.vm.write(PageId(PAGES - 1), round);
        let (prepared, child) = world.increment(&image);
        let prepared = if round == 1 { prepared.arm_ahead().unwrap() } else { prepared };
        assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, expected, "round {round}");
        image = child;
    }
}

pub(super) fn precopy_under_writes() {
    let world = world();
    let (prepared, image) = world.full();
    let vm = Arc::clone(&world.vm);
    let guest = thread::spawn(move || (0..40).for_each(|n| vm.write(PageId(n % 5), n)));
    let prepared = prepared.precopy(2).unwrap();
    guest.join().unwrap();
    let report = world.take(prepared, Pending::Dirty, &image);
    assert!(report.counts.total <= 5 && report.drafts.passes > 0 && report.drafts.pages >= PAGES, "{report:?}");
    let (prepared, child) = world.increment(&image);
    assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, 7);
}

/// The guest writes while what it wrote before is being protected, to pages that are among that and to others.
pub(super) fn armed_ahead_under_writes() {
    let world = world();
    let (prepared, image) = world.full();
    world.take(prepared.precopy(1).unwrap().arm_ahead().unwrap(), Pending::Dirty, &image);
    let (prepared, child) = world.increment(&image);
    let vm = Arc::clone(&world.vm);
    let guest = thread::spawn(move || (0..6).for_each(|n| vm.write(PageId(1 + 4 * (n % 3)), n)));
    let prepared = prepared.arm_ahead().unwrap();
    guest.join().unwrap();
    // Pages 3 to 9, and 1.
    assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, 8);
}

#[cfg(not(ramshot_shuttle))]
mod std_only {
    use super::*;

    #[test]
    fn every_increment_is_memory_at_its_t0() {
        chain_of_increments();
    }

    #[test]
    fn precopy_leaves_what_was_written() {
        (0..20).for_each(|_| precopy_under_writes());
    }

    #[test]
    fn what_is_written_while_armed_ahead_is_protected_at_t0() {
        (0..20).for_each(|_| armed_ahead_under_writes());
    }

    // It belongs after them.
    #[test]
    fn armed_ahead_before_the_drafts_is_slow_and_right() {
        for _ in 0..20 {
            let world = world();
            let (prepared, image) = world.full();
            let vm = Arc::clone(&world.vm);
            let guest = thread::spawn(move || (0..12).for_each(|n| vm.write(PageId(1 + 4 * (n % 3)), n)));
            let prepared = prepared.arm_ahead().unwrap().precopy(2).unwrap();
            guest.join().unwrap();
            world.take(prepared, Pending::Dirty, &image);
        }
    }

    #[test]
    fn what_was_written_is_protected_ahead_and_nothing_else() {
        let world = world();
        let (prepared, image) = world.full();
        world.take(prepared, Pending::All, &image);
        let (prepared, child) = world.increment(&image);
        let prepared = prepared.arm_ahead().unwrap();
        let write = |page| {
            let faults = world.vm.counts().faults;
            world.vm.write(PageId(page), 7);
            world.vm.counts().faults - faults
        };
        assert_eq!([1, 5, 5, 12].map(write), [0, 1, 0, 0], "pages 3 to 9 are");
        assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, 9);
    }

    #[test]
    fn a_page_that_goes_away_is_zero_in_the_increment() {
        let world = world();
        let (prepared, image) = world.full();
        world.take(prepared, Pending::All, &image);
        // Nobody reads events now, and no log tells of it.
        world.vm.discard(pages(&world.vm, 15, 2));
        let (prepared, child) = world.increment(&image);
        let prepared = prepared.arm_ahead().unwrap();
        // While it is prepared, the event tells.
        world.vm.discard(pages(&world.vm, 18, 1));
        assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, 7 + 3);
        let (prepared, grandchild) = world.increment(&child);
        assert_eq!(world.take(prepared, Pending::Dirty, &grandchild).counts.total, 7, "zero is known to be zero");
    }

    #[test]
    fn a_page_that_goes_away_after_its_draft_is_zero() {
        let world = world();
        let (prepared, image) = world.full();
        let prepared = prepared.precopy(1).unwrap();
        world.vm.discard(pages(&world.vm, 15, 2));
        assert_eq!(world.take(prepared, Pending::Dirty, &image).counts.total, 2);
    }

    #[test]
    fn what_the_vmm_marks_is_dirty() {
        let world = world();
        let (prepared, image) = world.full();
        world.take(prepared, Pending::All, &image);
        world.options.dirty.as_ref().unwrap().mark(pages(&world.vm, 15, 2));
        assert_eq!(world.options.dirty.as_ref().unwrap().written_bytes().unwrap(), 9 * 4096);
        let (prepared, child) = world.increment(&image);
        assert_eq!(world.take(prepared, Pending::Dirty, &child).counts.total, 9);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let world = world();
        let (sink, _) = MemorySink::child(world.vm.table(), &MemorySink::new(world.vm.table()).1);
        let refused = |result: Result<Prepared, SetupFailed>| result.err().map(|error| error.to_string());
        let none = World { vm: Arc::clone(&world.vm), options: Options::default() };
        let why = refused(none.prepare(sink)).unwrap();
        assert!(why.contains("no snapshot to build on"), "{why}");
        assert!(world.vm.is_clean());

        let (prepared, _) = world.full();
        let failed = prepared.begin(Pending::Dirty, Vec::new()).err().unwrap();
        assert!(matches!(failed, SnapshotFailed::Pending { given: Pending::Dirty, .. }), "{failed}");
        assert!(world.vm.is_clean());

        let (first, _) = world.full();
        let other = SimVm::new(3);
        let tracking = world.options.dirty.as_ref().unwrap();
        assert!(matches!(tracking.claim(world.vm.table()), Err(DirtyError::Busy)));
        drop(first);
        assert!(matches!(tracking.claim(other.table()), Err(DirtyError::OtherRam)));
        drop(tracking.claim(world.vm.table()).unwrap());
        let (without, _) = none.full();
        assert!(without.precopy(1).is_err() && world.vm.is_clean());
    }
}
