//! The synchronisation the engine uses, in one place so that a systematic scheduler can take its part: under
//! `--cfg ramshot_shuttle` every lock, condition variable and thread is shuttle's, which decides who runs next.

use std::time::Duration;

#[cfg(ramshot_shuttle)]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard},
    thread,
};
pub(crate) use std::sync::Arc;
#[cfg(not(ramshot_shuttle))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard},
    thread,
};

/// The calling thread runs as soon as it is woken: whoever it serves is blocked until then.
pub(crate) fn run_at_once() {
    // Shuttle's threads are all one to the system.
    if cfg!(not(ramshot_shuttle)) {
        crate::os::priority::run_at_once();
    }
}

/// The calling thread makes way for the guest and for who serves it.
pub(crate) fn run_behind() {
    if cfg!(not(ramshot_shuttle)) {
        crate::os::priority::run_behind();
    }
}

/// Lets whoever waits for this processor have it. The system takes it away only at a tick (4 ms at 250 Hz), and a vCPU that has
/// just been let through would wait that long.
pub(crate) fn make_way() {
    if cfg!(not(ramshot_shuttle)) {
        std::thread::yield_now();
    }
}

/// Sleeps.
pub(crate) fn pause(time: Duration) {
    if cfg!(not(ramshot_shuttle)) {
        std::thread::sleep(time);
    } else {
        thread::yield_now();
    }
}

/// Locks, whether or not a thread died while it held the lock: the state behind is only ever changed by whole steps, and a
/// thread that dies ends the snapshot.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits, under the same rule as [`lock`].
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits no longer than `time`; may return early.
#[cfg(not(ramshot_shuttle))]
pub(crate) fn wait_for<'a, T>(
    condvar: &Condvar,
    _mutex: &Mutex<T>,
    guard: MutexGuard<'a, T>,
    time: Duration,
) -> MutexGuard<'a, T> {
    condvar.wait_timeout(guard, time).unwrap_or_else(std::sync::PoisonError::into_inner).0
}

/// Shuttle has no clock: time passes whenever somebody else runs.
#[cfg(ramshot_shuttle)]
pub(crate) fn wait_for<'a, T>(
    _condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    _time: Duration,
) -> MutexGuard<'a, T> {
    drop(guard);
    thread::yield_now();
    lock(mutex)
}
