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
