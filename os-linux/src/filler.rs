//! Guest RAM that comes in page by page while the VM runs already: userfaultfd in missing mode.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use ramshot_core::{Event, Filled, HostAddr, HostRange, OsError, RamBlock, RamFiller, Treatment};

use crate::error::{Missing, TrackError};
use crate::event::{self, Message};
use crate::owner::{Context, Lease};
use crate::populated::{PageTable, populated};
use crate::probe::{self, WANTED};
use crate::ram::GuestRam;
use crate::register;
use crate::relay::{Attach, Relay};
use crate::storm::cut;
use crate::tracker::{Tracker, TrackerOptions};
use crate::uffd::{Stopped, Uffd};
use crate::{maps, uapi};

/// How often a call that the kernel puts off is repeated before the caller is asked to read events.
const ATTEMPTS: u32 = 2;

/// Zeros to be put in where the kernel's own page of them will not do.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How a [`Filler`] is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FillerOptions {
    /// Whether a userfaultfd of user mode only will do where no other can be had. **Not for KVM guests**: an access by the
    /// kernel to a page that is not there then fails instead of waiting. Default: no.
    pub user_mode_only: bool,
}

/// Puts pages into guest RAM that was registered as missing: whoever touches one waits until it is there.
///
/// Its context has the features that write tracking needs, and its blocks are registered for missing pages only: that is
/// cheap to end. A [`Tracker`] may share it ([`track`](Self::track)).
///
/// # Somebody must read
/// As for a [`Tracker`](crate::Tracker): from [`open`](Self::open) on a thread reads
/// [`next_events`](RamFiller::next_events), and never itself touches guest RAM or changes its mappings.
///
/// # What cannot be seen
/// Registration is per mapping. Another process, or a second mapping of a memfd, reads zeros where no page is in yet:
/// connect vhost-user back-ends after the restore. A child of `fork` does, too.
///
/// # Dropping
/// Ordinary memory that is not there reads as zeros, and that would be a lie until the last page is in. So dropping it before
/// [`finish`](RamFiller::finish) leaves the context open for as long as the process lives: who touches a page that is not in
/// stays blocked.
#[derive(Debug)]
pub struct Filler {
    uffd: ManuallyDrop<Uffd>,
    /// With whoever tracks writes meanwhile.
    relay: Arc<Relay>,
    registered: Mutex<Vec<HostRange>>,
    can_poison: bool,
    /// Of the context.
    features: u64,
    /// As many zeros as the largest page of a block that has no zero page of its own.
    zeros: Vec<u8>,
    ram: Arc<GuestRam>,
    /// Of a context that was handed over: until it is finished.
    lease: Mutex<Option<Lease>>,
}

impl Filler {
    /// Opens a userfaultfd and registers every block that is part of the image, whole. From then on nobody gets past a
    /// page that is not there.
    ///
    /// What it costs follows the number of blocks: the memory must be fresh, and is looked at to be sure.
    ///
    /// # Errors
    /// What is missing; a block that is not fresh. Nothing stays open or registered.
    pub fn open(ram: Arc<GuestRam>, options: &FillerOptions) -> Result<Self, TrackError> {
        let wanted = WANTED | uapi::FEATURE_MISSING_SHMEM | uapi::FEATURE_MISSING_HUGETLBFS | uapi::FEATURE_POISON;
        let (uffd, features, lease) = match ram.owner().context()? {
            Some(Context { uffd, features, lease }) => (uffd, features, Some(lease)),
            None => {
                let (uffd, features) = probe::open_context(wanted, options.user_mode_only)?;
                (uffd, features, None)
            }
        };
        let mut filler = Self {
            uffd: ManuallyDrop::new(uffd),
            relay: Arc::new(Relay::new(ram.owner())?),
            registered: Mutex::new(Vec::new()),
            can_poison: features & uapi::FEATURE_POISON != 0,
            features,
            zeros: Vec::new(),
            ram,
            lease: Mutex::new(lease),
        };
        let started = filler.register_all(features);
        if started.is_err() {
            let undone = filler.undo();
            log::debug!(target: "ramshot::restore", "lazy restore did not start: {started:?}; undone: {undone:?}");
        }
        started.map(|()| filler)
    }

