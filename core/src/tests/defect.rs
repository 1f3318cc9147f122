//! Ways to be wrong, for the exploration to find: it is worth as much as the bugs that it catches.

/// A deliberate mistake. The first group sits in the core's own code paths, the second in the driver's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Defect {
    /// A page counts as captured as soon as it is claimed, before it is read (FACTS, bug 1).
    CapturedBeforeRead,
    /// A fault waits until the writer has emptied the pool, although there are slots (FACTS, bug 2).
    FaultWaitsForWriter,
    /// When the pool is full, pages are released unsaved (FACTS, bug 3).
    CapOnPages,
    /// A fault on a released page is taken for one that somebody will wake.
    StaleNotWoken,
    /// A fault that the queue has no room for is dropped.
    FullQueueDropsFault,
    /// Slots are free again once the guest writes on, before their bytes are in the image.
    SlotFreedAtRelease,
    /// A later error replaces the first.
    LastCauseKept,

    /// Protection is lifted before the bytes are copied.
    ReleaseBeforeCapture,
    /// The claim is held until its bytes are written (FACTS, bug 2: the lock held for the whole sweep).
    ClaimHeldAcrossWrite,
    /// The fault thread ends at the first EAGAIN (FACTS, bug 4).
    FaultLoopEndsAtAgain,
    /// A discard event is read in one step and handed in in another: a capture can come between.
    EventReadOutsideLock,
    /// While the pool is full, the fault thread reads no events.
    NoEventsWhileFull,
    /// After the end nobody disarms.
    NoDisarm,
}
