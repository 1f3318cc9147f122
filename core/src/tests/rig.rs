//! What the scripted tests share: a small guest, and words for what happens to it.

use std::{vec, vec::Vec};

use crate::*;

/// Where block `i` is mapped: 16 MiB apart, so aligned to any host page in use here.
pub(super) const fn host_of(block: u64) -> u64 {
    0x1000_0000 + block * 0x100_0000
}

/// A block of `pages` used pages, one host page longer than that.
pub(crate) fn part(pages: u64, page_size: u64, treatment: Treatment) -> RamBlock {
    RamBlock {
        name: BlockName::new("x").unwrap(),
        guest: GuestAddr(0),
        host: HostAddr(0),
        len: pages * PAGE_SIZE + page_size,
        used: pages * PAGE_SIZE,
        page_size,
        backing: Backing::Anonymous,
        treatment,
    }
}

pub(crate) fn ram(pages: u64) -> RamBlock {
    part(pages, PAGE_SIZE, Treatment::Tracked)
}

/// A page at a time, nothing taken along, no reserve.
pub(super) const SINGLE: Limits =
    Limits { slot_pages: 1, reserve_slots: 0, scan_pages: 1, around_min: 1, around_max: 1, when_full: WhenFull::Stall };

pub(super) type Core = Snapshot<std::sync::Arc<BlockTable>, Vec<u64>, 4, 4>;

pub(crate) fn table(parts: &[RamBlock]) -> BlockTable {
    let blocks: Vec<RamBlock> = (0u64..)
        .zip(parts)
        .map(|(i, part)| RamBlock {
            name: BlockName::new(&std::format!("ram{i}")).unwrap(),
            guest: GuestAddr(i << 24),
            host: HostAddr(host_of(i)),
            ..*part
        })
        .collect();
    BlockTable::new(&blocks).unwrap()
}

/// A core over `parts`, all pages pending.
pub(super) fn core(parts: &[RamBlock], slots: u16, limits: Limits) -> Result<Core, SetupError> {
    core_of(parts, &[Run::new(PageId(0), u64::MAX)], slots, limits)
}

/// A core over `parts` with these runs pending.
pub(super) fn core_of(parts: &[RamBlock], runs: &[Run], slots: u16, limits: Limits) -> Result<Core, SetupError> {
    let table = table(parts);
    let words = |bits| vec![0; usize::try_from(PageBitmap::<Vec<u64>>::words_for(bits)).unwrap()];
    let mut pending = PageBitmap::new(words(table.pages()), table.pages(), true).unwrap();
    runs.iter().for_each(|&run| pending.insert(run));
    Snapshot::new(std::sync::Arc::new(table), pending, slots, words(u64::from(slots)), limits)
}

/// Words for what happens, on top of a core.
pub(super) trait Script {
    fn fault(&mut self, page: u64) -> FaultOutcome;
    /// The next claim, which must be there.
    fn claim(&mut self, who: Worker) -> Claim;
    /// From claim to image.
    fn finish(&mut self, claim: Claim);
    fn at(&self, page: u64) -> HostAddr;
    /// The pages that `who` gets, each claim finished before the next.
    fn drain(&mut self, who: Worker) -> Vec<Run>;
}

impl Script for Core {
    fn fault(&mut self, page: u64) -> FaultOutcome {
        let at = self.at(page);
        self.handle_fault(at)
    }

    fn claim(&mut self, who: Worker) -> Claim {
        match self.next_claim(who) {
            Next::Claim(claim) => claim,
            other => panic!("no claim for {who:?}: {other:?}"),
        }
    }

    fn finish(&mut self, claim: Claim) {
        let captured = self.captured(claim);
        let released = self.released(captured);
        self.written(released);
    }

    fn at(&self, page: u64) -> HostAddr {
        self.table().host_range(Run::new(PageId(page), 1)).unwrap().start
    }

    fn drain(&mut self, who: Worker) -> Vec<Run> {
        let mut runs = Vec::new();
        while let Next::Claim(claim) = self.next_claim(who) {
            runs.push(claim.run());
            self.finish(claim);
        }
        runs
    }
}

pub(super) fn run(first: u64, pages: u64) -> Run {
    Run::new(PageId(first), pages)
}
