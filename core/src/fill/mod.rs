//! The state of one lazy restore: which pages are in, who waits, what is fetched next.

mod claim;
pub(crate) mod seam;
mod search;

use core::ops::Deref;

use heapless::{Deque, Vec};

pub use claim::{FillClaim, FillFault, FillOrigin, Holds, NextFill};
pub use seam::{Content, Filled, RamFiller};

use crate::bitmap::PageBitmap;
use crate::block::{Backing, BlockTable, LayoutError, RamBlock};
use crate::policy::{FaultAround, Limits, window};
#[cfg(test)]
use crate::tests::FillDefect;
use crate::units::{HostAddr, HostRange, PAGE_SIZE, PageId, Run};

/// What happened so far, in pages unless said.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FillCounts {
    /// Missing faults handed in (faults, not pages).
    pub faults: u64,
    /// Put in because somebody waited for one of them or a neighbour.
    pub by_fault: u64,
    /// Put in by the prefetcher before anybody asked.
    pub prefetched: u64,
    /// Not to be had from the image.
    pub lost: u64,
}

/// A queued fault, or a run that was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Out {
    number: u32,
    run: Run,
    origin: FillOrigin,
}

/// The decisions of one lazy restore. `handle_*`: something happened. `next_*`: what to do now. [`put_in`](Self::put_in),
/// [`lose`](Self::lose), [`end`](Self::end): that is done. The rest are getters.
///
/// A claim says who reads a run, not who may put it in: whoever holds one asks [`wanted`](Self::wanted) right before he
/// hands pages to the kernel, and events are read by the thread that does so. Then no page that was put in by somebody
/// else meanwhile, or discarded, is touched again, and **no fault ever waits for the prefetcher**: a fault on a page that
/// the prefetcher is reading is read again, for it alone.
///
/// # Invariants
/// A page is missing (bit clear) or settled (set): in, lost, or discarded, and settled for good. Only missing pages are
/// claimed. Every page before the search is settled, or zero in the image.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Fill<T, W, const FAULTS: usize, const CLAIMS: usize> {
    table: T,
    settled: PageBitmap<W>,
    /// Settled, and not in: nothing but poison may ever be there.
    lost: PageBitmap<W>,
    faults: Deque<PageId, FAULTS>,
    claims: Vec<Out, CLAIMS>,
    next_number: u32,
    search: PageId,
    around: FaultAround,
    limits: Limits,
    counts: FillCounts,
    ended: bool,
    #[cfg(test)]
    defect: Option<FillDefect>,
}

