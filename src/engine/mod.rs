//! The engine: threads, pool and sink around core's decisions, as typestates around T0:
//! [`prepare_with`] → [`Prepared`] → [`Prepared::begin`] → [`Live`] → [`Live::finish`].

mod arm;
mod draft;
mod pool;
mod room;
mod shared;
#[cfg(all(test, not(ramshot_shuttle)))]
mod tests;
#[cfg(test)]
mod tests_dirty;
#[cfg(all(test, not(ramshot_shuttle)))]
mod tests_done;
#[cfg(all(test, not(ramshot_shuttle)))]
mod tests_end;
#[cfg(all(test, not(ramshot_shuttle)))]
mod tests_room;
#[cfg(all(test, ramshot_shuttle))]
mod tests_shuttle;
#[cfg(all(test, not(ramshot_shuttle)))]
mod tests_threads;
#[cfg(test)]
mod tests_world;
mod threads;
mod written;

use std::time::{Duration, Instant, SystemTime};

use ramshot_core::{
    BlockTable, Cause, DirtyPages, Discard, GuestAddr, HostRange, Limits, Next, OsError, PAGE_SIZE, PageBitmap, PageId,
    RamSource, Run, SetupError, Treatment, Worker, WriteTracker,
};

use self::shared::{Core, Shared};
use self::written::Written;
use crate::dirty::{AtT0, DirtyError};
use crate::file::PageState;
use crate::options::{OptionError, Options};
use crate::report::{Drafts, Progress, Report};
use crate::sink::{ImageMeta, ImageSink, SinkError};
use crate::sync::{Arc, thread};

/// What the scan leaves of the pool at least, if that is not more than three quarters of it (core sees to that): room for faults.
/// With the default pool, what is scanned is still in the processor's cache when it is written.
const RESERVE: u64 = 48 << 20;
/// What a transparent huge page maps, on x86-64 and on aarch64 with 4 KiB pages.
const HUGE_PAGE: u64 = 2 << 20;

/// What the engine works with. The `prepare` function puts these together for this process and a file; embedders with a
/// memory or a target of their own do it by hand.
pub struct Parts {
    /// Tracks writes to the blocks of `table`. Registered, nothing protected yet. It has one reader: the engine.
    pub tracker: Arc<dyn WriteTracker>,
    /// Reads guest RAM by host address.
    pub ram: Arc<dyn RamSource>,
    /// What guest RAM consists of.
    pub table: Arc<BlockTable>,
    /// Where the image goes.
    pub sink: Box<dyn ImageSink>,
}

/// Why a snapshot could not be prepared. The VM was not touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupFailed {
    /// A setting is out of its range.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The pool does not fit this RAM.
    #[error("the pool of {pool_bytes} bytes (option pool_bytes) does not fit this RAM: {source}")]
    Pool {
        /// The option's value.
        pool_bytes: u64,
        /// What is wrong.
        source: SetupError,
    },
    /// There is nothing to build on, or the tracking is not to be had.
    #[error("no increment: {0}")]
    Dirty(#[from] DirtyError),
    /// A thread could not be started.
    #[error("a snapshot thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// Why there is no image. The guest runs on unharmed, nothing is protected or registered any more, and what was at the
/// target before is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotFailed {
    /// It ended before every page was in the image.
    #[error("no snapshot: {cause}")]
    Ended {
        /// The first thing that went wrong.
        cause: Cause,
        /// If it was the image: what exactly.
        #[source]
        sink: Option<SinkError>,
    },
    /// `begin` was given pages that do not go with how the snapshot was prepared. Nothing was protected.
    #[error("no snapshot: begun with {given:?}, but it was {prepared}")]
    Pending {
        /// What was given.
        given: Pending,
        /// What it was prepared as.
        prepared: &'static str,
    },
    /// Every page was captured and written, but the image could not be committed.
    #[error("no snapshot: the image could not be committed")]
    Commit(#[source] SinkError),
}

/// Which pages a snapshot consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Pending {
    /// All of RAM: a full snapshot. Memory that was never touched is zero and costs nothing.
    #[default]
    All,
    /// What was written since the base (an increment, from [`prepare_increment`](crate::prepare_increment)), or since the
    /// last draft (after [`Prepared::precopy`]).
    Dirty,
}

