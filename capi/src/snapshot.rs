//! One snapshot, from `ramshot_prepare` to `ramshot_finish`.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ramshot::core::HostRange;
use ramshot::{GuestRam, Handle, HostAddr, Live, Pending, PrepareError, Prepared, SnapshotFailed};

use crate::error::{Error, guard};
use crate::options::{self, Options};
use crate::pass::{self, Out};
use crate::ram::Ram;
use crate::report::{Progress, Report};

/// All of RAM: a full snapshot.
pub const RAMSHOT_ALL: u32 = 0;
/// What was written since the base (after ramshot_prepare_increment), or since the last copy (after ramshot_precopy).
pub const RAMSHOT_DIRTY: u32 = 1;

/// One snapshot.
pub struct Snapshot {
    stage: Mutex<Stage>,
    /// Set when it begins.
    handle: OnceLock<Handle>,
    /// Cancelled before there was a handle to cancel by.
    cancelled: AtomicBool,
}

/// Where it stands. The lock is held for the calls of the thread that drives it, and never while it waits for the image.
enum Stage {
    Prepared(Box<Prepared>),
    Live(Box<Live>),
    /// Finished, failed, or in the hands of the call that is under way.
    Over,
}

impl Snapshot {
    fn new(prepared: Prepared) -> Self {
        let stage = Mutex::new(Stage::Prepared(Box::new(prepared)));
        Self { stage, handle: OnceLock::new(), cancelled: AtomicBool::new(false) }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        // It is only ever replaced whole.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_prepared(&self, call: &str) -> Result<Box<Prepared>, Error> {
        let mut stage = self.stage();
        match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Prepared(prepared) => Ok(prepared),
            Stage::Live(live) => {
                *stage = Stage::Live(live);
                Err(Error::invalid(format!("{call}: the snapshot has begun already")))
            }
            Stage::Over => Err(over(call)),
        }
    }

    fn take_live(&self, call: &str) -> Result<Box<Live>, Error> {
        let mut stage = self.stage();
        match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Live(live) => Ok(live),
            Stage::Prepared(prepared) => {
                *stage = Stage::Prepared(prepared);
                Err(Error::invalid(format!("{call}: the snapshot has not begun: call ramshot_begin first")))
            }
            Stage::Over => Err(over(call)),
        }
    }

    /// Does with the prepared snapshot what gives it back.
    fn advance(
        &self,
        call: &str,
        step: impl FnOnce(Prepared) -> Result<Prepared, SnapshotFailed>,
    ) -> Result<(), Error> {
        let prepared = step(*self.take_prepared(call)?)?;
        *self.stage() = Stage::Prepared(Box::new(prepared));
        Ok(())
    }

    fn begin(&self, pending: Pending, state: Vec<u8>) -> Result<(), Error> {
        let prepared = self.take_prepared("ramshot_begin")?;
        let live = prepared.begin(pending, state)?;
        // First the handle, then the flag; who cancels does it the other way round. So one of the two sees the other.
        let handle = self.handle.get_or_init(|| live.handle());
        if self.cancelled.load(Ordering::SeqCst) {
            handle.cancel();
        }
        *self.stage() = Stage::Live(Box::new(live));
        Ok(())
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(handle) = self.handle.get() {
            handle.cancel();
        }
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("begun", &self.handle.get().is_some()).finish_non_exhaustive()
    }
}

fn over(call: &str) -> Error {
    Error::invalid(format!("{call}: this snapshot is over, or another call on it is under way; free it"))
}

type Prepare = fn(&Arc<GuestRam>, &Path, &ramshot::Options) -> Result<Prepared, PrepareError>;

/// # Safety
/// As of [`pass::get`], [`pass::path`], [`options::convert`] and [`Out::new`].
unsafe fn prepare(
    ram: *const Ram,
    path: *const c_char,
    options: *const Options,
    size: usize,
    snapshot: *mut *mut Snapshot,
    how: Prepare,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(snapshot, "snapshot") }?;
        // SAFETY: the caller's promise.
        let (ram, path) = unsafe { (pass::get(ram, "ram")?, pass::path(path)?) };
        // SAFETY: the caller's promise.
        let options = unsafe { options::convert(options, size) }?;
        out.give(Snapshot::new(how(&ram.0, path, &options)?));
        Ok(())
    })
}

/// Prepares a snapshot of `ram` into the file `path`: opens and registers a userfaultfd, creates the file (under a name of its own
/// until it is complete), allocates the pool, starts the threads. The VM runs meanwhile. Belongs before a seccomp filter.
/// `options` may be NULL; `size` is sizeof *options.
///
/// Returns 0 and a handle in *snapshot, to be freed with ramshot_free; or -EINVAL, -E2BIG, -ENOTSUP (writes cannot be tracked
/// here), -EEXIST (and RAMSHOT_REPLACE is not set), -EBUSY (another snapshot is being written to that file, or uses that
/// dirty tracking), or the system's error. Nothing is left behind then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_prepare(
    ram: *const Ram,
    path: *const c_char,
    options: *const Options,
    size: usize,
    snapshot: *mut *mut Snapshot,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { prepare(ram, path, options, size, snapshot, |ram, path, options| ramshot::prepare(ram, path, options)) }
}

/// Prepares an increment: a snapshot that holds what was written since the last one committed with the same options->dirty,
/// which must be given. To be begun with RAMSHOT_DIRTY.
///
/// Returns as ramshot_prepare, and -ENODATA if there is no snapshot to build on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_prepare_increment(
    ram: *const Ram,
    path: *const c_char,
    options: *const Options,
    size: usize,
    snapshot: *mut *mut Snapshot,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        prepare(ram, path, options, size, snapshot, |ram, path, options| ramshot::prepare_increment(ram, path, options))
    }
}

