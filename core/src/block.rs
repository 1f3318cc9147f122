//! The RAM block table: what guest RAM consists of, and translation between its three address spaces
//! (host address, guest-physical address, page of the image).

use core::fmt;

use heapless::Vec;

use crate::units::{BlockIndex, GuestAddr, HostAddr, HostRange, PAGE_SIZE, PageId, Run};

/// How many RAM blocks one snapshot can have.
pub const MAX_BLOCKS: usize = 128;

/// Longest block name in bytes.
pub const MAX_NAME: usize = 47;

/// The name by which a block is found again at restore: UTF-8, 1 to [`MAX_NAME`] bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockName {
    len: u8,
    bytes: [u8; MAX_NAME],
}

impl BlockName {
    /// The name, or `None` if it is empty or longer than [`MAX_NAME`] bytes.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let len = u8::try_from(name.len()).ok()?;
        let mut bytes = [0; MAX_NAME];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        (len > 0).then_some(Self { len, bytes })
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Built from a `&str` only, so the bytes are UTF-8; the fallback is unreachable.
        self.bytes.get(..usize::from(self.len)).and_then(|b| core::str::from_utf8(b).ok()).unwrap_or("")
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the memory of a block comes from. Decides whether writes to it can be tracked and what absence means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Backing {
    /// Private anonymous memory, with or without transparent huge pages: what is not resident is zero.
    Anonymous,
    /// Shared memory (memfd, tmpfs, shared anonymous): what is absent from the page table may be in the file.
    Shmem,
    /// hugetlbfs pages, private or shared.
    HugeTlb,
    /// A file of a disk file system. The kernel cannot write-protect it synchronously.
    File,
    /// Memory this process cannot map or the kernel cannot protect (guest_memfd, device memory).
    Foreign,
}

/// What a snapshot does with a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Treatment {
    /// Guest RAM: protected at T0, captured in the background.
    Tracked,
    /// Nobody writes to it while the VM runs (ROM): saved in the background, neither registered nor protected.
    ReadOnly,
    /// Guest-visible memory that a device model writes without a fault we see (ROM devices, flash): copied inside
    /// the pause. Keep such blocks small, the pause grows with them.
    InPause,
    /// Shared or external memory that is not part of the image: left out, takes no pages.
    Ignored,
}

/// One contiguous host mapping of guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RamBlock {
    /// Name, unique in the table.
    pub name: BlockName,
    /// Where the guest sees it.
    pub guest: GuestAddr,
    /// Where this process maps it. A multiple of `page_size`.
    pub host: HostAddr,
    /// Length of the mapping in bytes: what is registered. A multiple of `page_size`.
    pub len: u64,
    /// How much of it is in use: what is protected and saved. A multiple of `page_size`, at most `len`.
    pub used: u64,
    /// Host page size in bytes: the unit the kernel protects. A power of two, at least [`PAGE_SIZE`].
    pub page_size: u64,
    /// What the memory comes from.
    pub backing: Backing,
    /// What a snapshot does with it.
    pub treatment: Treatment,
}

impl RamBlock {
    /// The whole mapping.
    #[must_use]
    pub const fn mapping(&self) -> HostRange {
        HostRange::new(self.host, self.len)
    }

    /// The part that is protected and saved.
    #[must_use]
    pub const fn used_range(&self) -> HostRange {
        HostRange::new(self.host, self.used)
    }

    /// Pages it takes in the image: none if it is ignored.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        match self.treatment {
            Treatment::Ignored => 0,
            _ => self.used / PAGE_SIZE,
        }
    }

    /// Target pages in one host page of this block.
    #[must_use]
    pub const fn pages_per_host_page(&self) -> u64 {
        self.page_size / PAGE_SIZE
    }
}

