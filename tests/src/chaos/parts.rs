//! A sink, a reader of guest RAM and a tracker that fail when told to, around the real ones.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ramshot::ImageSink;
use ramshot::core::{Done, Event, HostAddr, HostRange, OsError, RamSource, Residency, WriteTracker};
use ramshot::file::PageState;
use ramshot::sink::{Committed, ImageMeta, Piece, SinkError};

use super::{ON_PURPOSE, Tap};

/// How often something was made to fail.
#[derive(Clone, Debug, Default)]
pub struct Injected(Arc<AtomicU64>);

impl Injected {
    /// How often.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn one_more(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// How a sink fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SinkFault {
    /// ENOSPC, nothing written.
    NoSpace,
    /// EIO, nothing written.
    Io,
    /// A part of it is written, then no more (`WriteZero`).
    Short,
    /// A panic.
    Panic,
}

/// What goes wrong when, counted from 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct SinkPlan {
    write: Option<(u64, SinkFault)>,
    commit: Option<SinkFault>,
    slow: Option<Duration>,
}

/// An image sink that fails.
pub struct BadSink {
    inner: Box<dyn ImageSink>,
    plan: SinkPlan,
    tap: Option<Arc<Tap>>,
    writes: AtomicU64,
    injected: Injected,
}

impl BadSink {
    /// One that fails nowhere yet.
    #[must_use]
    pub fn new(inner: Box<dyn ImageSink>, injected: &Injected) -> Self {
        Self { inner, plan: SinkPlan::default(), tap: None, writes: AtomicU64::new(0), injected: injected.clone() }
    }

    /// The `nth` write (from 1) fails, and only that.
    #[must_use]
    pub fn failing_at(mut self, nth: u64, how: SinkFault) -> Self {
        self.plan.write = Some((nth, how));
        self
    }

    /// The commit fails.
    #[must_use]
    pub fn failing_to_commit(mut self, how: SinkFault) -> Self {
        self.plan.commit = Some(how);
        self
    }

    /// Every write passes a tap first.
    #[must_use]
    pub fn behind(mut self, tap: &Arc<Tap>) -> Self {
        self.tap = Some(Arc::clone(tap));
        self
    }

    /// Every write takes at least that long.
    #[must_use]
    pub fn slow(mut self, by: Duration) -> Self {
        self.plan.slow = Some(by);
        self
    }

    fn fail(&self, how: SinkFault, pieces: &[Piece<'_>]) -> SinkError {
        self.injected.one_more();
        let error = |source| SinkError { what: "an injected error".to_owned(), source };
        match how {
            SinkFault::NoSpace => error(io::Error::from_raw_os_error(libc::ENOSPC)),
            SinkFault::Io => error(io::Error::from_raw_os_error(libc::EIO)),
            SinkFault::Short => {
                // Half of the pieces, and of the next one half of the pages.
                let (whole, rest) = pieces.split_at(pieces.len() / 2);
                let _ = self.inner.write(whole);
                if let Some(piece) = rest.first() {
                    let pages = piece.digests.len() / 2;
                    let half = Piece {
                        bytes: piece.bytes.get(..pages * 4096).unwrap_or_default(),
                        digests: piece.digests.get(..pages).unwrap_or_default(),
                        ..*piece
                    };
                    let _ = self.inner.write(&[half]);
                }
                error(io::ErrorKind::WriteZero.into())
            }
            SinkFault::Panic => std::panic::panic_any(ON_PURPOSE),
        }
    }
}

impl ImageSink for BadSink {
    fn write(&self, pieces: &[Piece<'_>]) -> Result<(), SinkError> {
        let nth = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(tap) = &self.tap {
            tap.pass();
        }
        if let Some(by) = self.plan.slow {
            std::thread::sleep(by);
        }
        match self.plan.write {
            Some((at, how)) if at == nth => Err(self.fail(how, pieces)),
            _ => self.inner.write(pieces),
        }
    }

    fn omitted(&self) -> PageState {
        self.inner.omitted()
    }

    fn again(&self) -> Result<(), SinkError> {
        self.inner.again()
    }

    fn commit(self: Box<Self>, meta: &ImageMeta) -> Result<Committed, SinkError> {
        match self.plan.commit {
            Some(how) => {
                let error = self.fail(how, &[]);
                self.inner.abort();
                Err(error)
            }
            None => self.inner.commit(meta),
        }
    }

    fn abort(self: Box<Self>) {
        self.inner.abort();
    }
}

/// Guest RAM that cannot be read, once.
pub struct BadRam {
    inner: Arc<dyn RamSource>,
    at: u64,
    panics: bool,
    reads: AtomicU64,
    injected: Injected,
}

impl BadRam {
    /// The `nth` read (from 1) panics, or fails with EFAULT.
    #[must_use]
    pub fn new(inner: Arc<dyn RamSource>, nth: u64, panics: bool, injected: &Injected) -> Self {
        Self { inner, at: nth, panics, reads: AtomicU64::new(0), injected: injected.clone() }
    }
}

impl RamSource for BadRam {
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        if self.reads.fetch_add(1, Ordering::SeqCst) + 1 != self.at {
            return self.inner.read(from, into);
        }
        self.injected.one_more();
        // What a partial read leaves behind.
        into.fill(0xee);
        if self.panics {
            std::panic::panic_any(ON_PURPOSE);
        }
        Err(OsError::new("an injected error", libc::EFAULT))
    }
}

/// Which call of a tracker fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrackerFault {
    /// Finding what is populated, EIO: in `begin`.
    Populated,
    /// Protecting, ENOMEM: in `begin`.
    Protect,
    /// Protecting panics: in `begin`, in the caller's thread.
    ProtectPanics,
    /// Releasing, ENOMEM.
    Release,
    /// Releasing panics.
    ReleasePanics,
    /// Releasing says EAGAIN, 50 times in a row.
    ReleaseAgain,
    /// Reading events, EIO.
    Events,
    /// Reading events panics.
    EventsPanic,
    /// The first disarming, ENOMEM (it is done all the same).
    Disarm,
}

