//! The linear search: which pending page is next, for the scan and inside the pause.

use core::ops::Deref;

use super::Snapshot;
use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, Treatment};
use crate::claim::Origin;
use crate::outcome::Next;
use crate::pool::Budget;
use crate::units::{PageId, Run};

impl<T, W, const FAULTS: usize, const CLAIMS: usize> Snapshot<T, W, FAULTS, CLAIMS>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    pub(super) fn next_in_scan(&mut self) -> Next {
        let hot = self.next_hot();
        let ahead = hot.or_else(|| self.next_scannable(self.search.page));
        let Some(page) = ahead.or_else(|| self.next_scannable(PageId(0))) else {
            // Only blocks that are captured inside the pause are left; they are not the scan's.
            return Next::Idle;
        };
        self.search.round_complete |= ahead.is_none();
        match self.claim(page, self.limits.scan_pages, Budget::Scan, Origin::Scan) {
            Ok(claim) => Next::Claim(claim),
            Err(_) => Next::Full,
        }
    }

    pub(super) fn next_in_pause(&mut self) -> Next {
        match self.next_pause_page() {
            None => Next::Done,
            Some(page) => {
                self.claim(page, self.limits.scan_pages, Budget::Urgent, Origin::Pause).map_or(Next::Full, Next::Claim)
            }
        }
    }

    pub(super) fn next_pause_page(&self) -> Option<PageId> {
        self.table.iter().filter(|(_, b)| b.treatment == Treatment::InPause).find_map(|(i, _)| {
            let run = self.table.block_run(i);
            self.pending.next_set(run.first).filter(|&page| run.contains(page))
        })
    }

    /// The next page that was written lately, going on from where the scan stands.
    fn next_hot(&mut self) -> Option<PageId> {
        loop {
            let hot = self.hot.as_ref()?;
            let page = hot.next_set(self.search.page).or_else(|| hot.next_set(PageId(0)))?;
            if self.pending.contains(page) && !self.is_in_pause_block(page) {
                return Some(page);
            }
            if let Some(hot) = &mut self.hot {
                hot.remove(Run::new(page, 1));
            }
        }
    }

    /// The first pending page at or after `from` that the scan may take.
    fn next_scannable(&self, mut from: PageId) -> Option<PageId> {
        loop {
            let page = self.pending.next_set(from)?;
            if !self.is_in_pause_block(page) {
                return Some(page);
            }
            from = self.table.block_of(page).map(|b| self.table.block_run(b).end())?;
        }
    }

    pub(super) fn is_in_pause_block(&self, page: PageId) -> bool {
        self.table.block_of(page).and_then(|b| self.table.block(b)).is_some_and(|b| b.treatment == Treatment::InPause)
    }
}

/// Makes every host page pending of which a page is: the kernel protects and releases no less.
pub(super) fn round_to_host_pages<W: AsRef<[u64]> + AsMut<[u64]>>(table: &BlockTable, pending: &mut PageBitmap<W>) {
    for (index, block) in table.iter().filter(|(_, block)| block.pages_per_host_page() > 1) {
        let unit = block.pages_per_host_page();
        let whole = table.block_run(index);
        let mut at = whole.first;
        while let Some(page) = pending.next_set(at).filter(|&page| whole.contains(page)) {
            let first = whole.first.0 + (page.0 - whole.first.0) / unit * unit;
            pending.insert(Run::new(PageId(first), unit));
            at = PageId(first + unit);
        }
    }
}