/// Why a list of blocks is not a RAM layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// No block at all, or none that is part of the image.
    NoBlocks,
    /// More than [`MAX_BLOCKS`].
    TooManyBlocks {
        /// How many were given.
        given: usize,
    },
    /// A block without bytes.
    Empty {
        /// The block.
        block: BlockName,
    },
    /// The host page size is not a power of two of at least 4096.
    PageSize {
        /// The block.
        block: BlockName,
        /// The page size given.
        page_size: u64,
    },
    /// A host address or length is not a multiple of the host page size, or a guest address not of 4096.
    Unaligned {
        /// The block.
        block: BlockName,
        /// The value that is not aligned.
        value: u64,
        /// What it should be a multiple of.
        to: u64,
    },
    /// `used` is larger than `len`.
    UsedBeyondLength {
        /// The block.
        block: BlockName,
        /// Used length in bytes.
        used: u64,
        /// Mapping length in bytes.
        len: u64,
    },
    /// Address plus length runs over the end of an address space.
    Wraps {
        /// The block.
        block: BlockName,
    },
    /// Two blocks share host or guest addresses.
    Overlap {
        /// The earlier block.
        block: BlockName,
        /// The later one.
        other: BlockName,
    },
    /// Two blocks have the same name.
    SameName {
        /// The name.
        block: BlockName,
    },
    /// The bitmap lent has fewer bits than the layout has pages.
    BitmapTooSmall {
        /// Bits lent.
        bits: u64,
        /// Pages of the layout.
        pages: u64,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBlocks => f.write_str("the RAM layout has no block to save"),
            Self::TooManyBlocks { given } => {
                write!(f, "{given} RAM blocks given, at most {MAX_BLOCKS} fit; merge adjacent ones")
            }
            Self::Empty { block } => write!(f, "RAM block {block:?} is empty"),
            Self::PageSize { block, page_size } => {
                write!(f, "RAM block {block:?}: page size {page_size} is not a power of two of at least {PAGE_SIZE}")
            }
            Self::Unaligned { block, value, to } => {
                write!(f, "RAM block {block:?}: {value:#x} is not a multiple of {to:#x}")
            }
            Self::UsedBeyondLength { block, used, len } => {
                write!(f, "RAM block {block:?}: used length {used:#x} is more than its length {len:#x}")
            }
            Self::Wraps { block } => write!(f, "RAM block {block:?} runs over the end of the address space"),
            Self::Overlap { block, other } => write!(f, "RAM blocks {block:?} and {other:?} overlap"),
            Self::SameName { block } => write!(f, "two RAM blocks are called {block:?}"),
            Self::BitmapTooSmall { bits, pages } => {
                write!(f, "the bitmap lent has {bits} bits, the RAM layout has {pages} pages")
            }
        }
    }
}

impl core::error::Error for LayoutError {}

/// A checked list of RAM blocks, in the order in which they lie in the image.
///
/// # Invariants
/// No two blocks overlap in host or guest addresses; every address and length is a multiple of its page size; block
/// `i + 1` starts in the image where block `i` ends.
#[derive(Clone, Debug)]
pub struct BlockTable {
    blocks: Vec<RamBlock, MAX_BLOCKS>,
    /// First page of each block.
    firsts: Vec<PageId, MAX_BLOCKS>,
    /// Granule of each block, in pages.
    granules: Vec<u64, MAX_BLOCKS>,
    pages: u64,
}

impl BlockTable {
    /// Checks `blocks` and lays them out back to back.
    ///
    /// # Errors
    /// The first thing found that makes this no RAM layout.
    pub fn new(blocks: &[RamBlock]) -> Result<Self, LayoutError> {
        if blocks.len() > MAX_BLOCKS {
            return Err(LayoutError::TooManyBlocks { given: blocks.len() });
        }
        let mut table = Self { blocks: Vec::new(), firsts: Vec::new(), granules: Vec::new(), pages: 0 };
        for block in blocks {
            check_block(block)?;
            for earlier in &table.blocks {
                check_pair(earlier, block)?;
            }
            // Cannot fail: at most MAX_BLOCKS, checked above.
            let _ = table.granules.push(block.pages_per_host_page());
            let _ = table.firsts.push(PageId(table.pages));
            let _ = table.blocks.push(*block);
            table.pages = table.pages.checked_add(block.pages()).ok_or(LayoutError::Wraps { block: block.name })?;
        }
        if table.pages == 0 {
            return Err(LayoutError::NoBlocks);
        }
        Ok(table)
    }

    /// Sets the granule of a block, in bytes: the unit in which its pages are claimed where that is possible. It is the
    /// host page size unless it is set; 2 MiB for memory that is mapped by transparent huge pages keeps those whole.
    /// Rounded up to a power of two; policy only.
    pub fn set_granule(&mut self, index: BlockIndex, bytes: u64) {
        let pages = bytes.div_ceil(PAGE_SIZE).checked_next_power_of_two().unwrap_or(1);
        if let (Some(block), Some(granule)) =
            (self.blocks.get(usize::from(index.0)), self.granules.get_mut(usize::from(index.0)))
        {
            *granule = pages.max(block.pages_per_host_page());
        }
    }

    /// The same blocks, none of them protected: for a draft, which is copied while the guest writes on.
    #[must_use]
    pub fn unprotected(&self) -> Self {
        let mut table = self.clone();
        for block in table.blocks.iter_mut().filter(|block| block.treatment == Treatment::Tracked) {
            block.treatment = Treatment::ReadOnly;
        }
        table
    }

    /// The granule of a block, in pages.
    #[must_use]
    pub fn granule_pages(&self, index: BlockIndex) -> u64 {
        self.granules.get(usize::from(index.0)).copied().unwrap_or(1)
    }

