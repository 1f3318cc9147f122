//! What [`Fill`](super::Fill) answers, and the claim it hands out.

use crate::units::{HostRange, Run};

/// Why a run is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FillOrigin {
    /// Somebody waits for one of its pages.
    Fault,
    /// Nobody does yet.
    Prefetch,
}

/// What the image has for a run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Holds {
    /// Zeros: nothing to read.
    Zero,
    /// Data: one read.
    Data,
    /// Both, within one host page that the kernel takes only whole.
    Mixed,
}

/// The task to read a run and put it in. It cannot be copied, and not be made outside this crate; it ends with
/// [`Fill::end`](super::Fill::end).
#[must_use]
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct FillClaim {
    pub(super) number: u32,
    pub(super) run: Run,
    pub(super) range: HostRange,
    pub(super) origin: FillOrigin,
    pub(super) holds: Holds,
}

impl FillClaim {
    /// The pages, in one block, whole host pages.
    #[must_use]
    pub const fn run(&self) -> Run {
        self.run
    }

    /// Where they are mapped.
    #[must_use]
    pub const fn range(&self) -> HostRange {
        self.range
    }

    /// What they are read for.
    #[must_use]
    pub const fn origin(&self) -> FillOrigin {
        self.origin
    }

    /// What the image has for them.
    #[must_use]
    pub const fn holds(&self) -> Holds {
        self.holds
    }
}

/// What became of a missing fault.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FillFault {
    /// In the queue; a `next_fault` will return it.
    Queued,
    /// Somebody is reading that page for another fault, and will wake all who wait for it; or the restore was given up, and
    /// its end will.
    Waits,
    /// Put zeros there, and wake who waits if there is something already: the page was put in meanwhile, or was discarded,
    /// or is in no image.
    Zero(HostRange),
    /// The page is lost: poison it (again), or leave who waits there blocked. Nothing else.
    Lost(HostRange),
    /// No block has that address: what should be there is not known, so nothing may be put there.
    NotOurs,
    /// The queue is full: serve, then hand this one in again.
    QueueFull,
}

/// What to do now.
#[must_use]
#[derive(Debug)]
pub enum NextFill {
    /// Read this and put it in.
    Fill(FillClaim),
    /// As [`FillFault::Zero`].
    Zero(HostRange),
    /// As [`FillFault::Lost`].
    Lost(HostRange),
    /// Nothing until something happens.
    Idle,
    /// There is something, but as many claims are out as there can be.
    Full,
    /// Everything is in.
    Done,
    /// The restore was given up.
    Ended,
}
