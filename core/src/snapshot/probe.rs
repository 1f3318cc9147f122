//! What the tests look at inside a snapshot.

use core::hash::{Hash, Hasher};
use core::ops::Deref;

use super::{InFlight, Snapshot};
use crate::block::BlockTable;
use crate::tests::Defect;
use crate::units::{PageId, Run};

impl<T, W, const FAULTS: usize, const CLAIMS: usize> Snapshot<T, W, FAULTS, CLAIMS>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// Makes it decide wrongly.
    pub(crate) fn break_with(&mut self, defect: Defect) {
        self.defect = Some(defect);
    }

    /// Feeds everything that a later decision depends on to `hasher`: not the counts, not which cause it was, not the
    /// order in which claims lie in their list.
    pub(crate) fn key<H: Hasher>(&self, hasher: &mut H)
    where
        W: Hash,
    {
        self.pending.hash(hasher);
        self.hot.hash(hasher);
        self.pool.hash(hasher);
        hasher.write_usize(self.faults.len());
        self.faults.iter().for_each(|page| page.hash(hasher));
        hasher.write_usize(self.requests.len());
        self.requests.iter().for_each(|page| page.hash(hasher));
        let mut claims = self.claims.clone();
        claims.sort_unstable_by_key(|claim| claim.run.first);
        claims.hash(hasher);
        self.search.page.hash(hasher);
        if self.limits.around_max > self.limits.around_min {
            self.around.hash(hasher);
        }
        self.cause.is_some().hash(hasher);
    }

    pub(crate) fn is_lull(&self) -> bool {
        self.around.is_lull()
    }

    pub(crate) fn is_pending(&self, page: PageId) -> bool {
        self.pending.contains(page)
    }

    pub(crate) fn is_queued(&self, page: PageId) -> bool {
        self.faults.iter().any(|&queued| queued == page)
    }

    pub(crate) fn claimed_runs(&self) -> impl Iterator<Item = Run> {
        self.claims.iter().map(|InFlight { run, .. }| *run)
    }

    pub(crate) fn slots_in_use(&self) -> u64 {
        self.pool.in_use()
    }

    /// Whether a writer is known to wait for a page that nobody has claimed.
    pub(crate) fn has_a_fault(&self) -> bool {
        self.faults.iter().any(|&page| self.pending.contains(page))
    }

    /// Whether the fault at the head of the queue could be claimed now: a claim is free, and there is room for its host
    /// page. Written without the code that decides it.
    pub(crate) fn can_serve_a_fault(&self) -> bool {
        let Some(&page) = self.faults.iter().find(|&&page| self.pending.contains(page)) else { return false };
        let unit = self
            .table
            .block_of(page)
            .and_then(|b| self.table.block(b))
            .map_or(1, crate::block::RamBlock::pages_per_host_page);
        let free = self.pool.slots() - self.pool.in_use();
        self.cause.is_none() && self.claims.len() < CLAIMS && free * self.pool.slot_pages() >= unit
    }
}