/// Everything that can fail or wait is done: threads run, the pool is there, the target is open. Nothing is protected.
///
/// Dropping it undoes all that.
#[must_use = "a prepared snapshot that is dropped is undone"]
pub struct Prepared {
    running: Running,
    slot_words: Vec<u64>,
    slots: u16,
    limits: Limits,
    /// The image builds on another.
    increment: bool,
    drafts: Drafts,
}

/// A snapshot under way. T0 has passed: the VM may run.
///
/// Dropping it cancels it.
#[must_use = "a live snapshot that is dropped is cancelled"]
pub struct Live {
    running: Running,
    t0: SystemTime,
    begun: Instant,
    begin: Duration,
    arm: Duration,
    device_state: Vec<u8>,
    drafts: Drafts,
    /// With dirty tracking.
    at_t0: Option<AtT0>,
}

/// A handle on a live snapshot for other threads of the VMM: progress, cancel, discards.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// Starts the threads and allocates the pool. See [`Parts`].
///
/// # Errors
/// A setting out of range, a pool that cannot hold a host page, a thread that cannot be started.
pub fn prepare_with(parts: Parts, options: &Options) -> Result<Prepared, SetupFailed> {
    options.check()?;
    let host_page = parts.table.blocks().iter().map(|b| b.page_size).max().unwrap_or(PAGE_SIZE);
    let (slot_pages, slots) = options.slots(host_page);
    let limits = Limits {
        slot_pages,
        reserve_slots: RESERVE / (slot_pages * PAGE_SIZE),
        around_min: options.around_min / PAGE_SIZE,
        around_max: options.around_max / PAGE_SIZE,
        when_full: options.when_full,
        ..Limits::default()
    };
    prepare_sized(parts, options, slots, limits)
}

/// With this pool and these limits, whatever the options say of them.
fn prepare_sized(parts: Parts, options: &Options, slots: u16, limits: Limits) -> Result<Prepared, SetupFailed> {
    let Parts { tracker, ram, table, sink } = parts;
    let table = with_granules(&table, tracker.as_ref());
    let slot_words = zeroed(PageBitmap::<Vec<u64>>::words_for(u64::from(slots)));
    // Whatever `begin` could refuse is refused now, while the VM runs.
    try_core(&table, slots, slot_words.clone(), limits)
        .map_err(|source| SetupFailed::Pool { pool_bytes: options.pool_bytes, source })?;

    let increment = sink.omitted() == PageState::InParent;
    let dirty = options.dirty.as_ref().map(|dirty| dirty.claim(&table)).transpose()?;
    if increment && dirty.is_none() {
        return Err(SetupFailed::Dirty(DirtyError::NoBase));
    }
    let shared = Arc::new(Shared::new(tracker, ram, table, slots, limits.slot_pages, dirty));
    {
        let mut state = shared.lock();
        state.give_zeros = increment;
        state.written = options.order.clone().map(Written::new);
    }
    let sink = Some(Arc::new(sink));
    let mut running = Running { shared: Arc::clone(&shared), guard: None, threads: Vec::new(), sink };
    running.guard = Some(running.spawn("ramshot-faults", threads::serve_faults)?);
    for _ in 0..options.workers {
        let thread = running.spawn("ramshot-scan", threads::scan)?;
        running.threads.push(thread);
    }
    for _ in 0..options.writers {
        let Some(sink) = running.sink.clone() else { break };
        let thread = running.spawn("ramshot-write", move |shared| threads::write(shared, &sink))?;
        running.threads.push(thread);
    }
    // A seccomp filter may come next, and a thread sets its priority before it does anything else.
    shared.wait_until_ready(running.threads.len() + 1);
    log::debug!(target: "ramshot::snapshot", "prepared: {slots} slots of {} pages", limits.slot_pages);
    Ok(Prepared { running, slot_words, slots, limits, increment, drafts: Drafts::default() })
}

