//! Registering blocks with a userfaultfd, and why it may be refused.

use nix::errno::Errno;
use ramshot_core::{Backing, HostRange, RamBlock};

use crate::error::Missing;
use crate::uapi;
use crate::uffd::Uffd;

/// Whether a context with `features` can track `block`.
pub(crate) fn check_block(block: &RamBlock, features: u64) -> Result<(), Missing> {
    check_backing(what(block), block.backing, features)
}

/// Whether a context with `features` can track `backing` memory.
pub(crate) fn check_backing(what: String, backing: Backing, features: u64) -> Result<(), Missing> {
    let (why, remedy) = match backing {
        Backing::File => (
            "the kernel cannot write-protect a mapping of a disk file synchronously (register: EINVAL)",
            "copy it into anonymous memory or a memfd first (a MAP_PRIVATE restore file too), or take the snapshot with \
             the VM stopped",
        ),
        Backing::Foreign => (
            "it is device memory, guest_memfd or a special mapping, which the kernel cannot write-protect",
            "leave it out (Treatment::Ignored) or, if small and readable, have it copied inside the pause \
             (Treatment::InPause)",
        ),
        _ if features & uapi::FEATURE_PAGEFAULT_FLAG_WP == 0 => (
            "the kernel does not offer UFFD_FEATURE_PAGEFAULT_FLAG_WP",
            "it takes Linux 5.7 (on aarch64 6.10) with CONFIG_USERFAULTFD",
        ),
        Backing::Shmem | Backing::HugeTlb if features & uapi::FEATURE_WP_HUGETLBFS_SHMEM == 0 => (
            "the kernel does not offer UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
            "it takes Linux 5.19; before that use private anonymous memory",
        ),
        _ => return Ok(()),
    };
    Err(Missing::new(what, why, remedy))
}

/// Registers the whole of `block` for write faults, besides the modes `prior` that it has already. After an error
/// nothing of it is registered, if nothing was before.
pub(crate) fn register(uffd: &Uffd, block: &RamBlock, prior: u64) -> Result<(), Missing> {
    let range = block.mapping();
    let ioctls = uffd.register(range, uapi::REGISTER_MODE_WP | prior).map_err(|errno| {
        // The kernel checks every mapping in the range before it changes the first: a refusal has registered nothing,
        // and undoing it could hit somebody else's registration. Only memory can run out half-way.
        if errno == Errno::ENOMEM && prior == 0 {
            let _ = uffd.unregister(range);
        }
        let (why, remedy) = explain(errno);
        Missing::new(what(block), format!("UFFDIO_REGISTER: {errno}: {why}"), remedy)
    })?;
    if ioctls & uapi::CAN_WRITEPROTECT == 0 {
        if prior == 0 {
            let _ = uffd.unregister(range);
        }
        return Err(Missing::new(
            what(block),
            format!("it registers, but cannot be write-protected (ioctls {ioctls:#x})"),
            "use a newer kernel, or private anonymous memory",
        ));
    }
    Ok(())
}

/// Whether pages of `block` can come in late.
pub(crate) fn check_missing(block: &RamBlock, features: u64) -> Result<(), Missing> {
    let (why, remedy) = match block.backing {
        Backing::File | Backing::Foreign => (
            "userfaultfd fills anonymous memory, memfd and hugetlbfs, and this is neither",
            "restore eagerly (SnapshotFile::restore_into), or use such memory",
        ),
        Backing::Shmem if features & uapi::FEATURE_MISSING_SHMEM == 0 => {
            ("the kernel does not offer UFFD_FEATURE_MISSING_SHMEM", "it takes Linux 4.11; restore eagerly")
        }
        Backing::HugeTlb if features & uapi::FEATURE_MISSING_HUGETLBFS == 0 => {
            ("the kernel does not offer UFFD_FEATURE_MISSING_HUGETLBFS", "it takes Linux 4.11; restore eagerly")
        }
        _ => return Ok(()),
    };
    Err(Missing::new(what_lazily(block), why, remedy))
}

/// Registers the whole of `block` for missing pages; the bits of the ioctls that work on it. After an error nothing of it
/// is registered.
pub(crate) fn register_missing(uffd: &Uffd, block: &RamBlock) -> Result<u64, Missing> {
    let range = block.mapping();
    let ioctls = uffd.register(range, uapi::REGISTER_MODE_MISSING).map_err(|errno| {
        if errno == Errno::ENOMEM {
            // The only refusal that can come half-way.
            let _ = uffd.unregister(range);
        }
        let (why, remedy) = match errno {
            Errno::EBUSY => (
                "another userfaultfd is registered there, and the kernel allows one",
                "end what it is used for first (a live snapshot, another lazy restore)",
            ),
            Errno::EINVAL => ("the mapping is of a kind this kernel cannot fill, or has changed", "restore eagerly"),
            Errno::EPERM => ("the mapping can never be written", "map it writable, or restore eagerly"),
            _ => explain(errno),
        };
        Missing::new(what_lazily(block), format!("UFFDIO_REGISTER: {errno}: {why}"), remedy)
    })?;
    if ioctls & uapi::CAN_COPY == 0 {
        let _ = uffd.unregister(range);
        let why = format!("it registers, but cannot be filled (ioctls {ioctls:#x})");
        return Err(Missing::new(what_lazily(block), why, "use a newer kernel, or restore eagerly"));
    }
    Ok(ioctls)
}

/// That there is something in `block` already.
pub(crate) fn not_fresh(block: &RamBlock, range: HostRange) -> Missing {
    Missing::new(
        what_lazily(block),
        format!("{range} holds something already, and what is there already is not filled"),
        "give it fresh memory: nothing written, nothing read, no MAP_POPULATE, a memfd with nothing in it",
    )
}

fn what_lazily(block: &RamBlock) -> String {
    format!("lazy restore of RAM block {:?} at {} ({:?})", block.name, block.mapping(), block.backing)
}

fn what(block: &RamBlock) -> String {
    format!("write tracking of RAM block {:?} at {} ({:?})", block.name, block.mapping(), block.backing)
}

fn explain(errno: Errno) -> (&'static str, &'static str) {
    match errno {
        Errno::EBUSY => (
            "another userfaultfd is registered there, and the kernel allows one",
            "hand that descriptor over (Tracker::from_fd; a lazy restore: LazyRestore::prepare), or wait until its user is done",
        ),
        Errno::EINVAL => (
            "the mapping is of a kind this kernel cannot write-protect, or has changed",
            "use private anonymous memory (Linux 5.7), or memfd or hugetlbfs (5.19)",
        ),
        Errno::EPERM => ("the mapping can never be written", "describe it as Treatment::ReadOnly"),
        Errno::ENOMEM => ("out of memory, or of mappings", "raise vm.max_map_count"),
        _ => ("unexpected", "report it with the kernel version"),
    }
}
