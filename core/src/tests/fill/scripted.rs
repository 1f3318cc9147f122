//! One decision after the other.

use std::{vec, vec::Vec};

use crate::*;

const BASE: u64 = 0x7f00_0000_0000;

/// Data, but for the runs that are zero.
struct Image(u64, Vec<Run>);

impl Content for Image {
    fn extent(&self, first: PageId) -> Option<(Run, bool)> {
        let zero = |page: u64| self.1.iter().any(|run| run.contains(PageId(page)));
        let is = zero(first.0);
        let end = (first.0..self.0).find(|&page| zero(page) != is).unwrap_or(self.0);
        (first.0 < self.0).then(|| (Run::new(first, end - first.0), is))
    }
}

fn block(name: &str, at: u64, pages: u64, backing: Backing, page_size: u64) -> RamBlock {
    RamBlock {
        name: BlockName::new(name).unwrap(),
        guest: GuestAddr(at),
        host: HostAddr(BASE + at),
        len: pages * PAGE_SIZE + page_size,
        used: pages * PAGE_SIZE,
        page_size,
        backing,
        treatment: Treatment::Tracked,
    }
}

type Core = Fill<std::boxed::Box<BlockTable>, Vec<u64>, 4, 3>;

fn fill(blocks: &[RamBlock]) -> Core {
    let table = std::boxed::Box::new(BlockTable::new(blocks).unwrap());
    let map = |pages| PageBitmap::new(vec![0u64; 200], pages, true).unwrap();
    let (settled, lost) = (map(table.pages()), map(table.pages()));
    Fill::new(table, settled, lost, Limits { scan_pages: 64, ..Limits::default() }).unwrap()
}

fn at(page: u64) -> HostAddr {
    HostAddr(BASE + page * PAGE_SIZE)
}

fn claim(next: NextFill) -> FillClaim {
    match next {
        NextFill::Fill(claim) => claim,
        other => panic!("{other:?}"),
    }
}

fn fault(core: &mut Core, image: &Image, page: u64) -> FillClaim {
    assert_eq!(core.handle_fault(at(page)), FillFault::Queued);
    claim(core.next_fault(image))
}

fn all_in(core: &mut Core, claim: FillClaim) {
    core.put_in(&claim, claim.run());
    core.end(claim);
}

#[test]
fn a_fault_takes_its_neighbours_along_as_far_as_they_are_missing_and_alike() {
    let mut core = fill(&[block("a", 0, 1024, Backing::Anonymous, 4096)]);
    let image = Image(1024, vec![Run::new(PageId(200), 100)]);
    let first = fault(&mut core, &image, 5);
    assert_eq!((first.run(), first.holds()), (Run::new(PageId(0), 16), Holds::Data));
    all_in(&mut core, first);
    // Thick and fast: twice as many, but not what is in.
    let second = fault(&mut core, &image, 17);
    assert_eq!(second.run(), Run::new(PageId(16), 16));
    all_in(&mut core, second);
    // Up to where zeros begin.
    let third = fault(&mut core, &image, 199);
    assert_eq!((third.run(), third.holds()), (Run::new(PageId(192), 8), Holds::Data));
    let fourth = fault(&mut core, &image, 250);
    assert_eq!((fourth.run(), fourth.holds()), (Run::new(PageId(200), 56), Holds::Zero));
}

#[test]
fn what_is_prefetched_is_what_was_asked_for_and_not_zero() {
    let mut core = fill(&[block("a", 0, 512, Backing::Anonymous, 4096)]);
    let image = Image(512, vec![Run::new(PageId(0), 100)]);
    let all = Run::new(PageId(0), 512);
    let ordered = claim(core.next_prefetch(Run::new(PageId(300), 7), &image));
    assert_eq!((ordered.run(), ordered.holds()), (Run::new(PageId(300), 7), Holds::Data));
    let linear = claim(core.next_prefetch(all, &image));
    assert_eq!(linear.run(), Run::new(PageId(100), 64));
    // A fault on what is being read is served for itself, as little as goes.
    let overtakes = fault(&mut core, &image, 130);
    assert_eq!((overtakes.run(), overtakes.origin()), (Run::new(PageId(128), 16), FillOrigin::Fault));
    core.put_in(&overtakes, overtakes.run());
    core.end(overtakes);
    assert_eq!(core.wanted(&linear, PageId(100)), Some(Run::new(PageId(100), 28)));
    assert_eq!(core.wanted(&linear, PageId(128)), Some(Run::new(PageId(144), 20)));
    all_in(&mut core, ordered);
    all_in(&mut core, linear);
    assert!(matches!(core.next_prefetch(Run::new(PageId(300), 7), &image), NextFill::Idle));
    while let NextFill::Fill(next) = core.next_prefetch(all, &image) {
        assert!(next.run().first.0 >= 100, "{:?} is zero", next.run());
        all_in(&mut core, next);
    }
    assert!(matches!(core.next_prefetch(all, &image), NextFill::Done) && core.is_complete());
    assert_eq!(core.counts().by_fault + core.counts().prefetched, 412);
    // What is in, and yet is not there, was thrown away.
    assert_eq!(core.handle_fault(at(130)), FillFault::Zero(HostRange::new(at(130), 4096)));
}

#[test]
fn host_pages_come_in_whole() {
    let mut core = fill(&[block("a", 0, 1024, Backing::HugeTlb, 2 << 20)]);
    let image = Image(1024, vec![Run::new(PageId(0), 3), Run::new(PageId(512), 512)]);
    let first = fault(&mut core, &image, 300);
    assert_eq!((first.run(), first.holds()), (Run::new(PageId(0), 512), Holds::Mixed));
    core.lose(&first, first.run());
    core.end(first);
    assert_eq!(core.handle_fault(at(2)), FillFault::Lost(HostRange::new(at(0), 2 << 20)));
    let second = fault(&mut core, &image, 1000);
    assert_eq!((second.run(), second.holds()), (Run::new(PageId(512), 512), Holds::Zero));
    all_in(&mut core, second);
    assert!(matches!(core.next_prefetch(Run::new(PageId(0), 1024), &image), NextFill::Done));
    // The unused tail is in no image; elsewhere nothing is known.
    assert_eq!(core.handle_fault(at(1024)), FillFault::Zero(HostRange::new(at(1024), 2 << 20)));
    assert_eq!(core.handle_fault(at(9999)), FillFault::NotOurs);
}

#[test]
fn zeros_that_cost_memory_are_put_in_sparingly() {
    for (backing, pages) in [(Backing::Anonymous, 32), (Backing::Shmem, 16)] {
        let mut core = fill(&[block("a", 0, 512, backing, 4096)]);
        let image = Image(512, vec![Run::new(PageId(0), 512)]);
        let first = fault(&mut core, &image, 0);
        all_in(&mut core, first);
        let second = fault(&mut core, &image, 100);
        assert_eq!((second.run().pages, second.holds()), (pages, Holds::Zero));
        core.end(second);
    }
}