/// The granules: memory that is mapped by transparent huge pages, most of it, is captured in those.
fn with_granules(table: &BlockTable, tracker: &dyn WriteTracker) -> Arc<BlockTable> {
    let mut table = table.clone();
    for (index, block) in table.clone().iter().filter(|(_, block)| block.treatment == Treatment::Tracked) {
        let residency = tracker.residency(block.used_range());
        if residency.huge > residency.resident / 2 {
            table.set_granule(index, HUGE_PAGE);
        }
    }
    Arc::new(table)
}

/// Checks that a core can be made of this.
fn try_core(table: &Arc<BlockTable>, slots: u16, slot_words: Vec<u64>, limits: Limits) -> Result<(), SetupError> {
    let words = zeroed(PageBitmap::<Vec<u64>>::words_for(table.pages()));
    let pending = PageBitmap::new(words, table.pages(), true).ok_or(SetupError::PoolStorage { slots })?;
    Core::new(Arc::clone(table), pending, slots, slot_words, limits).map(drop)
}

/// Zeroed words that cost nothing until they are touched.
fn zeroed(words: u64) -> Vec<u64> {
    vec![0; usize::try_from(words).unwrap_or(usize::MAX)]
}

impl Prepared {
    /// Protects memory ahead of T0, while the guest runs, so that the pause depends on what the guest writes meanwhile
    /// and not on its size. Call it right before the VM is paused, or not at all.
    ///
    /// For an increment, and after pre-copy, what was written until now is protected ahead, and what is there is found: the pause
    /// depends on what is written from here on.
    ///
    /// Worth it for memory that is mapped by 4 KiB pages (protecting that takes 15 to 20 ms per GiB); what is mapped by
    /// huge pages takes 0.1 to 0.2 ms per GiB, and may be left to [`begin`](Self::begin). Until `begin`, the first write
    /// to each 2 MiB costs the guest one fault.
    ///
    /// If the image goes through the page cache (or a tmpfs) and the guest writes to more memory than the pool holds, room is
    /// made in the image for what it writes to, at most 512 MiB: that takes 0.35 ms per MiB more here, and shortens the
    /// time for which such a guest stands still after T0 by a quarter to a third. A guest that writes to less is watched for 2 ms.
    ///
    /// # Errors
    /// Memory could not be protected. Everything is undone.
    pub fn arm_ahead(self) -> Result<Self, SnapshotFailed> {
        let shared = &self.running.shared;
        // Read now, they have little to say at T0.
        let logs = shared.dirty.as_ref().map_or(Ok(()), |dirty| dirty.read_logs().map_err(Cause::Arm));
        let armed = logs.and_then(|()| match &shared.dirty {
            Some(dirty) if self.takes_dirty() => arm::dirty_ahead(shared, dirty, self.drafts.passes > 0, self.gaps()),
            _ => self.protect_ahead(),
        });
        match armed {
            Ok(()) => Ok(self),
            Err(cause) => {
                self.running.shared.end(cause);
                Err(self.running.fail())
            }
        }
    }