/// Protects memory ahead of T0, while the guest runs, so that the pause depends on what the guest writes meanwhile and not on
/// its size. Right before the VM is paused, or not at all.
///
/// Returns 0, or why memory could not be protected; the snapshot is over then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_arm_ahead(snapshot: *mut Snapshot) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        snapshot.advance("ramshot_arm_ahead", Prepared::arm_ahead)
    })
}

/// Copies everything into the image while the guest runs and writes on; at most `passes` times (0 is taken for 1). What is
/// written meanwhile is copied again, at T0. For guests that write little and must not wait for it. Needs options->dirty; to be begun with
/// RAMSHOT_DIRTY. ramshot_arm_ahead belongs after it. Takes as long as the writing does.
///
/// Returns 0, or why it failed; the snapshot is over then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_precopy(snapshot: *mut Snapshot, passes: u32) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        snapshot.advance("ramshot_precopy", |prepared| prepared.precopy(passes))
    })
}

/// T0: finds and protects the pages. To be called while every vCPU and every other writer of guest RAM is stopped; when it
/// returns, with or without error, the VM may run. The only call inside the pause.
///
/// `pending` is RAMSHOT_ALL or RAMSHOT_DIRTY. The `device_state_len` bytes at `device_state` (NULL if there are none) go into the
/// image as they are; they are copied.
///
/// Returns 0; or -EINVAL (not prepared, or `pending` does not go with how it was), -ECANCELED, or why memory could not be
/// protected. The snapshot is over then, the guest unharmed. A `pending` that is neither leaves it as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_begin(
    snapshot: *mut Snapshot,
    pending: u32,
    device_state: *const c_void,
    device_state_len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        let pending = match pending {
            RAMSHOT_ALL => Pending::All,
            RAMSHOT_DIRTY => Pending::Dirty,
            other => return Err(Error::invalid(format!("pending {other} is neither RAMSHOT_ALL nor RAMSHOT_DIRTY"))),
        };
        // SAFETY: the caller's promise.
        let state = unsafe { pass::bytes(device_state, device_state_len, "device_state") }?;
        if snapshot.cancelled.load(Ordering::SeqCst) {
            // Nothing was protected; dropping undoes the rest.
            drop(snapshot.take_prepared("ramshot_begin")?);
            return Err(ramshot::Cause::Cancelled.into());
        }
        snapshot.begin(pending, state.to_vec())
    })
}

/// How far it is, in *progress; `size` is sizeof *progress. From any thread, also while ramshot_finish waits.
///
/// Returns 0, or -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_progress(snapshot: *mut Snapshot, progress: *mut Progress, size: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        pass::check_out(progress, size, "progress")?;
        let now = snapshot.handle.get().map(Handle::progress).unwrap_or_default();
        // SAFETY: the caller's promise.
        unsafe { pass::write(progress, size, now.into()) };
        Ok(())
    })
}

/// Ends it without an image; returns at once, the guest is free within a moment. ramshot_finish, or ramshot_begin if that
/// comes first, then says -ECANCELED. After the last page was written it has no effect any more. From any thread, also while
/// ramshot_finish waits; not from a signal handler.
///
/// Returns 0, or -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_cancel(snapshot: *mut Snapshot) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { pass::get(snapshot, "snapshot") }?.cancel();
        Ok(())
    })
}

/// To be called before the VMM discards guest RAM (balloon, virtio-mem; madvise, fallocate): captures what is pending of the
/// `len` bytes at `host` and returns when the discard is safe. Costs nothing before ramshot_begin and for pages captured
/// already. From any thread, also while ramshot_finish waits; not while ramshot_begin runs, since nothing may discard in the
/// pause.
///
/// Returns 0; or -EINVAL; or why the snapshot has ended: the discard is safe then, too.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_before_discard(snapshot: *mut Snapshot, host: *mut c_void, len: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        match snapshot.handle.get() {
            Some(handle) => Ok(handle.before_discard(HostRange::new(HostAddr(host.addr() as u64), len))?),
            None => Ok(()),
        }
    })
}

/// Waits until every page is captured and written, and commits the image: only then the file has its name. `report` may be
/// NULL; `size` is sizeof *report. Progress, cancel and discards from other threads go on meanwhile.
///
/// Returns 0; or -EINVAL (not begun, or over), -ECANCELED, -ENOSPC, -ENOBUFS (RAMSHOT_CANCEL_WHEN_FULL), -EFAULT (memory was
/// discarded or unmapped before it was captured), ... There is no image then, what was at the path before is still there, and
/// the guest is unharmed. Either way only ramshot_free is left to be called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_finish(snapshot: *mut Snapshot, report: *mut Report, size: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let snapshot = unsafe { pass::get(snapshot, "snapshot") }?;
        if !report.is_null() {
            pass::check_size(size, "report")?;
        }
        let done = snapshot.take_live("ramshot_finish")?.finish()?;
        // SAFETY: the caller's promise.
        unsafe { pass::write(report, size, Report::from(&done)) };
        Ok(())
    })
}

/// Frees the handle; NULL is allowed. A snapshot that is not finished is cancelled, and waited for: when it returns, no thread
/// of it is left and nothing is protected. No other call on it may be under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_free(snapshot: *mut Snapshot) {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { pass::free(snapshot) };
        Ok(())
    });
}
