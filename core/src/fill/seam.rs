//! What a lazy restore asks of the image and of an operating system.

use crate::seams::{Event, OsError};
use crate::units::{HostAddr, HostRange, PageId, Run};

/// What the image has where.
pub trait Content {
    /// The longest run from `first` on that is all zero (true) or all data; never empty. `None`: no such page.
    fn extent(&self, first: PageId) -> Option<(Run, bool)>;
}

/// How far the kernel got with a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Filled {
    /// Bytes from the start of the range in which there is a page now. Whole host pages; who waited there was woken.
    pub bytes: u64,
    /// Of those, bytes in which there was a page before: they were left as they were.
    pub present: u64,
    /// Why it is not all: the mappings are being changed (EAGAIN). Read the events, then go on.
    pub again: bool,
}

/// Guest RAM that is not there yet: one userfaultfd context, or something that behaves like one.
///
/// Registered memory blocks who touches a page that is not there until it is put in. All methods may be called from any
/// thread, but a discard goes on as soon as its event is read: so one thread both reads events and puts pages in, and no page
/// is put in on account of what was true before an event.
pub trait RamFiller: Send + Sync {
    /// Puts `bytes`, whole host pages, at `at` where no page is, and wakes who waits there.
    ///
    /// # Errors
    /// What the system answered. Nothing is known of how far it got then.
    fn fill(&self, at: HostAddr, bytes: &[u8]) -> Result<Filled, OsError>;

    /// Puts zeros into `range`, whole host pages, where no page is, and wakes who waits there.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    fn zero(&self, range: HostRange) -> Result<Filled, OsError>;

    /// Makes every access to `range`, whole host pages, fail where no page is (SIGBUS), and wakes who waits there.
    ///
    /// # Errors
    /// As [`fill`](Self::fill); also where the system cannot ([`can_poison`](Self::can_poison)).
    fn poison(&self, range: HostRange) -> Result<Filled, OsError>;

    /// Whether [`poison`](Self::poison) works.
    fn can_poison(&self) -> bool;

    /// As [`WriteTracker::next_events`](crate::WriteTracker::next_events).
    ///
    /// # Errors
    /// What the system answered. The descriptor is of no more use then.
    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError>;

    /// Makes the running or the next call of [`next_events`](Self::next_events) return.
    fn interrupt(&self);

    /// The restore did not begin, and nothing was put in: as before it was prepared. By default as
    /// [`finish`](Self::finish), which is right where nobody runs in the memory yet.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    fn undo(&self) -> Result<(), OsError> {
        self.finish()
    }

    /// Everything is in: makes what is still not there ordinary memory, which is zero, and lets everybody go on. **Only
    /// when no page is missing that has data.**
    ///
    /// # Errors
    /// `EBUSY` (16) while a snapshot shares what the filler works with: nothing was ended, try again when
    /// [`next_events`](Self::next_events) returns. Otherwise the first error met; the rest is done all the same.
    fn finish(&self) -> Result<(), OsError>;
}
