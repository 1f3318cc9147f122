//! The kernel's side of the contract: every constant, structure and ioctl number of `linux/userfaultfd.h` and of
//! `PAGEMAP_SCAN` (`linux/fs.h`) that this crate uses. Nothing else in the crate names a number.
//!
//! Each ioctl number is computed from its parts and compared at compile time with the literal of the kernel headers,
//! so neither a mistyped part nor a structure of the wrong size gets past the compiler.
#![allow(dead_code)] // Some definitions stand here for completeness.

use nix::{request_code_none, request_code_read, request_code_readwrite, request_code_write};

/// The only version of the userfaultfd API.
pub(crate) const UFFD_API: u64 = 0xAA;
/// Flag of `userfaultfd(2)`: faults of user mode only (5.11).
pub(crate) const UFFD_USER_MODE_ONLY: i32 = 1;

const UFFDIO: u8 = 0xAA;
const NR_REGISTER: u8 = 0x00;
const NR_UNREGISTER: u8 = 0x01;
const NR_WAKE: u8 = 0x02;
const NR_COPY: u8 = 0x03;
const NR_ZEROPAGE: u8 = 0x04;
const NR_MOVE: u8 = 0x05;
const NR_WRITEPROTECT: u8 = 0x06;
const NR_CONTINUE: u8 = 0x07;
const NR_POISON: u8 = 0x08;
const NR_API: u8 = 0x3F;

/// Bits of `UffdioRegister::ioctls`: what works on the range.
pub(crate) const CAN_COPY: u64 = 1 << NR_COPY;
/// Not on hugetlbfs.
pub(crate) const CAN_ZEROPAGE: u64 = 1 << NR_ZEROPAGE;
/// Since 6.6.
pub(crate) const CAN_POISON: u64 = 1 << NR_POISON;
/// Bit of `UffdioRegister::ioctls`: the range can be write-protected.
pub(crate) const CAN_WRITEPROTECT: u64 = 1 << NR_WRITEPROTECT;

// UFFD_FEATURE_*, with the kernel that brought each. MISSING_* are 4.11, EVENT_* 4.11.
pub(crate) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0; // 5.7
pub(crate) const FEATURE_EVENT_FORK: u64 = 1 << 1;
pub(crate) const FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub(crate) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(crate) const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub(crate) const FEATURE_SIGBUS: u64 = 1 << 7; // 4.14
pub(crate) const FEATURE_THREAD_ID: u64 = 1 << 8; // 4.14
pub(crate) const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9; // 5.13
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10; // 5.14
pub(crate) const FEATURE_EXACT_ADDRESS: u64 = 1 << 11; // 5.18
pub(crate) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12; // 5.19
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13; // 6.4
pub(crate) const FEATURE_POISON: u64 = 1 << 14; // 6.6
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15; // 6.7
pub(crate) const FEATURE_MOVE: u64 = 1 << 16; // 6.8
/// Not of the API: how the kernel marks, in `/proc/*/fdinfo`, a context on which UFFDIO_API has been called.
pub(crate) const FEATURE_INITIALIZED: u64 = 1 << 31;

pub(crate) const REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(crate) const REGISTER_MODE_WP: u64 = 1 << 1;
pub(crate) const REGISTER_MODE_MINOR: u64 = 1 << 2;

pub(crate) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub(crate) const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
pub(crate) const COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const COPY_MODE_WP: u64 = 1 << 1;
pub(crate) const ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const CONTINUE_MODE_WP: u64 = 1 << 1;
pub(crate) const POISON_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const MOVE_MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;

pub(crate) const EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const EVENT_FORK: u8 = 0x13;
pub(crate) const EVENT_REMAP: u8 = 0x14;
pub(crate) const EVENT_REMOVE: u8 = 0x15;
pub(crate) const EVENT_UNMAP: u8 = 0x16;

pub(crate) const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub(crate) const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// `struct uffdio_api`
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioApi {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// `struct uffdio_register`
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioRegister {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioWriteprotect {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
}

/// `struct uffdio_copy`; `done` is bytes copied or a negative error number.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioCopy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    pub(crate) done: i64,
}

/// `struct uffdio_move`, laid out like `uffdio_copy`.
pub(crate) type UffdioMove = UffdioCopy;

/// `struct uffdio_zeropage`; `uffdio_continue` and `uffdio_poison` are laid out the same.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct UffdioZeropage {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) done: i64,
}

/// `struct uffdio_continue`
pub(crate) type UffdioContinue = UffdioZeropage;
/// `struct uffdio_poison`
pub(crate) type UffdioPoison = UffdioZeropage;

