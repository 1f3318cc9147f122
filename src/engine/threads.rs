//! The threads: one that serves faults, workers that scan, writers. All are created in `prepare`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use heapless::Vec as Array;
use ramshot_core::{Cause, Done, Event, FaultOutcome, HostAddr, HostRange, Next, OsError, PAGE_SIZE, Worker};

use super::pool::Job;
use super::room;
use super::shared::{Phase, Shared, State};
use crate::sink::ImageSink;
use crate::sync::{Arc, MutexGuard, make_way, run_at_once, run_behind};

/// Events read at a time.
const BATCH: usize = 64;
/// Faults that come further apart than this come one by one. From one to the next, not from the end of a service: a wide
/// window takes long to serve, and would keep itself wide. vCPUs that write flat out over protected memory fault every 100 to 200 us
/// here, a wake-up of a thread (50 us) being most of it; one that writes 2000 pages a second every 500.
const LULL: Duration = Duration::from_micros(400);
/// While a release has to be retried, events are waited for no longer than this.
const RETRY_MS: u32 = 1;

/// The fault thread: reads events, serves faults, and nothing else. It leaves when everything is captured or the
/// snapshot has ended, and disarms on its way out, however it leaves.
pub(crate) fn serve_faults(shared: &Shared) {
    run_at_once();
    shared.ready();
    let room = 1024;
    let mut server = FaultServer {
        shared,
        held: Vec::with_capacity(room),
        held_ahead: false,
        faulted_at: None,
        stale: Vec::with_capacity(room),
        foreign: Vec::with_capacity(room),
    };
    if let Some(Err(error)) = shared.survive(|| server.run()) {
        shared.end(Cause::Events(error));
    }
    shared.disarm();
    let cause = shared.lock().cause();
    match cause {
        Some(cause) => log::warn!(target: "ramshot::snapshot", "snapshot ended: {cause}"),
        None => log::debug!(target: "ramshot::snapshot", "all pages captured"),
    }
}

struct FaultServer<'a> {
    shared: &'a Shared,
    /// Write faults that core has not taken yet: they came while memory was being armed, or its queue was full.
    held: Vec<Event>,
    /// Some of them were put off by the kernel before T0.
    held_ahead: bool,
    /// When the last fault was read.
    faulted_at: Option<Instant>,
    /// Stale faults whose release the kernel put off.
    stale: Vec<HostRange>,
    /// Faults that are not ours, to be logged.
    foreign: Vec<HostAddr>,
}

impl<'a> FaultServer<'a> {
    /// Waits, reads, serves, until there is nothing more to capture.
    fn run(&mut self) -> Result<(), OsError> {
        let mut events = [Event::WriteFault { at: HostAddr(0) }; BATCH];
        let shared = self.shared;
        loop {
            let retries = !self.stale.is_empty() || shared.lock().has_retries() || self.held_ahead;
            shared.tracker.next_events(&mut [], retries.then_some(RETRY_MS))?;
            // Read under the lock: a discard goes on as soon as its event is read, and what is captured after that must
            // not count as captured before it.
            let mut state = shared.lock();
            let count = shared.tracker.next_events(&mut events, Some(0))?;
            let read_at = Instant::now();
            self.take_in(&mut state, events.get(..count).unwrap_or_default());
            let go_on = match state.phase {
                Phase::Prepared => self.open_ahead(state),
                // `begin` interrupts us when it is through.
                Phase::Arming => !state.stop,
                Phase::Live => self.serve_all(state, read_at),
            };
            if !go_on {
                return Ok(());
            }
        }
    }

    /// Lets through what was caught ahead of T0. False: there is nothing more to do.
    fn open_ahead(&mut self, state: MutexGuard<'a, State>) -> bool {
        let over = state.is_over();
        let faults = self.held.drain(..).filter_map(|event| match event {
            Event::WriteFault { at } => Some(at),
            _ => None,
        });
        let again = self.shared.open_ahead(state, faults.collect());
        self.held.extend(again.into_iter().map(|at| Event::WriteFault { at }));
        self.held_ahead = !self.held.is_empty();
        !over
    }

    /// Serves until nothing is left that can be served now. False: the work of this thread is over.
    fn serve_all(&mut self, mut state: MutexGuard<'a, State>, read_at: Instant) -> bool {
        self.held_ahead = false;
        if !self.held.is_empty() {
            let last = self.faulted_at.replace(read_at);
            let lull = last.is_some_and(|at| read_at.saturating_duration_since(at) > LULL);
            if let (Some(core), true) = (&mut state.core, lull) {
                core.handle_lull();
            }
        }
        loop {
            self.offer_faults(&mut state);
            self.shared.announce_end(&mut state);
            let over = state.is_over();
            drop(state);
            self.release_stale();
            if over {
                return false;
            }
            self.retry_releases();
            // Whatever frees room, or ends it all, interrupts us.
            let served = self.serve(read_at);
            if served == Served::AllButNoRoom {
                // How long that lasts says nothing about the guest.
                self.faulted_at = None;
            }
            if served == Served::AllButNoRoom || self.held.is_empty() {
                return true;
            }
            state = self.shared.lock();
        }
    }

    /// What became of memory is settled at once; write faults are held.
    fn take_in(&mut self, state: &mut State, events: &[Event]) {
        for &event in events {
            match event {
                Event::WriteFault { .. } => self.held.push(event),
                Event::MissingFault { at } => {
                    state.foreign_faults += 1;
                    self.foreign.push(at);
                }
                Event::Discarded(_) | Event::Unmapped(_) => self.shared.lost(state, event),
            }
        }
    }

