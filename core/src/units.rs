//! Numbers with a meaning: addresses, page indices, lengths. All arithmetic on them is checked.

use core::fmt;

/// Size of a target page in bytes: the unit of the bitmaps and of the saved image, whatever the host maps.
pub const PAGE_SIZE: u64 = 4096;

/// An address in the process that maps guest RAM (what userfaultfd reports, what `mmap` returned).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostAddr(pub u64);

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestAddr(pub u64);

/// A target page of the image: its index in flat RAM, so byte `page * PAGE_SIZE` of a snapshot file.
///
/// Blocks lie back to back in table order, each with its used length; ignored blocks take no pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageId(pub u64);

/// Position of a block in the block table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockIndex(pub u16);

macro_rules! address {
    ($t:ident) => {
        impl $t {
            /// The address `len` bytes further on, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, len: u64) -> Option<Self> {
                match self.0.checked_add(len) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Whether the address is a multiple of `align` (a power of two).
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
        }

        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(HostAddr);
address!(GuestAddr);

impl fmt::Debug for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

impl fmt::Debug for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

/// `len` bytes of host address space from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostRange {
    /// First byte.
    pub start: HostAddr,
    /// Length in bytes.
    pub len: u64,
}

impl HostRange {
    /// The range of `len` bytes from `start`.
    #[must_use]
    pub const fn new(start: HostAddr, len: u64) -> Self {
        Self { start, len }
    }

    /// One past the last byte, saturating at the end of the address space.
    #[must_use]
    pub const fn end(self) -> HostAddr {
        HostAddr(self.start.0.saturating_add(self.len))
    }

    /// Whether `at` lies inside.
    #[must_use]
    pub const fn contains(self, at: HostAddr) -> bool {
        at.0 >= self.start.0 && at.0 < self.end().0
    }

    /// Whether the two have a byte in common; an empty range has none with anything.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        let first = if self.start.0 > other.start.0 { self.start.0 } else { other.start.0 };
        first < self.end().0 && first < other.end().0
    }
}

impl fmt::Debug for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start.0, self.len)
    }
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Consecutive target pages of one block; never empty where the API hands one out.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// First page.
    pub first: PageId,
    /// How many.
    pub pages: u64,
}

impl Run {
    /// `pages` pages from `first`.
    #[must_use]
    pub const fn new(first: PageId, pages: u64) -> Self {
        Self { first, pages }
    }

    /// One past the last page, saturating.
    #[must_use]
    pub const fn end(self) -> PageId {
        PageId(self.first.0.saturating_add(self.pages))
    }

    /// Length in bytes, saturating.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// Whether `page` is one of them.
    #[must_use]
    pub const fn contains(self, page: PageId) -> bool {
        page.0 >= self.first.0 && page.0 < self.end().0
    }

    /// Whether the two have a page in common; an empty run has none with anything.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        let first = if self.first.0 > other.first.0 { self.first.0 } else { other.first.0 };
        first < self.end().0 && first < other.end().0
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}+{}", self.first.0, self.pages)
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}+{}", self.first.0, self.pages)
    }
}
