//! The gate all vCPU threads pass: open they run, closed they wait in front of it, and whoever closed it knows when the
//! last one has arrived.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Want {
    Run,
    Park,
    Stop,
}

#[derive(Debug)]
struct Inner {
    want: Want,
    /// Threads that wait in front of the gate.
    parked: u32,
    /// Threads that will never come again.
    gone: u32,
    /// Why the first of those left that were not told to.
    failure: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Whether `want` is anything but Run: what a running thread looks at.
    closed: AtomicBool,
    threads: u32,
}

impl Gate {
    /// Closed, for so many threads.
    pub(crate) fn new(threads: u32) -> Self {
        let inner = Inner { want: Want::Park, parked: 0, gone: 0, failure: None };
        Self { inner: Mutex::new(inner), changed: Condvar::new(), closed: AtomicBool::new(true), threads }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a running thread: whether to come to [`pass`](Self::pass). A running thread that saw `false` sees `true` at
    /// the latest when it looks again after it was kicked.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// For a thread: waits until the gate is open. `false`: end.
    pub(crate) fn pass(&self) -> bool {
        let mut inner = self.lock();
        if inner.want == Want::Park {
            inner.parked += 1;
            self.changed.notify_all();
            while inner.want == Want::Park {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
            inner.parked -= 1;
        }
        inner.want == Want::Run
    }

    /// For a thread: it will not come again, for that reason if it was not told to end.
    pub(crate) fn leave(&self, why: Option<String>) {
        let mut inner = self.lock();
        inner.gone += 1;
        if inner.failure.is_none() {
            inner.failure = why;
        }
        self.changed.notify_all();
    }

    /// Why the first thread left.
    pub(crate) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    pub(crate) fn open(&self) {
        self.set(Want::Run);
    }

    /// Tells all threads to end. They may have to be kicked.
    pub(crate) fn stop(&self) {
        self.set(Want::Stop);
    }

    fn set(&self, want: Want) {
        let mut inner = self.lock();
        if inner.want != Want::Stop {
            inner.want = want;
            self.closed.store(want != Want::Run, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Whether all threads wait in front of it (or are gone).
    pub(crate) fn all_parked(&self) -> bool {
        let inner = self.lock();
        inner.want == Want::Park && inner.parked + inner.gone >= self.threads
    }

    /// Closes it and waits until no thread runs, calling `kick` now and again. `false`: not within `timeout`.
    pub(crate) fn close(&self, timeout: Duration, kick: &dyn Fn()) -> bool {
        self.set(Want::Park);
        let start = Instant::now();
        let mut patience = Duration::from_micros(500);
        kick();
        let mut inner = self.lock();
        while inner.parked + inner.gone < self.threads {
            if start.elapsed() > timeout {
                return false;
            }
            let (guard, waited) = self.changed.wait_timeout(inner, patience).unwrap_or_else(PoisonError::into_inner);
            inner = guard;
            if waited.timed_out() {
                // A kick can come just before a thread enters a system call that does not look for it.
                patience = (patience * 2).min(Duration::from_millis(20));
                kick();
            }
        }
        true
    }
}
