//! What the threads of one snapshot share: core's state behind one short lock, and the steps that more than one of them
//! takes.
//!
//! Nothing slow happens under the lock: no copying, no allocation, no logging, no system call but wake-ups and the
//! fault thread's reading of events, which must not wait.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use ramshot_core::{
    BlockTable, CapturedRun, Cause, Claim, Done, Event, HostAddr, HostRange, Next, Origin, OsError, PAGE_SIZE,
    RamSource, SlotList, Snapshot, Worker, WriteTracker,
};

use super::arm::{self, Ahead};
use super::pool::{Buffers, Job, Pool, queue};
use super::room::Room;
use super::written::Written;
use crate::dirty::DirtyUse;
use crate::report::Latencies;
use crate::sink::SinkError;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait};

/// Faults and claims in flight: more vCPUs than that wait in the kernel's queue, more workers than that do not exist.
pub(crate) type Core = Snapshot<Arc<BlockTable>, Vec<u64>, 256, 64>;
const CLAIMS: usize = 64;

/// Where the snapshot stands between its two typestates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Before `begin`: nothing is protected, or some of it ahead of T0.
    Prepared,
    /// Inside `begin`: some of it is.
    Arming,
    /// T0 has passed; core decides.
    Live,
}

/// What a VMM wants called when a snapshot is done.
pub(crate) type DoneCall = Box<dyn FnOnce() + Send>;

/// More than any VMM registers; beyond it, the list grows.
const DONE_CALLS: usize = 8;

pub(crate) struct State {
    pub(crate) phase: Phase,
    /// There until `Phase::Arming`.
    pub(crate) ahead: Option<Ahead>,
    /// There from `Phase::Live` on.
    pub(crate) core: Option<Core>,
    pub(crate) pool: Pool,
    /// Released, digests not computed yet.
    pub(crate) undigested: VecDeque<Job>,
    /// Ready for the image.
    pub(crate) digested: VecDeque<Job>,
    /// Captured, but the kernel said "again".
    pub(crate) retries: Vec<(CapturedRun, Buffers)>,
    pub(crate) pages_zero: u64,
    pub(crate) foreign_faults: u64,
    pub(crate) service: Latencies,
    pub(crate) captured_at: Option<Instant>,
    pub(crate) sink_error: Option<SinkError>,
    /// Set once: every thread leaves as soon as it can.
    pub(crate) stop: bool,
    /// Discards and the like that were heard of while memory was being armed; core hears of them first thing.
    pub(crate) early_losses: Vec<Event>,
    /// The fault thread has something to serve and no room for it: it wants to be interrupted when there is some.
    pub(crate) faults_starve: bool,
    /// Zero pages have to be said: what is not given is not zero in this image.
    pub(crate) give_zeros: bool,
    /// Room to be made in the image.
    pub(crate) room: Room,
    /// What the guest writes to, in order, if somebody wants to know.
    pub(crate) written: Option<Written>,
    /// Threads that have set themselves up and make ordinary system calls only from here on.
    pub(crate) ready: usize,
    /// To be called by a writer, outside the lock, as soon as `finish` has nothing to wait for but the commit.
    when_done: Vec<DoneCall>,
    /// An end that came before core was there.
    early_cause: Option<Cause>,
    end_announced: bool,
    workers_waiting: usize,
    /// Threads inside `WriteTracker::release`, on account of a claim or of a write ahead of T0.
    releasing: usize,
    disarmed: bool,
}

impl State {
    /// Whether a release has to be tried again.
    pub(crate) fn has_retries(&self) -> bool {
        !self.retries.is_empty()
    }

    pub(crate) fn cause(&self) -> Option<Cause> {
        self.core.as_ref().and_then(Core::cause).or(self.early_cause)
    }

    pub(crate) fn is_captured(&self) -> bool {
        self.core.as_ref().is_some_and(Core::is_captured)
    }

    pub(crate) fn is_written(&self) -> bool {
        self.core.as_ref().is_some_and(Core::is_written)
    }

    /// Whether `finish` has nothing to wait for but the commit, or nothing at all.
    pub(crate) fn is_done(&self) -> bool {
        self.is_written() || self.cause().is_some()
    }

    /// What is to be called now.
    pub(crate) fn take_done_calls(&mut self) -> Vec<DoneCall> {
        if self.when_done.is_empty() || !self.is_done() { Vec::new() } else { std::mem::take(&mut self.when_done) }
    }

