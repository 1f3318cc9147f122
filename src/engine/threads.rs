//! The threads: one that serves faults, workers that scan, writers. All are created in `prepare`.

use std::time::Instant;

use heapless::Vec as Array;
use ramshot_core::{Cause, Done, Event, FaultOutcome, HostAddr, HostRange, Next, PAGE_SIZE, Worker};

use super::pool::Job;
use super::shared::{Phase, Shared, State};
use crate::sink::ImageSink;
use crate::sync::{Arc, thread};

/// Events read at a time.
const BATCH: usize = 64;
/// Most bytes handed to the sink in one call.
const WRITE_BATCH: u64 = 4 << 20;
/// While a release has to be retried, events are waited for no longer than this.
const RETRY_MS: u32 = 1;

/// Ends the snapshot if its thread dies, so that neither the guest nor `finish` waits for a dead thread.
struct Watch<'a>(&'a Shared);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Cause::ThreadDied);
        }
    }
}

/// Disarms when the fault thread leaves, however it leaves.
struct Disarm<'a>(&'a Shared);

impl Drop for Disarm<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.tracker.disarm() {
            log::error!(target: "ramshot::snapshot", "disarm: {error}");
        }
    }
}

/// The fault thread: reads events, serves faults, and nothing else. It leaves when everything is captured or the
/// snapshot has ended, and disarms on its way out.
pub(crate) fn serve_faults(shared: &Shared) {
    let _disarm = Disarm(shared);
    let _watch = Watch(shared);
    let mut events = [Event::WriteFault { at: HostAddr(0) }; BATCH];
    let mut server = FaultServer { shared, held: Vec::with_capacity(1024), stale: Vec::with_capacity(1024) };
    loop {
        let timeout = server.has_retries().then_some(RETRY_MS);
        let read = match shared.tracker.next_events(&mut events, timeout) {
            Ok(count) => events.get(..count).unwrap_or_default(),
            Err(error) => {
                shared.end(Cause::Events(error));
                return;
            }
        };
        if !server.handle(read, Instant::now()) {
            return;
        }
    }
}

struct FaultServer<'a> {
    shared: &'a Shared,
    /// Events that core has not taken yet: they came while memory was being armed, or the fault queue was full.
    held: Vec<Event>,
    /// Stale faults whose release the kernel put off.
    stale: Vec<HostRange>,
}

impl FaultServer<'_> {
    fn has_retries(&self) -> bool {
        !self.stale.is_empty() || !self.shared.lock().retries.is_empty()
    }

    /// Takes events in and serves until nothing is left. False: the work of this thread is over.
    fn handle(&mut self, events: &[Event], read_at: Instant) -> bool {
        self.held.extend_from_slice(events);
        loop {
            let mut state = self.shared.lock();
            match state.phase {
                Phase::Prepared => self.held.clear(),
                // `begin` interrupts us when it is through.
                Phase::Arming => return !state.stop,
                Phase::Live => self.take_in(&mut state),
            }
            let over = state.is_over();
            drop(state);
            self.release_stale();
            if over {
                return false;
            }
            self.retry_releases();
            if self.serve(read_at) && self.held.is_empty() {
                return true;
            }
        }
    }

    /// Hands the events held to core, as many as its queue takes.
    fn take_in(&mut self, state: &mut State) {
        let mut taken = 0;
        for event in &self.held {
            let Some(core) = &mut state.core else { break };
            match *event {
                Event::WriteFault { at } => match core.handle_fault(at) {
                    FaultOutcome::Queued | FaultOutcome::Waits => {}
                    FaultOutcome::Stale(range) => self.stale.push(range),
                    FaultOutcome::NotOurs => {
                        state.foreign_faults += 1;
                        log::error!(target: "ramshot::snapshot", "write fault at {at}, which is in no RAM block");
                        self.stale.push(HostRange::new(HostAddr(at.0 & !(PAGE_SIZE - 1)), PAGE_SIZE));
                    }
                    FaultOutcome::QueueFull => break,
                },
                Event::MissingFault { at } => {
                    state.foreign_faults += 1;
                    log::error!(target: "ramshot::snapshot", "missing-page fault at {at}: nobody restores this VM");
                }
                Event::Discarded(range) => {
                    core.handle_discarded(range);
                }
                Event::Unmapped(range) => {
                    core.handle_unmapped(range);
                }
            }
            taken += 1;
        }
        self.held.drain(..taken);
    }

    /// Wakes the writers of stale faults.
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
            drop(state);
            if let Some(job) = self.shared.release(captured, buffers) {
                self.hand_on(job);
            }
        }
    }

    /// Serves what is queued. False if the pool was full: there is more.
    fn serve(&self, read_at: Instant) -> bool {
        loop {
            let mut state = self.shared.lock();
            match self.shared.next_claim(&mut state, Worker::Faults) {
                (Next::Claim(claim), buffers) => {
                    drop(state);
                    if let Some(job) = self.shared.serve(claim, buffers) {
                        self.shared.lock().service.record(read_at.elapsed());
                        self.hand_on(job);
                    }
                }
                (Next::Full, _) => {
                    drop(self.shared.wait_for_work(state));
                    return false;
                }
                (Next::Idle | Next::Done, _) => return true,
                (Next::Ended, _) => return false,
            }
        }
    }

    /// Digests are the workers' business.
    fn hand_on(&self, job: Job) {
        let mut state = self.shared.lock();
        state.undigested.push_back(job);
        self.shared.work_changed(&state);
    }
}

/// A scan worker: copies what is pending, and computes the digests of all that is copied.
pub(crate) fn scan(shared: &Shared) {
    let _watch = Watch(shared);
    let mut state = shared.lock();
    while !state.stop {
        if let Some(mut job) = state.undigested.pop_front() {
            drop(state);
            let zero = job.digest();
            shared.submit(job, zero);
            state = shared.lock();
            continue;
        }
        state = match shared.next_claim(&mut state, Worker::Scan) {
            (Next::Claim(claim), buffers) => {
                drop(state);
                if let Some(mut job) = shared.serve(claim, buffers) {
                    let zero = job.digest();
                    shared.submit(job, zero);
                }
                shared.lock()
            }
            (Next::Idle | Next::Full | Next::Done | Next::Ended, _) => shared.wait_for_work(state),
        };
    }
}

/// A writer: hands what is digested to the sink, several runs at a time.
pub(crate) fn write(shared: &Shared, sink: &Arc<Box<dyn ImageSink>>) {
    let _watch = Watch(shared);
    let mut batch: Array<Job, 64> = Array::new();
    let mut state = shared.lock();
    loop {
        let mut bytes = 0;
        while bytes < WRITE_BATCH && !batch.is_full() {
            let Some(job) = state.digested.pop_front() else { break };
            bytes += job.run.run().bytes();
            // Cannot fail: it is not full.
            let _ = batch.push(job);
        }
        if batch.is_empty() {
            if state.stop {
                return;
            }
            state = shared.wait_for_jobs(state);
            continue;
        }
        let wanted = state.cause().is_none();
        drop(state);
        if wanted {
            let mut pieces = Vec::with_capacity(64);
            batch.iter().for_each(|job| job.pieces(&mut pieces));
            if let Err(error) = sink.write(&pieces) {
                log::error!(target: "ramshot::snapshot", "image: {error}");
                shared.lock().sink_error.get_or_insert(error);
                shared.end(Cause::Sink);
            }
        }
        state = shared.lock();
        for job in std::mem::take(&mut batch) {
            shared.written(&mut state, job);
        }
    }
}
