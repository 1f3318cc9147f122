//! Guest memory of the test VM: one or two regions, of the backing that was asked for.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::hugepages::HugePages;

/// Where the hole for devices and the local APIC begins; RAM that does not fit below goes on at [`HOLE_END`].
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM goes on behind the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Regions begin at multiples of this, in the host too, so that huge pages can back them.
pub const HUGE_PAGE: u64 = 2 << 20;
const PAGE: usize = 4096;

/// What guest memory is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private anonymous memory in 4 KiB pages (`MADV_NOHUGEPAGE`).
    Anon,
    /// Private anonymous memory in transparent huge pages (`MADV_HUGEPAGE`).
    Thp,
    /// A memfd, mapped shared.
    Memfd,
    /// A memfd of 2 MiB hugetlbfs pages, mapped shared.
    HugeTlb,
}

impl Backing {
    /// The unit in which the kernel maps and protects it for sure, in bytes.
    #[must_use]
    pub const fn page_size(self) -> u64 {
        match self {
            Self::HugeTlb => HUGE_PAGE,
            Self::Anon | Self::Thp | Self::Memfd => 4096,
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anon => "anon",
            Self::Thp => "thp",
            Self::Memfd => "memfd",
            Self::HugeTlb => "hugetlb",
        })
    }
}

impl FromStr for Backing {
    type Err = MemoryError;

    fn from_str(s: &str) -> Result<Self, MemoryError> {
        match s {
            "anon" => Ok(Self::Anon),
            "thp" => Ok(Self::Thp),
            "memfd" => Ok(Self::Memfd),
            "hugetlb" => Ok(Self::HugeTlb),
            _ => Err(MemoryError::UnknownBacking { given: s.to_owned() }),
        }
    }
}

/// Why there is no guest memory.
#[derive(thiserror::Error, Debug)]
pub enum MemoryError {
    /// Not a name of a backing.
    #[error("unknown backing {given:?}: it is one of anon, thp, memfd, hugetlb")]
    UnknownBacking {
        /// What was given.
        given: String,
    },
    /// Nothing, or not whole huge pages.
    #[error("guest memory of {size} bytes: it has to be a multiple of 2 MiB, and not 0")]
    Size {
        /// What was given.
        size: u64,
    },
    /// A system call failed.
    #[error("{what} for {len} bytes of guest memory failed")]
    System {
        /// Which.
        what: &'static str,
        /// On how much.
        len: u64,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The kernel did not get the huge pages together.
    #[error(
        "guest memory needs {needed} more huge pages of 2 MiB, the kernel found {got}: memory is too little or too \
             fragmented (see /proc/sys/vm/nr_hugepages)"
    )]
    NoHugePages {
        /// How many were asked for.
        needed: u64,
        /// How many it found.
        got: u64,
    },
    /// The pool of huge pages could not be changed.
    #[error("cannot change the pool of huge pages, {path}")]
    HugePagePool {
        /// Which file.
        path: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// vm-memory refused the mapping.
    #[error("vm-memory refuses a region of {len} bytes at {guest:#x}")]
    Region {
        /// Guest-physical address.
        guest: u64,
        /// Length.
        len: u64,
        /// Its answer.
        #[source]
        source: MmapRegionError,
    },
    /// vm-memory refused the collection.
    #[error("vm-memory refuses the RAM layout: {0}")]
    Layout(String),
    /// An access outside guest memory.
    #[error("guest address {address:#x}+{len:#x} is not in RAM")]
    NotRam {
        /// Address.
        address: u64,
        /// Length.
        len: u64,
    },
}

/// One region, as a VMM knows it.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// Its name: `ram.low`, `ram.high`.
    pub name: String,
    /// Guest-physical address.
    pub guest: u64,
    /// Address in this process.
    pub host: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host page size in bytes.
    pub page_size: u64,
    /// What it is made of.
    pub backing: Backing,
    /// The memfd, if there is one.
    pub file: Option<Arc<File>>,
    /// Where in the memfd it begins.
    pub file_offset: u64,
}

/// A mapping of ours, unmapped when it goes.
#[derive(Debug)]
struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

// SAFETY: the pointer is an address to unmap; nobody reads or writes through it here.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of a mapping this value alone owns.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

/// Guest memory. The regions are mapped as long as this value lives, and as long as anybody else holds the
/// [`GuestMemoryMmap`] that [`guest`](Self::guest) gives.
#[derive(Debug)]
pub struct Memory {
    guest: Option<Arc<GuestMemoryMmap>>,
    mappings: Vec<Mapping>,
    regions: Vec<RegionInfo>,
    size: u64,
    // Last: given back to the kernel when nothing is mapped from them any more.
    _huge_pages: Option<HugePages>,
}

