//! Guest RAM: what the VMM describes, completed by what the kernel knows, readable and fillable.

use std::any::Any;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use ramshot_core::{
    Backing, BlockName, BlockTable, GuestAddr, HostAddr, HostRange, OsError, RamBlock, RamSource, RamTarget, Treatment,
};

use crate::backing::{self, Content, Piece};
use crate::error::RamError;
use crate::handoff::Handoff;
use crate::maps;
use crate::owner::Owner;

/// The file behind a piece of guest RAM (memfd, tmpfs or hugetlbfs file).
#[derive(Debug)]
pub struct RegionFile {
    /// The file, or a duplicate of its descriptor.
    pub file: File,
    /// Offset at which the region starts in it, as passed to `mmap`.
    pub offset: u64,
}

/// A piece of guest RAM as the VMM describes it.
#[derive(Debug)]
pub struct Region {
    /// Name by which the block is found again at restore; 1 to 47 bytes, unique.
    pub name: String,
    /// Where the guest sees it.
    pub guest: GuestAddr,
    /// Where the process of the VMM maps it.
    pub host: HostAddr,
    /// Length of the mapping in bytes.
    pub len: u64,
    /// How much of it is in use (`None`: all).
    pub used: Option<u64>,
    /// What a snapshot does with it.
    pub treatment: Treatment,
    /// The file behind it, if the VMM has it. Without it, what of a shared mapping holds data is found out through
    /// `/proc/self/map_files`, which takes CAP_CHECKPOINT_RESTORE; failing that, all of it is taken to.
    pub file: Option<RegionFile>,
}

/// Guest RAM, of this process or of another one: the block table, and how to read and fill it. What was given to keep alive
/// stays referenced as long as this value lives.
pub struct GuestRam {
    owner: Owner,
    table: Arc<BlockTable>,
    /// What each block of the table is made of, in table order.
    pieces: Vec<Vec<Piece>>,
    /// Ranges handed out by `with_mut` right now.
    lent: Mutex<Vec<HostRange>>,
    _keep: Option<Box<dyn Any + Send + Sync>>,
}

impl GuestRam {
    /// Guest RAM at the addresses the VMM gives. Backing and page size are learnt from the kernel by address.
    ///
    /// # Safety
    /// As long as the value lives:
    /// - every region that is not [`Treatment::Ignored`] stays mapped at its address, readable, and writable where
    ///   [`RamTarget::with_mut`] is used on it (discarding its content with `madvise` is fine);
    /// - Rust references into a region are held by nobody while [`RamTarget::with_mut`] fills it. Reading
    ///   ([`RamSource::read`]) is a plain copy out of memory that a guest may be writing, as in every VMM.
    ///
    /// # Errors
    /// The first thing found that makes this no guest RAM: see [`RamError`].
    pub unsafe fn from_regions(regions: Vec<Region>) -> Result<Self, RamError> {
        Self::build(Owner::Us, regions, None)
    }

    /// Guest RAM of another process, which has handed it over. Snapshots and lazy restores of it run in this one, with the same
    /// calls; see [`Handoff`] for what differs.
    ///
    /// It is read through the files behind its regions where there are any (`pread` on a memfd), and by
    /// `process_vm_readv` where not. It cannot be filled ([`RamTarget`]), only restored lazily.
    ///
    /// # Errors
    /// [`RamError::Process`] if that process is not there or may not be looked into (it takes what attaching a debugger
    /// takes); [`RamError::Unsupported`] if its userfaultfd will not do; otherwise as
    /// [`from_regions`](Self::from_regions).
    pub fn from_handoff(handoff: Handoff) -> Result<Self, RamError> {
        let Handoff { pid, userfaultfd, regions } = handoff;
        Self::build(Owner::other(pid, userfaultfd)?, regions, None)
    }

    /// The blocks.
    #[must_use]
    pub fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    /// What a caller of this promises is what [`from_regions`](Self::from_regions) asks for; `keep` may be what makes
    /// it true.
    pub(crate) fn build(
        owner: Owner,
        regions: Vec<Region>,
        keep: Option<Box<dyn Any + Send + Sync>>,
    ) -> Result<Self, RamError> {
        let failed = |source| RamError::Maps { path: owner.proc_name("maps"), source };
        let vmas = maps::read(&owner).map_err(failed)?;
        let mut kinds = backing::Kinds::new(&owner);
        let mut blocks = Vec::with_capacity(regions.len());
        let mut pieces = Vec::with_capacity(regions.len());
        for region in regions {
            let name = BlockName::new(&region.name).ok_or(RamError::Name { name: region.name })?;
            let mut block = RamBlock {
                name,
                guest: region.guest,
                host: region.host,
                len: region.len,
                used: region.used.unwrap_or(region.len),
                page_size: backing::base_page_size(),
                backing: Backing::Foreign,
                treatment: region.treatment,
            };
            // An ignored block need not be mapped here at all, and an empty one is refused below.
            match maps::cover(&vmas, block.mapping()) {
                Ok(found) if !found.is_empty() => {
                    pieces.push(backing::examine(&mut block, &found, region.file, &mut kinds)?);
                }
                Err(gap) if block.treatment != Treatment::Ignored => return Err(RamError::Gap { block: name, gap }),
                Ok(_) | Err(_) => pieces.push(Vec::new()),
            }
            blocks.push(block);
        }
        let table = Arc::new(BlockTable::new(&blocks)?);
        for block in table.blocks() {
            log::debug!(
                target: "ramshot::track",
                "block {} {:?} {:?}: page size {}, host {}, guest {}, used {:#x}",
                block.name, block.backing, block.treatment, block.page_size, block.mapping(), block.guest, block.used
            );
        }
        Ok(Self { owner, table, pieces, lent: Mutex::new(Vec::new()), _keep: keep })
    }