    /// T0: `core` decides from now on.
    pub(crate) fn go_live(&mut self, mut core: Core) {
        self.early_cause.into_iter().for_each(|cause| {
            core.cancel(cause);
        });
        for event in self.early_losses.drain(..) {
            hear_of_loss(&mut core, event);
        }
        self.core = Some(core);
        self.phase = Phase::Live;
    }

    /// Whether there is nothing more to capture, for good or ill.
    pub(crate) fn is_over(&self) -> bool {
        // A core before T0 is that of a draft.
        self.stop || self.cause().is_some() || self.phase == Phase::Live && self.is_captured()
    }
}

/// A discard or an unmapping ends the snapshot if it met a page that was not captured.
fn hear_of_loss(core: &mut Core, event: Event) {
    match event {
        Event::Discarded(range) => core.handle_discarded(range),
        Event::Unmapped(range) => core.handle_unmapped(range),
        Event::WriteFault { .. } | Event::MissingFault { .. } => false,
    };
}

pub(crate) struct Shared {
    state: Mutex<State>,
    /// Workers and the fault thread wait here for something to do.
    work: Condvar,
    /// Writers wait here for jobs.
    jobs: Condvar,
    /// `finish` waits here.
    done: Condvar,
    pub(crate) tracker: Arc<dyn WriteTracker>,
    pub(crate) ram: Arc<dyn RamSource>,
    pub(crate) table: Arc<BlockTable>,
    pub(crate) dirty: Option<DirtyUse>,
}

impl Shared {
    pub(crate) fn new(
        tracker: Arc<dyn WriteTracker>,
        ram: Arc<dyn RamSource>,
        table: Arc<BlockTable>,
        slots: u16,
        slot_pages: u64,
        dirty: Option<DirtyUse>,
    ) -> Self {
        let state = State {
            phase: Phase::Prepared,
            ahead: arm::nothing(&table),
            core: None,
            pool: Pool::new(slots, slot_pages),
            undigested: queue(slots),
            digested: queue(slots),
            retries: Vec::with_capacity(CLAIMS),
            pages_zero: 0,
            foreign_faults: 0,
            service: Latencies::default(),
            captured_at: None,
            sink_error: None,
            stop: false,
            early_losses: Vec::new(),
            faults_starve: false,
            give_zeros: false,
            room: Room::default(),
            written: None,
            ready: 0,
            when_done: Vec::with_capacity(DONE_CALLS),
            early_cause: None,
            end_announced: false,
            workers_waiting: 0,
            releasing: 0,
            disarmed: false,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            jobs: Condvar::new(),
            done: Condvar::new(),
            tracker,
            ram,
            table,
            dirty,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    // ---- waiting

    /// Waits until there may be something to do for a worker or a discard. The fault thread does not wait here while the
    /// snapshot lives: it has events to read, or releases are refused and discards hang.
    pub(crate) fn wait_for_work<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.workers_waiting += 1;
        let mut state = wait(&self.work, state);
        state.workers_waiting -= 1;
        state
    }

    pub(crate) fn wait_for_jobs<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        wait(&self.jobs, state)
    }