impl<T, W, const FAULTS: usize, const CLAIMS: usize> Fill<T, W, FAULTS, CLAIMS>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// A restore of all pages of `table`, none of which is in. `settled` and `lost` are empty bitmaps over them, lent.
    /// Of `limits` it takes `scan_pages` (what the prefetcher takes at once), `around_min` and `around_max`.
    ///
    /// # Errors
    /// A bitmap that is too small.
    pub fn new(table: T, settled: PageBitmap<W>, lost: PageBitmap<W>, limits: Limits) -> Result<Self, LayoutError> {
        for map in [&settled, &lost] {
            if map.pages() < table.pages() {
                return Err(LayoutError::BitmapTooSmall { bits: map.pages(), pages: table.pages() });
            }
        }
        Ok(Self {
            table,
            settled,
            lost,
            faults: Deque::new(),
            claims: Vec::new(),
            next_number: 0,
            search: PageId(0),
            around: FaultAround::new(&limits),
            limits,
            counts: FillCounts::default(),
            ended: false,
            #[cfg(test)]
            defect: None,
        })
    }

    // ---- something happened

    /// Somebody is blocked at `at`, where no page is.
    pub fn handle_fault(&mut self, at: HostAddr) -> FillFault {
        let Some((block, range)) = self.host_page(at) else { return FillFault::NotOurs };
        let Some(page) = self.table.page_at(at) else {
            // The unused tail of a block, or one that is not part of the image: nothing ever was there.
            return FillFault::Zero(range);
        };
        let run = host_run(&self.table, page, block.pages_per_host_page());
        self.counts.faults += 1;
        if self.touches_lost(run) {
            return FillFault::Lost(range);
        }
        if self.settled.contains(page) {
            return FillFault::Zero(range);
        }
        if self.ended {
            return FillFault::Waits;
        }
        if self.faults.iter().any(|&queued| run.contains(queued)) {
            return FillFault::Queued;
        }
        if self.is_claimed(page, FillOrigin::Fault) {
            return FillFault::Waits;
        }
        match self.faults.push_back(page) {
            Ok(()) => FillFault::Queued,
            Err(_) => {
                self.counts.faults -= 1;
                FillFault::QueueFull
            }
        }
    }

    /// The content of `range` is gone: what is in no page any more is zero from now on, whatever the image says. Also for
    /// memory that was unmapped.
    ///
    /// Whoever is blocked on one of them already, because it is lost or being read for him, is served by nobody else: `zero` is
    /// called with where zeros are to be put for him.
    pub fn handle_discarded(&mut self, range: HostRange, mut zero: impl FnMut(HostRange)) {
        #[cfg(test)]
        if self.defect == Some(FillDefect::DiscardForgotten) {
            return;
        }
        // Blocks are few, and so are lost pages.
        for index in 0..self.table.blocks().len() {
            let Some(run) = self.table.runs_in(range).nth(index) else { break };
            for out in self.claims.iter().filter(|out| out.origin == FillOrigin::Fault && out.run.overlaps(run)) {
                zero(self.range_of(cut(run, out.run)));
            }
            self.settled.insert(run);
            while let Some(lost) = self.lost.next_set(run.first).filter(|&page| run.contains(page)) {
                let gone = host_run(&self.table, lost, self.per_host_page(lost));
                self.lost.remove(gone);
                zero(self.range_of(gone));
            }
        }
    }

    /// For a while nobody faulted.
    pub fn handle_lull(&mut self) {
        self.around.lull();
    }

    /// No more claims: the restore is given up. What is out may still be put in and ended. Faults wait for the end: that of
    /// the page, if it is [given up](Self::give_up), or of the restore.
    pub fn cancel(&mut self) {
        self.ended = true;
        self.faults.clear();
    }

    // ---- what to do now

    /// What the thread that serves faults does next.
    pub fn next_fault(&mut self, content: &impl Content) -> NextFill {
        while let Some(&page) = self.faults.front() {
            if self.ended {
                return NextFill::Ended;
            }
            let per_host = self.per_host_page(page);
            let run = host_run(&self.table, page, per_host);
            let range = self.range_of(run);
            if self.touches_lost(run) {
                self.faults.pop_front();
                return NextFill::Lost(range);
            }
            if self.settled.contains(page) {
                // Put in since, or discarded.
                self.faults.pop_front();
                return NextFill::Zero(range);
            }
            if self.claims.is_full() {
                return NextFill::Full;
            }
            self.faults.pop_front();
            if self.is_claimed(page, FillOrigin::Fault) {
                continue;
            }
            let (run, holds) = self.around(page, per_host, content);
            if let Some(claim) = self.hand_out(run, holds, FillOrigin::Fault) {
                return NextFill::Fill(claim);
            }
        }
        if self.ended { NextFill::Ended } else { NextFill::Idle }
    }

    /// What a prefetcher reads next: the first pages of `within` that are missing, that nobody reads, and that hold data.
    /// Zero pages are not prefetched: where nothing is when the restore is over, zeros are.
    ///
    /// `Idle`: all of `within` is in, or others have it. With all pages in `within` it is `Done` when nothing is missing.
    pub fn next_prefetch(&mut self, within: Run, content: &impl Content) -> NextFill {
        if self.ended {
            return NextFill::Ended;
        }
        let whole = within.first.0 == 0 && within.end().0 >= self.table.pages();
        let from = if whole { self.search } else { within.first };
        let end = PageId(within.end().0.min(self.table.pages()));
        let (found, searched) = self.find_data(from, end, content, true);
        if whole {
            self.search = searched;
        }
        let Some((run, holds)) = found else {
            return if whole && self.is_complete() { NextFill::Done } else { NextFill::Idle };
        };
        if self.claims.is_full() {
            return NextFill::Full;
        }
        match self.hand_out(run, holds, FillOrigin::Prefetch) {
            Some(claim) => NextFill::Fill(claim),
            None => NextFill::Full,
        }
    }

    /// The next pages of `claim` at or after `from` that are still to be put in: not those that somebody else put in
    /// meanwhile, nor those that were discarded. Ask after reading events, and put them in before reading more.
    pub fn wanted(&self, claim: &FillClaim, from: PageId) -> Option<Run> {
        let end = claim.run().end();
        #[cfg(test)]
        if self.defect == Some(FillDefect::PutInBlindly) {
            return (from.0 < end.0).then(|| Run::new(from, end.0 - from.0));
        }
        let first = self.settled.first_clear(from.0.max(claim.run().first.0), end.0);
        if first >= end.0 {
            return None;
        }
        let to = self.settled.next_set(PageId(first)).map_or(end.0, |page| page.0.min(end.0));
        Some(Run::new(PageId(first), to - first))
    }

    // ---- that is done

    /// The kernel has these pages of `claim`, or had them already; who waited for them was woken.
    pub fn put_in(&mut self, claim: &FillClaim, part: Run) {
        let part = cut(part, claim.run());
        let before = self.settled.count();
        self.settled.insert(part);
        let count = match claim.origin() {
            FillOrigin::Fault => &mut self.counts.by_fault,
            FillOrigin::Prefetch => &mut self.counts.prefetched,
        };
        *count += self.settled.count() - before;
    }

    /// These pages of `claim` cannot be had: they are to be poisoned, or whoever touches them stays blocked.
    pub fn lose(&mut self, claim: &FillClaim, part: Run) {
        let part = cut(part, claim.run());
        let mut at = part.first;
        // What came in or was discarded meanwhile is not lost.
        while let Some(run) = self.wanted(claim, at).map(|run| cut(run, part)).filter(|run| run.pages > 0) {
            self.counts.lost += run.pages;
            self.settled.insert(run);
            self.lost.insert(run);
            at = run.end();
        }
    }

    /// The first pages at or after `from` that hold data and are neither in nor lost, whoever reads them.
    pub fn next_missing(&self, from: PageId, content: &impl Content) -> Option<Run> {
        self.find_data(from, PageId(self.table.pages()), content, false).0.map(|(run, _)| run)
    }

    /// The first pages of `run` that are lost.
    #[must_use]
    pub fn next_lost(&self, run: Run) -> Option<PageId> {
        self.lost.next_set(run.first).filter(|&page| run.contains(page))
    }

    /// Gives up `run`, which [`next_missing`](Self::next_missing) gave: it is lost.
    pub fn give_up(&mut self, run: Run) {
        let before = self.settled.count();
        self.settled.insert(run);
        self.lost.insert(run);
        self.counts.lost += self.settled.count() - before;
    }

    /// Ends a claim. What of it is still missing will be claimed again: the search has not passed it.
    pub fn end(&mut self, claim: FillClaim) {
        self.claims.retain(|out| out.number != claim.number);
    }

    // ---- getters

    /// Whether every page that has data is settled. Then what is not in may become ordinary memory, which is zero.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        #[cfg(test)]
        if self.defect == Some(FillDefect::CompleteTooEarly) {
            return self.search.0 >= self.table.pages();
        }
        self.search.0 >= self.table.pages() && self.claims.is_empty()
    }

    /// Whether the restore was given up.
    #[must_use]
    pub const fn is_ended(&self) -> bool {
        self.ended
    }

    /// The block table.
    #[must_use]
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// What happened so far.
    #[must_use]
    pub const fn counts(&self) -> &FillCounts {
        &self.counts
    }

    /// Whether `page` is settled: in, lost or discarded.
    #[must_use]
    pub fn is_settled(&self, page: PageId) -> bool {
        self.settled.contains(page)
    }

    /// Pages that are lost now: one that is discarded is lost no more.
    #[must_use]
    pub fn lost_pages(&self) -> u64 {
        self.lost.count()
    }

    /// Whether there are faults to serve.
    #[must_use]
    pub fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Where `run`, inside one block, is mapped.
    #[must_use]
    pub fn range_of(&self, run: Run) -> HostRange {
        self.table.host_range(run).unwrap_or(HostRange::new(HostAddr(0), 0))
    }

    #[cfg(test)]
    pub(crate) fn break_with(&mut self, defect: FillDefect) {
        self.defect = Some(defect);
    }

    #[cfg(test)]
    pub(crate) fn is_lost(&self, page: PageId) -> bool {
        self.lost.contains(page)
    }

    /// Feeds all that the future depends on to `hasher`.
    #[cfg(test)]
    pub(crate) fn key<H: core::hash::Hasher>(&self, hasher: &mut H)
    where
        W: core::hash::Hash,
    {
        use core::hash::Hash;
        (&self.settled, &self.lost, self.search, self.around, self.ended).hash(hasher);
        self.faults.iter().for_each(|page| page.hash(hasher));
        self.faults.len().hash(hasher);
        let mut runs: Vec<(PageId, u64, bool), CLAIMS> = Vec::new();
        for out in &self.claims {
            let _ = runs.push((out.run.first, out.run.pages, out.origin == FillOrigin::Fault));
        }
        runs.sort_unstable();
        runs.as_slice().hash(hasher);
    }

    fn touches_lost(&self, run: Run) -> bool {
        #[cfg(test)]
        if self.defect == Some(FillDefect::LostIsZero) {
            return false;
        }
        self.lost.count() > 0 && self.lost.next_set(run.first).is_some_and(|page| run.contains(page))
    }

    fn is_claimed(&self, page: PageId, by: FillOrigin) -> bool {
        self.claims.iter().any(|out| out.origin == by && out.run.contains(page))
    }

    /// The block at `at` and the host page there.
    fn host_page(&self, at: HostAddr) -> Option<(&RamBlock, HostRange)> {
        let block = self.table.block(self.table.block_at(at)?)?;
        let start = HostAddr(at.0 & !(block.page_size - 1));
        Some((block, HostRange::new(start, block.page_size)))
    }

    fn per_host_page(&self, page: PageId) -> u64 {
        let block = self.table.block_of(page).and_then(|index| self.table.block(index));
        block.map_or(1, RamBlock::pages_per_host_page)
    }

    /// What to put in for a fault on `page`, which is missing: its neighbours too as far as policy goes, and as far as
    /// they are missing and alike.
    fn around(&mut self, page: PageId, per_host: u64, content: &impl Content) -> (Run, Holds) {
        let own = host_run(&self.table, page, per_host);
        let Some(index) = self.table.block_of(page) else { return (own, Holds::Mixed) };
        let host = self.table.block(index).map_or(HostAddr(0), |block| block.host);
        let thin = self.table.block(index).is_some_and(|block| block.backing == Backing::Anonymous);
        let mut want = self.around.faulted(&self.limits);
        let overtakes = self.is_claimed(page, FillOrigin::Prefetch);
        let least = self.limits.around_min.max(1);
        if overtakes {
            // The rest of it is on its way.
            want = least;
        }
        let free = |page: PageId| {
            !self.settled.contains(page)
                && !self.is_claimed(page, FillOrigin::Fault)
                && (overtakes || !self.is_claimed(page, FillOrigin::Prefetch))
        };
        let block = self.table.block_run(index);
        let widest = window(page, want.max(per_host), host, block);
        let mut run = grow(own, widest, per_host, &free);
        let holds = search::holds_around(&mut run, own, content);
        if holds == Holds::Zero && !thin {
            // Only private anonymous memory has one zero page for all: elsewhere each takes memory of its own.
            run = cut(run, window(page, least.max(per_host), host, block));
        }
        (run, holds)
    }

    fn hand_out(&mut self, run: Run, holds: Holds, origin: FillOrigin) -> Option<FillClaim> {
        let number = self.next_number;
        self.claims.push(Out { number, run, origin }).ok()?;
        self.next_number = self.next_number.wrapping_add(1);
        Some(FillClaim { number, run, range: self.range_of(run), origin, holds })
    }
}

/// The pages of the host page that holds `page`.
fn host_run(table: &BlockTable, page: PageId, per_host: u64) -> Run {
    let first = table.block_of(page).map_or(page, |index| table.block_run(index).first);
    Run::new(PageId(page.0 - (page.0 - first.0) % per_host), per_host)
}

/// `own` and its neighbours in `within`, host page by host page, as far as `free` says yes.
fn grow(own: Run, within: Run, step: u64, free: &impl Fn(PageId) -> bool) -> Run {
    let (mut first, mut end) = (own.first.0, own.end().0);
    while first >= within.first.0 + step && free(PageId(first - step)) {
        first -= step;
    }
    while end + step <= within.end().0 && free(PageId(end)) {
        end += step;
    }
    Run::new(PageId(first), end - first)
}

/// What `run` and `within` have in common; empty at `within`'s start if that is nothing.
fn cut(run: Run, within: Run) -> Run {
    let first = run.first.max(within.first);
    let end = run.end().min(within.end());
    if first < end { Run::new(first, end.0 - first.0) } else { Run::new(within.first, 0) }
}

const _: () = assert!(PAGE_SIZE == 4096);
