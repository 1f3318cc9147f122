//! Write tracking of guest RAM by userfaultfd write protection.

mod ending;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ramshot_core::{Done, Event, HostRange, OsError, RamBlock, Residency, Treatment, WriteTracker};

use crate::adopted::Adopted;
use crate::error::TrackError;
use crate::event::{self, Message, Waiter};
use crate::owner::{Context, Lease};
use crate::populated::{PageTable, populated};
use crate::probe::{self, WANTED};
use crate::ram::GuestRam;
use crate::relay::Relay;
use crate::storm::Storm;
use crate::uffd::{Uffd, Way};
use crate::{maps, register, uapi};

const WRITEPROTECT: &str = "UFFDIO_WRITEPROTECT";

/// How a [`Tracker`] is opened and how patient it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrackerOptions {
    /// Whether a userfaultfd of user mode only will do where no other can be had. **Not for KVM guests**: a write by
    /// the kernel into a protected page then fails instead of waiting, so `KVM_RUN` returns EFAULT for a vCPU's
    /// write, and `read(2)` into guest RAM fails. Default: no.
    pub user_mode_only: bool,
    /// How long protecting waits for mappings that are being changed (EAGAIN) before it gives up, and disarming before
    /// it does without waiting. Default: 1 s. One change ends as soon as its event is read; against a thread that did
    /// nothing but discard, on two processors, protecting took up to 16 ms.
    pub patience: Duration,
}

impl Default for TrackerOptions {
    fn default() -> Self {
        Self { user_mode_only: false, patience: Duration::from_secs(1) }
    }
}

/// Tracks writes to guest RAM: one userfaultfd context with every [`Treatment::Tracked`] block registered.
///
/// # Somebody must read
/// From [`open`](Self::open) on, a thread that discards, unmaps or moves registered memory (`madvise`, `munmap`,
/// `mremap`) waits inside that system call until its event is read, and protecting and releasing answer EAGAIN
/// meanwhile. So the thread that calls [`next_events`](WriteTracker::next_events) starts right after `open` and runs until
/// [`disarm`](WriteTracker::disarm), and must never itself change those mappings. In return no discard goes unnoticed: without
/// the events, memory discarded under a snapshot would read as zeros.
///
/// # Dropping
/// Dropping disarms. Guest RAM is kept alive by the tracker and let go after that, so unmapping it does not wait.
#[derive(Debug)]
pub struct Tracker {
    uffd: Uffd,
    waiter: Waiter,
    /// With the lazy restore whose context this is: it reads the events.
    relay: Option<Arc<Relay>>,
    page_table: PageTable,
    patience: Duration,
    /// Whether the kernel lifts the protection of what is unregistered (since 6.0; known by a feature of 6.4).
    ending_lifts: bool,
    /// What is registered: cut and moved as the kernel reports that mappings are.
    registered: Mutex<Vec<Registration>>,
    /// Held by the one that disarms.
    disarming: Mutex<()>,
    /// Set when disarming begins; nothing is protected after that.
    disarmed: AtomicBool,
    storm: Storm,
    /// Held for reading while protecting, taken for writing by disarm, so that it waits for what is under way.
    protecting: RwLock<()>,
    ram: Arc<GuestRam>,
    /// Of a context that was handed over.
    _lease: Option<Lease>,
}

/// A range registered for write faults.
#[derive(Clone, Copy, Debug)]
struct Registration {
    range: HostRange,
    /// Modes it had before us (a lazy restore's): then the registration is not ours to end.
    prior: u64,
    page_size: u64,
}

/// The modes that each block is registered with already: by a lazy restore, which goes on.
fn registered_already(ram: &GuestRam) -> Result<impl Fn(&RamBlock) -> u64 + use<>, TrackError> {
    let failed = |error: std::io::Error| OsError::new("reading smaps", error.raw_os_error().unwrap_or(0));
    let found = ram.owner().registrations().map_err(failed)?;
    Ok(move |block: &RamBlock| found.modes(block.mapping()) & !uapi::REGISTER_MODE_WP)
}

