//! Finding out what belongs to a snapshot, before T0 and at T0, so that the pause does not grow with the guest's size.
//!
//! Memory can be protected while the guest still runs. A write to a protected page means nothing then: it is let through
//! at once, with its neighbourhood, and noted. At T0 only what was noted is protected again, and only what was not
//! there before is looked at again.

use core::ops::Deref;

use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, LayoutError};
use crate::policy::window;
use crate::units::{HostAddr, HostRange, PageId, Run};

/// What is there, and what of it is protected, before T0. It lives from the moment the tracker is registered until T0;
/// arming ahead is optional, without it everything is found at T0.
///
/// # Invariants
/// A page that is in `protected` is protected, or is about to be. So at T0, when nobody writes and nobody lifts protection any
/// more, looking at what was not there before ([`next_absent`](Self::next_absent)) and protecting what of the snapshot is not
/// ([`next_unprotected`](Self::next_unprotected)) leaves every page of the snapshot protected.
///
/// A range that was ever discarded is neither in `there` nor in `protected` before T0: the kernel announces a discard before it
/// happens, so a page may be seen, protected, and gone with its protection afterwards.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub struct ArmAhead<T, W> {
    table: T,
    there: PageBitmap<W>,
    protected: PageBitmap<W>,
    written: PageBitmap<W>,
    discarded: PageBitmap<W>,
    around: u64,
}

