//! Arming ahead of T0: memory is protected while the guest still runs, so that the pause does not grow with its size.
//!
//! Before T0 a write to a protected page means nothing yet: it is let through at once, with its neighbourhood, and noted.
//! At T0 only what was noted is protected again, and only what was not there before is looked at again.

use core::ops::Deref;

use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, LayoutError};
use crate::policy::window;
use crate::units::{HostAddr, HostRange, PAGE_SIZE, PageId, Run};

/// What is protected before T0, and what has lost its protection since.
///
/// # Invariants
/// A page that is in `pending` and not in `open` is protected, or its protection is being lifted by whoever was just
/// told to. So once nobody lifts any more and nobody writes, protecting [`next_open`](Self::next_open) and looking again
/// at what is not pending leaves every page that holds something pending and protected.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub struct ArmAhead<T, W> {
    table: T,
    pending: PageBitmap<W>,
    open: PageBitmap<W>,
    around: u64,
}

impl<T, W> ArmAhead<T, W>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// Nothing is protected yet. `around` is how many pages a write opens along with its own: the more, the fewer
    /// faults before T0 and the more to protect again at T0.
    ///
    /// # Errors
    /// A bitmap smaller than the layout.
    pub fn new(table: T, pending: PageBitmap<W>, open: PageBitmap<W>, around: u64) -> Result<Self, LayoutError> {
        let bits = pending.pages().min(open.pages());
        if bits < table.pages() {
            return Err(LayoutError::BitmapTooSmall { bits, pages: table.pages() });
        }
        Ok(Self { table, pending, open, around })
    }

    /// `range` holds something and is about to be protected.
    pub fn protecting(&mut self, range: HostRange) {
        self.table.runs_in(range).for_each(|run| self.pending.insert(run));
    }

    /// A writer is blocked at `at`: the range to release at once. `None` if no block has that address.
    ///
    /// The range counts as open from here on, before it is released: that is the order that loses nothing.
    pub fn handle_fault(&mut self, at: HostAddr) -> Option<HostRange> {
        let index = self.table.block_at(at)?;
        let block = self.table.block(index)?;
        let Some(page) = self.table.page_at(at) else {
            // In the unused tail of a block, which belongs to no page.
            return Some(HostRange::new(HostAddr(at.0 & !(block.page_size - 1)), block.page_size));
        };
        let run = window(page, self.around.max(block.pages_per_host_page()), block.host, self.table.block_run(index));
        self.open.insert(run);
        self.table.host_range(run)
    }

    /// `range` is losing its content, and its protection with it: it counts as not there.
    pub fn handle_discarded(&mut self, range: HostRange) {
        self.table.runs_in(range).for_each(|run| {
            self.pending.remove(run);
            self.open.remove(run);
        });
    }

    /// T0: the next run to protect again, until there is none.
    pub fn next_open(&mut self) -> Option<Run> {
        let page = self.open.next_set(PageId(0))?;
        let block = self.table.block_run(self.table.block_of(page)?);
        let run = self.open.run_around(page, block)?;
        self.open.remove(run);
        Some(run)
    }

    /// The first stretch at or after `from`, inside `block`, that is not pending: what may have come since. A stretch
    /// ends where something pending begins.
    pub fn next_absent(&self, from: PageId, block: Run) -> Option<Run> {
        let mut at = from.0.max(block.first.0);
        while at < block.end().0 {
            match self.pending.next_set(PageId(at)) {
                Some(page) if page.0 == at => {
                    at = self.pending.run_around(page, block)?.end().0;
                }
                next => {
                    let end = next.map_or(block.end().0, |page| page.0.min(block.end().0));
                    return Some(Run::new(PageId(at), end - at));
                }
            }
        }
        None
    }

    /// What is protected: the pages of the snapshot, once [`next_open`](Self::next_open) and
    /// [`next_absent`](Self::next_absent) are worked off. The second bitmap is empty and can be used again.
    pub fn into_pending(self) -> (PageBitmap<W>, PageBitmap<W>) {
        (self.pending, self.open)
    }

    /// Bytes to protect again at T0, as it stands.
    pub fn open_bytes(&self) -> u64 {
        self.open.count() * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{Backing, BlockName, GuestAddr, RamBlock, Treatment};

    const BASE: u64 = 0x7000_0000;

    fn table() -> BlockTable {
        let block = RamBlock {
            name: BlockName::new("ram").unwrap(),
            guest: GuestAddr(0),
            host: HostAddr(BASE),
            len: 64 * PAGE_SIZE,
            used: 48 * PAGE_SIZE,
            page_size: PAGE_SIZE,
            backing: Backing::Anonymous,
            treatment: Treatment::Tracked,
        };
        BlockTable::new(&[block]).unwrap()
    }

    fn ahead(table: &BlockTable) -> ArmAhead<&BlockTable, [u64; 2]> {
        let empty = || PageBitmap::new([0; 2], 48, true).unwrap();
        ArmAhead::new(table, empty(), empty(), 4).unwrap()
    }

    fn host(page: u64, pages: u64) -> HostRange {
        HostRange::new(HostAddr(BASE + page * PAGE_SIZE), pages * PAGE_SIZE)
    }

    #[test]
    fn a_write_opens_its_neighbourhood_and_is_protected_again_at_t0() {
        let table = table();
        let mut ahead = ahead(&table);
        ahead.protecting(host(0, 48));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 9 * PAGE_SIZE + 17)), Some(host(8, 4)));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 12 * PAGE_SIZE)), Some(host(12, 4)));
        assert_eq!(ahead.open_bytes(), 8 * PAGE_SIZE);
        assert_eq!(ahead.next_open(), Some(Run::new(PageId(8), 8)));
        assert_eq!(ahead.next_open(), None);
        assert_eq!(ahead.next_absent(PageId(0), table.block_run(crate::BlockIndex(0))), None);
        assert_eq!(ahead.into_pending().0.count(), 48);
    }

    #[test]
    fn what_was_not_there_and_what_was_discarded_is_looked_at_again() {
        let table = table();
        let block = table.block_run(crate::BlockIndex(0));
        let mut ahead = ahead(&table);
        ahead.protecting(host(4, 8));
        ahead.protecting(host(20, 28));
        let _ = ahead.handle_fault(HostAddr(BASE + 24 * PAGE_SIZE));
        ahead.handle_discarded(host(24, 2));
        assert_eq!(ahead.next_open(), Some(Run::new(PageId(26), 2)), "discarded pages need no protection again");
        let mut found = std::vec::Vec::new();
        let mut from = PageId(0);
        while let Some(run) = ahead.next_absent(from, block) {
            found.push((run.first.0, run.pages));
            from = run.end();
        }
        assert_eq!(found, [(0, 4), (12, 8), (24, 2)]);
    }

    #[test]
    fn faults_outside_the_image() {
        let table = table();
        let mut ahead = ahead(&table);
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 50 * PAGE_SIZE + 1)), Some(host(50, 1)), "unused tail");
        assert_eq!(ahead.handle_fault(HostAddr(1)), None);
        assert_eq!(ahead.next_open(), None);
    }
}