impl Tracker {
    /// The guest RAM it tracks.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Opens a userfaultfd and registers every tracked block, whole. Nothing is protected yet. Belongs before the
    /// pause, and before a seccomp filter.
    ///
    /// `/dev/userfaultfd` is tried first, then the system call, on any failure. For memory of another process it is the one
    /// that was handed over with it.
    ///
    /// # Errors
    /// What is missing; nothing stays open or registered.
    pub fn open(ram: Arc<GuestRam>, options: &TrackerOptions) -> Result<Self, TrackError> {
        if let Some(Context { uffd, features, lease }) = ram.owner().context()? {
            let prior = registered_already(&ram)?;
            let mut tracker = Self::start(uffd, features, None, ram, options, prior)?;
            tracker._lease = Some(lease);
            return Ok(tracker);
        }
        let (uffd, features) = probe::open_context(WANTED, options.user_mode_only)?;
        Self::start(uffd, features, None, ram, options, |_| 0)
    }

    /// On the context of a lazy restore, which has attached it.
    pub(crate) fn sharing(
        uffd: &Uffd,
        features: u64,
        relay: Arc<Relay>,
        ram: Arc<GuestRam>,
        options: &TrackerOptions,
    ) -> Result<Self, TrackError> {
        Self::start(uffd.duplicate()?, features, Some(relay), ram, options, |_| uapi::REGISTER_MODE_MISSING)
    }

    /// Takes over a userfaultfd of this process on which UFFDIO_API has been called: the one that a lazy restore runs
    /// on, or one that was made by a more privileged process. From then on this tracker reads its events.
    ///
    /// Ranges that are registered for missing pages stay so, while tracked and after (then for writes too, which costs
    /// nothing while nothing is protected). To go on using the context
    /// afterwards, pass a duplicate of the descriptor: closing the last one while pages are missing makes them read as
    /// zeros. The descriptor is made non-blocking.
    ///
    /// # Errors
    /// [`TrackError::Unsuitable`] if it is no initialised userfaultfd, or has WP_ASYNC or SIGBUS, under which no write
    /// fault is reported; otherwise as [`open`](Self::open).
    pub fn from_fd(fd: OwnedFd, ram: Arc<GuestRam>, options: &TrackerOptions) -> Result<Self, TrackError> {
        let (uffd, features) = Adopted::new(fd).map_err(TrackError::Unsuitable)?.into_parts();
        let prior = registered_already(&ram)?;
        Self::start(uffd, features, None, ram, options, prior)
    }

    /// Takes over a `userfaultfd::Uffd`, as [`from_fd`](Self::from_fd) does.
    ///
    /// # Errors
    /// As [`from_fd`](Self::from_fd).
    #[cfg(feature = "userfaultfd")]
    pub fn from_uffd(
        uffd: userfaultfd::Uffd,
        ram: Arc<GuestRam>,
        options: &TrackerOptions,
    ) -> Result<Self, TrackError> {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: `uffd` is alive until the end of this function, and its descriptor open as long.
        let borrowed = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
        // A duplicate, and the original closed: in userfaultfd 0.9 `into_raw_fd` returns a closed descriptor.
        let fd = borrowed
            .try_clone_to_owned()
            .map_err(|error| OsError::new("fcntl F_DUPFD_CLOEXEC", error.raw_os_error().unwrap_or(0)))?;
        Self::from_fd(fd, ram, options)
    }

    fn start(
        uffd: Uffd,
        features: u64,
        relay: Option<Arc<Relay>>,
        ram: Arc<GuestRam>,
        options: &TrackerOptions,
        prior: impl Fn(&RamBlock) -> u64,
    ) -> Result<Self, TrackError> {
        ram.warn_of_aliases();
        let tracker = Self {
            uffd,
            waiter: Waiter::new(ram.owner())?,
            relay,
            page_table: PageTable::open(ram.owner()),
            patience: options.patience,
            ending_lifts: Way::ALL.into_iter().find_map(|way| probe::offered(way).ok()).unwrap_or(0)
                & uapi::FEATURE_WP_UNPOPULATED
                != 0,
            registered: Mutex::new(Vec::new()),
            disarming: Mutex::new(()),
            disarmed: AtomicBool::new(false),
            storm: Storm::new(),
            protecting: RwLock::new(()),
            ram,
            _lease: None,
        };
        // On failure `tracker` is dropped, which unregisters the blocks done so far.
        for block in tracker.ram.table().blocks().iter().filter(|b| b.treatment == Treatment::Tracked) {
            register::check_block(block, features).map_err(TrackError::Block)?;
            let prior = prior(block);
            let (range, page_size) = (block.mapping(), block.page_size);
            register::register(&tracker.uffd, block, prior).map_err(TrackError::Block)?;
            tracker.list().push(Registration { range, prior, page_size });

            log::debug!(
                target: "ramshot::track",
                "start block {}: page size {page_size}, address {}, length {:#x}", block.name, range.start, range.len
            );
        }
        let registered: Vec<HostRange> = tracker.list().iter().map(|registration| registration.range).collect();
        tracker.ram.owner().check_registered(&registered, uapi::REGISTER_MODE_WP)?;
        Ok(tracker)
    }