impl TrackerFault {
    /// Whether there is an image nevertheless.
    #[must_use]
    pub const fn is_survived(self) -> bool {
        matches!(self, Self::ReleaseAgain | Self::Disarm)
    }
}

/// A tracker that fails.
pub struct BadTracker {
    inner: Arc<dyn WriteTracker>,
    fault: TrackerFault,
    at: u64,
    calls: AtomicU64,
    injected: Injected,
}

impl BadTracker {
    /// The `nth` call (from 1) of that kind fails.
    #[must_use]
    pub fn new(inner: Arc<dyn WriteTracker>, fault: TrackerFault, nth: u64, injected: &Injected) -> Self {
        Self { inner, fault, at: nth, calls: AtomicU64::new(0), injected: injected.clone() }
    }

    /// Whether this call, of one of `kinds`, fails.
    fn now(&self, kinds: &[TrackerFault]) -> Option<TrackerFault> {
        if !kinds.contains(&self.fault) {
            return None;
        }
        let nth = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let last = if self.fault == TrackerFault::ReleaseAgain { self.at + 49 } else { self.at };
        (self.at..=last).contains(&nth).then(|| {
            self.injected.one_more();
            self.fault
        })
    }
}

fn injected(errno: i32) -> OsError {
    OsError::new("an injected error", errno)
}

impl WriteTracker for BadTracker {
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        if self.now(&[TrackerFault::Populated]).is_some() {
            return Err(injected(libc::EIO));
        }
        self.inner.populated(within, each)
    }

    fn residency(&self, within: HostRange) -> Residency {
        self.inner.residency(within)
    }

    fn protect(&self, range: HostRange) -> Result<(), OsError> {
        match self.now(&[TrackerFault::Protect, TrackerFault::ProtectPanics]) {
            None => self.inner.protect(range),
            Some(TrackerFault::ProtectPanics) => std::panic::panic_any(ON_PURPOSE),
            Some(_) => {
                // Half of it is protected, as the kernel may leave it.
                let half = range.len / 2 / (2 << 20) * (2 << 20);
                if half > 0 {
                    self.inner.protect(HostRange::new(range.start, half))?;
                }
                Err(injected(libc::ENOMEM))
            }
        }
    }

    fn release(&self, range: HostRange) -> Result<Done, OsError> {
        match self.now(&[TrackerFault::Release, TrackerFault::ReleasePanics, TrackerFault::ReleaseAgain]) {
            None => self.inner.release(range),
            Some(TrackerFault::ReleasePanics) => std::panic::panic_any(ON_PURPOSE),
            Some(TrackerFault::ReleaseAgain) => Ok(Done::Again),
            Some(_) => Err(injected(libc::ENOMEM)),
        }
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        match self.now(&[TrackerFault::Events, TrackerFault::EventsPanic]) {
            None => self.inner.next_events(events, timeout_ms),
            Some(TrackerFault::EventsPanic) => std::panic::panic_any(ON_PURPOSE),
            Some(_) => Err(injected(libc::EIO)),
        }
    }

    fn interrupt(&self) {
        self.inner.interrupt();
    }

    fn disarm(&self) -> Result<(), OsError> {
        let result = self.inner.disarm();
        if self.now(&[TrackerFault::Disarm]).is_some() { Err(injected(libc::ENOMEM)) } else { result }
    }
}