    /// Hands the faults held to core, as many as its queue takes.
    fn offer_faults(&mut self, state: &mut State) {
        let Some(core) = &mut state.core else { return };
        self.held.retain(|event| {
            let Event::WriteFault { at } = *event else { return false };
            match core.handle_fault(at) {
                FaultOutcome::Queued | FaultOutcome::Waits => {}
                FaultOutcome::Stale(range) => self.stale.push(range),
                FaultOutcome::NotOurs => {
                    state.foreign_faults += 1;
                    self.foreign.push(at);
                    self.stale.push(HostRange::new(HostAddr(at.0 & !(PAGE_SIZE - 1)), PAGE_SIZE));
                }
                FaultOutcome::QueueFull => return true,
            }
            false
        });
    }

    /// Wakes the writers of stale faults and of those that are not ours.
    fn release_stale(&mut self) {
        self.stale.retain(|&range| match self.shared.tracker.release(range) {
            Ok(Done::Yes) => false,
            Ok(Done::Again) => true,
            Err(error) => {
                // The disarm will wake whoever waits there.
                log::error!(target: "ramshot::snapshot", "stale fault: {error}");
                self.shared.end(Cause::Release(error));
                false
            }
        });
        for at in self.foreign.drain(..) {
            log::error!(target: "ramshot::snapshot", "fault at {at}: in no RAM block, or a page that nobody restores");
        }
    }

    /// Tries again what the kernel put off, each once.
    fn retry_releases(&self) {
        let count = self.shared.lock().retries.len();
        for _ in 0..count {
            let mut state = self.shared.lock();
            if state.retries.is_empty() {
                return;
            }
            let (captured, buffers) = state.retries.remove(0);
            if let Some(job) = self.shared.release(state, captured, buffers) {
                self.shared.hand_on(job);
            }
        }
    }

    /// Serves what is queued.
    fn serve(&self, read_at: Instant) -> Served {
        loop {
            let mut state = self.shared.lock();
            match self.shared.next_claim(&mut state, Worker::Faults) {
                (Next::Claim(claim), buffers) => {
                    drop(state);
                    if let Some(job) = self.shared.serve(claim, buffers) {
                        self.shared.lock().service.record(read_at.elapsed());
                        self.shared.hand_on(job);
                    }
                }
                (Next::Full, _) => {
                    state.faults_starve = true;
                    return Served::AllButNoRoom;
                }
                (Next::Idle | Next::Done | Next::Ended, _) => return Served::All,
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    All,
    /// There is more, but no slot or no claim is free.
    AllButNoRoom,
}

/// A scan worker: copies what is pending, and computes the digests of all that is copied.
pub(crate) fn scan(shared: &Shared) {
    // A vCPU that waits for a run in its hands is not on a core meanwhile.
    run_behind();
    shared.ready();
    let mut state = shared.lock();
    while !state.stop {
        if let Some(mut job) = state.undigested.pop_front() {
            drop(state);
            let zero = job.digest();
            shared.submit(job, zero);
            make_way();
            state = shared.lock();
            continue;
        }
        state = match shared.next_claim(&mut state, Worker::Scan) {
            (Next::Claim(claim), buffers) => {
                drop(state);
                if let Some(mut job) = shared.serve(claim, buffers) {
                    make_way();
                    let zero = job.digest();
                    shared.submit(job, zero);
                }
                make_way();
                shared.lock()
            }
            (Next::Idle | Next::Full | Next::Done | Next::Ended, _) => shared.wait_for_work(state),
        };
    }
}

/// A writer: hands what is digested to the sink, several runs at a time.
pub(crate) fn write(shared: &Shared, sink: &Arc<Box<dyn ImageSink>>) {
    run_behind();
    shared.ready();
    let most = sink.write_size();
    let mut batch: Array<Job, 64> = Array::new();
    let mut state = shared.lock();
    loop {
        let mut bytes = 0;
        while bytes < most && !batch.is_full() {
            let Some(job) = state.digested.pop_front() else { break };
            bytes += job.run.run().bytes();
            // Cannot fail: it is not full.
            let _ = batch.push(job);
        }
        if batch.is_empty() {
            let calls = state.take_done_calls();
            if !calls.is_empty() {
                drop(state);
                for call in calls {
                    // The snapshot's end has come: a panic changes nothing about it.
                    if catch_unwind(AssertUnwindSafe(call)).is_err() {
                        log::error!(target: "ramshot::snapshot", "what was to be called when the snapshot is done panicked");
                    }
                }
                state = shared.lock();
                continue;
            }
            if state.stop {
                return;
            }
            if let Some(run) = room::next(&mut state) {
                drop(state);
                room::make_piece(shared, sink.as_ref().as_ref(), run);
                state = shared.lock();
                continue;
            }
            state = shared.wait_for_jobs(state);
            continue;
        }
        let wanted = state.cause().is_none();
        drop(state);
        if wanted {
            let mut pieces = Vec::with_capacity(64);
            batch.iter().for_each(|job| job.pieces(&mut pieces));
            if let Some(Err(error)) = shared.survive(|| sink.write(&pieces)) {
                log::error!(target: "ramshot::snapshot", "image: {error}");
                shared.lock().sink_error.get_or_insert(error);
                shared.end(Cause::Sink);
            }
        }
        make_way();
        state = shared.lock();
        for job in std::mem::take(&mut batch) {
            shared.written(&mut state, job);
        }
    }
}
