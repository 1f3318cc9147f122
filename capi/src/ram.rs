//! Guest RAM, as a C program describes it.

use std::ffi::{c_char, c_int, c_void};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ramshot::{GuestAddr, GuestRam, HostAddr, RegionFile, Treatment};

use crate::error::{Error, guard};
use crate::pass::{self, Out, Plain};

/// Guest RAM: protected at T0, captured in the background. The default.
pub const RAMSHOT_TRACKED: u32 = 0;
/// Nobody writes to it while the VM runs (ROM): saved in the background, neither registered nor protected.
pub const RAMSHOT_READ_ONLY: u32 = 1;
/// Guest-visible memory that the VMM writes without a fault that ramshot sees (ROM devices, flash): copied inside the
/// pause. Keep such regions small.
pub const RAMSHOT_IN_PAUSE: u32 = 2;
/// Not part of the image, and need not be mapped.
pub const RAMSHOT_IGNORED: u32 = 3;

/// `fd` and `fd_offset` are given.
pub const RAMSHOT_REGION_FD: u32 = 1;

/// A piece of guest RAM: one mapping of this process. Fields that are 0 have their default.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Region {
    /// By this name it is found again at restore: UTF-8, 1 to 47 bytes, different for each region.
    pub name: *const c_char,
    /// Where it is mapped in this process; aligned to its page size.
    pub host: *mut c_void,
    /// Guest-physical address, in bytes.
    pub guest: u64,
    /// Length of the mapping in bytes, a multiple of its page size.
    pub len: u64,
    /// How much of it is in use and belongs into the image, in bytes; a multiple of the page size. 0: all of it.
    pub used: u64,
    /// RAMSHOT_TRACKED, RAMSHOT_READ_ONLY, RAMSHOT_IN_PAUSE or RAMSHOT_IGNORED.
    pub treatment: u32,
    /// 0 or RAMSHOT_REGION_FD.
    pub flags: u32,
    /// With RAMSHOT_REGION_FD: where the region starts in the file, as it was passed to mmap, in bytes.
    pub fd_offset: u64,
    /// With RAMSHOT_REGION_FD: the file that is mapped there (memfd, tmpfs, hugetlbfs); duplicated, so the caller may close
    /// it. Without it, all of a shared mapping is taken to hold data, unless the process has CAP_CHECKPOINT_RESTORE.
    pub fd: c_int,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: integers and pointers.
unsafe impl Plain for Region {}

/// Guest RAM of this process.
#[derive(Debug)]
pub struct Ram(pub(crate) Arc<GuestRam>);

/// Describes guest RAM: `count` regions of `region_size` (= sizeof *regions) bytes each. What the memory is made of is asked
/// of the kernel. Nothing is changed or protected.
///
/// Until the ram, and every snapshot and dirty tracking made from it, has been freed, every region that is not
/// RAMSHOT_IGNORED must stay mapped at its address, readable, and writable if a snapshot is restored into it. Discarding
/// its content (madvise) is allowed; see ramshot_before_discard.
///
/// Returns 0 and a handle in *ram, to be freed with ramshot_ram_free; or -EINVAL for regions that are no guest RAM (not mapped,
/// not aligned, overlapping, of mixed pages, ...), or the system's error for /proc/self/maps.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_ram_new(
    regions: *const Region,
    count: usize,
    region_size: usize,
    ram: *mut *mut Ram,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(ram, "ram") }?;
        // SAFETY: the caller's promise.
        let regions = unsafe { pass::read_all(regions, count, region_size, "regions") }?;
        // SAFETY: the names are strings, the descriptors open: the caller's promise.
        let regions = regions.iter().map(|region| unsafe { convert(region) }).collect::<Result<_, _>>()?;
        // SAFETY: the regions stay mapped as long as the handle or what was made from it lives, and C has no Rust references
        // into them: the caller's promise.
        let ram = unsafe { GuestRam::from_regions(regions) }?;
        out.give(Ram(Arc::new(ram)));
        Ok(())
    })
}

/// Frees the handle; NULL is allowed. Snapshots and dirty trackings made from it may still be there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_ram_free(ram: *mut Ram) {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { pass::free(ram) };
        Ok(())
    });
}

/// # Safety
/// The name is NULL or a string; the descriptor, if there is one, open.
unsafe fn convert(region: &Region) -> Result<ramshot::Region, Error> {
    // SAFETY: the caller's promise.
    let name = unsafe { pass::text(region.name, "the name of a region") }?;
    let treatment = match region.treatment {
        RAMSHOT_TRACKED => Treatment::Tracked,
        RAMSHOT_READ_ONLY => Treatment::ReadOnly,
        RAMSHOT_IN_PAUSE => Treatment::InPause,
        RAMSHOT_IGNORED => Treatment::Ignored,
        other => {
            return Err(Error::invalid(format!("region {name:?}: treatment {other} is none of RAMSHOT_TRACKED...")));
        }
    };
    if region.flags & !RAMSHOT_REGION_FD != 0 || region.reserved != 0 {
        let (flags, reserved) = (region.flags, region.reserved);
        return Err(Error::invalid(format!(
            "region {name:?}: flags {flags:#x}, reserved {reserved:#x}: only RAMSHOT_REGION_FD is known"
        )));
    }
    let file = if region.flags & RAMSHOT_REGION_FD == 0 {
        None
    } else {
        let file = duplicate(region.fd, &format!("region {name:?}"))?;
        Some(RegionFile { file: File::from(file), offset: region.fd_offset })
    };
    Ok(ramshot::Region {
        name: name.to_owned(),
        guest: GuestAddr(region.guest),
        host: HostAddr(region.host.expose_provenance() as u64),
        len: region.len,
        used: (region.used != 0).then_some(region.used),
        treatment,
        file,
    })
}

/// A descriptor of our own for what the caller's is open on.
pub(crate) fn duplicate(fd: c_int, of: &str) -> Result<std::os::fd::OwnedFd, Error> {
    let closed = || Error::new(libc::EBADF, format!("{of}: file descriptor {fd} is not open"));
    if fd < 0 {
        return Err(closed());
    }
    // SAFETY: used for this call alone, and not closed by it. If it is not open, duplicating says EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().map_err(|_| closed())
}