    fn register_all(&mut self, features: u64) -> Result<(), TrackError> {
        let ram = Arc::clone(&self.ram);
        let table = ram.table();
        let page_table = PageTable::open(ram.owner());
        for (block, pieces) in table.blocks().iter().zip(ram.pieces()) {
            if block.treatment == Treatment::Ignored {
                continue;
            }
            register::check_missing(block, features).map_err(TrackError::Block)?;
            let ioctls = register::register_missing(&self.uffd, block).map_err(TrackError::Block)?;
            self.list().push(block.mapping());
            self.can_poison &= ioctls & uapi::CAN_POISON != 0;
            if ioctls & uapi::CAN_ZEROPAGE == 0 {
                let len = usize::try_from(block.page_size).unwrap_or(usize::MAX).max(self.zeros.len());
                // Fresh zeros: the kernel's one zero page, read over and over.
                self.zeros = vec![0; len];
            }
            // After registering: what comes later blocks, what came before is found here.
            let mut first = None;
            populated(&page_table, pieces, ram.pieces(), block.used_range(), block.page_size, &mut |range| {
                first.get_or_insert(range);
            })?;
            if let Some(range) = first {
                return Err(TrackError::Block(register::not_fresh(block, range)));
            }
            log::debug!(
                target: "ramshot::restore",
                "block {}: {} missing from {}, page size {}", block.name, block.len, block.host, block.page_size
            );
        }
        let registered = self.list().clone();
        ram.owner().check_registered(&registered, uapi::REGISTER_MODE_MISSING)?;
        Ok(())
    }

    /// Tracks writes to the same memory: a live snapshot of a VM that is still being restored. The tracker uses this context, and its
    /// events are read by whoever reads this filler's. Until it is disarmed and dropped, [`finish`](RamFiller::finish) says
    /// `EBUSY`.
    ///
    /// What it does not know of is which missing pages have data: its [`populated`](ramshot_core::WriteTracker::populated)
    /// names what is there. [`LazyRestore::prepare`](https://docs.rs/ramshot) adds the rest.
    ///
    /// # Errors
    /// [`TrackError::Unsuitable`] if a tracker shares the context already, or if the restore is over: then open one of its own
    /// ([`is_over`](Self::is_over) tells). Otherwise as [`Tracker::open`].
    pub fn track(&self, options: &TrackerOptions) -> Result<Tracker, TrackError> {
        let unsuitable = |why: &str, remedy: &str| {
            TrackError::Unsuitable(Missing::new("the userfaultfd of the lazy restore", why.to_owned(), remedy))
        };
        match self.relay.attach() {
            Ok(()) => {}
            Err(Attach::Busy) => return Err(unsuitable("another snapshot uses it", "wait until that is over")),
            Err(Attach::Over) => return Err(unsuitable("the restore is over", "open one: memory is ordinary memory")),
        }
        let shared =
            Tracker::sharing(&self.uffd, self.features, Arc::clone(&self.relay), Arc::clone(&self.ram), options);
        if shared.is_err() {
            self.relay.detach();
        }
        shared
    }

