//! What [`Snapshot`](crate::Snapshot) answers: what to do next, what became of an event, why it ended, how far it is.

use core::fmt;

use crate::block::{BlockName, LayoutError};
use crate::claim::Claim;
use crate::seams::OsError;
use crate::units::{HostRange, PageId, Run};

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
    /// The snapshot has ended; see [`Snapshot::cause`](crate::Snapshot::cause).
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
        /// The block.
        block: BlockName,
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
            Self::HostPageTooLarge { block, page_size, room } => write!(
                f,
                "RAM block {block:?}: a host page of {page_size} bytes does not fit into one claim, which can have {room} \
                 bytes of the pool; lend a larger pool or larger slots"
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
    /// Faults that had to wait for a slot at least once (faults, not pages).
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
