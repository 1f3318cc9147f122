//! Settings of one snapshot.

use std::sync::Arc;

use ramshot::{Options as Settings, WhenFull};

use crate::dirty::Dirty;
use crate::error::Error;
use crate::pass::{self, Plain};

/// An existing snapshot file of that name is replaced, atomically, when the new one is complete. Without: -EEXIST.
pub const RAMSHOT_REPLACE: u32 = 1;
/// The commit does not wait until the image is on stable storage: a power cut can leave a file that does not open.
pub const RAMSHOT_NO_SYNC: u32 = 2;
/// Pages are written through the page cache. Without: past it, where the file system can.
pub const RAMSHOT_NO_DIRECT: u32 = 4;
/// When a vCPU waits for a page and the pool is full, the snapshot is cancelled (-ENOBUFS). Without: the vCPU waits until
/// the image writer has made room.
pub const RAMSHOT_CANCEL_WHEN_FULL: u32 = 8;

const KNOWN: u32 = RAMSHOT_REPLACE | RAMSHOT_NO_SYNC | RAMSHOT_NO_DIRECT | RAMSHOT_CANCEL_WHEN_FULL;

/// Settings of a snapshot. All zero is right for most; fields that are 0 have their default.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Options {
    /// Size of the pool in which captured pages wait until they are written, in bytes: 1 MiB to 4 GiB. Default 64 MiB.
    pub pool_bytes: u64,
    /// Most bytes that are copied while a vCPU waits, if its neighbours are pending too. Default 2 MiB.
    pub around_max: u64,
    /// Fewest bytes that are copied for a fault, if its neighbours are pending too. Default 64 KiB.
    pub around_min: u64,
    /// Threads that scan and copy: 1 to 16. Default 1.
    pub workers: u32,
    /// Threads that write the image: 1 to 16. Default 1.
    pub writers: u32,
    /// RAMSHOT_REPLACE, RAMSHOT_NO_SYNC, RAMSHOT_NO_DIRECT, RAMSHOT_CANCEL_WHEN_FULL.
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Follows what is written, so that an increment can build on this snapshot, and for pre-copy. NULL: none. The snapshot
    /// keeps it; it may be freed any time.
    pub dirty: *const Dirty,
}

// SAFETY: integers and a pointer.
unsafe impl Plain for Options {}

/// # Safety
/// `options` is NULL or points to `size` readable bytes; the dirty tracking in it is NULL or alive.
pub(crate) unsafe fn convert(options: *const Options, size: usize) -> Result<Settings, Error> {
    let defaults = Settings::default();
    if options.is_null() {
        return Ok(defaults);
    }
    // SAFETY: the caller's promise.
    let given = unsafe { pass::read(options, size, "options") }?;
    if given.flags & !KNOWN != 0 || given.reserved != 0 {
        let (flags, reserved) = (given.flags, given.reserved);
        return Err(Error::invalid(format!(
            "options: flags {flags:#x}, reserved {reserved:#x}: only the flags {KNOWN:#x} are known"
        )));
    }
    let or = |value: u64, default| if value == 0 { default } else { value };
    let count = |value: u32, default| if value == 0 { default } else { usize::try_from(value).unwrap_or(usize::MAX) };
    let has = |flag| given.flags & flag != 0;
    // SAFETY: the caller's promise.
    let dirty = unsafe { given.dirty.as_ref() }.map(|dirty| Arc::clone(&dirty.0));
    Ok(Settings {
        pool_bytes: or(given.pool_bytes, defaults.pool_bytes),
        workers: count(given.workers, defaults.workers),
        writers: count(given.writers, defaults.writers),
        when_full: if has(RAMSHOT_CANCEL_WHEN_FULL) { WhenFull::Cancel } else { WhenFull::Stall },
        around_max: or(given.around_max, defaults.around_max),
        around_min: or(given.around_min, defaults.around_min),
        dirty,
        order: None,
        replace: has(RAMSHOT_REPLACE),
        sync: !has(RAMSHOT_NO_SYNC),
        direct: !has(RAMSHOT_NO_DIRECT),
    })
}
