//! Numbered units of work, spread over threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// More threads than this are not started.
const MAX_THREADS: usize = 256;

/// Does units `0..units` on up to `threads` threads, of which the caller is one; `work` gets its thread's scratch value
/// and the unit, and returns how much it did. After each of its own units the caller hears how much is done in all.
///
/// Units are begun in ascending order, and one that was begun is finished, so the error that is returned is that of the
/// lowest unit that has one, whatever the threads do.
pub(super) fn run<S: Default, E: Send>(
    units: u64,
    threads: usize,
    work: &(impl Fn(&mut S, u64) -> Result<u64, E> + Sync),
    progress: &mut dyn FnMut(u64),
) -> Result<(), E> {
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    // The lowest unit that failed, and why.
    let failed: Mutex<Option<(u64, E)>> = Mutex::new(None);

    let worker = |report: &mut dyn FnMut(u64)| {
        let mut scratch = S::default();
        loop {
            let unit = next.fetch_add(1, Ordering::Relaxed);
            if unit >= units {
                return;
            }
            match work(&mut scratch, unit) {
                Ok(amount) => report(done.fetch_add(amount, Ordering::Relaxed) + amount),
                Err(error) => {
                    // Nobody begins another one. Cannot wrap: each thread adds at most one more.
                    next.store(units, Ordering::Relaxed);
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    if failed.as_ref().is_none_or(|(lowest, _)| unit < *lowest) {
                        *failed = Some((unit, error));
                    }
                    return;
                }
            }
        }
    };
    let helpers = threads.min(MAX_THREADS).min(usize::try_from(units).unwrap_or(MAX_THREADS)).saturating_sub(1);
    thread::scope(|scope| {
        for _ in 0..helpers {
            // Without it the others do the work.
            let _ = thread::Builder::new().spawn_scoped(scope, || worker(&mut |_| {}));
        }
        worker(progress);
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => {
            progress(done.into_inner());
            Ok(())
        }
    }
}
