//! The server: the one thread that reads events and puts pages in. Faults come first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use ramshot_core::{
    Event, FillClaim, FillFault, Filled, Holds, HostAddr, HostRange, NextFill, OsError, PAGE_SIZE, PageId, Run,
};

use super::lost::{LostWhy, WhenLost};
use super::read::{Bad, Extents, bytes_of, read};
use super::shared::{Offer, Phase, Shared, State};
use super::{LazyFailed, order};
use crate::sync::run_at_once;

/// Events read at a time.
const BATCH: usize = 64;
/// Pages of what was prefetched that are put in between two looks for faults: 256 KiB, some 50 us.
const PIECE_PAGES: u64 = 64;
/// Without a fault for this long, the next one is a fault by itself.
const LULL: Duration = Duration::from_micros(300);
/// `EBUSY`.
const BUSY: i32 = 16;
/// While something has to be repeated, events are waited for no longer than this.
const RETRY_MS: u32 = 1;
/// Runs remembered for the next time: 16 MiB.
const MOST_TOUCHED: usize = 1 << 20;

/// The thread.
pub(super) fn serve(shared: &Shared) {
    run_at_once();
    let mut server = Server {
        shared,
        buffer: Vec::new(),
        held: Vec::new(),
        zeros: Vec::new(),
        lost: Vec::new(),
        served_at: None,
        pause: 0,
        blocks: false,
    };
    match catch_unwind(AssertUnwindSafe(|| server.run())) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => shared.over(Phase::Staying, Some(LazyFailed::Events(error))),
        Err(_) => shared.died(),
    }
}

struct Server<'a> {
    shared: &'a Shared,
    /// What is read for faults.
    buffer: Vec<u8>,
    /// Faults that core's queue had no room for.
    held: Vec<HostAddr>,
    /// Where zeros belong, still to be put there.
    zeros: Vec<HostRange>,
    /// What is lost, still to be poisoned.
    lost: Vec<HostRange>,
    served_at: Option<Instant>,
    /// How often in a row the kernel has put something off.
    pause: u32,
    /// There are lost pages that are not poisoned: who waits for one waits on.
    blocks: bool,
}

/// How far a claim is.
enum Step {
    /// Up to here.
    At(PageId),
    /// Up to here, and the kernel has put off the rest: read events first.
    Again(PageId),
    /// All of it.
    End,
}

