//! The state of one snapshot: what is pending, what is claimed, who waits, where the scan stands.

use core::ops::Deref;

use heapless::{Deque, Vec};

use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, LayoutError, Treatment};
use crate::claim::{CapturedRun, Claim, Flight, MAX_SLOTS_PER_CLAIM, Origin, ReleasedRun};
use crate::outcome::{
    Cause, Counts, Discard, FaultOutcome, Next, PageSearchStatus, RequestOutcome, SetupError, Worker,
};
use crate::policy::{FaultAround, Limits, WhenFull, window};
use crate::pool::{Budget, SlotPool};
use crate::seams::OsError;
use crate::units::{BlockIndex, HostAddr, HostRange, PAGE_SIZE, PageId, Run};

#[cfg(test)]
mod probe;
mod search;

#[cfg(test)]
use crate::tests::Defect;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct InFlight {
    run: Run,
    captured: bool,
}

/// The decisions of one snapshot. `handle_*`: something happened. `next_*`, `claim_*`: what to do now. `captured`,
/// `released`, `written`: that is done. The rest are getters.
///
/// `T` is the block table (a reference or an `Arc`), `W` the storage lent for bitmaps, `FAULTS` the capacity of the
/// fault queue and of the request queue, `CLAIMS` how many claims there can be at once.
///
/// # Invariants
/// A page is in exactly one place: pending (its bit is set), claimed (in `claims`), or released (neither). A claim
/// leaves `claims` only through [`released`](Self::released), or when the snapshot has ended. A slot is free, or
/// belongs to exactly one `Claim`, `CapturedRun` or `ReleasedRun`. The first cause of an end is the one kept.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Snapshot<T, W, const FAULTS: usize, const CLAIMS: usize> {
    table: T,
    pending: PageBitmap<W>,
    /// Pending pages that the scan takes first.
    hot: Option<PageBitmap<W>>,
    pool: SlotPool<W>,
    faults: Deque<PageId, FAULTS>,
    requests: Deque<PageId, FAULTS>,
    claims: Vec<InFlight, CLAIMS>,
    search: PageSearchStatus,
    around: FaultAround,
    limits: Limits,
    counts: Counts,
    cause: Option<Cause>,
    /// The fault at the head of the queue that was last counted as held.
    held: Option<PageId>,
    #[cfg(test)]
    defect: Option<Defect>,
}

/// Why a page cannot be claimed now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// As many claims are out as there can be; the next `released` frees one.
    NoClaim,
    /// The pool has no room; the next `written` frees a slot.
    NoSlot,
}