/// `struct uffd_msg`, its union as three words: page fault (flags, address, thread id), fork (descriptor), remap
/// (from, to, length), remove and unmap (start, end).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UffdMsg {
    pub(crate) event: u8,
    pub(crate) reserved: [u8; 7],
    pub(crate) arg: [u64; 3],
}

// Categories of PAGEMAP_SCAN.
pub(crate) const PAGE_IS_WPALLOWED: u64 = 1 << 0;
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(crate) const PAGE_IS_FILE: u64 = 1 << 2;
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(crate) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(crate) const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub(crate) const PAGE_IS_HUGE: u64 = 1 << 6;
pub(crate) const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;

pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
pub(crate) const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct PmScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

/// `struct kvm_dirty_gfn` (linux/kvm.h): one entry of a dirty ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KvmDirtyGfn {
    pub(crate) flags: u32,
    pub(crate) slot: u32,
    pub(crate) offset: u64,
}

/// Where a vCPU's ring is mapped from, in pages (`KVM_DIRTY_LOG_PAGE_OFFSET` of x86 and arm64).
pub(crate) const KVM_DIRTY_LOG_PAGE_OFFSET: u64 = 64;

/// `struct kvm_dirty_log` (linux/kvm.h)
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct KvmDirtyLogArg {
    pub(crate) slot: u32,
    pub(crate) padding: u32,
    pub(crate) bitmap: u64,
}

// Entries of /proc/*/pagemap.
pub(crate) const PAGEMAP_PRESENT: u64 = 1 << 63;
pub(crate) const PAGEMAP_SWAPPED: u64 = 1 << 62;

const USERFAULTFD_IOC_NEW: nix::sys::ioctl::ioctl_num_type = request_code_none!(UFFDIO, 0x00);
const UFFDIO_UNREGISTER: nix::sys::ioctl::ioctl_num_type =
    request_code_read!(UFFDIO, NR_UNREGISTER, size_of::<UffdioRange>());
const UFFDIO_WAKE: nix::sys::ioctl::ioctl_num_type = request_code_read!(UFFDIO, NR_WAKE, size_of::<UffdioRange>());

// UNREGISTER and WAKE are declared "read" in the kernel headers although the kernel only reads the argument; so the
// "bad" form of nix's macro, which takes the number as it is and a const pointer.
nix::ioctl_write_int_bad!(
    /// On `/dev/userfaultfd`: a new context. The argument is the flags.
    ioctl_new,
    USERFAULTFD_IOC_NEW
);
nix::ioctl_write_ptr_bad!(ioctl_unregister, UFFDIO_UNREGISTER, UffdioRange);
nix::ioctl_write_ptr_bad!(ioctl_wake, UFFDIO_WAKE, UffdioRange);
nix::ioctl_readwrite!(ioctl_api, UFFDIO, NR_API, UffdioApi);
nix::ioctl_readwrite!(ioctl_register, UFFDIO, NR_REGISTER, UffdioRegister);
nix::ioctl_readwrite!(ioctl_writeprotect, UFFDIO, NR_WRITEPROTECT, UffdioWriteprotect);
nix::ioctl_readwrite!(ioctl_copy, UFFDIO, NR_COPY, UffdioCopy);
nix::ioctl_readwrite!(ioctl_zeropage, UFFDIO, NR_ZEROPAGE, UffdioZeropage);
nix::ioctl_readwrite!(ioctl_move, UFFDIO, NR_MOVE, UffdioMove);
nix::ioctl_readwrite!(ioctl_continue, UFFDIO, NR_CONTINUE, UffdioContinue);
nix::ioctl_readwrite!(ioctl_poison, UFFDIO, NR_POISON, UffdioPoison);
nix::ioctl_readwrite!(ioctl_pagemap_scan, b'f', 16, PmScanArg);
nix::ioctl_write_ptr!(ioctl_get_dirty_log, 0xAE, 0x42, KvmDirtyLogArg);
nix::ioctl_none!(ioctl_reset_dirty_rings, 0xAE, 0xC7);

/// The numbers of the ioctls of a snapshot as a seccomp filter sees them: 32 bits.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // They have 32 bits; musl's type for them is signed.
pub(crate) mod request {
    use super::*;

