//! The state of one snapshot: what is pending, what is claimed, who waits, where the scan stands.

use core::fmt;
use core::ops::Deref;

use heapless::{Deque, Vec};

use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, LayoutError, Treatment};
use crate::claim::{CapturedRun, Claim, Flight, MAX_SLOTS_PER_CLAIM, Origin, ReleasedRun};
use crate::policy::{FaultAround, Limits, WhenFull};
use crate::pool::{Budget, SlotPool};
use crate::seams::OsError;
use crate::units::{BlockIndex, HostAddr, HostRange, PAGE_SIZE, PageId, Run};

/// Who asks for something to capture.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Worker {
    /// The thread that serves faults: requests and faults only, so that it is free when the next one comes.
    Faults,
    /// A scan worker: requests, faults, then the linear scan.
    Scan,
    /// Whoever holds the VM stopped: the blocks that must be captured inside the pause.
    Pause,
}

/// What to do now.
#[must_use]
#[derive(Debug)]
pub enum Next {
    /// Capture this.
    Claim(Claim),
    /// Nothing for this worker until something happens (a fault, a request).
    Idle,
    /// There is something, but no slot or no claim is free: come back after a `written` or a `released`.
    Full,
    /// Every page is claimed: this worker is not needed any more, except for faults that may still come.
    Done,
    /// The snapshot has ended; see [`Snapshot::cause`].
    Ended,
}

/// What became of a write fault.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultOutcome {
    /// In the queue; a `next_claim` will return it.
    Queued,
    /// Somebody is capturing that page: the release of his claim wakes the writer. Nothing to do.
    Waits,
    /// That page is not pending (any more): release this range, which wakes the writer.
    Stale(HostRange),
    /// No block has that address. Release the page in the kernel so that nobody hangs, and report it.
    NotOurs,
    /// The queue is full: stop reading events, serve, then hand this one in again.
    QueueFull,
}

/// What became of a request for a page.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestOutcome {
    /// In the queue.
    Queued,
    /// On its way already.
    Claimed,
    /// Captured before, or never part of this snapshot: nothing to do.
    NotPending,
    /// The image has no such page.
    NoSuchPage,
    /// The queue is full: ask again later.
    QueueFull,
}

/// What to do before a run is discarded.
#[must_use]
#[derive(Debug)]
pub enum Discard {
    /// Capture this first, then ask again.
    Claim(Claim),
    /// Somebody is capturing part of it, or there is no slot: ask again after the next `released` or `written`.
    Wait,
    /// Nothing of it is pending: discard.
    Clear,
}

/// Why a snapshot ended without an image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Cause {
    /// The embedder cancelled it, or dropped its handle.
    Cancelled,
    /// The memory could not be protected.
    Arm(OsError),
    /// Guest RAM could not be read.
    Capture(OsError),
    /// The protection could not be lifted.
    Release(OsError),
    /// The tracker's events could not be read.
    Events(OsError),
    /// The image could not be written; the sink's own error has the details.
    Sink,
    /// A writer waited, the pool was full, and the policy is to cancel.
    PoolFull,
    /// Pages that were not captured yet were discarded without `before_discard`.
    Discarded(Run),
    /// Pages that were not captured yet were unmapped or moved.
    Unmapped(Run),
    /// A thread of the engine died.
    ThreadDied,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cancelled => f.write_str("cancelled"),
            Self::Arm(e) => write!(f, "guest RAM could not be write-protected: {e}"),
            Self::Capture(e) => write!(f, "guest RAM could not be read: {e}"),
            Self::Release(e) => write!(f, "write protection could not be lifted: {e}"),
            Self::Events(e) => write!(f, "write faults could not be read: {e}"),
            Self::Sink => f.write_str("the image could not be written"),
            Self::PoolFull => f.write_str(
                "the pool was full while the guest waited for a page; give it more memory or let the guest wait",
            ),
            Self::Discarded(run) => {
                write!(f, "{run} were discarded before they were captured; call before_discard first")
            }
            Self::Unmapped(run) => write!(f, "{run} were unmapped or moved before they were captured"),
            Self::ThreadDied => f.write_str("a thread of the snapshot died"),
        }
    }
}

