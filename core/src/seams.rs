//! The seams: what the engine asks of an operating system, as traits that a shim (or a simulation) implements.
//!
//! Nothing here decides anything; the order in which the calls are made is [`Snapshot`](crate::Snapshot)'s.

use core::fmt;

use crate::units::{HostAddr, HostRange};

/// A system call that failed: which, on what, with which error number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OsError {
    /// The operation, as its manual page calls it (`"UFFDIO_WRITEPROTECT"`).
    pub op: &'static str,
    /// The system's error number, positive; 0 where the system gave none.
    pub errno: i32,
    /// The memory it was about, if any.
    pub range: Option<HostRange>,
}

impl OsError {
    /// `op` failed with `errno`.
    #[must_use]
    pub const fn new(op: &'static str, errno: i32) -> Self {
        Self { op, errno, range: None }
    }

    /// The same error, about `range`.
    #[must_use]
    pub const fn on(self, range: HostRange) -> Self {
        Self { range: Some(range), ..self }
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.op)?;
        if let Some(range) = self.range {
            write!(f, " on {range}")?;
        }
        write!(f, ": error {}", self.errno)
    }
}

impl core::error::Error for OsError {}

/// Something the tracker saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A writer is blocked on a protected page.
    WriteFault {
        /// Address of the write (or of its page).
        at: HostAddr,
    },
    /// A thread is blocked on a page that is not there (lazy restore).
    MissingFault {
        /// Address of the access (or of its page).
        at: HostAddr,
    },
    /// The content of a range is being discarded (`MADV_DONTNEED`, `MADV_REMOVE`). It cannot be held back any more.
    Discarded(HostRange),
    /// A range is being unmapped or moved away.
    Unmapped(HostRange),
}

/// Whether the kernel did what it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Done {
    /// It did.
    Yes,
    /// Not now (EAGAIN: the mappings are being changed): read the events, then ask again.
    Again,
}

/// What a range of memory is mapped by, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Residency {
    /// In memory.
    pub resident: u64,
    /// Of that, mapped by huge pages.
    pub huge: u64,
}

/// Write tracking of guest RAM: one userfaultfd context, or something that behaves like one.
///
/// All methods may be called from any thread; one thread at a time reads [`next_events`](Self::next_events).
pub trait WriteTracker: Send + Sync {
    /// Calls `each` for every range of `within`, a part of the used part of one block, that may hold something other
    /// than zeros: ascending, multiples of the host page size. Memory never touched is not among them and will not be
    /// protected.
    ///
    /// # Errors
    /// What the system answered; `EINVAL` (22) for a range that is not in one RAM block.
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError>;

    /// How much of `within` is resident, and how much of that is mapped by huge pages although the host page is smaller
    /// (transparent huge pages). Nothing known is nothing resident, which is always right: it only guides policy.
    fn residency(&self, within: HostRange) -> Residency {
        let _ = within;
        Residency::default()
    }

    /// Write-protects `range`: from its return on, every write there blocks and is reported. `Again` is handled
    /// inside.
    ///
    /// # Errors
    /// What the system answered; part of the range may be protected then.
    fn protect(&self, range: HostRange) -> Result<(), OsError>;

    /// Lifts the protection of `range` and wakes every writer blocked there. Ranges that are not protected are fine.
    ///
    /// # Errors
    /// What the system answered.
    fn release(&self, range: HostRange) -> Result<Done, OsError>;

    /// Waits for events and puts as many as there are and fit into `events`; returns how many. Returns early (0) after
    /// [`interrupt`](Self::interrupt) or when `timeout_ms` passes (`None`: never). With no room in `events` it only
    /// waits until there is something to read.
    ///
    /// Reading a discard lets it go on. So wait outside the lock that guards the snapshot, but read (with a timeout of 0)
    /// and hand in under it: otherwise a run may be captured in between, with the discard's zeros in it.
    ///
    /// # Errors
    /// What the system answered. The descriptor is of no more use then.
    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError>;

    /// Calls `each` for every discard and unmapping that somebody else has read for this tracker and that
    /// [`next_events`](Self::next_events) has not handed out. Asked under the lock that guards the snapshot, before a run
    /// counts as captured. Only for a tracker whose events others read, as those of a lazy restore are; by default there
    /// is none.
    fn losses(&self, each: &mut dyn FnMut(Event)) {
        let _ = each;
    }

    /// Makes the running or the next call of [`next_events`](Self::next_events) return.
    fn interrupt(&self);

    /// Lifts every protection, unregisters every block, wakes everybody. After it no thread is blocked by this tracker
    /// and nothing is left registered. May be called more than once.
    ///
    /// # Errors
    /// The first error met; the rest is disarmed all the same.
    fn disarm(&self) -> Result<(), OsError>;
}

/// Knows which memory was written: KVM's dirty log, the VMM's own bitmap. Several are combined.
pub trait DirtyLog: Send + Sync {
    /// Calls `each` for every range that was written since the last call, and starts afresh. What is written while it
    /// runs is reported now or by the next call. More than was written may be reported, less never. Ranges in no RAM block
    /// are passed over.
    ///
    /// # Errors
    /// What the system answered. What was not reported yet must be by a later call.
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError>;
}

/// A way to read guest RAM: a pointer in this process, a second mapping, another process's memory.
pub trait RamSource: Send + Sync {
    /// Copies `into.len()` bytes from host address `from`.
    ///
    /// # Errors
    /// What the system answered, or `EFAULT` (14) for a range that is not in one RAM block.
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError>;
}

/// A way to fill guest RAM that no vCPU runs on yet.
pub trait RamTarget: Send + Sync {
    /// Hands `len` bytes of guest RAM at `at` to `fill`.
    ///
    /// # Errors
    /// `EFAULT` (14) for a range that is not in one RAM block; otherwise whatever `fill` does is the caller's.
    fn with_mut(&self, at: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError>;
}
