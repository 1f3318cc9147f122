//! A simulated VM, for tests of the engine and of what embeds it: memory that is write-protected, vCPUs that block, and
//! a kernel that has bad days.
//!
//! [`SimVm`] is guest RAM with its vCPUs, [`SimTracker`] the userfaultfd of one snapshot, [`MemorySink`] an image in
//! memory. What goes wrong, and when, is a [`Trouble`] plan. No memory is mapped, no system call made; it runs on every
//! platform, and under a systematic scheduler.
//!
//! The simulation is as strict as Linux, and in three points as treacherous: a discard cannot be held back, only heard
//! of, and goes on as soon as its event is read; releases say "again" while the mappings are being changed; a release
//! lifts the protection whoever put it on.
//!
//! ```
//! use ramshot::sim::{MemorySink, Outcome, SimVm};
//! use ramshot::{Options, Parts, Pending, prepare_with};
//! use ramshot_core::PageId;
//!
//! let vm = SimVm::new(64);
//! vm.write(PageId(3), 1);
//! let (sink, image) = MemorySink::new(vm.table());
//! let parts =
//!     Parts { tracker: vm.track()?, ram: vm.clone(), table: vm.table().clone(), sink: Box::new(sink) };
//! let prepared = prepare_with(parts, &Options::default())?;
//!
//! let at_t0 = vm.memory(); // the VM is paused: nobody writes
//! let live = prepared.begin(Pending::All, b"devices".to_vec())?;
//! vm.write(PageId(3), 2); // a vCPU: blocks until its page is captured
//! live.finish()?;
//!
//! assert_eq!(image.outcome(), Outcome::Committed);
//! assert!(image.memory() == Some(at_t0));
//! assert!(vm.is_clean());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod sink;
mod tracker;
mod trouble;

use std::collections::VecDeque;
use std::fmt;

use ramshot_core::{
    Backing, BlockName, BlockTable, DirtyLog, Event, GuestAddr, HostAddr, HostRange, LayoutError, OsError, PAGE_SIZE,
    PageId, RamBlock, RamSource, RamTarget, Run, Treatment,
};

pub use self::sink::{MemoryImage, MemorySink, Outcome};
pub use self::tracker::SimTracker;
use self::trouble::Plan;
pub use self::trouble::{Call, Mishap, Trouble};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait};

const PAGE: usize = 4096;
const EBUSY: i32 = 16;
const EFAULT: i32 = 14;

/// Guest RAM and its vCPUs, simulated. All methods may be called from any thread.
pub struct SimVm {
    table: Arc<BlockTable>,
    state: Mutex<State>,
    /// Blocked threads of the guest wait here.
    guest: Condvar,
    /// The reader of events waits here.
    reader: Condvar,
}

/// What happened to a [`SimVm`] so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SimCounts {
    /// Times a writer blocked on a protected page.
    pub faults: u64,
    /// Events handed to a reader.
    pub events: u64,
    /// Calls of `next_events`.
    pub reads: u64,
    /// Calls of `release`, whatever they answered.
    pub releases: u64,
    /// Calls of `disarm`.
    pub disarms: u64,
    /// Releases that lifted the protection of somebody else's snapshot: each one can tear an image.
    pub intrusions: u64,
}

#[derive(Clone, Copy)]
struct Page {
    protected: bool,
    /// Ever written: what was not is neither resident nor protected.
    touched: bool,
    mapped: bool,
    /// Written since the dirty log was last read.
    logged: bool,
}

/// A thread that waits for a release (a writer) or for its event to be read (a discard).
struct Blocked {
    ticket: u64,
    context: usize,
    until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    Released(HostAddr),
    Read,
}

/// One userfaultfd: what [`SimVm::track`] made.
#[derive(Default)]
struct Context {
    queue: VecDeque<Queued>,
    interrupted: bool,
}

#[derive(Clone, Copy)]
struct Queued {
    event: Event,
    ticket: Option<u64>,
}

struct State {
    bytes: Vec<u8>,
    pages: Vec<Page>,
    contexts: Vec<Context>,
    /// The context with which RAM is registered.
    registered: Option<usize>,
    blocked: Vec<Blocked>,
    tickets: u64,
    counts: SimCounts,
    plan: Plan,
}