/// Why a snapshot cannot be set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetupError {
    /// The bitmap lent does not fit the layout.
    Layout(LayoutError),
    /// The pool cannot hold one host page of a block.
    HostPageTooLarge {
        /// Host page size in bytes.
        page_size: u64,
        /// The most one claim can hold, in bytes.
        room: u64,
    },
    /// The storage lent for the pool's slots is too short.
    PoolStorage {
        /// Slots asked for.
        slots: u16,
    },
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(e) => e.fmt(f),
            Self::HostPageTooLarge { page_size, room } => write!(
                f,
                "a host page of {page_size} bytes does not fit into the pool, where one claim can have {room} bytes; \
                 make the pool larger"
            ),
            Self::PoolStorage { slots } => write!(f, "the storage lent is too short for {slots} pool slots"),
        }
    }
}

impl core::error::Error for SetupError {}

/// What happened so far, in pages unless said.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Counts {
    /// Pages that belonged to the snapshot at T0.
    pub total: u64,
    /// Captured and released.
    pub released: u64,
    /// Of those, claimed because a writer was blocked on one of them or a neighbour.
    pub by_fault: u64,
    /// Of those, claimed by request.
    pub by_request: u64,
    /// Of those, claimed before a discard.
    pub by_discard: u64,
    /// Of those, captured inside the pause.
    pub by_pause: u64,
    /// Write faults handed in (faults, not pages).
    pub faults: u64,
    /// Faults on pages not pending any more.
    pub stale_faults: u64,
    /// Faults that had to wait for a slot at least once.
    pub faults_held: u64,
    /// Most pool slots in use at once.
    pub slots_peak: u64,
}