    /// Whether it has [finished](RamFiller::finish): memory is ordinary memory.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.relay.is_over()
    }

    /// The guest RAM it fills.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn list(&self) -> MutexGuard<'_, Vec<HostRange>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block(&self, at: HostAddr) -> Option<&RamBlock> {
        let table = self.ram.table();
        table.block_at(at).and_then(|index| table.block(index))
    }

    /// Has `attempt` fill `range` from the given place on, past pages that are there already and past what is registered
    /// no more.
    fn through(
        &self,
        op: &'static str,
        range: HostRange,
        attempt: impl Fn(HostRange) -> Result<(), Stopped>,
    ) -> Result<Filled, OsError> {
        let page = self.block(range.start).map_or(ramshot_core::PAGE_SIZE, |block| block.page_size);
        let mut filled = Filled::default();
        let mut attempts = 0;
        // How much is tried in one call: all, or a page where the range is made of several mappings.
        let mut most = range.len;
        while filled.bytes < range.len {
            let at = HostAddr(range.start.0 + filled.bytes);
            let rest = HostRange::new(at, (range.len - filled.bytes).min(most));
            let stopped = match attempt(rest) {
                Ok(()) => {
                    filled.bytes += rest.len;
                    continue;
                }
                Err(stopped) => stopped,
            };
            match stopped.errno {
                _ if stopped.done > 0 => filled.bytes += stopped.done,
                Errno::EEXIST => {
                    let one = HostRange::new(at, page.min(rest.len));
                    self.wake(one)?;
                    filled.bytes += one.len;
                    filled.present += one.len;
                }
                Errno::EAGAIN if attempts < ATTEMPTS => {
                    attempts += 1;
                    // Short: the thread that changes the mappings is past it as soon as it runs again.
                    thread::sleep(Duration::from_micros(1 << attempts));
                }
                Errno::EAGAIN => {
                    filled.again = true;
                    return Ok(filled);
                }
                Errno::ENOENT if rest.len > page => most = page,
                // Unmapped or moved away: whoever waits there must find out.
                Errno::ENOENT if !maps::registered_in(self.ram.owner(), rest).is_ok_and(|found| !found.is_empty()) => {
                    self.wake(rest)?;
                    filled.bytes += rest.len;
                }
                errno => return Err(OsError::new(op, errno as i32).on(rest)),
            }
        }
        Ok(filled)
    }

    fn wake(&self, range: HostRange) -> Result<(), OsError> {
        self.uffd.wake(range).map_err(|errno| OsError::new("UFFDIO_WAKE", errno as i32).on(range))
    }

    /// What a message means to the engine, having noted what it means to us.
    fn take(&self, message: Message) -> Option<Event> {
        if !self.relay.pass(message) {
            return None;
        }
        let (event, range) = match message {
            Message::Event(Event::Unmapped(range)) => (Event::Unmapped(range), range),
            Message::Event(event) => return Some(event),
            Message::Moved { from, to } => {
                log::error!(
                    target: "ramshot::restore",
                    "{from} was moved to {to} while it was restored: what is missing there stays missing"
                );
                (Event::Unmapped(from), from)
            }
            Message::Forked { .. } => return None,
            Message::Unknown(event) => {
                log::warn!(target: "ramshot::restore", "userfaultfd message {event:#x} is unknown and ignored");
                return None;
            }
        };
        let mut list = self.list();
        *list = list.drain(..).flat_map(|registered| cut(registered, range)).flatten().collect();
        drop(list);
        // Unmapping wakes nobody who is blocked there. The descriptor's errors show up elsewhere.
        let _ = self.uffd.wake(range);
        Some(event)
    }
}