impl Memory {
    /// `size` bytes, below the hole first.
    ///
    /// # Errors
    /// Says what could not be had; nothing stays behind.
    pub fn new(size: u64, backing: Backing) -> Result<Arc<Self>, MemoryError> {
        if size == 0 || !size.is_multiple_of(HUGE_PAGE) {
            return Err(MemoryError::Size { size });
        }
        let huge_pages = if backing == Backing::HugeTlb { Some(HugePages::reserve(size / HUGE_PAGE)?) } else { None };
        let low = size.min(HOLE_START);
        let mut parts = vec![("ram.low", 0, low)];
        if size > low {
            parts.push(("ram.high", HOLE_END, size - low));
        }
        let (mut mappings, mut regions, mut guest) = (Vec::new(), Vec::new(), Vec::new());
        for (name, address, len) in parts {
            let file = match backing {
                Backing::Anon | Backing::Thp => None,
                Backing::Memfd => Some(Arc::new(memfd(len, 0)?)),
                Backing::HugeTlb => Some(Arc::new(memfd(len, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?)),
            };
            let mapping = map(len, backing, file.as_deref())?;
            guest.push(region(&mapping, address, len, file.clone())?);
            regions.push(RegionInfo {
                name: name.to_owned(),
                guest: address,
                host: mapping.address as u64,
                len,
                page_size: backing.page_size(),
                backing,
                file,
                file_offset: 0,
            });
            mappings.push(mapping);
        }
        let guest = GuestMemoryMmap::from_regions(guest).map_err(|error| MemoryError::Layout(error.to_string()))?;
        Ok(Arc::new(Self { guest: Some(Arc::new(guest)), mappings, regions, size, _huge_pages: huge_pages }))
    }

    /// As `vm-memory` sees it.
    ///
    /// # Panics
    /// Never: it is there until `drop`.
    #[must_use]
    pub fn guest(&self) -> &Arc<GuestMemoryMmap> {
        self.guest.as_ref().expect("guest memory is there until drop")
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// Bytes of RAM.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// The range is not in RAM.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len() as u64;
        self.guest().read_slice(into, GuestAddress(address)).map_err(|_| MemoryError::NotRam { address, len })
    }

    /// Writes guest memory.
    ///
    /// # Errors
    /// The range is not in RAM.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        let len = from.len() as u64;
        self.guest().write_slice(from, GuestAddress(address)).map_err(|_| MemoryError::NotRam { address, len })
    }

    /// The whole content, region after region, read in a way that changes nothing: what was never touched stays
    /// untouched (anonymous memory is asked for by page map, a memfd is read as a file, where holes stay holes). Stop
    /// the guest first.
    ///
    /// # Errors
    /// A system call failed.
    pub fn copy(&self) -> Result<Vec<Vec<u8>>, MemoryError> {
        self.regions.iter().map(copy_region).collect()
    }

    /// The whole content, region after region, read as the guest reads it: through the mapping, touching every page.
    ///
    /// # Errors
    /// Never in practice: the regions are RAM.
    pub fn read_all(&self) -> Result<Vec<Vec<u8>>, MemoryError> {
        let read = |info: &RegionInfo| {
            let mut bytes = vec![0; to_usize(info.len)?];
            self.read(info.guest, &mut bytes)?;
            Ok(bytes)
        };
        self.regions.iter().map(read).collect()
    }

