//! Guest RAM that becomes a private mapping of a file.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use ramshot_core::{Backing, BlockIndex, HostAddr, HostRange, OsError, RamBlock};

use crate::backing::base_page_size;
use crate::error::Missing;
use crate::ram::GuestRam;

/// Guest RAM whose mappings may be replaced: by private mappings of a snapshot file, at the same addresses.
#[derive(Debug)]
pub struct MapTarget {
    ram: Arc<GuestRam>,
}

impl MapTarget {
    /// Takes `ram` for a target. It describes its memory no more once something was mapped: describe it anew after that.
    ///
    /// # Safety
    /// Until the value is dropped:
    /// - every block that is part of the image is private anonymous memory that the caller owns whole, used length and all, and
    ///   its content may go: no vCPU runs in it, no thread accesses it, nobody holds a Rust reference into it;
    /// - whoever unmaps those addresses later unmaps whatever is mapped there. What was set on the old mapping
    ///   (`madvise`, `mlock`, `mbind`, protection keys, a userfaultfd) is gone with it.
    ///
    /// And for as long as the mapping stays: the file is not truncated. Who accesses a page beyond its end gets SIGBUS.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use ramshot_linux::{GuestRam, MapTarget};
    /// # fn example(ram: GuestRam) {
    /// // SAFETY: this is a new VM, whose memory nobody has touched yet; it is unmapped by address, by us.
    /// let target = unsafe { MapTarget::new(Arc::new(ram)) };
    /// # }
    /// ```
    #[must_use]
    pub const unsafe fn new(ram: Arc<GuestRam>) -> Self {
        Self { ram }
    }

    /// The guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Whether the used part of a block can become a mapping of a file from byte `offset` on.
    ///
    /// # Errors
    /// Why not. A memfd or hugetlbfs block is shared with others, or meant to be: a private mapping in its place would part
    /// this process from them.
    pub fn check(&self, index: BlockIndex, offset: u64) -> Result<(), Missing> {
        let table = self.ram.table();
        let Some((block, pieces)) = table.block(index).zip(self.ram.pieces().get(usize::from(index.0))) else {
            return Err(Missing::new(
                "mapped restore",
                format!("there is no block {}", index.0),
                "ask for one there is",
            ));
        };
        let page = base_page_size();
        let (why, remedy) = match block.backing {
            _ if !self.ram.owner().is_us() => {
                ("it is memory of another process".to_owned(), "have that process map the file, or restore lazily")
            }
            Backing::Anonymous if !pieces.iter().all(|piece| piece.writable) => {
                ("it is mapped read-only".to_owned(), "restore eagerly, or map it writable")
            }
            Backing::Anonymous if !block.used.is_multiple_of(page) || !offset.is_multiple_of(page) => (
                format!(
                    "{:#x} bytes from byte {offset:#x} of the file are not whole pages of {page} bytes",
                    block.used
                ),
                "restore lazily or eagerly",
            ),
            Backing::Anonymous => return Ok(()),
            Backing::Shmem | Backing::HugeTlb => (
                format!("it is {:?} memory, which a private mapping of a file cannot stand for", block.backing),
                "restore lazily or eagerly, or give the VM private anonymous memory",
            ),
            Backing::File | Backing::Foreign => (
                format!("it is {:?} memory", block.backing),
                "restore eagerly, or give the VM private anonymous memory",
            ),
        };
        Err(Missing::new(what(block), why, remedy))
    }

    /// Maps `file` from byte `offset` on, privately, in place of a `part` (from byte, length) of the used part of a block, which
    /// [`check`](Self::check) has nothing against. A part must be whole pages of the system.
    ///
    /// # Errors
    /// What mmap(2) answered, EINVAL if there is no such part; the part is as it was, or not mapped at all (ENOMEM).
    pub fn map(&self, index: BlockIndex, part: (u64, u64), file: &File, offset: u64) -> Result<(), OsError> {
        const OP: &str = "mmap of the snapshot file";
        let invalid = |range: HostRange| OsError::new(OP, libc::EINVAL).on(range);
        let table = self.ram.table();
        let block = table.block(index).ok_or(invalid(HostRange::new(HostAddr(0), 0)))?;
        let (from, len) = part;
        let page = Self::page_size();
        let is_part = from.checked_add(len).is_some_and(|end| end <= block.used);
        if !is_part || !from.is_multiple_of(page) || !len.is_multiple_of(page) || self.check(index, offset).is_err() {
            return Err(invalid(block.used_range()));
        }
        let range = HostRange::new(HostAddr(block.host.0 + from), len);
        let number = |value: u64| usize::try_from(value).ok().and_then(NonZeroUsize::new).ok_or(invalid(range));
        let (at, len) = (number(range.start.0)?, number(range.len)?);
        let offset = i64::try_from(offset).map_err(|_| invalid(range))?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        // SAFETY: the range is private anonymous memory (checked when it was described), or what we mapped there, that the
        // caller of `new` owns and lets go; nobody accesses it or holds a reference into it. The new mapping is as long and
        // as writable.
        let mapped = unsafe { mmap(Some(at), len, prot, flags, file, offset) };
        mapped.map(drop).map_err(|errno| OsError::new(OP, errno as i32).on(range))
    }

    /// Of what parts are multiples: the system's page size, in bytes.
    #[must_use]
    pub fn page_size() -> u64 {
        base_page_size()
    }
}

fn what(block: &RamBlock) -> String {
    format!("mapped restore of RAM block {:?} at {} ({:?})", block.name, block.mapping(), block.backing)
}