    pub(crate) const USERFAULTFD_IOC_NEW: u32 = super::USERFAULTFD_IOC_NEW as u32;
    pub(crate) const UFFDIO_API: u32 = request_code_readwrite!(UFFDIO, NR_API, size_of::<UffdioApi>()) as u32;
    pub(crate) const UFFDIO_REGISTER: u32 =
        request_code_readwrite!(UFFDIO, NR_REGISTER, size_of::<UffdioRegister>()) as u32;
    pub(crate) const UFFDIO_UNREGISTER: u32 = super::UFFDIO_UNREGISTER as u32;
    pub(crate) const UFFDIO_WAKE: u32 = super::UFFDIO_WAKE as u32;
    pub(crate) const UFFDIO_WRITEPROTECT: u32 =
        request_code_readwrite!(UFFDIO, NR_WRITEPROTECT, size_of::<UffdioWriteprotect>()) as u32;
    pub(crate) const PAGEMAP_SCAN: u32 = request_code_readwrite!(b'f', 16, size_of::<PmScanArg>()) as u32;
    pub(crate) const KVM_GET_DIRTY_LOG: u32 = request_code_write!(0xAE, 0x42, size_of::<KvmDirtyLogArg>()) as u32;
    pub(crate) const KVM_RESET_DIRTY_RINGS: u32 = request_code_none!(0xAE, 0xC7) as u32;
}

const _: () = {
    assert!(size_of::<UffdioApi>() == 24);
    assert!(size_of::<UffdioRange>() == 16);
    assert!(size_of::<UffdioRegister>() == 32);
    assert!(size_of::<UffdioWriteprotect>() == 24);
    assert!(size_of::<UffdioCopy>() == 40);
    assert!(size_of::<UffdioZeropage>() == 32);
    assert!(size_of::<UffdMsg>() == 32);
    assert!(size_of::<PageRegion>() == 24);
    assert!(size_of::<PmScanArg>() == 96);
    assert!(size_of::<KvmDirtyLogArg>() == 16);
    assert!(size_of::<KvmDirtyGfn>() == 16);
};

// The literals below are those of the generic ioctl encoding (x86, arm, riscv, s390, loongarch). mips, powerpc and
// sparc shift the direction bits; there "no argument" is not zero and the comparison is left out.
const _: () = {
    if request_code_none!(0, 0) == 0 {
        assert!(USERFAULTFD_IOC_NEW == 0xaa00);
        assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
        assert!(UFFDIO_WAKE == 0x8010_aa02);
        assert!(request_code_readwrite!(UFFDIO, NR_API, size_of::<UffdioApi>()) == 0xc018_aa3f);
        assert!(request_code_readwrite!(UFFDIO, NR_REGISTER, size_of::<UffdioRegister>()) == 0xc020_aa00);
        assert!(request_code_readwrite!(UFFDIO, NR_COPY, size_of::<UffdioCopy>()) == 0xc028_aa03);
        assert!(request_code_readwrite!(UFFDIO, NR_ZEROPAGE, size_of::<UffdioZeropage>()) == 0xc020_aa04);
        assert!(request_code_readwrite!(UFFDIO, NR_MOVE, size_of::<UffdioMove>()) == 0xc028_aa05);
        assert!(request_code_readwrite!(UFFDIO, NR_WRITEPROTECT, size_of::<UffdioWriteprotect>()) == 0xc018_aa06);
        assert!(request_code_readwrite!(UFFDIO, NR_CONTINUE, size_of::<UffdioContinue>()) == 0xc020_aa07);
        assert!(request_code_readwrite!(UFFDIO, NR_POISON, size_of::<UffdioPoison>()) == 0xc020_aa08);
        assert!(request_code_write!(0xAE, 0x42, size_of::<KvmDirtyLogArg>()) == 0x4010_ae42);
        assert!(request_code_readwrite!(b'f', 16, size_of::<PmScanArg>()) == 0xc060_6610);
    }
};

/// Ours against the bindings that bindgen makes from this machine's kernel headers.
#[cfg(all(test, feature = "userfaultfd"))]
mod tests {
    use std::mem::offset_of;

    use userfaultfd_sys as sys;

    use super::*;

    macro_rules! same_layout {
        ($ours:ty, $theirs:ty: $($our_field:ident = $their_field:ident),+) => {
            assert_eq!(size_of::<$ours>(), size_of::<$theirs>());
            $(assert_eq!(
                offset_of!($ours, $our_field),
                offset_of!($theirs, $their_field),
                concat!(stringify!($ours), ".", stringify!($our_field))
            );)+
        };
    }