    fn list(&self) -> MutexGuard<'_, Vec<Registration>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// UFFDIO_WRITEPROTECT on all of `range`, mapping by mapping where the kernel does not take them at once (before
    /// 6.3 it took no more than one).
    fn write_protect(&self, range: HostRange, on: bool) -> Result<Done, OsError> {
        let failed = |range, errno| Err(OsError::new(WRITEPROTECT, errno as i32).on(range));
        match self.uffd.write_protect(range, on) {
            Ok(()) => return Ok(Done::Yes),
            Err(Errno::EAGAIN) => return Ok(Done::Again),
            Err(Errno::ENOENT) => {}
            Err(errno) => return failed(range, errno),
        }
        let pieces = match maps::read(self.ram.owner()).map(|vmas| maps::cover(&vmas, range)) {
            Ok(Ok(pieces)) if pieces.len() > 1 => pieces,
            // One mapping, a gap, or unknown: the kernel's answer stands.
            _ => return failed(range, Errno::ENOENT),
        };
        for piece in pieces {
            match self.uffd.write_protect(piece.range, on) {
                Ok(()) => {}
                Err(Errno::EAGAIN) => return Ok(Done::Again),
                Err(errno) => return failed(piece.range, errno),
            }
        }
        Ok(Done::Yes)
    }

    /// Repeats `attempt` while it says `Again`, as long as `patience` lasts, with `meanwhile` between two attempts.
    fn insist(
        &self,
        range: HostRange,
        mut attempt: impl FnMut() -> Result<Done, OsError>,
        mut meanwhile: impl FnMut() -> Result<(), OsError>,
    ) -> Result<(), OsError> {
        let mut started = None;
        while attempt()? == Done::Again {
            if started.get_or_insert_with(Instant::now).elapsed() > self.patience {
                return Err(OsError::new(WRITEPROTECT, libc::EAGAIN).on(range));
            }
            meanwhile()?;
            // Short: the gaps between two changes are, and every attempt is a chance to hit one.
            thread::sleep(Duration::from_micros(10));
        }
        Ok(())
    }

    /// Reads all messages there are.
    fn drain(&self) -> Result<(), OsError> {
        let take = &mut |message| {
            self.take(message);
        };
        match &self.relay {
            Some(relay) => relay.losses(take),
            None => while event::read_now(&self.uffd, usize::MAX, take)? > 0 {},
        }
        Ok(())
    }

    /// What a message means to the engine, having noted what it means to us.
    fn take(&self, message: Message) -> Option<Event> {
        match message {
            Message::Event(Event::Unmapped(range)) => {
                self.gone(range, None);
                Some(Event::Unmapped(range))
            }
            Message::Event(event) => Some(event),
            Message::Moved { from, to } => {
                log::debug!(target: "ramshot::track", "{from} was moved to {to}");
                self.gone(from, Some(to));
                Some(Event::Unmapped(from))
            }
            Message::Forked { .. } => None,
            Message::Unknown(event) => {
                log::warn!(target: "ramshot::track", "userfaultfd message {event:#x} is unknown and ignored");
                None
            }
        }
    }
}