    /// Fills RAM with what [`copy`](Self::copy) gave, zero pages left untouched. RAM has to be fresh.
    ///
    /// # Errors
    /// The copy is of another layout.
    pub fn paste(&self, copy: &[Vec<u8>]) -> Result<(), MemoryError> {
        if copy.len() != self.regions.len() {
            return Err(MemoryError::Layout(format!("{} regions, not {}", copy.len(), self.regions.len())));
        }
        for (info, bytes) in self.regions.iter().zip(copy) {
            for (address, page) in (info.guest..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
                if page.iter().any(|&byte| byte != 0) {
                    self.write(address, page)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Somebody still holds the vm-memory object, which does not own what it points to: leave it mapped for ever.
        if self.guest.take().is_none_or(|guest| Arc::into_inner(guest).is_none()) {
            for mapping in self.mappings.drain(..) {
                std::mem::forget(mapping);
            }
        }
    }
}

fn system(what: &'static str, len: u64) -> MemoryError {
    MemoryError::System { what, len, source: io::Error::last_os_error() }
}

fn to_usize(len: u64) -> Result<usize, MemoryError> {
    usize::try_from(len).map_err(|_| MemoryError::Size { size: len })
}

fn memfd(len: u64, flags: libc::c_uint) -> Result<File, MemoryError> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(system("memfd_create", len));
    }
    // SAFETY: a descriptor just made, owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(|source| MemoryError::System { what: "ftruncate of a memfd", len, source })?;
    Ok(file)
}

/// Maps `len` bytes at a multiple of 2 MiB: reserve too much, map over the aligned part, cut off the rest.
fn map(len: u64, backing: Backing, file: Option<&File>) -> Result<Mapping, MemoryError> {
    let bytes = to_usize(len)?;
    let huge = to_usize(HUGE_PAGE)?;
    let whole = bytes + huge;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, reserve, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(system("mmap", len));
    }
    let before = (huge - base as usize % huge) % huge;
    let address = base.wrapping_byte_add(before);
    let (flags, fd) = match file {
        Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
    };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: replaces a part of the reservation made above, which nobody else knows.
    let mapped = unsafe { libc::mmap(address, bytes, access, flags | libc::MAP_FIXED, fd, 0) };
    if mapped == libc::MAP_FAILED {
        let error = system("mmap", len);
        // SAFETY: the reservation made above.
        unsafe { libc::munmap(base, whole) };
        return Err(error);
    }
    // SAFETY: the two ends of the reservation, which the guest's mapping does not reach.
    unsafe {
        if before > 0 {
            libc::munmap(base, before);
        }
        libc::munmap(address.wrapping_byte_add(bytes), huge - before);
    }
    let mapping = Mapping { address, len: bytes };
    let advice = match backing {
        Backing::Anon => Some(libc::MADV_NOHUGEPAGE),
        Backing::Thp => Some(libc::MADV_HUGEPAGE),
        Backing::Memfd | Backing::HugeTlb => None,
    };
    // SAFETY: advice about a mapping of ours; neither discards anything.
    if advice.is_some_and(|advice| unsafe { libc::madvise(address, bytes, advice) } != 0)
        // A kernel without transparent huge pages has none to avoid.
        && backing == Backing::Thp
    {
        return Err(system("madvise(MADV_HUGEPAGE)", len));
    }
    Ok(mapping)
}

fn region(mapping: &Mapping, guest: u64, len: u64, file: Option<Arc<File>>) -> Result<GuestRegionMmap, MemoryError> {
    let mut builder = MmapRegionBuilder::new(mapping.len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    if let Some(file) = file {
        builder = builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(FileOffset::from_arc(file, 0));
    }
    // SAFETY: the mapping is this long, and `Memory` keeps it as long as anybody holds the region.
    let builder = unsafe { builder.with_raw_mmap_pointer(mapping.address.cast()) };
    let region = builder.build().map_err(|source| MemoryError::Region { guest, len, source })?;
    GuestRegionMmap::new(region, GuestAddress(guest))
        .ok_or_else(|| MemoryError::Layout(format!("{len:#x} bytes at {guest:#x} wrap around")))
}

fn copy_region(info: &RegionInfo) -> Result<Vec<u8>, MemoryError> {
    let len = to_usize(info.len)?;
    let mut copy = vec![0; len];
    if let Some(file) = &info.file {
        file.read_exact_at(&mut copy, info.file_offset).map_err(|source| MemoryError::System {
            what: "reading the memfd",
            len: info.len,
            source,
        })?;
        return Ok(copy);
    }
    let failed = |source| MemoryError::System { what: "reading /proc/self/pagemap", len: info.len, source };
    let pagemap = File::open("/proc/self/pagemap").map_err(failed)?;
    let mut entries = vec![0; 512 * 8];
    for (batch, chunk) in copy.chunks_mut(512 * PAGE).enumerate() {
        let first = info.host + batch as u64 * HUGE_PAGE;
        let entries = &mut entries[..chunk.len() / PAGE * 8];
        pagemap.read_exact_at(entries, first / PAGE as u64 * 8).map_err(failed)?;
        for (index, (entry, page)) in entries.chunks(8).zip(chunk.chunks_mut(PAGE)).enumerate() {
            // Bits 63 and 62: present, swapped out (Documentation/admin-guide/mm/pagemap.rst).
            if entry[7] & 0xc0 != 0 {
                let from = (first + (index * PAGE) as u64) as *const u8;
                // SAFETY: a page of guest RAM, which is mapped as long as `Memory` lives; the guest is stopped, and
                // were it not, bytes would be torn, nothing more.
                unsafe { std::ptr::copy_nonoverlapping(from, page.as_mut_ptr(), PAGE) };
            }
        }
    }
    Ok(copy)
}