    #[test]
    fn layouts_are_those_of_the_headers() {
        same_layout!(UffdioApi, sys::uffdio_api: api = api, features = features, ioctls = ioctls);
        same_layout!(UffdioRange, sys::uffdio_range: start = start, len = len);
        same_layout!(UffdioRegister, sys::uffdio_register: range = range, mode = mode, ioctls = ioctls);
        same_layout!(UffdioWriteprotect, sys::uffdio_writeprotect: range = range, mode = mode);
        same_layout!(UffdioCopy, sys::uffdio_copy: dst = dst, src = src, len = len, mode = mode, done = copy);
        same_layout!(UffdioZeropage, sys::uffdio_zeropage: range = range, mode = mode, done = zeropage);
        same_layout!(UffdMsg, sys::uffd_msg: event = event, arg = arg);
        assert_eq!(size_of::<UffdioContinue>(), size_of::<sys::uffdio_continue>());
    }

    #[test]
    #[allow(clippy::useless_conversion)]
    fn numbers_are_those_of_the_headers() {
        // Widened: the headers' constants come as u8, u32 or u64.
        let pairs: [(u64, u64); 25] = [
            (NR_API.into(), sys::_UFFDIO_API.into()),
            (NR_REGISTER.into(), sys::_UFFDIO_REGISTER.into()),
            (NR_UNREGISTER.into(), sys::_UFFDIO_UNREGISTER.into()),
            (NR_WAKE.into(), sys::_UFFDIO_WAKE.into()),
            (NR_COPY.into(), sys::_UFFDIO_COPY.into()),
            (NR_ZEROPAGE.into(), sys::_UFFDIO_ZEROPAGE.into()),
            (NR_WRITEPROTECT.into(), sys::_UFFDIO_WRITEPROTECT.into()),
            (NR_CONTINUE.into(), sys::_UFFDIO_CONTINUE.into()),
            (UFFDIO.into(), sys::UFFDIO.into()),
            (EVENT_PAGEFAULT.into(), sys::UFFD_EVENT_PAGEFAULT.into()),
            (EVENT_FORK.into(), sys::UFFD_EVENT_FORK.into()),
            (EVENT_REMAP.into(), sys::UFFD_EVENT_REMAP.into()),
            (EVENT_REMOVE.into(), sys::UFFD_EVENT_REMOVE.into()),
            (EVENT_UNMAP.into(), sys::UFFD_EVENT_UNMAP.into()),
            (FEATURE_PAGEFAULT_FLAG_WP.into(), sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP.into()),
            (FEATURE_EVENT_FORK.into(), sys::UFFD_FEATURE_EVENT_FORK.into()),
            (FEATURE_EVENT_REMAP.into(), sys::UFFD_FEATURE_EVENT_REMAP.into()),
            (FEATURE_EVENT_REMOVE.into(), sys::UFFD_FEATURE_EVENT_REMOVE.into()),
            (FEATURE_EVENT_UNMAP.into(), sys::UFFD_FEATURE_EVENT_UNMAP.into()),
            (FEATURE_MISSING_HUGETLBFS.into(), sys::UFFD_FEATURE_MISSING_HUGETLBFS.into()),
            (FEATURE_MISSING_SHMEM.into(), sys::UFFD_FEATURE_MISSING_SHMEM.into()),
            (FEATURE_SIGBUS.into(), sys::UFFD_FEATURE_SIGBUS.into()),
            (FEATURE_THREAD_ID.into(), sys::UFFD_FEATURE_THREAD_ID.into()),
            (PAGEFAULT_FLAG_WRITE.into(), sys::UFFD_PAGEFAULT_FLAG_WRITE.into()),
            (PAGEFAULT_FLAG_WP.into(), sys::UFFD_PAGEFAULT_FLAG_WP.into()),
        ];
        assert!(pairs.iter().all(|(ours, theirs)| ours == theirs), "{pairs:x?}");
        assert_eq!(UFFD_API, sys::UFFD_API);
        assert_eq!(REGISTER_MODE_MISSING, sys::UFFDIO_REGISTER_MODE_MISSING);
        assert_eq!(REGISTER_MODE_WP, sys::UFFDIO_REGISTER_MODE_WP);
        assert_eq!(WRITEPROTECT_MODE_WP, sys::UFFDIO_WRITEPROTECT_MODE_WP);
        assert_eq!(WRITEPROTECT_MODE_DONTWAKE, sys::UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
        assert_eq!(COPY_MODE_DONTWAKE, sys::UFFDIO_COPY_MODE_DONTWAKE);
        assert_eq!(ZEROPAGE_MODE_DONTWAKE, sys::UFFDIO_ZEROPAGE_MODE_DONTWAKE);
    }
}