impl WriteTracker for Tracker {
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let table = self.ram.table();
        let found = table.block_at(within.start).and_then(|index| {
            let (block, pieces) = (table.block(index)?, self.ram.pieces().get(usize::from(index.0))?);
            (within.end().0 <= block.used_range().end().0).then_some((block, pieces))
        });
        let Some((block, pieces)) = found else {
            return Err(OsError::new("populated: not inside one RAM block", libc::EINVAL).on(within));
        };
        populated(&self.page_table, pieces, self.ram.pieces(), within, block.page_size, each)
    }

    fn residency(&self, within: HostRange) -> Residency {
        self.page_table.residency(within)
    }

    fn protect(&self, range: HostRange) -> Result<(), OsError> {
        let _under_way = self.protecting.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(relay) = &self.relay {
            // Whole blocks: what is protected too much is released at its first fault.
            let blocks = self.ram.table().blocks().iter().filter(|block| block.mapping().overlaps(range));
            blocks.for_each(|block| relay.protect_what_comes(block.mapping()));
        }
        let attempt = || {
            if self.disarmed.load(Ordering::Acquire) {
                return Err(OsError::new("UFFDIO_WRITEPROTECT after disarming", libc::ECANCELED).on(range));
            }
            match self.write_protect(range, true) {
                Err(error) if error.errno == libc::ENOENT && self.take_back(range)? => self.write_protect(range, true),
                result => result,
            }
        };
        // Reading the event is the reader's; this thread only waits.
        self.insist(range, attempt, || Ok(()))
    }

    fn release(&self, range: HostRange) -> Result<Done, OsError> {
        let error = match self.write_protect(range, false) {
            Ok(Done::Yes) => {
                self.storm.calm();
                return Ok(Done::Yes);
            }
            Ok(Done::Again) if self.storm.is_unbearable() => return Ok(self.give_up(range)),
            Ok(Done::Again) => return Ok(Done::Again),
            Err(error) => error,
        };
        if error.errno != libc::ENOENT {
            return Err(error);
        }
        // Part of it is not registered any more. Whoever is blocked there must find out.
        let _ = self.uffd.wake(range);
        if self.disarmed.load(Ordering::Acquire) {
            return Ok(Done::Yes);
        }
        let Some(parts) = self.storm.without_given_up(range) else { return Err(error) };
        for part in parts {
            if self.write_protect(part, false)? == Done::Again {
                return Ok(Done::Again);
            }
        }
        Ok(Done::Yes)
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        if let Some(relay) = &self.relay {
            return relay.next_events(events, timeout_ms, &mut |message| self.take(message));
        }
        event::next_events(&self.waiter, &self.uffd, events, timeout_ms, &mut |message| self.take(message))
    }

    fn losses(&self, each: &mut dyn FnMut(Event)) {
        if let Some(relay) = &self.relay {
            relay.losses(&mut |message| self.take(message).into_iter().for_each(&mut *each));
        }
    }

    fn interrupt(&self) {
        match &self.relay {
            Some(relay) => relay.interrupt_tracker(),
            None => self.waiter.interrupt(),
        }
    }

    fn disarm(&self) -> Result<(), OsError> {
        self.disarmed.store(true, Ordering::Release);
        // From here on nobody protects: who does now is waited for, who comes later sees the flag.
        drop(self.protecting.write().unwrap_or_else(PoisonError::into_inner));
        let _alone = self.disarming.lock().unwrap_or_else(PoisonError::into_inner);
        // Nor does anything come in protected.
        self.relay.iter().for_each(|relay| relay.protect_no_more());
        let mut first = None;
        let mut failed = Vec::new();
        loop {
            // Up to date before each look at the list: what was unmapped is not ours any more, what was moved is
            // elsewhere. And whoever waits for an event to be read would wait for as long as the descriptor is open.
            let drained = self.drain();
            first = first.or(drained.err());
            let Some(registration) = self.list().pop() else { break };
            let result = self.disarm_one(registration);
            let range = registration.range;
            log::debug!(
                target: "ramshot::track", "stop address {}, length {:#x}: {result:?}", range.start, range.len
            );
            if let Err(error) = result {
                first = first.or(Some(error));
                failed.push(registration);
            }
        }
        // For another attempt.
        *self.list() = failed;
        first.map_or(Ok(()), Err)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            log::error!(target: "ramshot::track", "disarming on drop: {error}; closing the descriptor lifts the rest");
        }
        self.relay.iter().for_each(|relay| relay.detach());
    }
}