/// Where the linear scan stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PageSearchStatus {
    /// The next page to look at.
    pub page: PageId,
    /// Whether the scan has passed the end of RAM at least once.
    pub round_complete: bool,
}

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
    pool: SlotPool<W>,
    faults: Deque<PageId, FAULTS>,
    requests: Deque<PageId, FAULTS>,
    claims: Vec<InFlight, CLAIMS>,
    search: PageSearchStatus,
    around: FaultAround,
    limits: Limits,
    counts: Counts,
    cause: Option<Cause>,
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
                return Err(SetupError::HostPageTooLarge { page_size: block.page_size, room });
            }
        }
        let pool = SlotPool::new(slot_words, slots, limits.slot_pages, limits.reserve_slots.min(u64::from(slots) / 2))
            .ok_or(SetupError::PoolStorage { slots })?;
        let mut snapshot = Self {
            table,
            pending,
            pool,
            faults: Deque::new(),
            requests: Deque::new(),
            claims: Vec::new(),
            search: PageSearchStatus::default(),
            around: FaultAround::new(&limits),
            limits,
            counts: Counts::default(),
            cause: None,
        };
        snapshot.round_to_host_pages();
        snapshot.counts.total = snapshot.pending.count();
        Ok(snapshot)
    }

    // ---- something happened

    /// A writer is blocked at `at`.
    pub fn handle_fault(&mut self, at: HostAddr) -> FaultOutcome {
        let Some(index) = self.table.block_at(at) else {
            return FaultOutcome::NotOurs;
        };
        let outcome = match self.table.page_at(at) {
            Some(page) if self.cause.is_none() && self.pending.contains(page) => {
                if self.faults.iter().any(|&queued| queued == page) || self.faults.push_back(page).is_ok() {
                    FaultOutcome::Queued
                } else {
                    return FaultOutcome::QueueFull;
                }
            }
            Some(page) if self.cause.is_none() && self.is_claimed(Run::new(page, 1)) => FaultOutcome::Waits,
            _ => {
                self.counts.stale_faults += 1;
                FaultOutcome::Stale(self.host_page_at(index, at))
            }
        };
        self.counts.faults += 1;
        outcome
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
        while let Some(&page) = self.requests.front() {
            if !self.pending.contains(page) {
                self.requests.pop_front();
                continue;
            }
            let Some(claim) = self.claim(page, self.limits.around_min, Budget::Urgent, Origin::Request) else {
                return Next::Full;
            };
            self.requests.pop_front();
            return Next::Claim(claim);
        }
        while let Some(&page) = self.faults.front() {
            if !self.pending.contains(page) {
                // Claimed since: that claim's release wakes the writer.
                self.faults.pop_front();
                continue;
            }
            let before = self.around;
            let around = self.around.faulted(&self.limits);
            if let Some(claim) = self.claim(page, around, Budget::Urgent, Origin::Fault) {
                self.faults.pop_front();
                return Next::Claim(claim);
            }
            self.around = before;
            self.counts.faults_held += 1;
            if self.limits.when_full == WhenFull::Cancel && self.pool.room(Budget::Urgent) == 0 {
                self.cancel(Cause::PoolFull);
                return Next::Ended;
            }
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

    fn next_in_scan(&mut self) -> Next {
        let ahead = self.next_scannable(self.search.page);
        let Some(page) = ahead.or_else(|| self.next_scannable(PageId(0))) else {
            // Only blocks that are captured inside the pause are left; they are not the scan's.
            return Next::Idle;
        };
        self.search.round_complete |= ahead.is_none();
        match self.claim(page, self.limits.scan_pages, Budget::Scan, Origin::Scan) {
            Some(claim) => {
                self.around.scanned();
                Next::Claim(claim)
            }
            None => Next::Full,
        }
    }

    fn next_in_pause(&mut self) -> Next {
        match self.next_pause_page() {
            None => Next::Done,
            Some(page) => self
                .claim(page, self.limits.scan_pages, Budget::Urgent, Origin::Pause)
                .map_or(Next::Full, Next::Claim),
        }
    }

    fn next_pause_page(&self) -> Option<PageId> {
        self.table.iter().filter(|(_, b)| b.treatment == Treatment::InPause).find_map(|(i, _)| {
            let run = self.table.block_run(i);
            self.pending.next_set(run.first).filter(|&page| run.contains(page))
        })
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

    fn is_in_pause_block(&self, page: PageId) -> bool {
        self.table
            .block_of(page)
            .and_then(|b| self.table.block(b))
            .is_some_and(|b| b.treatment == Treatment::InPause)
    }

    /// Claims the pending pages around `page` inside the naturally aligned window of `want` pages, in whole host pages,
    /// as many as there is room for. `None`: no slot or no claim is free.
    fn claim(&mut self, page: PageId, want: u64, budget: Budget, origin: Origin) -> Option<Claim> {
        if self.claims.is_full() {
            return None;
        }
        let index = self.table.block_of(page)?;
        let block = *self.table.block(index)?;
        let whole = self.table.block_run(index);
        let unit = block.pages_per_host_page();
        let within = window(page, want.max(unit), block.host, whole);
        let mut run = self.pending.run_around(page, within)?;
        let room = self.pool.room(budget) / unit * unit;
        if room == 0 {
            return None;
        }
        if run.pages > room {
            // The host page of `page` must be among them.
            let first = PageId(whole.first.0 + (page.0 - whole.first.0) / unit * unit);
            run = Run::new(first, room.min(run.end().0 - first.0));
        }
        let range = self.table.host_range(run)?;
        let slots = self.pool.take(run.pages)?;
        self.pending.remove(run);
        // Cannot fail: there was room above.
        let _ = self.claims.push(InFlight { run, captured: false });
        self.counts.slots_peak = self.counts.slots_peak.max(self.pool.in_use());
        if origin != Origin::Discard && origin != Origin::Pause {
            self.search.page = run.end();
        }
        Some(Claim {
            flight: Flight { run, range, slots, origin, protected: block.treatment == Treatment::Tracked },
        })
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

    fn round_to_host_pages(&mut self) {
        for (index, block) in self.table.iter() {
            let unit = block.pages_per_host_page();
            let whole = self.table.block_run(index);
            let mut at = whole.first;
            while unit > 1 {
                let Some(page) = self.pending.next_set(at).filter(|&page| whole.contains(page)) else { break };
                let first = whole.first.0 + (page.0 - whole.first.0) / unit * unit;
                self.pending.insert(Run::new(PageId(first), unit));
                at = PageId(first + unit);
            }
        }
    }

    /// Pages in one pool slot.
    pub fn slot_pages(&self) -> u64 {
        self.pool.slot_pages()
    }
}

/// The window of `want` pages (rounded up to a power of two), aligned in host address space so that a window of 2 MiB
/// is one huge page, that holds `page`; cut to its block.
fn window(page: PageId, want: u64, host: HostAddr, block: Run) -> Run {
    let size = want.checked_next_power_of_two().unwrap_or(1 << 63);
    let base = host.0 / PAGE_SIZE;
    let start = (base + (page.0 - block.first.0)) & !(size - 1);
    let from = start.saturating_sub(base);
    let to = (start.saturating_add(size) - base).min(block.pages);
    Run::new(PageId(block.first.0 + from), to - from)
}