impl SimVm {
    /// A VM with one anonymous, tracked RAM block of `pages` pages, all untouched.
    ///
    /// # Panics
    /// If `pages` is 0 or more than 2^20.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn new(pages: u64) -> Arc<Self> {
        assert!((1..=1 << 20).contains(&pages), "a simulated VM has 1 to 2^20 pages");
        let block = Self::block("ram", 0, pages, Treatment::Tracked);
        Self::with_blocks(&[block]).expect("one aligned block is a layout")
    }

    /// A block of 4 KiB pages for [`with_blocks`](Self::with_blocks): `pages` pages at guest page `at`.
    ///
    /// # Panics
    /// If `name` is empty or too long.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn block(name: &str, at: u64, pages: u64, treatment: Treatment) -> RamBlock {
        RamBlock {
            name: BlockName::new(name).expect("a block name of 1 to 47 bytes"),
            guest: GuestAddr(at * PAGE_SIZE),
            host: HostAddr(0x7000_0000_0000 + at * PAGE_SIZE),
            len: pages * PAGE_SIZE,
            used: pages * PAGE_SIZE,
            page_size: PAGE_SIZE,
            backing: Backing::Anonymous,
            treatment,
        }
    }

    /// A VM with these RAM blocks, all untouched.
    ///
    /// # Errors
    /// If they are no layout.
    pub fn with_blocks(blocks: &[RamBlock]) -> Result<Arc<Self>, LayoutError> {
        let table = BlockTable::new(blocks)?;
        let pages = usize::try_from(table.pages()).unwrap_or(0);
        let state = State {
            bytes: vec![0; pages * PAGE],
            pages: vec![Page { protected: false, touched: false, mapped: true, logged: false }; pages],
            contexts: Vec::new(),
            registered: None,
            blocked: Vec::new(),
            tickets: 0,
            counts: SimCounts::default(),
            plan: Plan::default(),
        };
        let (guest, reader) = (Condvar::new(), Condvar::new());
        Ok(Arc::new(Self { table: Arc::new(table), state: Mutex::new(state), guest, reader }))
    }

    /// Its RAM blocks.
    #[must_use]
    pub fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    /// Registers RAM with a new tracker.
    ///
    /// # Errors
    /// EBUSY (16) while it is registered with another that is not disarmed.
    pub fn track(self: &Arc<Self>) -> Result<Arc<SimTracker>, OsError> {
        let mut state = self.lock();
        if state.registered.is_some() {
            return Err(OsError::new("UFFDIO_REGISTER", EBUSY));
        }
        let id = state.contexts.len();
        state.contexts.push(Context::default());
        state.registered = Some(id);
        Ok(Arc::new(SimTracker::new(Arc::clone(self), id)))
    }

    /// What its vCPUs write, as KVM's dirty log tells it. Discards are not in it.
    #[must_use]
    pub fn dirty_log(self: &Arc<Self>) -> Box<dyn DirtyLog> {
        Box::new(SimLog(Arc::clone(self)))
    }

    /// From now on this goes wrong; calls are counted anew.
    pub fn trouble(&self, trouble: Trouble) {
        self.lock().plan = Plan::new(trouble);
    }

    // ---- the guest

    /// A vCPU writes `value` all over `page`. Blocks while the page is protected.
    pub fn write(&self, page: PageId, value: u64) {
        let (Some(range), Ok(index)) = (self.table.host_range(Run::new(page, 1)), usize::try_from(page.0)) else {
            return;
        };
        let mut state = self.lock();
        while state.pages.get(index).is_some_and(|page| page.protected) {
            state.counts.faults += 1;
            state = self.block_on(state, Event::WriteFault { at: range.start }, Until::Released(range.start));
        }
        let Some(flags) = state.pages.get_mut(index).filter(|page| page.mapped) else { return };
        (flags.touched, flags.logged) = (true, true);
        let span = index * PAGE..(index + 1) * PAGE;
        for word in state.bytes.get_mut(span).unwrap_or_default().chunks_exact_mut(8) {
            word.copy_from_slice(&value.to_ne_bytes());
        }
    }

    /// A thread faults at `at` whatever the protection there is, and blocks until it is released: at an address of no
    /// RAM block, something else registered with the same context; at a page whose release is long over, a stale fault.
    /// (A fault in the midst of a release does not block: Linux looks at the protection again before it lets a thread
    /// sleep.)
    pub fn fault(&self, at: HostAddr) {
        drop(self.block_on(self.lock(), Event::WriteFault { at }, Until::Released(at)));
    }

    /// The VMM discards `range` (`MADV_DONTNEED`): waits until the event is read, then the content is zero.
    pub fn discard(&self, range: HostRange) {
        let mut state = self.block_on(self.lock(), Event::Discarded(range), Until::Read);
        self.zap(&mut state, range, true);
    }

    /// The VMM unmaps `range`: the content is gone, then it waits until the event is read.
    pub fn unmap(&self, range: HostRange) {
        let mut state = self.lock();
        self.zap(&mut state, range, false);
        drop(self.block_on(state, Event::Unmapped(range), Until::Read));
    }

    // ---- checks

    /// The bytes of all pages, in the order of the image.
    #[must_use]
    pub fn memory(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Whether nothing of any snapshot is left: nothing protected, nothing registered, nobody blocked, and no snapshot
    /// has disturbed another.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let state = self.lock();
        state.registered.is_none()
            && state.blocked.is_empty()
            && state.counts.intrusions == 0
            && state.pages.iter().all(|page| !page.protected)
    }

    /// How many threads are blocked: writers on protected pages, discards whose event was not read.
    #[must_use]
    pub fn blocked(&self) -> usize {
        self.lock().blocked.len()
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> SimCounts {
        self.lock().counts
    }

    // ---- inside

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Reports `event` and waits for what ends the wait. Without a tracker there is nobody to wait for.
    fn block_on<'a>(&'a self, mut state: MutexGuard<'a, State>, event: Event, until: Until) -> MutexGuard<'a, State> {
        let Some(context) = state.registered else { return state };
        state.tickets += 1;
        let ticket = state.tickets;
        state.blocked.push(Blocked { ticket, context, until });
        if let Some(context) = state.contexts.get_mut(context) {
            context.queue.push_back(Queued { event, ticket: Some(ticket) });
        }
        self.reader.notify_all();
        while state.blocked.iter().any(|blocked| blocked.ticket == ticket) {
            state = wait(&self.guest, state);
        }
        state
    }

    fn zap(&self, state: &mut State, range: HostRange, mapped: bool) {
        for run in self.table.runs_in(range) {
            let (from, to) = span(run);
            state.bytes.get_mut(from * PAGE..to * PAGE).unwrap_or_default().fill(0);
            for page in state.pages.get_mut(from..to).unwrap_or_default() {
                *page = Page { protected: false, touched: false, mapped: page.mapped && mapped, ..*page };
            }
        }
    }

    /// The page at `at`, if `len` bytes from there lie in one block.
    fn offset(&self, at: HostAddr, len: usize) -> Result<usize, OsError> {
        let range = HostRange::new(at, len as u64);
        let fault = || OsError::new("sim", EFAULT).on(range);
        let block = self.table.block_at(at).and_then(|index| self.table.block(index)).ok_or_else(fault)?;
        let page = self.table.page_at(at).filter(|_| range.end() <= block.used_range().end()).ok_or_else(fault)?;
        let offset = page.0 * PAGE_SIZE + at.0 % PAGE_SIZE;
        usize::try_from(offset).map_err(|_| fault())
    }
}

