//! The life of a run of pages, as values that can be neither copied nor made outside this crate:
//!
//! ```text
//! Claim ──captured()──▶ CapturedRun ──released()──▶ ReleasedRun ──written()──▶ (slots are free again)
//! ```
//!
//! So there is no way from a claimed run to a released one except through its capture, and no slot is free before its
//! bytes are written.

use heapless::Vec;

use crate::units::{HostRange, Run};

/// Most pool slots one claim can take.
pub const MAX_SLOTS_PER_CLAIM: usize = 32;

/// A buffer of the pool, by number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotId(pub u16);

/// The slots of one claim, in the order in which the pages go into them.
pub type SlotList = Vec<SlotId, MAX_SLOTS_PER_CLAIM>;

/// What a run was claimed for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// A reader elsewhere asked for it.
    Request,
    /// A writer is blocked on it.
    Fault,
    /// The linear scan reached it.
    Scan,
    /// The VMM wants to discard it.
    Discard,
    /// A device model may write it without a fault: captured while the VM is stopped.
    Pause,
}

macro_rules! stage {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[must_use]
        #[derive(Debug)]
        #[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
        pub struct $name {
            pub(crate) flight: Flight,
        }

        impl $name {
            /// The pages.
            #[must_use]
            pub const fn run(&self) -> Run {
                self.flight.run
            }

            /// Where they are mapped.
            #[must_use]
            pub const fn range(&self) -> HostRange {
                self.flight.range
            }

            /// The pool slots their bytes go to, each filled up before the next.
            #[must_use]
            pub fn slots(&self) -> &[SlotId] {
                &self.flight.slots
            }

            /// What they were claimed for.
            #[must_use]
            pub const fn origin(&self) -> Origin {
                self.flight.origin
            }

            /// Whether the block is write-protected, so the run has to be released in the kernel too.
            #[must_use]
            pub const fn is_protected(&self) -> bool {
                self.flight.protected
            }
        }
    };
}

stage! {
    /// Exclusive right to capture a run. The pages are protected: copy them, then hand the claim to
    /// [`Snapshot::captured`](crate::Snapshot::captured), or to
    /// [`Snapshot::capture_failed`](crate::Snapshot::capture_failed).
    Claim
}

stage! {
    /// The bytes are out of guest RAM: lift the protection, then call
    /// [`Snapshot::released`](crate::Snapshot::released).
    CapturedRun
}

stage! {
    /// The guest writes there again; the bytes wait in the pool to be written. End it with
    /// [`Snapshot::written`](crate::Snapshot::written).
    ReleasedRun
}

/// What travels from stage to stage.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Flight {
    pub(crate) run: Run,
    pub(crate) range: HostRange,
    pub(crate) slots: SlotList,
    pub(crate) origin: Origin,
    pub(crate) protected: bool,
}