impl Server<'_> {
    fn run(&mut self) -> Result<(), OsError> {
        let mut timeout = None;
        loop {
            self.read_events(timeout)?;
            loop {
                self.serve_faults()?;
                self.answer()?;
                if !self.put_in_a_piece()? {
                    break;
                }
                self.read_events(Some(0))?;
            }
            if self.is_over()? {
                return Ok(());
            }
            let more = !self.zeros.is_empty() || !self.lost.is_empty() || !self.held.is_empty();
            timeout = more.then_some(RETRY_MS);
        }
    }

    /// Waits for events and hands them to core.
    fn read_events(&mut self, timeout_ms: Option<u32>) -> Result<(), OsError> {
        let mut events = [Event::MissingFault { at: HostAddr(0) }; BATCH];
        let count = self.shared.filler.next_events(&mut events, timeout_ms)?;
        let held = std::mem::take(&mut self.held);
        if count == 0 && held.is_empty() {
            return Ok(());
        }
        let mut state = self.shared.lock();
        if self.served_at.is_some_and(|at| at.elapsed() > LULL) {
            state.core.handle_lull();
        }
        for &event in events.get(..count).unwrap_or_default() {
            match event {
                Event::MissingFault { at } => self.take_fault(&mut state, at),
                Event::Discarded(range) | Event::Unmapped(range) => {
                    state.core.handle_discarded(range, |range| self.zeros.push(range));
                }
                // A tracker that shares the context hears of it.
                Event::WriteFault { .. } => {}
            }
        }
        held.into_iter().for_each(|at| self.take_fault(&mut state, at));
        Ok(())
    }

    fn take_fault(&mut self, state: &mut State, at: HostAddr) {
        match state.core.handle_fault(at) {
            FillFault::Queued | FillFault::Waits => {}
            FillFault::Zero(range) => self.zeros.push(range),
            FillFault::Lost(range) => self.lost.push(range),
            FillFault::NotOurs => {
                log::error!(target: "ramshot::restore", "fault at {at}, in no RAM block: what belongs there is not known");
                self.lost.push(HostRange::new(HostAddr(at.0 & !(PAGE_SIZE - 1)), PAGE_SIZE));
            }
            FillFault::QueueFull => self.held.push(at),
        }
    }

    /// Serves what is queued.
    fn serve_faults(&mut self) -> Result<(), OsError> {
        loop {
            let mut state = self.shared.lock();
            match state.core.next_fault(&Extents(self.shared.source.as_ref())) {
                NextFill::Fill(claim) => {
                    state.serving = true;
                    drop(state);
                    self.serve_one(claim)?;
                }
                NextFill::Zero(range) => self.zeros.push(range),
                NextFill::Lost(range) => self.lost.push(range),
                NextFill::Idle | NextFill::Full | NextFill::Done | NextFill::Ended => {
                    if std::mem::take(&mut state.serving) {
                        drop(state);
                        self.shared.notify();
                    }
                    return Ok(());
                }
            }
        }
    }

    fn serve_one(&mut self, claim: FillClaim) -> Result<(), OsError> {
        let read_at = Instant::now();
        let len = bytes_of(claim.run().pages);
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut bad = Vec::new();
        if claim.holds() != Holds::Zero {
            if buffer.len() < len {
                let most = self.shared.around_max.max(self.shared.host_page);
                buffer.resize(usize::try_from(most).unwrap_or(len).max(len), 0);
            }
            let into = buffer.get_mut(..len).unwrap_or_default();
            bad = read(self.shared.source.as_ref(), &claim, into, || ());
        }
        let mut at = claim.run().first;
        loop {
            match self.put_in(&claim, &buffer, &bad, at, u64::MAX)? {
                Step::At(next) => at = next,
                Step::Again(next) => {
                    at = next;
                    self.breathe();
                    self.read_events(Some(0))?;
                }
                Step::End => break,
            }
        }
        self.buffer = buffer;
        let now = Instant::now();
        self.served_at = Some(now);
        let mut state = self.shared.lock();
        state.service.record(now.duration_since(read_at));
        let asked = state.for_snapshot.len();
        state.for_snapshot.retain(|&page| !claim.run().contains(page));
        let touched = state.for_snapshot.len() == asked;
        if touched && claim.holds() != Holds::Zero && state.touched.len() < MOST_TOUCHED {
            state.touched.push(claim.run());
        }
        state.core.end(claim);
        drop(state);
        self.shared.notify();
        Ok(())
    }

    /// Puts in a piece of what the prefetcher has read; whether there is more.
    fn put_in_a_piece(&mut self) -> Result<bool, OsError> {
        let mut state = self.shared.lock();
        if state.cancelled {
            return Ok(false);
        }
        let Some(mut offer) = state.offers.pop_front() else { return Ok(false) };
        drop(state);
        let step = self.put_in(&offer.claim, &offer.buffer, &offer.bad, offer.at, PIECE_PAGES)?;
        match step {
            Step::At(next) => offer.at = next,
            Step::Again(next) => {
                offer.at = next;
                self.breathe();
            }
            Step::End => {
                let Offer { claim, buffer, .. } = offer;
                let mut state = self.shared.lock();
                state.core.end(claim);
                state.free.push(buffer);
                drop(state);
                self.shared.notify();
                return Ok(true);
            }
        }
        self.shared.lock().offers.push_front(offer);
        Ok(true)
    }

    /// Puts in the next pages of `claim` at or after `at` that are still wanted, `most` at a time. `bytes` are those of
    /// its run.
    fn put_in(&mut self, claim: &FillClaim, bytes: &[u8], bad: &[Bad], at: PageId, most: u64) -> Result<Step, OsError> {
        let (wanted, page) = {
            let state = self.shared.lock();
            let Some(wanted) = state.core.wanted(claim, at) else { return Ok(Step::End) };
            (wanted, host_page_at(&state, wanted.first))
        };
        let mut part = Run::new(wanted.first, wanted.pages.min(most.max(page)));
        // Whole host pages, good or bad.
        if let Some(first_bad) = bad.iter().find(|bad| bad.run.overlaps(part)) {
            let into = (first_bad.run.first.0.max(part.first.0) - part.first.0) / page * page;
            if into == 0 {
                let lost = Run::new(part.first, page);
                self.lose(claim, lost, first_bad.why.clone())?;
                return Ok(Step::At(lost.end()));
            }
            part.pages = into;
        }
        match self.hand_over(claim, bytes, part) {
            Ok(filled) => {
                let done = Run::new(part.first, filled.bytes / PAGE_SIZE);
                self.shared.lock().core.put_in(claim, done);
                if filled.present > 0 {
                    log::warn!(
                        target: "ramshot::restore",
                        "{} bytes at {part} were there already: somebody else wrote them", filled.present
                    );
                }
                if filled.again {
                    return Ok(Step::Again(done.end()));
                }
                self.pause = 0;
                Ok(Step::At(done.end()))
            }
            // Host page by host page, to find the one that cannot be had.
            Err(_) if part.pages > page => {
                let last = part.end();
                let mut at = part.first;
                while at < last {
                    match self.put_in(claim, bytes, bad, at, page)? {
                        Step::At(next) => at = next,
                        other => return Ok(other),
                    }
                }
                Ok(Step::At(last))
            }
            Err(error) => {
                self.lose(claim, part, LostWhy::Ram(error))?;
                Ok(Step::At(part.end()))
            }
        }
    }

    fn hand_over(&self, claim: &FillClaim, bytes: &[u8], part: Run) -> Result<Filled, OsError> {
        let range = self.shared.lock().core.range_of(part);
        if claim.holds() == Holds::Zero {
            return self.shared.filler.zero(range);
        }
        let from = bytes_of(part.first.0 - claim.run().first.0);
        let bytes = bytes.get(from..).and_then(|rest| rest.get(..bytes_of(part.pages)));
        match bytes {
            Some(bytes) => self.shared.filler.fill(range.start, bytes),
            None => Err(OsError::new("a buffer shorter than its claim", 0).on(range)),
        }
    }

    fn lose(&mut self, claim: &FillClaim, run: Run, why: LostWhy) -> Result<(), OsError> {
        let mut state = self.shared.lock();
        state.core.lose(claim, run);
        let range = state.core.range_of(run);
        drop(state);
        // Told first: a vCPU that waits for it will fail.
        self.shared.tell_lost(run, why);
        self.lost.push(range);
        self.answer()
    }

    /// Zeros where they belong, poison where nothing else may be.
    fn answer(&mut self) -> Result<(), OsError> {
        for range in std::mem::take(&mut self.zeros) {
            match self.shared.filler.zero(range) {
                Ok(filled) if filled.again => self.zeros.push(rest(range, filled)),
                Ok(_) => {}
                Err(error) => {
                    log::error!(target: "ramshot::restore", "zeros: {error}");
                    self.lost.push(range);
                }
            }
        }
        for range in std::mem::take(&mut self.lost) {
            if self.shared.when_lost == WhenLost::Block {
                self.blocks = true;
                continue;
            }
            match self.shared.filler.poison(range) {
                Ok(filled) if filled.again => self.lost.push(rest(range, filled)),
                Ok(_) => {}
                Err(error) => {
                    log::error!(target: "ramshot::restore", "{error}: who touches it stays blocked");
                    self.blocks = true;
                }
            }
        }
        if !self.zeros.is_empty() || !self.lost.is_empty() {
            self.breathe();
        }
        Ok(())
    }

    /// Lets the thread go on that is changing the mappings. It may need this very processor, and be inside the next change
    /// when we wake up: so no two pauses are alike.
    fn breathe(&mut self) {
        self.pause = self.pause.wrapping_add(1);
        thread::sleep(Duration::from_micros(u64::from(self.pause * 7 % 13)));
    }

    /// Whether the work of this thread is done.
    fn is_over(&mut self) -> Result<bool, OsError> {
        let mut state = self.shared.lock();
        if state.abandoned {
            return Ok(true);
        }
        if state.cancelled && !state.core.is_ended() {
            state.core.cancel();
            drop(state);
            self.give_up()?;
            state = self.shared.lock();
        }
        let complete = state.core.is_ended() || state.core.is_complete() && state.offers.is_empty();
        let waiting = !self.zeros.is_empty() || !self.lost.is_empty() || !self.held.is_empty();
        if !complete || waiting || state.core.has_faults() && !state.core.is_ended() {
            return Ok(false);
        }
        // A lost page that was discarded since is lost no more.
        let stays = self.blocks && (state.core.lost_pages() > 0 || state.core.is_ended());
        let (was, cancelled) = (state.phase, state.cancelled);
        let (touched, order) = (std::mem::take(&mut state.touched), state.order.clone());
        let pages = state.core.table().pages();
        drop(state);
        if was == Phase::Filling
            && !cancelled
            && let Some(path) = &self.shared.order_file
        {
            order::save(path, pages, &order, &touched);
        }
        if stays {
            if was == Phase::Filling {
                self.shared.over(Phase::Staying, None);
            }
            return Ok(false);
        }
        match self.shared.filler.finish() {
            // A snapshot works on the same context: its end wakes us.
            Err(error) if error.errno == BUSY => {
                if was == Phase::Filling {
                    self.shared.over(Phase::Staying, None);
                }
                Ok(false)
            }
            finished => {
                self.shared.over(Phase::Over, finished.err().map(LazyFailed::Unregister));
                Ok(true)
            }
        }
    }

    /// Everything that has data and is not in is lost.
    fn give_up(&mut self) -> Result<(), OsError> {
        let content = Extents(self.shared.source.as_ref());
        let mut at = PageId(0);
        loop {
            let mut state = self.shared.lock();
            let Some(run) = state.core.next_missing(at, &content) else { break };
            state.core.give_up(run);
            let range = state.core.range_of(run);
            drop(state);
            at = run.end();
            self.lost.push(range);
            self.answer()?;
            while !self.lost.is_empty() {
                self.read_events(Some(0))?;
                self.answer()?;
            }
        }
        Ok(())
    }
}

/// What of `range` was put off.
fn rest(range: HostRange, filled: Filled) -> HostRange {
    HostRange::new(HostAddr(range.start.0 + filled.bytes), range.len - filled.bytes)
}

/// Pages of the host page at `page`.
fn host_page_at(state: &State, page: PageId) -> u64 {
    let table = state.core.table();
    let block = table.block_of(page).and_then(|index| table.block(index));
    block.map_or(1, ramshot_core::RamBlock::pages_per_host_page)
}