impl RamSource for SimVm {
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        let mishap = self.lock().plan.next(Call::Read);
        trouble::happen(mishap, Call::Read)?;
        let start = self.offset(from, into.len())?;
        // Page by page, so that a write can come in between.
        for (index, piece) in into.chunks_mut(PAGE).enumerate() {
            let at = start + index * PAGE;
            let state = self.lock();
            let mapped = state.pages.get(at / PAGE).is_some_and(|page| page.mapped);
            let bytes = state.bytes.get(at..at + piece.len()).filter(|_| mapped);
            piece.copy_from_slice(bytes.ok_or(OsError::new("read", EFAULT))?);
        }
        Ok(())
    }
}

struct SimLog(Arc<SimVm>);

impl DirtyLog for SimLog {
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let SimVm { table, .. } = self.0.as_ref();
        let mut state = self.0.lock();
        for (number, page) in (0..).zip(&mut state.pages) {
            if std::mem::take(&mut page.logged)
                && let Some(range) = table.host_range(Run::new(PageId(number), 1))
            {
                each(range);
            }
        }
        Ok(())
    }
}

impl RamTarget for SimVm {
    fn with_mut(&self, at: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
        let start = self.offset(at, len)?;
        let mut state = self.lock();
        fill(state.bytes.get_mut(start..start + len).unwrap_or_default());
        for page in state.pages.get_mut(start / PAGE..(start + len).div_ceil(PAGE)).unwrap_or_default() {
            page.touched = true;
        }
        Ok(())
    }
}

impl fmt::Debug for SimVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimVm").field("pages", &self.table.pages()).field("counts", &self.counts()).finish()
    }
}

/// First and last-plus-one page of `run`, as indices.
fn span(run: Run) -> (usize, usize) {
    let index = |page: PageId| usize::try_from(page.0).unwrap_or(usize::MAX);
    (index(run.first), index(run.end()))
}
