//! Guest RAM without a hypervisor: anonymous memory that is owned here and shared as atomic words.

use std::fmt;
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use ramshot_core::{GuestAddr, HostAddr, Treatment};

use crate::error::RamError;
use crate::owner::Owner;
use crate::ram::{GuestRam, Region};

/// Anonymous memory in the part of guest RAM: threads of this process write to it as vCPUs would. For demonstrations and
/// tests that have no hypervisor. Zero at first; what was never touched takes no memory.
pub struct AnonymousRam {
    start: NonNull<AtomicU64>,
    len: NonZeroUsize,
}

// SAFETY: the mapping is owned by the value and belongs to no thread.
unsafe impl Send for AnonymousRam {}
// SAFETY: what a shared reference gives access to are atomics.
unsafe impl Sync for AnonymousRam {}

impl AnonymousRam {
    /// Maps `len` bytes, a multiple of the page size.
    ///
    /// # Errors
    /// [`RamError::Allocate`], with what mmap(2) answered.
    pub fn new(len: u64) -> Result<Self, RamError> {
        let refused = |source| RamError::Allocate { len, source };
        let bytes = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        let len = bytes.ok_or_else(|| refused(io::Error::new(ErrorKind::InvalidInput, "no such length")))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE) };
        Ok(Self { start: start.map_err(|errno| refused(errno.into()))?.cast(), len })
    }

    /// The memory. Words may be read and written while it is being snapshotted; a store to a page that is not captured
    /// yet takes a moment longer.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and `len` bytes from it on are mapped readable and writable as long as `self`
        // lives; any bytes are valid atomics. Who else accesses them: the snapshot engine, which reads them by a plain
        // copy as it does any guest's RAM, and never by a `&mut` (see `from_anonymous`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len.get() / size_of::<AtomicU64>()) }
    }
}

impl Drop for AnonymousRam {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody borrows from it any more. It can only fail for a range that is none.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}

impl fmt::Debug for AnonymousRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnonymousRam({:?}+{:#x})", self.start, self.len)
    }
}

impl GuestRam {
    /// Guest RAM that is all of `memory`: one tracked block, `ram0`, at guest address 0. It is read and never filled:
    /// [`with_mut`](ramshot_core::RamTarget::with_mut) answers `EACCES`, because [`AnonymousRam::words`] hands out
    /// references to everybody.
    ///
    /// # Errors
    /// As [`from_regions`](Self::from_regions).
    pub fn from_anonymous(memory: Arc<AnonymousRam>) -> Result<Self, RamError> {
        let region = Region {
            name: "ram0".to_owned(),
            guest: GuestAddr(0),
            host: HostAddr(memory.start.as_ptr().expose_provenance() as u64),
            len: memory.len.get() as u64,
            used: None,
            treatment: Treatment::Tracked,
            file: None,
        };
        // What `from_regions` asks for holds: the mapping lives as long as `memory`, which the value keeps, and is
        // never filled.
        let mut ram = Self::build(Owner::Us, vec![region], Some(Box::new(memory)))?;
        ram.never_filled();
        Ok(ram)
    }
}