    /// The blocks, in image order.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// One block.
    #[must_use]
    pub fn block(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(usize::from(index.0))
    }

    /// Index and block, in image order.
    pub fn iter(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock)> {
        (0u16..).map(BlockIndex).zip(self.blocks.iter())
    }

    /// Pages of the image.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The pages of one block, empty if it is ignored or does not exist.
    #[must_use]
    pub fn block_run(&self, index: BlockIndex) -> Run {
        match (self.firsts.get(usize::from(index.0)), self.block(index)) {
            (Some(&first), Some(block)) => Run::new(first, block.pages()),
            _ => Run::new(PageId(self.pages), 0),
        }
    }

    /// The block that holds `page`.
    #[must_use]
    pub fn block_of(&self, page: PageId) -> Option<BlockIndex> {
        self.iter().map(|(i, _)| i).find(|&i| self.block_run(i).contains(page))
    }

    /// The block whose mapping holds host address `at` (its unused tail included).
    #[must_use]
    pub fn block_at(&self, at: HostAddr) -> Option<BlockIndex> {
        self.iter().find(|(_, b)| b.mapping().contains(at)).map(|(i, _)| i)
    }

    /// The page at host address `at`, if it is part of the image.
    #[must_use]
    pub fn page_at(&self, at: HostAddr) -> Option<PageId> {
        let index = self.block_at(at)?;
        let block = self.block(index)?;
        let run = self.block_run(index);
        let page = PageId(run.first.0 + (at.0 - block.host.0) / PAGE_SIZE);
        run.contains(page).then_some(page)
    }

    /// The page at guest-physical address `at`, if it is part of the image.
    #[must_use]
    pub fn page_at_guest(&self, at: GuestAddr) -> Option<PageId> {
        self.iter().find_map(|(i, b)| {
            let offset = at.0.checked_sub(b.guest.0)?;
            let run = self.block_run(i);
            let page = PageId(run.first.0.checked_add(offset / PAGE_SIZE)?);
            run.contains(page).then_some(page)
        })
    }

    /// Where `run` is mapped, if it lies inside one block.
    #[must_use]
    pub fn host_range(&self, run: Run) -> Option<HostRange> {
        let index = self.block_of(run.first)?;
        let block = self.block(index)?;
        let whole = self.block_run(index);
        (run.end().0 <= whole.end().0)
            .then(|| HostRange::new(HostAddr(block.host.0 + (run.first.0 - whole.first.0) * PAGE_SIZE), run.bytes()))
    }

    /// The pages of the image that `range` touches, block by block.
    pub fn runs_in(&self, range: HostRange) -> impl Iterator<Item = Run> {
        self.iter().filter_map(move |(i, b)| {
            let start = range.start.0.max(b.host.0);
            let end = range.end().0.min(b.used_range().end().0);
            let run = self.block_run(i);
            if start >= end || run.pages == 0 {
                return None;
            }
            let from = (start - b.host.0) / PAGE_SIZE;
            let to = (end - b.host.0).div_ceil(PAGE_SIZE);
            Some(Run::new(PageId(run.first.0 + from), to - from))
        })
    }
}

fn check_block(block: &RamBlock) -> Result<(), LayoutError> {
    let name = block.name;
    if !block.page_size.is_power_of_two() || block.page_size < PAGE_SIZE {
        return Err(LayoutError::PageSize { block: name, page_size: block.page_size });
    }
    if block.len == 0 || block.used == 0 {
        return Err(LayoutError::Empty { block: name });
    }
    if block.used > block.len {
        return Err(LayoutError::UsedBeyondLength { block: name, used: block.used, len: block.len });
    }
    let host_page = block.page_size;
    for (value, to) in
        [(block.host.0, host_page), (block.len, host_page), (block.used, host_page), (block.guest.0, PAGE_SIZE)]
    {
        if value & (to - 1) != 0 {
            return Err(LayoutError::Unaligned { block: name, value, to });
        }
    }
    if block.host.checked_add(block.len).is_none() || block.guest.checked_add(block.len).is_none() {
        return Err(LayoutError::Wraps { block: name });
    }
    Ok(())
}

fn check_pair(earlier: &RamBlock, later: &RamBlock) -> Result<(), LayoutError> {
    if earlier.name == later.name {
        return Err(LayoutError::SameName { block: later.name });
    }
    let guest = |b: &RamBlock| HostRange::new(HostAddr(b.guest.0), b.len);
    if earlier.mapping().overlaps(later.mapping()) || guest(earlier).overlaps(guest(later)) {
        return Err(LayoutError::Overlap { block: earlier.name, other: later.name });
    }
    Ok(())
}
