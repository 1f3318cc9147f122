//! What the engine's tests have in common: a simulated VM, an image in memory, and the verdict that must hold whatever
//! went wrong.
#![allow(clippy::unwrap_used)]

use ramshot_core::{Cause, HostRange, Limits, PageId, RamSource, Run, WhenFull, WriteTracker};

use super::{Live, Parts, Pending, Prepared, SnapshotFailed, prepare_sized};
use crate::options::Options;
use crate::report::Report;
use crate::sim::{MemoryImage, MemorySink, Outcome, SimVm};
use crate::sync::Arc;

/// A snapshot to be: change what you like, then [`prepare`](Self::prepare).
pub(super) struct World {
    pub(super) vm: Arc<SimVm>,
    pub(super) image: MemoryImage,
    pub(super) tracker: Arc<dyn WriteTracker>,
    pub(super) ram: Arc<dyn RamSource>,
    pub(super) options: Options,
    pub(super) slots: u16,
    pub(super) limits: Limits,
    sink: MemorySink,
}

impl World {
    /// A pool of 4 slots of one page, claims of at most 2 pages, one worker, one writer.
    pub(super) fn new(vm: &Arc<SimVm>) -> Self {
        let (sink, image) = MemorySink::new(vm.table());
        let limits = Limits {
            slot_pages: 1,
            reserve_slots: 1,
            scan_pages: 2,
            around_min: 1,
            around_max: 2,
            when_full: WhenFull::Stall,
        };
        let tracker = vm.track().unwrap();
        let ram = Arc::clone(vm) as Arc<dyn RamSource>;
        Self { vm: Arc::clone(vm), image, tracker, ram, options: Options::default(), slots: 4, limits, sink }
    }

    pub(super) fn prepare(self) -> Prepared {
        let Self { vm, tracker, ram, sink, .. } = self;
        let parts = Parts { tracker, ram, table: Arc::clone(vm.table()), sink: Box::new(sink) };
        prepare_sized(parts, &self.options, self.slots, self.limits).unwrap()
    }

    /// Prepares and begins. What memory was at T0 is noted.
    pub(super) fn begin(self) -> (Live, Scene) {
        let (live, scene) = self.try_begin();
        (live.unwrap(), scene)
    }

    /// As `begin`, where so much goes wrong that it may have ended when `begin` returns.
    pub(super) fn try_begin(self) -> (Result<Live, SnapshotFailed>, Scene) {
        let (vm, image) = (Arc::clone(&self.vm), self.image.clone());
        let prepared = self.prepare();
        let at_t0 = vm.memory();
        let live = prepared.begin(Pending::All, vec![7]);
        (live, Scene { vm, image, at_t0 })
    }
}

/// A snapshot that has begun.
pub(super) struct Scene {
    pub(super) vm: Arc<SimVm>,
    pub(super) image: MemoryImage,
    pub(super) at_t0: Vec<u8>,
}

impl Scene {
    /// Either the image is memory at T0, or there is none and the cause is returned. Nothing is left in the VM.
    pub(super) fn verdict(&self, result: Result<Report, SnapshotFailed>) -> Option<Cause> {
        assert_eq!(self.image.violations(), [""; 0]);
        let cause = match result {
            Ok(_) => {
                assert_eq!(self.image.outcome(), Outcome::Committed);
                assert!(self.image.memory().unwrap() == self.at_t0, "the image is not memory at T0");
                assert_eq!(self.image.meta().device_state, [7]);
                None
            }
            Err(failed) => {
                assert_eq!(self.image.outcome(), Outcome::Aborted);
                match failed {
                    SnapshotFailed::Ended { cause, sink } => {
                        assert!(sink.is_none() || cause == Cause::Sink);
                        Some(cause)
                    }
                    SnapshotFailed::Commit(_) => Some(Cause::Sink),
                    SnapshotFailed::Pending { .. } => panic!("{failed}"),
                }
            }
        };
        self.undisturbed();
        cause
    }

    /// Nothing is protected or registered, nobody blocked.
    pub(super) fn undisturbed(&self) {
        assert!(self.vm.is_clean(), "{:?}, {} blocked", self.vm.counts(), self.vm.blocked());
    }
}

/// `count` pages from `first`, as the VMM maps them.
pub(super) fn pages(vm: &SimVm, first: u64, count: u64) -> HostRange {
    vm.table().host_range(Run::new(PageId(first), count)).unwrap()
}

/// Every page of `vm` holds its number plus 1.
pub(super) fn fill(vm: &SimVm) {
    (0..vm.table().pages()).for_each(|page| vm.write(PageId(page), page + 1));
}

/// The number that fills `page` in `memory`; fails if the page is torn.
pub(super) fn value(memory: &[u8], page: u64) -> u64 {
    let at = usize::try_from(page).unwrap() * 4096;
    let mut words = memory[at..at + 4096].chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
    let first = words.next().unwrap();
    assert!(words.all(|word| word == first), "page {page} is torn");
    first
}
