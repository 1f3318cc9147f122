//! What the threads of one snapshot share: core's state behind one short lock, and the steps that more than one of them
//! takes.
//!
//! Nothing slow happens under the lock: no copying, no system call but wake-ups, no allocation.

use std::collections::VecDeque;
use std::time::Instant;

use ramshot_core::{
    BlockTable, CapturedRun, Cause, Claim, Done, HostAddr, Next, OsError, PAGE_SIZE, RamSource, SlotList, Snapshot, Worker,
    WriteTracker,
};

use super::pool::{Buffers, Job, Pool, queue};
use crate::report::Latencies;
use crate::sink::SinkError;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait};

/// Faults and claims in flight: more vCPUs than that wait in the kernel's queue, more workers than that do not exist.
pub(crate) type Core = Snapshot<Arc<BlockTable>, Vec<u64>, 256, 64>;
const CLAIMS: usize = 64;

/// Where the snapshot stands between its two typestates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Before `begin`: nothing is protected.
    Prepared,
    /// Inside `begin`: some of it is.
    Arming,
    /// T0 has passed; core decides.
    Live,
}

pub(crate) struct State {
    pub(crate) phase: Phase,
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
    /// An end that came before core was there.
    early_cause: Option<Cause>,
    end_announced: bool,
    workers_waiting: usize,
}

impl State {
    pub(crate) fn cause(&self) -> Option<Cause> {
        self.core.as_ref().and_then(Core::cause).or(self.early_cause)
    }

    pub(crate) fn is_captured(&self) -> bool {
        self.core.as_ref().is_some_and(Core::is_captured)
    }

    pub(crate) fn is_written(&self) -> bool {
        self.core.as_ref().is_some_and(Core::is_written)
    }

    /// Whether there is nothing more to capture, for good or ill.
    pub(crate) fn is_over(&self) -> bool {
        self.stop || self.cause().is_some() || self.is_captured()
    }
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
}

impl Shared {
    pub(crate) fn new(
        tracker: Arc<dyn WriteTracker>,
        ram: Arc<dyn RamSource>,
        table: Arc<BlockTable>,
        slots: u16,
        slot_pages: u64,
    ) -> Self {
        let state = State {
            phase: Phase::Prepared,
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
            early_cause: None,
            end_announced: false,
            workers_waiting: 0,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            jobs: Condvar::new(),
            done: Condvar::new(),
            tracker,
            ram,
            table,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    // ---- waiting

    /// Waits until there may be something to do for a worker, the fault thread or a discard.
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

    /// Something changed that workers may wait for. Costs nothing when none does.
    pub(crate) fn work_changed(&self, state: &State) {
        if state.workers_waiting > 0 {
            self.work.notify_all();
        }
    }

    /// The snapshot is at a turning point: everybody looks again.
    pub(crate) fn wake_all(&self) {
        self.work.notify_all();
        self.jobs.notify_all();
        self.done.notify_all();
        self.tracker.interrupt();
    }

    // ---- the end

    /// Ends the snapshot without an image, unless it has ended already.
    pub(crate) fn end(&self, cause: Cause) {
        let mut state = self.lock();
        Self::end_locked(&mut state, cause);
        drop(state);
        self.wake_all();
    }

    fn end_locked(state: &mut State, cause: Cause) {
        if state.cause().is_none() {
            log::warn!(target: "ramshot::snapshot", "snapshot ends: {cause}");
        }
        match &mut state.core {
            Some(core) => {
                core.cancel(cause);
            }
            None => {
                state.early_cause.get_or_insert(cause);
            }
        }
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
        if matches!(next, Next::Ended) && !state.end_announced {
            // Core can end by itself (a full pool whose policy is to cancel): everybody has to hear of it, once.
            state.end_announced = true;
            self.wake_all();
        }
        (next, buffers)
    }

    /// From claim to release: the copy and the unprotect call, nothing else. `None`: the release has to be tried again
    /// later, or the snapshot has ended.
    pub(crate) fn serve(&self, claim: Claim, mut buffers: Buffers) -> Option<Job> {
        if let Err(error) = self.copy(&claim, &mut buffers) {
            let mut state = self.lock();
            Self::give_back(&mut state, &slot_list(claim.slots()), buffers);
            if let Some(core) = &mut state.core {
                core.capture_failed(claim, error);
            }
            drop(state);
            self.wake_all();
            return None;
        }
        let captured = self.lock().core.as_mut().map(|core| core.captured(claim))?;
        self.release(captured, buffers)
    }

    /// Lifts the protection of a captured run.
    pub(crate) fn release(&self, captured: CapturedRun, buffers: Buffers) -> Option<Job> {
        let answer = if captured.is_protected() { self.tracker.release(captured.range()) } else { Ok(Done::Yes) };
        let mut state = self.lock();
        match answer {
            Ok(Done::Yes) => {
                let run = state.core.as_mut().map(|core| core.released(captured))?;
                self.work_changed(&state);
                if state.is_captured() {
                    state.captured_at = Some(Instant::now());
                    drop(state);
                    log::debug!(target: "ramshot::snapshot", "all pages captured");
                    self.wake_all();
                }
                Some(Job { run, buffers })
            }
            Ok(Done::Again) => {
                // The fault thread reads the event that stands in the way, then tries again.
                state.retries.push((captured, buffers));
                drop(state);
                self.tracker.interrupt();
                None
            }
            Err(error) => {
                Self::give_back(&mut state, &slot_list(captured.slots()), buffers);
                if let Some(core) = &mut state.core {
                    core.release_failed(captured, error);
                }
                drop(state);
                self.wake_all();
                None
            }
        }
    }

    /// A digested job: on to the writers, or done already if there is nothing but zeros in it.
    pub(crate) fn submit(&self, job: Job, zero: u64) {
        let all_zero = job.run.run().pages == zero;
        let mut state = self.lock();
        state.pages_zero += zero;
        if all_zero || state.cause().is_some() {
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
        }
    }

    fn give_back(state: &mut State, ids: &SlotList, buffers: Buffers) {
        state.pool.put(ids, buffers);
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

fn slot_list(ids: &[ramshot_core::SlotId]) -> SlotList {
    ids.iter().copied().collect()
}
