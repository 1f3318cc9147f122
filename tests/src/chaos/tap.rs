//! A tap: whoever comes to it waits while it is closed.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug)]
struct State {
    open: bool,
    waiting: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Tap {
    state: Mutex<State>,
    changed: Condvar,
}

impl Tap {
    /// A closed one.
    #[must_use]
    pub fn closed() -> Self {
        Self { state: Mutex::new(State { open: false, waiting: 0 }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is open.
    pub fn pass(&self) {
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while !state.open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
    }

    /// Lets everybody through, now and later.
    pub fn open(&self) {
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Waits until somebody waits at the closed tap; false if nobody came within `patience`.
    #[must_use]
    pub fn somebody_waits(&self, patience: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.lock();
        while state.waiting == 0 || state.open {
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// Opens it on drop, so that a test that fails does not hang.
impl Drop for Tap {
    fn drop(&mut self) {
        self.open();
    }
}