    /// T0: finds and protects the pages. Call it while every vCPU and every other writer of guest RAM is stopped; when
    /// it returns, with or without error, the VM may run, from any thread.
    ///
    /// `device_state` goes into the image as it is.
    ///
    /// # Errors
    /// Memory could not be protected. Everything is undone.
    pub fn begin(self, pending: Pending, device_state: Vec<u8>) -> Result<Live, SnapshotFailed> {
        let (t0, begun) = (SystemTime::now(), Instant::now());
        let takes_dirty = self.takes_dirty();
        if takes_dirty != (pending == Pending::Dirty) {
            let prepared = match (self.increment, self.drafts.passes > 0) {
                (true, _) => "prepared as an increment",
                (false, true) => "copied ahead by precopy",
                (false, false) => "prepared as a full snapshot",
            };
            return Err(SnapshotFailed::Pending { given: pending, prepared });
        }
        let gaps = self.gaps();
        let Self { running, slot_words, slots, limits, drafts, .. } = self;
        let shared = Arc::clone(&running.shared);
        // Both unreachable: prepare has tried the same.
        let impossible = || Cause::Arm(OsError::new("setting up core", 0));
        let armed = shared.close_ahead().ok_or_else(impossible).and_then(|ahead| {
            // Nobody writes any more: what they say now is what was written before T0.
            let dirty = shared.dirty.as_ref();
            dirty.map_or(Ok(()), |dirty| dirty.read_logs().map_err(Cause::Arm))?;
            let (pending, hot, at_t0) = match dirty {
                Some(dirty) if takes_dirty => {
                    let at_t0 = arm::dirty_at_t0(&shared, ahead, dirty, drafts.passes > 0, gaps)?;
                    (at_t0.pending.clone(), None, Some(at_t0))
                }
                _ => {
                    let (pending, hot) = arm::at_t0(&shared, ahead)?;
                    dirty.into_iter().for_each(|dirty| dirty.pages(DirtyPages::begin_full));
                    let both = || AtT0 { pending: pending.clone(), there: pending.clone(), all: true };
                    let at_t0 = dirty.map(|_| both());
                    (pending, Some(hot), at_t0)
                }
            };
            let table = Arc::clone(&shared.table);
            let mut core = Core::new(table, pending, slots, slot_words, limits).map_err(|_| impossible())?;
            if let Some(written) = &mut shared.lock().written {
                written.just_before = hot.as_ref().or(at_t0.as_ref().map(|at_t0| &at_t0.pending)).cloned();
            }
            hot.into_iter().for_each(|hot| core.scan_first(hot));
            Ok((core, at_t0))
        });
        let (core, at_t0) = match armed {
            Ok(armed) => armed,
            Err(cause) => {
                shared.end(cause);
                return Err(running.fail());
            }
        };
        let arm = begun.elapsed();
        {
            let mut state = shared.lock();
            state.go_live(core);
            shared.announce_end(&mut state);
        }
        let live = Live { running, t0, begun, begin: Duration::ZERO, arm, device_state, drafts, at_t0 };
        shared.capture_in_pause();
        if shared.lock().cause().is_some() {
            return Err(live.running.fail());
        }
        shared.wake_all();
        let begin = begun.elapsed();
        log::debug!(target: "ramshot::snapshot", "T0: armed in {arm:?}, begin took {begin:?}");
        Ok(Live { begin, ..live })
    }
}

impl Prepared {
    fn protect_ahead(&self) -> Result<(), Cause> {
        let shared = &self.running.shared;
        let nothing = Run::new(PageId(0), 0);
        let room = self.running.sink.as_ref().is_some_and(|sink| sink.make_room(nothing));
        if room {
            room::make(shared, u64::from(self.slots) * self.limits.slot_pages)?;
        }
        arm::ahead(shared)
    }

    /// A fault takes only neighbours along. Among drafts a page may be copied once more; an increment is to stay small.
    const fn gaps(&self) -> u64 {
        if self.increment { 0 } else { arm::GAPS }
    }

    /// Whether only what was written belongs to it.
    const fn takes_dirty(&self) -> bool {
        self.increment || self.drafts.passes > 0
    }
}

impl Shared {
    /// Captures the blocks that are written without a fault we see, on the thread that holds the VM stopped.
    fn capture_in_pause(&self) {
        loop {
            let mut state = self.lock();
            match self.next_claim(&mut state, Worker::Pause) {
                (Next::Claim(claim), buffers) => {
                    drop(state);
                    if let Some(job) = self.serve(claim, buffers) {
                        self.hand_on(job);
                    }
                }
                (Next::Full, _) => drop(self.wait_for_work(state)),
                (Next::Idle | Next::Done | Next::Ended, _) => return,
            }
        }
    }
}