    pub(crate) fn wait_for_end<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        wait(&self.done, state)
    }

    /// Something changed that workers or the fault thread may wait for. Costs nothing when none does.
    pub(crate) fn work_changed(&self, state: &mut State) {
        if state.workers_waiting > 0 {
            self.work.notify_all();
        }
        if std::mem::take(&mut state.faults_starve) {
            self.tracker.interrupt();
        }
    }

    /// The snapshot is at a turning point: everybody looks again.
    pub(crate) fn wake_all(&self) {
        self.work.notify_all();
        self.jobs.notify_all();
        self.done.notify_all();
        self.tracker.interrupt();
    }

    /// A thread has set itself up.
    pub(crate) fn ready(&self) {
        self.lock().ready += 1;
        self.done.notify_all();
    }

    /// Waits until `threads` have set themselves up.
    pub(crate) fn wait_until_ready(&self, threads: usize) {
        let mut state = self.lock();
        while state.ready < threads {
            state = self.wait_for_end(state);
        }
    }

    // ---- the end

    /// Has a writer call `call` as soon as the snapshot is done; calls it here if that is the case already.
    pub(crate) fn when_done(&self, call: DoneCall) {
        let mut state = self.lock();
        if state.is_done() {
            drop(state);
            call();
        } else {
            state.when_done.push(call);
        }
    }

    /// Ends the snapshot without an image, unless it has ended already.
    pub(crate) fn end(&self, cause: Cause) {
        self.end_locked(&mut self.lock(), cause);
    }

    pub(crate) fn end_locked(&self, state: &mut State, cause: Cause) {
        match &mut state.core {
            Some(core) => {
                core.cancel(cause);
            }
            None => {
                state.early_cause.get_or_insert(cause);
            }
        }
        self.announce_end(state);
    }

    /// If the snapshot has ended, whoever ended it (core can do so by itself), everybody hears of it, once.
    pub(crate) fn announce_end(&self, state: &mut State) {
        if state.cause().is_some() && !std::mem::replace(&mut state.end_announced, true) {
            self.wake_all();
        }
    }

    /// Calls code that is not ours. If it panics, the snapshot ends, so that neither the guest nor `finish` waits for a
    /// thread that died; the thread lives on to help with the end.
    pub(crate) fn survive<R>(&self, call: impl FnOnce() -> R) -> Option<R> {
        let result = catch_unwind(AssertUnwindSafe(call));
        if result.is_err() {
            self.end(Cause::ThreadDied);
        }
        result.ok()
    }

    /// Lifts every protection, once; again only if that failed.
    ///
    /// Waits until nobody is inside a release: the kernel lifts a protection whoever has put it on, and as soon as this
    /// snapshot is disarmed there may be another.
    pub(crate) fn disarm(&self) {
        let mut state = self.lock();
        while state.releasing > 0 {
            state = self.wait_for_work(state);
        }
        if state.disarmed {
            return;
        }
        drop(state);
        match self.tracker.disarm() {
            Ok(()) => self.lock().disarmed = true,
            Err(error) => log::error!(target: "ramshot::snapshot", "disarm: {error}"),
        }
    }

    // ---- before T0

    /// Lets the writers at `at` through that were caught by arming ahead. Returns those whose release the kernel put
    /// off: hand them in again. They were handed in under `state`, in `Phase::Prepared`.
    pub(crate) fn open_ahead(&self, mut state: MutexGuard<'_, State>, at: Vec<HostAddr>) -> Vec<HostAddr> {
        let Some(ahead) = &mut state.ahead else { return at };
        let page = |at: HostAddr| HostRange::new(HostAddr(at.0 & !(PAGE_SIZE - 1)), PAGE_SIZE);
        let ranges: Vec<_> = at.into_iter().map(|at| (at, ahead.handle_fault(at).unwrap_or(page(at)))).collect();
        // `begin` waits for us: what is opened after T0 would be torn.
        state.releasing += 1;
        drop(state);
        let mut again = Vec::new();
        for (at, range) in ranges {
            match self.survive(|| self.tracker.release(range)).unwrap_or(Err(PANICKED)) {
                Ok(Done::Yes) => {}
                Ok(Done::Again) => again.push(at),
                Err(error) => self.end(Cause::Release(error)),
            }
        }
        let mut state = self.lock();
        state.releasing -= 1;
        self.work_changed(&mut state);
        again
    }

    /// Locks at a moment at which nobody is lifting protection.
    pub(crate) fn lock_unopened(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.releasing > 0 {
            state = self.wait_for_work(state);
        }
        state
    }

    /// Ends the time before T0: from here on nobody lifts protection until core decides. `None` if it had ended before.
    pub(crate) fn close_ahead(&self) -> Option<Ahead> {
        self.lock().phase = Phase::Arming;
        self.lock_unopened().ahead.take()
    }

    // ---- the life of a run

    /// The next claim for `who`, with its buffers.
    pub(crate) fn next_claim(&self, state: &mut State, who: Worker) -> (Next, Buffers) {
        let Some(core) = &mut state.core else {
            return (Next::Idle, Buffers::new());
        };
        let next = core.next_claim(who);
        let buffers = match &next {
            Next::Claim(claim) => state.pool.take(claim),
            _ => Buffers::new(),
        };
        if let (Next::Claim(claim), Some(written)) = (&next, &mut state.written)
            && claim.origin() == Origin::Fault
        {
            written.push(claim.run());
        }
        if matches!(next, Next::Ended) {
            // A full pool whose policy is to cancel.
            self.announce_end(state);
        }
        (next, buffers)
    }

    /// From claim to release: the copy and the unprotect call, nothing else. `None`: the release has to be tried again
    /// later, or the snapshot has ended.
    pub(crate) fn serve(&self, claim: Claim, mut buffers: Buffers) -> Option<Job> {
        let copied = self.survive(|| self.copy(&claim, &mut buffers)).unwrap_or(Err(PANICKED));
        let mut state = self.lock();
        if let Err(error) = copied {
            state.pool.put(&slot_list(claim.slots()), buffers);
            if let Some(core) = &mut state.core {
                core.capture_failed(claim, error);
            }
            self.announce_end(&mut state);
            return None;
        }
        // What was discarded before it was copied does not count.
        self.tracker.losses(&mut |event| self.lost(&mut state, event));
        let captured = state.core.as_mut().map(|core| core.captured(claim))?;
        let job = self.release(state, captured, buffers);
        if job.is_none() {
            // It may have to be tried again, which is the fault thread's business, after reading the events.
            self.tracker.interrupt();
        }
        job
    }

    /// Lifts the protection of a captured run. `None`: it has to be tried again later, or the snapshot has ended.
    pub(crate) fn release<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        captured: CapturedRun,
        buffers: Buffers,
    ) -> Option<Job> {
        // After the end, the disarm lifts everything.
        let answer = if state.cause().is_some() {
            Err(OsError::new("release after the end", 0))
        } else if captured.is_protected() {
            state.releasing += 1;
            drop(state);
            let answer = self.survive(|| self.tracker.release(captured.range())).unwrap_or(Err(PANICKED));
            state = self.lock();
            state.releasing -= 1;
            answer
        } else {
            Ok(Done::Yes)
        };
        self.work_changed(&mut state);
        match answer {
            Ok(Done::Yes) => {
                let run = state.core.as_mut().map(|core| core.released(captured))?;
                if state.is_captured() {
                    state.captured_at = Some(Instant::now());
                    self.wake_all();
                }
                Some(Job { run, buffers })
            }
            Ok(Done::Again) => {
                state.retries.push((captured, buffers));
                None
            }
            Err(error) => {
                state.pool.put(&slot_list(captured.slots()), buffers);
                if let Some(core) = &mut state.core {
                    core.release_failed(captured, error);
                }
                self.announce_end(&mut state);
                None
            }
        }
    }

    /// A job of a thread that has better things to do: digests are the workers' business.
    pub(crate) fn hand_on(&self, job: Job) {
        let mut state = self.lock();
        state.undigested.push_back(job);
        self.work_changed(&mut state);
    }

    /// A digested job: on to the writers, or done already if there is nothing but zeros in it.
    pub(crate) fn submit(&self, job: Job, zero: u64) {
        let all_zero = job.run.run().pages == zero;
        let mut state = self.lock();
        state.pages_zero += zero;
        if all_zero && !state.give_zeros || state.cause().is_some() {
            self.written(&mut state, job);
        } else {
            state.digested.push_back(job);
            drop(state);
            self.jobs.notify_one();
        }
    }

    /// The bytes of `job` are in the image, or not wanted any more.
    pub(crate) fn written(&self, state: &mut State, job: Job) {
        state.pool.put(&slot_list(job.run.slots()), job.buffers);
        if let Some(core) = &mut state.core {
            core.written(job.run);
        }
        self.work_changed(state);
        if state.is_written() {
            self.done.notify_all();
            if !state.when_done.is_empty() {
                self.jobs.notify_all();
            }
        }
    }

    /// Memory was discarded or unmapped.
    pub(crate) fn lost(&self, state: &mut State, event: Event) {
        let (Event::Discarded(range) | Event::Unmapped(range)) = event else { return };
        // No log tells of it.
        self.dirty.iter().for_each(|dirty| dirty.mark(range));
        match (state.phase, &mut state.core, &mut state.ahead) {
            (Phase::Live, Some(core), _) => hear_of_loss(core, event),
            (Phase::Prepared, _, Some(ahead)) => ahead.handle_discarded(range),
            (Phase::Prepared | Phase::Live, ..) => {}
            (Phase::Arming, ..) => state.early_losses.push(event),
        }
    }

    fn copy(&self, claim: &Claim, buffers: &mut Buffers) -> Result<(), OsError> {
        let range = claim.range();
        let (mut at, end) = (range.start, range.end());
        for slot in buffers {
            let pages = slot.capacity().min((end.0 - at.0) / PAGE_SIZE);
            self.ram.read(at, slot.bytes_mut(pages))?;
            at = HostAddr(at.0 + pages * PAGE_SIZE);
        }
        Ok(())
    }
}

/// What stands for the answer of a call that panicked; the cause is `ThreadDied` by then.
const PANICKED: OsError = OsError::new("a call that panicked", 0);

fn slot_list(ids: &[ramshot_core::SlotId]) -> SlotList {
    ids.iter().copied().collect()
}