impl<T, W, const FAULTS: usize, const CLAIMS: usize> Snapshot<T, W, FAULTS, CLAIMS>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// A snapshot of the pages set in `pending`, with `slots` pool slots. `slot_words` is storage for
    /// [`PageBitmap::words_for`]`(slots)` words.
    ///
    /// Where the host page is larger than the target page, whole host pages become pending.
    ///
    /// # Errors
    /// Storage too small, or a pool that cannot hold one host page.
    pub fn new(
        table: T,
        pending: PageBitmap<W>,
        slots: u16,
        slot_words: W,
        limits: Limits,
    ) -> Result<Self, SetupError> {
        if pending.pages() < table.pages() {
            let error = LayoutError::BitmapTooSmall { bits: pending.pages(), pages: table.pages() };
            return Err(SetupError::Layout(error));
        }
        let per_claim = u64::from(slots).min(MAX_SLOTS_PER_CLAIM as u64).saturating_mul(limits.slot_pages);
        for block in table.blocks().iter().filter(|b| b.treatment != Treatment::Ignored) {
            if block.pages_per_host_page() > per_claim {
                let room = per_claim.saturating_mul(PAGE_SIZE);
                return Err(SetupError::HostPageTooLarge { block: block.name, page_size: block.page_size, room });
            }
        }
        let pool = SlotPool::new(
            slot_words,
            slots,
            limits.slot_pages,
            limits.reserve_slots.min(u64::from(slots - slots.div_ceil(4))),
        )
        .ok_or(SetupError::PoolStorage { slots })?;
        let mut snapshot = Self {
            table,
            pending,
            hot: None,
            pool,
            faults: Deque::new(),
            requests: Deque::new(),
            claims: Vec::new(),
            search: PageSearchStatus::default(),
            around: FaultAround::new(&limits),
            limits,
            counts: Counts::default(),
            cause: None,
            held: None,
            #[cfg(test)]
            defect: None,
        };
        // What a longer bitmap has beyond the image is no page of it: nobody could ever claim it.
        snapshot.pending.remove(Run::new(PageId(snapshot.table.pages()), u64::MAX));
        search::round_to_host_pages(&snapshot.table, &mut snapshot.pending);
        snapshot.counts.total = snapshot.pending.count();
        Ok(snapshot)
    }

    /// Has the scan take the pages of `hot` first: those that were written lately will be written next. Pages that are
    /// not pending do not matter.
    pub fn scan_first(&mut self, hot: PageBitmap<W>) {
        self.hot = Some(hot);
    }

    // ---- something happened

    /// A writer is blocked at `at`.
    ///
    /// Only tracked blocks are protected on account of this snapshot. A fault anywhere else (an unused tail, a
    /// read-only block, one captured inside the pause) has nothing to wait for here, and is stale.
    pub fn handle_fault(&mut self, at: HostAddr) -> FaultOutcome {
        let Some((index, block)) = self.table.block_at(at).and_then(|i| Some((i, self.table.block(i)?))) else {
            return FaultOutcome::NotOurs;
        };
        let ours = self.cause.is_none() && block.treatment == Treatment::Tracked;
        let outcome = match self.table.page_at(at).filter(|_| ours) {
            #[cfg(test)]
            Some(page) if self.defect == Some(Defect::CapOnPages) && self.pool.is_full() => {
                self.pending.remove(Run::new(page, 1));
                FaultOutcome::Stale(self.host_page_at(index, at))
            }
            Some(page) if self.pending.contains(page) => {
                if self.faults.iter().any(|&queued| queued == page) || self.faults.push_back(page).is_ok() {
                    FaultOutcome::Queued
                } else {
                    #[cfg(test)]
                    if self.defect == Some(Defect::FullQueueDropsFault) {
                        return FaultOutcome::Queued;
                    }
                    return FaultOutcome::QueueFull;
                }
            }
            #[cfg(test)]
            Some(page) if self.defect == Some(Defect::CapturedBeforeRead) && self.is_claimed(Run::new(page, 1)) => {
                FaultOutcome::Stale(self.host_page_at(index, at))
            }
            Some(page) if self.is_claimed(Run::new(page, 1)) => FaultOutcome::Waits,
            #[cfg(test)]
            Some(_) if self.defect == Some(Defect::StaleNotWoken) => FaultOutcome::Waits,
            _ => {
                self.counts.stale_faults += 1;
                FaultOutcome::Stale(self.host_page_at(index, at))
            }
        };
        self.counts.faults += 1;
        outcome
    }

    /// For so long nobody has faulted that the next fault is one by itself (the embedder has the clock). It takes fewer
    /// neighbours along; without a lull it takes more. Hand it in before the fault.
    pub fn handle_lull(&mut self) {
        self.around.lull();
    }

    /// A reader elsewhere wants `page` next.
    pub fn handle_request(&mut self, page: PageId) -> RequestOutcome {
        let Some(index) = self.table.block_of(page) else {
            return RequestOutcome::NoSuchPage;
        };
        let in_pause = self.table.block(index).is_some_and(|b| b.treatment == Treatment::InPause);
        if self.is_claimed(Run::new(page, 1)) || (in_pause && self.pending.contains(page)) {
            RequestOutcome::Claimed
        } else if !self.pending.contains(page) {
            RequestOutcome::NotPending
        } else if self.requests.iter().any(|&queued| queued == page) || self.requests.push_back(page).is_ok() {
            RequestOutcome::Queued
        } else {
            RequestOutcome::QueueFull
        }
    }

    /// `range` is losing its content and cannot be held back. If a page of it was not captured yet, the snapshot ends
    /// with `Cause::Discarded` and this returns true.
    ///
    /// Reading the event is what lets the discard go on, so no [`captured`](Self::captured) may come between the two:
    /// its bytes would be zeros. Read the event under the lock that guards this value, without waiting.
    pub fn handle_discarded(&mut self, range: HostRange) -> bool {
        self.handle_loss(range, Cause::Discarded)
    }

    /// `range` goes away. If a page of it was not captured yet, the snapshot ends with `Cause::Unmapped` and this
    /// returns true.
    pub fn handle_unmapped(&mut self, range: HostRange) -> bool {
        self.handle_loss(range, Cause::Unmapped)
    }

    /// Ends the snapshot without an image. The first cause is kept; returns whether it was this one.
    ///
    /// What to do then: disarm, which wakes everybody. Claims still held are given back with
    /// [`capture_failed`](Self::capture_failed) or go on through the stages; both are harmless.
    pub fn cancel(&mut self, cause: Cause) -> bool {
        let first = self.cause.is_none();
        #[cfg(test)]
        if self.defect == Some(Defect::LastCauseKept) {
            self.cause = None;
        }
        self.cause.get_or_insert(cause);
        first
    }

    // ---- what to do now

    /// The next thing to capture for `who`: requests first, then faults, then the linear scan, which goes on from
    /// where the last out-of-order run ended, since its neighbours are likely next.
    pub fn next_claim(&mut self, who: Worker) -> Next {
        if self.cause.is_some() {
            return Next::Ended;
        }
        if who == Worker::Pause {
            return self.next_in_pause();
        }
        let mut full = false;
        while let Some(&page) = self.requests.front() {
            if self.pending.contains(page) {
                match self.claim(page, self.limits.around_min, Budget::Urgent, Origin::Request) {
                    Ok(claim) => {
                        self.requests.pop_front();
                        return Next::Claim(claim);
                    }
                    // A fault on a smaller host page may still find room, and a blocked vCPU does not wait for a reader.
                    Err(_) => full = true,
                }
                break;
            }
            self.requests.pop_front();
        }
        while let Some(&page) = self.faults.front() {
            if !self.pending.contains(page) {
                // Claimed since: that claim's release wakes the writer.
                self.faults.pop_front();
                continue;
            }
            let before = self.around;
            let around = self.around.faulted(&self.limits);
            #[cfg(test)]
            if self.defect == Some(Defect::FaultWaitsForWriter) && !self.pool.all_free() {
                return Next::Full;
            }
            match self.claim(page, around, Budget::Urgent, Origin::Fault) {
                Ok(claim) => {
                    self.faults.pop_front();
                    return Next::Claim(claim);
                }
                Err(Refusal::NoSlot) => self.hold(page),
                Err(Refusal::NoClaim) => {}
            }
            self.around = before;
            full = true;
            break;
        }
        if self.cause.is_some() {
            return Next::Ended;
        }
        if full {
            return Next::Full;
        }
        if self.pending.count() == 0 {
            return Next::Done;
        }
        match who {
            Worker::Scan => self.next_in_scan(),
            Worker::Faults | Worker::Pause => Next::Idle,
        }
    }

    /// `run` is going to be discarded by the VMM: capture what is pending of it first. Ask again until it says
    /// [`Discard::Clear`].
    pub fn claim_for_discard(&mut self, run: Run) -> Discard {
        if self.cause.is_some() {
            return Discard::Clear;
        }
        let next = self.pending.next_set(run.first).filter(|&page| run.contains(page));
        match next {
            Some(page) => {
                let want = run.pages.min(self.limits.scan_pages);
                self.claim(page, want, Budget::Urgent, Origin::Discard).map_or(Discard::Wait, Discard::Claim)
            }
            None if self.is_claimed(run) => Discard::Wait,
            None => Discard::Clear,
        }
    }

    // ---- that is done

    /// The bytes of `claim` are in its slots.
    pub fn captured(&mut self, claim: Claim) -> CapturedRun {
        if let Some(entry) = self.claims.iter_mut().find(|c| c.run == claim.flight.run) {
            entry.captured = true;
        }
        CapturedRun { flight: claim.flight }
    }

    /// The bytes of `claim` could not be read: the snapshot ends with `Cause::Capture`. The run stays protected until
    /// the disarm, so nothing uncaptured is ever released by us while the snapshot lives.
    pub fn capture_failed(&mut self, claim: Claim, error: OsError) {
        self.cancel(Cause::Capture(error));
        self.land(&claim.flight);
        self.pool.give_back(&claim.flight.slots);
    }

    /// The protection of `run` is lifted and its writers are awake.
    pub fn released(&mut self, run: CapturedRun) -> ReleasedRun {
        self.land(&run.flight);
        #[cfg(test)]
        if self.defect == Some(Defect::SlotFreedAtRelease) {
            self.pool.give_back(&run.flight.slots);
        }
        let pages = run.flight.run.pages;
        self.counts.released += pages;
        match run.flight.origin {
            Origin::Fault => self.counts.by_fault += pages,
            Origin::Request => self.counts.by_request += pages,
            Origin::Discard => self.counts.by_discard += pages,
            Origin::Pause => self.counts.by_pause += pages,
            Origin::Scan => {}
        }
        ReleasedRun { flight: run.flight }
    }

    /// The protection of `run` cannot be lifted: the snapshot ends with `Cause::Release`, and the disarm tries again.
    pub fn release_failed(&mut self, run: CapturedRun, error: OsError) {
        self.cancel(Cause::Release(error));
        self.land(&run.flight);
        self.pool.give_back(&run.flight.slots);
    }

    /// The bytes of `run` are in the image, or not wanted any more: its slots are free.
    pub fn written(&mut self, run: ReleasedRun) {
        self.pool.give_back(&run.flight.slots);
    }

    // ---- getters

    /// Why it ended without an image, if it did.
    pub const fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// Whether every page is captured and released: nothing is protected any more on account of this snapshot.
    pub fn is_captured(&self) -> bool {
        self.cause.is_none() && self.pending.count() == 0 && self.claims.is_empty()
    }

    /// Whether every page is in the image too.
    pub fn is_written(&self) -> bool {
        self.is_captured() && self.pool.all_free()
    }

    /// Whether everything that must be captured inside the pause is.
    pub fn is_pause_captured(&self) -> bool {
        self.next_pause_page().is_none() && self.claims.iter().all(|c| !self.is_in_pause_block(c.run.first))
    }

    /// Pages not claimed yet.
    pub fn pending(&self) -> u64 {
        self.pending.count()
    }

    /// What happened so far.
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Where the linear scan stands.
    pub const fn search(&self) -> PageSearchStatus {
        self.search
    }

    /// The block table.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    // ---- inside

    /// The writer blocked on `page` has to wait for a slot, or the policy says that it must not.
    fn hold(&mut self, page: PageId) {
        if self.held != Some(page) {
            self.held = Some(page);
            self.counts.faults_held += 1;
        }
        if self.limits.when_full == WhenFull::Cancel {
            self.cancel(Cause::PoolFull);
        }
    }

    /// Claims the pending pages around `page` inside the naturally aligned window of `want` pages, in whole host pages,
    /// as many as there is room for.
    fn claim(&mut self, page: PageId, want: u64, budget: Budget, origin: Origin) -> Result<Claim, Refusal> {
        if self.claims.is_full() {
            return Err(Refusal::NoClaim);
        }
        // Every pending page has a block; the fallback keeps core free of panics.
        let index = self.table.block_of(page).ok_or(Refusal::NoClaim)?;
        let block = *self.table.block(index).ok_or(Refusal::NoClaim)?;
        let whole = self.table.block_run(index);
        let unit = block.pages_per_host_page();
        let granule = self.table.granule_pages(index);
        let within = window(page, want.max(granule), block.host, whole);
        let mut run = self.pending.run_around(page, within).ok_or(Refusal::NoClaim)?;
        let room = self.pool.room(budget, unit);
        if room == 0 {
            return Err(Refusal::NoSlot);
        }
        if run.pages > room {
            if budget == Budget::Scan && room < granule.min(run.pages) && !self.pool.all_free() {
                // The scan has time: it waits for room rather than to take a huge page apart.
                return Err(Refusal::NoSlot);
            }
            // The host page of `page` must be among them.
            let first = PageId(whole.first.0 + (page.0 - whole.first.0) / unit * unit);
            run = Run::new(first, room.min(run.end().0 - first.0));
        }
        let range = self.table.host_range(run).ok_or(Refusal::NoClaim)?;
        let slots = self.pool.take(run.pages).ok_or(Refusal::NoSlot)?;
        self.pending.remove(run);
        if let Some(hot) = &mut self.hot {
            hot.remove(run);
        }
        // Cannot fail: there was room above.
        let _ = self.claims.push(InFlight { run, captured: false });
        self.counts.slots_peak = self.counts.slots_peak.max(self.pool.in_use());
        if origin != Origin::Discard && origin != Origin::Pause {
            self.search.page = run.end();
        }
        Ok(Claim { flight: Flight { run, range, slots, origin, protected: block.treatment == Treatment::Tracked } })
    }

    fn handle_loss(&mut self, range: HostRange, cause: fn(Run) -> Cause) -> bool {
        let lost = self.table.runs_in(range).find_map(|run| {
            let pending = self.pending.next_set(run.first).filter(|&page| run.contains(page));
            let claimed = self.claims.iter().find(|c| !c.captured && c.run.overlaps(run)).map(|c| c.run);
            pending.map(|page| Run::new(page, 1)).or(claimed)
        });
        match lost {
            Some(run) => {
                self.cancel(cause(run));
                true
            }
            None => false,
        }
    }

    fn is_claimed(&self, run: Run) -> bool {
        self.claims.iter().any(|c| c.run.overlaps(run))
    }

    fn land(&mut self, flight: &Flight) {
        self.claims.retain(|c| c.run != flight.run);
    }

    fn host_page_at(&self, index: BlockIndex, at: HostAddr) -> HostRange {
        let unit = self.table.block(index).map_or(PAGE_SIZE, |b| b.page_size);
        HostRange::new(HostAddr(at.0 & !(unit - 1)), unit)
    }

    /// Pages in one pool slot.
    pub fn slot_pages(&self) -> u64 {
        self.pool.slot_pages()
    }
}