impl RamFiller for Filler {
    fn fill(&self, at: HostAddr, bytes: &[u8]) -> Result<Filled, OsError> {
        let range = HostRange::new(at, u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        self.through("UFFDIO_COPY", range, |part| {
            let from = usize::try_from(part.start.0 - at.0).unwrap_or(usize::MAX);
            let len = usize::try_from(part.len).unwrap_or(usize::MAX);
            let bytes = bytes.get(from..).and_then(|rest| rest.get(..len)).unwrap_or_default();
            let putting_in = self.relay.putting_in();
            self.uffd.copy(part.start, bytes, putting_in.protected(part))
        })
    }

    fn zero(&self, range: HostRange) -> Result<Filled, OsError> {
        let zeros = |len: u64| {
            // A huge page has a buffer of its own.
            let from = if self.zeros.is_empty() { ZEROS.as_slice() } else { &self.zeros };
            from.get(..usize::try_from(len).unwrap_or(usize::MAX)).unwrap_or(from)
        };
        let block = self.block(range.start);
        let huge = block.filter(|block| block.backing == ramshot_core::Backing::HugeTlb).map(|block| block.page_size);
        let step = huge.unwrap_or(ZEROS.len() as u64);
        let mut filled = Filled::default();
        while filled.bytes < range.len && !filled.again {
            let at = HostAddr(range.start.0 + filled.bytes);
            let rest = HostRange::new(at, range.len - filled.bytes);
            let one = {
                let putting_in = self.relay.putting_in();
                if huge.is_none() && !putting_in.protected(rest) {
                    self.through("UFFDIO_ZEROPAGE", rest, |part| self.uffd.zeropage(part))?
                } else {
                    // The kernel has no zero page for it, or none that is protected.
                    let piece = HostRange::new(at, rest.len.min(step));
                    self.through("UFFDIO_COPY of zeros", piece, |part| {
                        self.uffd.copy(part.start, zeros(part.len), putting_in.protected(part))
                    })?
                }
            };
            filled.bytes += one.bytes;
            filled.present += one.present;
            filled.again = one.again;
        }
        Ok(filled)
    }

    fn poison(&self, range: HostRange) -> Result<Filled, OsError> {
        self.through("UFFDIO_POISON", range, |part| self.uffd.poison(part))
    }

    fn can_poison(&self) -> bool {
        self.can_poison
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        event::next_events(&self.relay.filler, &self.uffd, events, timeout_ms, &mut |message| self.take(message))
    }

    fn interrupt(&self) {
        self.relay.filler.interrupt();
    }

    fn undo(&self) -> Result<(), OsError> {
        if !self.ram.owner().is_us() {
            // That process runs perhaps, and has registered what is missing itself: it must not meet zeros.
            self.list().clear();
            return Ok(());
        }
        self.finish()
    }

    fn finish(&self) -> Result<(), OsError> {
        if !self.relay.end() {
            return Err(OsError::new("ending a lazy restore during a snapshot", libc::EBUSY));
        }
        let mut first = Ok(());
        let mut failed = Vec::new();
        loop {
            // What was unmapped meanwhile is off the list; and nobody may wait for an event to be read any more.
            let mut drained = Ok(1);
            while let Ok(1..) = drained {
                drained = event::read_now(&self.uffd, usize::MAX, &mut |message| {
                    self.take(message);
                });
            }
            let Some(range) = self.list().pop() else { break };
            let pieces = match self.uffd.unregister(range) {
                Ok(()) => Ok(Vec::new()),
                // A part of it was unmapped, or something else was mapped there.
                Err(errno) => maps::registered_in(self.ram.owner(), range)
                    .map_err(|_| OsError::new("UFFDIO_UNREGISTER", errno as i32).on(range)),
            };
            let result = pieces.and_then(|pieces| {
                pieces.into_iter().try_for_each(|piece| {
                    let failed = |errno| OsError::new("UFFDIO_UNREGISTER", errno as i32).on(piece);
                    self.uffd.unregister(piece).map_err(failed)
                })
            });
            let result = if self.ram.owner().has_ended() { Ok(()) } else { result };
            // Wakes who came while it was ended.
            let result = result.and(self.wake(range));
            log::debug!(target: "ramshot::restore", "all in at {range}: {result:?}");
            if result.is_err() {
                failed.push(range);
            }
            first = first.and(result);
        }
        if first.is_ok() {
            self.lease.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        // For another attempt.
        *self.list() = failed;
        first
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if self.list().is_empty() || self.ram.owner().has_ended() {
            // SAFETY: taken once, here; nothing uses the field after drop.
            drop(unsafe { ManuallyDrop::take(&mut self.uffd) });
        } else {
            log::error!(
                target: "ramshot::restore",
                "a lazy restore was dropped before it was finished: its userfaultfd stays open, and who touches a page \
                 that is not in stays blocked"
            );
        }
    }
}