impl Live {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.handle().progress()
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.running.shared) }
    }

    /// Ends it without an image; returns at once, the guest is free within a moment. `finish` then says `Cancelled`.
    pub fn cancel(&self) {
        self.handle().cancel();
    }

    /// See [`Handle::before_discard`].
    ///
    /// # Errors
    /// As there.
    pub fn before_discard(&self, range: HostRange) -> Result<(), Cause> {
        self.handle().before_discard(range)
    }

    /// See [`Handle::when_done`].
    pub fn when_done(&self, call: impl FnOnce() + Send + 'static) {
        self.handle().when_done(call);
    }

    /// Waits until every page is captured and written, and commits the image.
    ///
    /// # Errors
    /// There is no image, for the reason given, and nothing is left behind.
    pub fn finish(self) -> Result<Report, SnapshotFailed> {
        let Self { mut running, t0, begun, begin, arm, device_state, drafts, at_t0 } = self;
        let shared = Arc::clone(&running.shared);
        let mut state = shared.lock();
        while !state.is_written() && state.cause().is_none() {
            state = shared.wait_for_end(state);
        }
        drop(state);
        running.stop_work();
        let mut state = shared.lock();
        if state.cause().is_some() {
            drop(state);
            return Err(running.fail());
        }
        let counts = state.core.as_ref().map(|core| *core.counts()).unwrap_or_default();
        let capture = state.captured_at.map_or(Duration::ZERO, |at| at.duration_since(begun));
        let written = state.written.take();
        let (pages_zero, foreign_faults, fault_service) =
            (state.pages_zero, state.foreign_faults, state.service.clone());
        drop(state);
        let statistics = [
            ("arm_ns", nanos(arm)),
            ("capture_ns", nanos(capture)),
            ("pages_captured", counts.released),
            ("pages_by_fault", counts.by_fault),
            ("write_faults", counts.faults),
        ];
        let meta = ImageMeta {
            device_state,
            statistics: statistics.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        let Some(sink) = running.take_sink() else {
            return Err(running.fail());
        };
        let image = sink.commit(&meta).map_err(SnapshotFailed::Commit)?;
        log::debug!(target: "ramshot::snapshot", "committed {} bytes", image.image_bytes);
        if let Some(written) = written {
            written.save(shared.table.pages());
        }
        if let (Some(dirty), Some(at_t0)) = (&shared.dirty, &at_t0) {
            dirty.committed(at_t0, image.snapshot);
        }
        let total = begun.elapsed();
        // Ending the registration takes 25 to 60 ms per GiB mapped by small pages; the image did not wait for it.
        running.stop();
        Ok(Report { t0, begin, arm, capture, total, counts, drafts, pages_zero, image, fault_service, foreign_faults })
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Handle {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let state = self.shared.lock();
        let counts = state.core.as_ref().map(|core| *core.counts()).unwrap_or_default();
        Progress {
            pages_total: counts.total,
            pages_captured: counts.released,
            pages_by_fault: counts.by_fault,
            write_faults: counts.faults,
            captured: state.is_captured(),
            ended: state.cause().is_some(),
        }
    }

    /// Ends the snapshot without an image; returns at once.
    pub fn cancel(&self) {
        let mut state = self.shared.lock();
        if !state.is_written() {
            self.shared.end_locked(&mut state, Cause::Cancelled);
        }
    }

    /// Has `call` called once, as soon as [`Live::finish`] has nothing to wait for but the commit: every page is written, or
    /// the snapshot has ended without an image. So a VMM with an event loop need not spend a thread on waiting: `call`
    /// writes to its eventfd (or wakes its task), and the loop calls `finish`.
    ///
    /// It is called on a thread of the engine, or here if it is too late for that; it must not wait, and must neither finish
    /// nor drop the [`Live`]. May be called more than once: all are called.
    pub fn when_done(&self, call: impl FnOnce() + Send + 'static) {
        self.shared.when_done(Box::new(call));
    }

    /// To be called before the VMM discards guest RAM (balloon, virtio-mem): captures what is pending of `range` and
    /// returns when the discard is safe. Costs nothing for pages captured already.
    ///
    /// # Errors
    /// The snapshot has ended; the discard is safe all the same.
    pub fn before_discard(&self, range: HostRange) -> Result<(), Cause> {
        let shared = &self.shared;
        for run in shared.table.runs_in(range) {
            loop {
                let mut state = shared.lock();
                if let Some(cause) = state.cause() {
                    return Err(cause);
                }
                let Some(core) = &mut state.core else { break };
                match core.claim_for_discard(run) {
                    Discard::Clear => break,
                    Discard::Wait => drop(shared.wait_for_work(state)),
                    Discard::Claim(claim) => {
                        let buffers = state.pool.take(&claim);
                        drop(state);
                        if let Some(job) = shared.serve(claim, buffers) {
                            shared.hand_on(job);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// As [`before_discard`](Self::before_discard), by guest-physical address.
    ///
    /// # Errors
    /// As there.
    pub fn before_discard_guest(&self, at: GuestAddr, len: u64) -> Result<(), Cause> {
        for block in self.shared.table.blocks() {
            let from = at.0.max(block.guest.0);
            let to = at.0.saturating_add(len).min(block.guest.0 + block.used);
            if from < to {
                let host = ramshot_core::HostAddr(block.host.0 + (from - block.guest.0));
                self.before_discard(HostRange::new(host, to - from))?;
            }
        }
        Ok(())
    }
}

/// The threads and the sink; dropping it ends the snapshot, whatever state it is in.
struct Running {
    shared: Arc<Shared>,
    /// Serves faults, and disarms.
    guard: Option<thread::JoinHandle<()>>,
    /// Scan and write.
    threads: Vec<thread::JoinHandle<()>>,
    sink: Option<Arc<Box<dyn ImageSink>>>,
}

impl Running {
    fn spawn(
        &self,
        name: &str,
        body: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<thread::JoinHandle<()>, SetupFailed> {
        let shared = Arc::clone(&self.shared);
        let body = move || {
            shared.survive(|| body(&shared));
        };
        thread::Builder::new().name(name.to_owned()).spawn(body).map_err(SetupFailed::Thread)
    }

    /// Tells every thread to leave, and joins those that scan and write. Does nothing the second time.
    fn stop_work(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            // A panic inside has ended the snapshot.
            let _ = thread.join();
        }
    }

    /// Joins them all, and makes sure that nothing is protected. Does nothing the second time.
    fn stop(&mut self) {
        self.stop_work();
        if let Some(guard) = self.guard.take() {
            let _ = guard.join();
        }
        self.shared.disarm();
    }

    /// What was given so far is a draft. The error is kept.
    fn again(&self) -> Result<(), ()> {
        let Some(sink) = &self.sink else { return Err(()) };
        let mut state = self.shared.lock();
        state.give_zeros = true;
        sink.again().map_err(|error| {
            state.sink_error.get_or_insert(error);
        })
    }

    /// The sink, once the threads are gone.
    fn take_sink(&mut self) -> Option<Box<dyn ImageSink>> {
        Arc::into_inner(self.sink.take()?)
    }

    /// Stops everything and says why.
    fn fail(mut self) -> SnapshotFailed {
        self.stop();
        let mut state = self.shared.lock();
        let cause = state.cause().unwrap_or(Cause::ThreadDied);
        SnapshotFailed::Ended { cause, sink: state.sink_error.take() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.shared.end(Cause::Cancelled);
        }
        self.stop();
        if let Some(sink) = self.take_sink() {
            sink.abort();
        }
    }
}