    /// From now on [`RamTarget::with_mut`] refuses: others hold references into this memory.
    pub(crate) fn never_filled(&mut self) {
        self.pieces.iter_mut().flatten().for_each(|piece| piece.writable = false);
    }

    pub(crate) fn pieces(&self) -> &[Vec<Piece>] {
        &self.pieces
    }

    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// The block in which `len` bytes at `at` lie, if they lie in one that is part of the image.
    fn block_of(&self, op: &'static str, at: HostAddr, len: usize) -> Result<usize, OsError> {
        let range = HostRange::new(at, u64::try_from(len).unwrap_or(u64::MAX));
        let error = OsError::new(op, libc::EFAULT).on(range);
        let index = self.table.block_at(at).ok_or(error)?;
        let block = self.table.block(index).ok_or(error)?;
        let end = at.checked_add(range.len).ok_or(error)?;
        if end > block.mapping().end() || block.treatment == Treatment::Ignored {
            return Err(error);
        }
        Ok(usize::from(index.0))
    }

    /// Reads what is mapped in another process.
    fn read_other(&self, index: usize, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        let range = HostRange::new(from, u64::try_from(into.len()).unwrap_or(u64::MAX));
        let mut rest = into;
        for piece in self.pieces.get(index).into_iter().flatten() {
            let Some(part) = maps::intersection(piece.range, range) else { continue };
            let len = usize::try_from(part.len).unwrap_or(usize::MAX);
            let split = std::mem::take(&mut rest).split_at_mut_checked(len);
            let (now, later) = split.ok_or(OsError::new("reading guest RAM", libc::EFAULT).on(range))?;
            rest = later;
            match &piece.content {
                Content::File(file) | Content::HugeFile(file) if piece.shared => {
                    let at = file.offset.saturating_add(part.start.0 - piece.range.start.0);
                    let failed = |error: std::io::Error| {
                        // A file that ends early has been cut.
                        OsError::new("pread of the file behind guest RAM", error.raw_os_error().unwrap_or(libc::EIO))
                    };
                    file.file.read_exact_at(now, at).map_err(|error| failed(error).on(part))?;
                }
                _ => self.owner.read(part.start, now)?,
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(OsError::new("reading guest RAM", libc::EFAULT).on(range)) }
    }
}

/// The address as a pointer of this process.
fn pointer(at: HostAddr) -> *mut u8 {
    // Of a mapping here, so it fits.
    ptr::with_exposed_provenance_mut(usize::try_from(at.0).unwrap_or(0))
}

impl RamSource for GuestRam {
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        let index = self.block_of("reading guest RAM", from, into.len())?;
        if !self.owner.is_us() {
            return self.read_other(index, from, into);
        }
        let source = pointer(from);
        // SAFETY: the whole of `source..+len` lies in one block, which stays mapped readable while `self` lives (the
        // promise of `from_regions`, or of the guest memory kept alive). `into` is ours alone and cannot overlap it:
        // nobody holds a reference into guest RAM. A guest that writes meanwhile can tear what is copied, not more;
        // what must not be torn is write-protected.
        unsafe { ptr::copy_nonoverlapping(source.cast_const(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }
}

impl RamTarget for GuestRam {
    /// Only for RAM that no vCPU or device runs on. `EBUSY` for a range of which another call has a part in hand;
    /// `EACCES` for a block mapped read-only, or lent out by [`AnonymousRam`](crate::AnonymousRam); `EOPNOTSUPP` for memory of
    /// another process.
    fn with_mut(&self, at: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
        const OP: &str = "filling guest RAM";
        let index = self.block_of(OP, at, len)?;
        let range = HostRange::new(at, u64::try_from(len).unwrap_or(u64::MAX));
        if !self.pieces.get(index).is_some_and(|pieces| pieces.iter().all(|piece| piece.writable)) {
            return Err(OsError::new(OP, libc::EACCES).on(range));
        }
        if !self.owner.is_us() {
            return Err(
                OsError::new("filling guest RAM of another process (restore it lazily)", libc::EOPNOTSUPP).on(range)
            );
        }
        let target = pointer(at);
        let _lent = Lent::take(&self.lent, range).ok_or(OsError::new(OP, libc::EBUSY).on(range))?;
        // SAFETY: the whole of `target..+len` lies in one block, mapped writable while `self` lives. No other slice
        // over it exists: `_lent` keeps other calls out until `fill` is done, and others hold no references into it
        // (the promise of `from_regions`).
        fill(unsafe { std::slice::from_raw_parts_mut(target, len) });
        Ok(())
    }
}

/// A range in the list of those handed out, taken off on drop (also when `fill` panics).
struct Lent<'a> {
    list: &'a Mutex<Vec<HostRange>>,
    range: HostRange,
}

impl<'a> Lent<'a> {
    fn take(list: &'a Mutex<Vec<HostRange>>, range: HostRange) -> Option<Self> {
        let mut ranges = list.lock().unwrap_or_else(PoisonError::into_inner);
        if ranges.iter().any(|other| other.overlaps(range)) {
            return None;
        }
        ranges.push(range);
        Some(Self { list, range })
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut ranges = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = ranges.iter().position(|&range| range == self.range) {
            ranges.swap_remove(at);
        }
    }
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRam").field("table", &self.table).finish_non_exhaustive()
    }
}