impl<T, W> ArmAhead<T, W>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// Nothing is protected yet. `around` is how many pages a write opens along with its own: the more, the fewer faults
    /// before T0 and the more to protect again at T0.
    ///
    /// # Errors
    /// A bitmap smaller than the layout.
    pub fn new(table: T, bitmaps: [PageBitmap<W>; 4], around: u64) -> Result<Self, LayoutError> {
        let bits = bitmaps.iter().map(PageBitmap::pages).min().unwrap_or(0);
        if bits < table.pages() {
            return Err(LayoutError::BitmapTooSmall { bits, pages: table.pages() });
        }
        let [there, protected, written, discarded] = bitmaps;
        Ok(Self { table, there, protected, written, discarded, around })
    }

    // ---- before T0

    /// `range` holds something; it is not going to be protected for that.
    pub fn seen(&mut self, range: HostRange) {
        for run in self.table.runs_in(range) {
            self.there.insert(run);
        }
        self.leave_out_discarded(range);
    }

    /// `range` holds something and is going to be protected while the guest runs; once more, perhaps. It must have been there
    /// when somebody looked: before Linux 6.4 a page that is not there cannot be protected.
    ///
    /// It counts as protected from here on, before it is. So nobody may be inside the release of a range that
    /// [`handle_fault`](Self::handle_fault) has returned: that release could come after the protection, unnoticed.
    pub fn protecting(&mut self, range: HostRange) {
        for run in self.table.runs_in(range) {
            self.there.insert(run);
            self.protected.insert(run);
        }
        self.leave_out_discarded(range);
    }

    fn leave_out_discarded(&mut self, range: HostRange) {
        for run in self.table.runs_in(range) {
            let mut at = run.first;
            while let Some(page) = self.discarded.next_set(at).filter(|&page| run.contains(page)) {
                let gone = self.discarded.run_around(page, run).unwrap_or(Run::new(page, 1));
                self.there.remove(gone);
                self.protected.remove(gone);
                at = gone.end();
            }
        }
    }

    /// A writer is blocked at `at`: the range to release at once. `None` if no block has that address.
    ///
    /// The range counts as unprotected from here on, before it is released: in the other order a page could lose its
    /// protection unnoticed.
    pub fn handle_fault(&mut self, at: HostAddr) -> Option<HostRange> {
        let index = self.table.block_at(at)?;
        let block = self.table.block(index)?;
        let Some(page) = self.table.page_at(at) else {
            // In the unused tail of a block, which belongs to no page.
            return Some(HostRange::new(HostAddr(at.0 & !(block.page_size - 1)), block.page_size));
        };
        let want = self.around.max(self.table.granule_pages(index));
        let near = window(page, want, block.host, self.table.block_run(index));
        self.written.insert(near);
        // What is not protected need not be opened: KVM drops its mapping of all that is released, protected or not.
        let unit = self.table.granule_pages(index);
        let alone = || window(page, unit, block.host, self.table.block_run(index));
        let run = self.protected.run_around(page, near).filter(|run| run.pages > unit).unwrap_or_else(alone);
        self.protected.remove(run);
        self.table.host_range(run)
    }

    /// `range` is losing its content, and its protection with it.
    pub fn handle_discarded(&mut self, range: HostRange) {
        for run in self.table.runs_in(range) {
            self.discarded.insert(run);
            self.there.remove(run);
            self.protected.remove(run);
        }
    }

    // ---- before T0 and at T0

    /// The next run of `of` at or after `from` that does not count as protected. Before T0, what of [`there`](Self::there) can be
    /// [protected](Self::protecting) once more; at T0, what of the snapshot is left to protect.
    pub fn next_unprotected(&self, of: &PageBitmap<W>, from: PageId) -> Option<Run> {
        let mut page = of.next_set(from)?;
        while self.protected.contains(page) {
            page = of.next_set(PageId(self.protected.first_clear(page.0, u64::MAX)))?;
        }
        let run = of.run_around(page, self.table.block_run(self.table.block_of(page)?))?;
        let end = self.protected.next_set(page).map_or(run.end(), |protected| protected.min(run.end()));
        Some(Run::new(page, end.0 - page.0))
    }

    /// The pages that hold something, as far as anybody has looked.
    pub const fn there(&self) -> &PageBitmap<W> {
        &self.there
    }

    // ---- at T0

    /// The next stretch at or after `from`, inside `within`, that was not there before. What [`found`](Self::found)
    /// reports inside a stretch does not move its end.
    pub fn next_absent(&self, from: PageId, within: Run) -> Option<Run> {
        let mut at = from.0.max(within.first.0);
        while at < within.end().0 {
            match self.there.next_set(PageId(at)) {
                Some(page) if page.0 == at => {
                    at = self.there.run_around(page, within)?.end().0;
                }
                next => {
                    let end = next.map_or(within.end().0, |page| page.0.min(within.end().0));
                    return Some(Run::new(PageId(at), end - at));
                }
            }
        }
        None
    }

    /// `range` holds something at T0, whatever became of it before.
    pub fn found(&mut self, range: HostRange) {
        self.table.runs_in(range).for_each(|run| self.there.insert(run));
    }

    /// The pages that are there, and those that were written while it was armed: they will be written next.
    pub fn into_there(self) -> (PageBitmap<W>, PageBitmap<W>) {
        (self.there, self.written)
    }

    /// Feeds everything that a later decision depends on to `hasher`.
    #[cfg(test)]
    pub(crate) fn key<H: core::hash::Hasher>(&self, hasher: &mut H)
    where
        W: core::hash::Hash,
    {
        use core::hash::Hash;
        (&self.there, &self.protected, &self.discarded).hash(hasher);
    }

    #[cfg(test)]
    pub(crate) fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Pages around which was written while some of them were protected, in neighbourhoods.
    pub const fn written(&self) -> &PageBitmap<W> {
        &self.written
    }

    /// The next run around which was written that holds `from`, or begins after it.
    pub fn next_written(&self, from: PageId) -> Option<Run> {
        let page = self.written.next_set(from)?;
        self.written.run_around(page, self.table.block_run(self.table.block_of(page)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Backing, BlockIndex, BlockName, GuestAddr, PAGE_SIZE, RamBlock, Treatment};

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
        ArmAhead::new(table, [empty(), empty(), empty(), empty()], 4).unwrap()
    }

    fn host(page: u64, pages: u64) -> HostRange {
        HostRange::new(HostAddr(BASE + page * PAGE_SIZE), pages * PAGE_SIZE)
    }

    fn open(ahead: &ArmAhead<&BlockTable, [u64; 2]>, from: u64) -> Option<(u64, u64)> {
        ahead.next_unprotected(ahead.there(), PageId(from)).map(|run| (run.first.0, run.pages))
    }

    fn absent(ahead: &ArmAhead<&BlockTable, [u64; 2]>) -> std::vec::Vec<(u64, u64)> {
        let block = ahead.table.block_run(BlockIndex(0));
        let mut from = PageId(0);
        std::iter::from_fn(|| {
            let run = ahead.next_absent(from, block)?;
            from = run.end();
            Some((run.first.0, run.pages))
        })
        .collect()
    }

    #[test]
    fn a_write_opens_its_neighbourhood_which_is_protected_again_at_t0() {
        let table = table();
        let mut ahead = ahead(&table);
        ahead.protecting(host(0, 48));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 9 * PAGE_SIZE + 17)), Some(host(8, 4)));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 12 * PAGE_SIZE)), Some(host(12, 4)));
        assert_eq!(open(&ahead, 0), Some((8, 8)));
        assert_eq!(open(&ahead, 16), None);
        assert_eq!(absent(&ahead), []);
        assert_eq!(ahead.next_written(PageId(0)), Some(Run::new(PageId(8), 8)));
        ahead.protecting(host(0, 11));
        assert_eq!(open(&ahead, 0), Some((11, 5)), "protected again");
        let (there, hot) = ahead.into_there();
        assert_eq!((there.count(), hot.count()), (48, 8));
    }

    #[test]
    fn what_was_not_there_and_what_was_discarded_is_looked_at_again() {
        let table = table();
        let mut ahead = ahead(&table);
        ahead.handle_discarded(host(30, 2));
        ahead.protecting(host(4, 8));
        ahead.protecting(host(20, 28));
        let _ = ahead.handle_fault(HostAddr(BASE + 24 * PAGE_SIZE));
        ahead.handle_discarded(host(24, 2));
        assert_eq!(open(&ahead, 0), Some((26, 2)), "discarded pages need no protection again");
        assert_eq!(absent(&ahead), [(0, 4), (12, 8), (24, 2), (30, 2)]);
        ahead.found(host(12, 8));
        ahead.found(host(30, 1));
        assert_eq!(absent(&ahead), [(0, 4), (24, 2), (31, 1)]);
        assert_eq!((open(&ahead, 0), open(&ahead, 20)), (Some((12, 8)), Some((26, 2))), "found, not protected yet");
    }

    #[test]
    fn a_page_that_is_protected_alone_is_opened_alone() {
        let table = table();
        let mut ahead = ahead(&table);
        ahead.protecting(host(9, 1));
        ahead.protecting(host(16, 3));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 9 * PAGE_SIZE)), Some(host(9, 1)));
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 17 * PAGE_SIZE)), Some(host(16, 3)));
        assert_eq!((open(&ahead, 0), open(&ahead, 10)), (Some((9, 1)), Some((16, 3))));
        assert_eq!(ahead.written().count(), 8, "the neighbourhood counts as written");
    }

    #[test]
    fn what_is_seen_is_there_and_not_protected() {
        let table = table();
        let mut ahead = ahead(&table);
        ahead.handle_discarded(host(30, 2));
        ahead.seen(host(0, 48));
        ahead.protecting(host(8, 4));
        ahead.protecting(host(28, 4));
        assert_eq!(absent(&ahead), [(30, 2)]);
        let mut dirty = PageBitmap::new([0; 2], 48, true).unwrap();
        [(6, 4), (11, 2), (27, 4)].into_iter().for_each(|(first, pages)| dirty.insert(Run::new(PageId(first), pages)));
        let mut from = PageId(0);
        let left: std::vec::Vec<_> = std::iter::from_fn(|| {
            let run = ahead.next_unprotected(&dirty, from)?;
            from = run.end();
            Some((run.first.0, run.pages))
        })
        .collect();
        assert_eq!(left, [(6, 2), (12, 1), (27, 1), (30, 1)], "also what is not there: it is about to be");
        assert_eq!(
            ahead.handle_fault(HostAddr(BASE + 4 * PAGE_SIZE)),
            Some(host(4, 1)),
            "never protected: opened alone"
        );
    }

    #[test]
    fn without_arming_ahead_everything_is_looked_at() {
        let table = table();
        assert_eq!(absent(&ahead(&table)), [(0, 48)]);
    }

    #[test]
    fn faults_outside_the_image() {
        let table = table();
        let mut ahead = ahead(&table);
        assert_eq!(ahead.handle_fault(HostAddr(BASE + 50 * PAGE_SIZE + 1)), Some(host(50, 1)), "unused tail");
        assert_eq!(ahead.handle_fault(HostAddr(1)), None);
        assert_eq!(open(&ahead, 0), None);
    }
}
