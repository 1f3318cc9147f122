//! What an embedder can choose.

use std::path::PathBuf;
use std::sync::Arc;

use ramshot_core::{MAX_SLOTS_PER_CLAIM, PAGE_SIZE, WhenFull};

use crate::dirty::DirtyTracking;

/// Settings of one snapshot. `Options::default()` is right for most.
#[derive(Clone, Debug)]
pub struct Options {
    /// Size of the pool in bytes: what captured pages wait in until they are written. Default 64 MiB; between 1 MiB and
    /// 4 GiB. It is allocated and touched in `prepare`.
    pub pool_bytes: u64,
    /// Threads that scan and copy. Default 1, at most 16. One copies several times faster than a disk writes.
    pub workers: usize,
    /// Threads that write the image. Default 1, at most 16.
    pub writers: usize,
    /// What to do when a vCPU waits for a page and the pool is full. Default: it waits until the image writer has made
    /// room.
    pub when_full: WhenFull,
    /// The stall budget: most bytes that are copied while a vCPU waits, if its neighbours are pending too. Default
    /// 2 MiB, about 0.25 ms at 10 GB/s; at least one host page.
    pub around_max: u64,
    /// Fewest bytes that are copied for a fault, if its neighbours are pending too. Default 64 KiB.
    pub around_min: u64,
    /// Follows what is written, so that an increment can build on this snapshot, and for pre-copy. Default none.
    pub dirty: Option<Arc<DirtyTracking>>,
    /// The file to which is written, after the commit, what the guest wrote to around T0, for the prefetcher of a lazy restore
    /// ([`LazyOptions::order`](crate::LazyOptions::order); [`order_path`](crate::restore::order_path) of the image, usually). A
    /// restore goes on with it. Default none.
    pub order: Option<PathBuf>,
    /// Whether an existing snapshot file of that name is replaced (at the commit, atomically). Default no: it is an
    /// error.
    pub replace: bool,
    /// Whether the commit waits until the image is on stable storage. Default yes; without it a power cut can leave a
    /// file that does not open.
    pub sync: bool,
    /// Whether pages are written past the page cache where the file system can. Default yes. See
    /// [`FileSinkOptions::direct`](crate::file::FileSinkOptions::direct).
    pub direct: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pool_bytes: 64 << 20,
            workers: 1,
            writers: 1,
            when_full: WhenFull::Stall,
            around_max: 2 << 20,
            around_min: 64 << 10,
            dirty: None,
            order: None,
            replace: false,
            sync: true,
            direct: true,
        }
    }
}

/// A setting out of its range.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("option {name} is {value}; it must be between {min} and {max}")]
pub struct OptionError {
    /// The field of [`Options`].
    pub name: &'static str,
    /// The value given.
    pub value: u64,
    /// Smallest allowed.
    pub min: u64,
    /// Largest allowed.
    pub max: u64,
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), OptionError> {
        let within = |name, value, min, max| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(OptionError { name, value, min, max }) }
        };
        within("pool_bytes", self.pool_bytes, 1 << 20, 4 << 30)?;
        within("workers", self.workers as u64, 1, 16)?;
        within("writers", self.writers as u64, 1, 16)?;
        within("around_min", self.around_min, PAGE_SIZE, 1 << 30)?;
        within("around_max", self.around_max, self.around_min, 1 << 30)
    }

    /// How the pool is cut for RAM whose largest host page is `host_page` bytes: pages in a slot, and how many slots.
    pub(crate) fn slots(&self, host_page: u64) -> (u64, u16) {
        let slot_bytes = (64 << 10).max(host_page.div_ceil(MAX_SLOTS_PER_CLAIM as u64));
        let slots = (self.pool_bytes / slot_bytes).clamp(1, u64::from(u16::MAX));
        (slot_bytes / PAGE_SIZE, u16::try_from(slots).unwrap_or(u16::MAX))
    }
}
