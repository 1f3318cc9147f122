//! One userfaultfd context as a safe value: every ioctl of it that this crate issues.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use ramshot_core::{HostAddr, HostRange, OsError};

use crate::uapi::{
    self, UffdioApi, UffdioCopy, UffdioPoison, UffdioRange, UffdioRegister, UffdioWriteprotect, UffdioZeropage,
};

/// How a userfaultfd is got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// `/dev/userfaultfd` (6.1): permission by file mode, works where the system call is forbidden.
    Device,
    /// `userfaultfd(2)`.
    Syscall,
    /// `userfaultfd(2)` with `UFFD_USER_MODE_ONLY` (5.11): allowed to everybody, but a write by the kernel (KVM for
    /// its vCPU, read(2)) into a protected page fails instead of waiting.
    UserModeOnly,
}

impl Way {
    pub(crate) const ALL: [Self; 3] = [Self::Device, Self::Syscall, Self::UserModeOnly];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "/dev/userfaultfd",
            Self::Syscall => "userfaultfd(2)",
            Self::UserModeOnly => "userfaultfd(2), user mode only",
        })
    }
}

/// What failed, with which error number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Failed {
    pub(crate) op: &'static str,
    pub(crate) errno: Errno,
}

impl Failed {
    fn by(op: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { op, errno }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Errno prints as "EACCES: Permission denied".
        write!(f, "{}: {}", self.op, self.errno)
    }
}

/// Why a range was not filled to its end, and how far it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stopped {
    /// Bytes from its start.
    pub(crate) done: u64,
    /// EAGAIN with some bytes done means only that: the call says why when it is repeated from there.
    pub(crate) errno: Errno,
}

impl Stopped {
    /// `done` is the kernel's last field: bytes, or a negative error number.
    fn after(result: nix::Result<i32>, done: i64) -> Result<(), Self> {
        result.map(drop).map_err(|errno| Self { done: u64::try_from(done).unwrap_or(0), errno })
    }
}

/// A userfaultfd context.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

impl Uffd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// A new context, non-blocking and close-on-exec, on which UFFDIO_API has not been called.
    pub(crate) fn open(way: Way) -> Result<Self, Failed> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match way {
            Way::Device => {
                let device = File::options().read(true).write(true).open("/dev/userfaultfd").map_err(|error| {
                    Failed { op: "open /dev/userfaultfd", errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)) }
                })?;
                // SAFETY: `device` is an open descriptor; USERFAULTFD_IOC_NEW takes its flags by value. On any other
                // device than the one meant, the ioctl is unknown and fails.
                unsafe { uapi::ioctl_new(device.as_raw_fd(), flags) }.map_err(Failed::by("USERFAULTFD_IOC_NEW"))?
            }
            Way::Syscall => syscall(flags)?,
            Way::UserModeOnly => syscall(flags | uapi::UFFD_USER_MODE_ONLY)?,
        };
        // SAFETY: the kernel has just made this descriptor for us (any number is valid, 0 too); nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// UFFDIO_API with `features`; returns the features the kernel offers. With 0 it is a probe, and the context is
    /// then of use for nothing that needs a feature.
    pub(crate) fn api(&self, features: u64) -> Result<u64, Failed> {
        let mut arg = UffdioApi { api: uapi::UFFD_API, features, ioctls: 0 };
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_api`, which the kernel reads and writes.
        unsafe { uapi::ioctl_api(self.raw(), &raw mut arg) }.map_err(Failed::by("UFFDIO_API"))?;
        Ok(arg.features)
    }

    /// UFFDIO_REGISTER; returns the bits of the ioctls that work on the range.
    pub(crate) fn register(&self, range: HostRange, mode: u64) -> Result<u64, Errno> {
        let mut arg = UffdioRegister { range: uffdio_range(range), mode, ioctls: 0 };
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_register`. The range is only an address to the
        // kernel; registering changes no byte of memory.
        unsafe { uapi::ioctl_register(self.raw(), &raw mut arg) }?;
        Ok(arg.ioctls)
    }

    /// UFFDIO_UNREGISTER. Lifts the protection, but does not wake who waits for a write (6.18): see
    /// [`wake`](Self::wake).
    pub(crate) fn unregister(&self, range: HostRange) -> Result<(), Errno> {
        let arg = uffdio_range(range);
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_range`, which the kernel only reads.
        unsafe { uapi::ioctl_unregister(self.raw(), &raw const arg) }.map(drop)
    }

    /// UFFDIO_WAKE: whoever is blocked in the range tries again. The range need not be registered, nor mapped, any more.
    pub(crate) fn wake(&self, range: HostRange) -> Result<(), Errno> {
        let arg = uffdio_range(range);
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_range`, which the kernel only reads.
        unsafe { uapi::ioctl_wake(self.raw(), &raw const arg) }.map(drop)
    }

    /// UFFDIO_WRITEPROTECT: protects, or lifts the protection and wakes.
    pub(crate) fn write_protect(&self, range: HostRange, on: bool) -> Result<(), Errno> {
        let mode = if on { uapi::WRITEPROTECT_MODE_WP } else { 0 };
        let mut arg = UffdioWriteprotect { range: uffdio_range(range), mode };
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_writeprotect`. Protecting changes no byte: at
        // worst a writer waits.
        unsafe { uapi::ioctl_writeprotect(self.raw(), &raw mut arg) }.map(drop)
    }

    /// UFFDIO_COPY: puts `bytes` at `at`, where no page may be, write-protected if that is wanted, and wakes who waits there.
    pub(crate) fn copy(&self, at: HostAddr, bytes: &[u8], protected: bool) -> Result<(), Stopped> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        // The kernel reads through the address.
        let src = u64::try_from(bytes.as_ptr().expose_provenance()).unwrap_or(0);
        let mode = if protected { uapi::COPY_MODE_WP } else { 0 };
        let mut arg = UffdioCopy { dst: at.0, src, len, mode, done: 0 };
        // SAFETY: the descriptor is open, `arg` is a live `uffdio_copy`, `bytes` is readable for `len` bytes. The kernel
        // writes only where no page is in a mapping that is registered here, so nobody has read those bytes: who tried
        // to is blocked.
        let result = unsafe { uapi::ioctl_copy(self.raw(), &raw mut arg) };
        Stopped::after(result, arg.done)
    }

    /// UFFDIO_ZEROPAGE: puts zeros into `range`, where no page may be, and wakes who waits there. Not for hugetlbfs.
    pub(crate) fn zeropage(&self, range: HostRange) -> Result<(), Stopped> {
        let mut arg = UffdioZeropage { range: uffdio_range(range), mode: 0, done: 0 };
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_zeropage`. Writes only where no page is, as `copy`.
        let result = unsafe { uapi::ioctl_zeropage(self.raw(), &raw mut arg) };
        Stopped::after(result, arg.done)
    }

    /// UFFDIO_POISON (6.6): accesses to `range`, where no page may be, fail from now on; wakes who waits there.
    pub(crate) fn poison(&self, range: HostRange) -> Result<(), Stopped> {
        let mut arg = UffdioPoison { range: uffdio_range(range), mode: 0, done: 0 };
        // SAFETY: the descriptor is open and `arg` is a live `uffdio_poison`. No byte changes that anybody can have read.
        let result = unsafe { uapi::ioctl_poison(self.raw(), &raw mut arg) };
        Stopped::after(result, arg.done)
    }

    /// Reads messages, as many as there are and fit; EAGAIN if there is none.
    pub(crate) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.0, into)
    }

    /// Another descriptor of the same context.
    pub(crate) fn duplicate(&self) -> Result<Self, OsError> {
        let failed = |error: std::io::Error| OsError::new("fcntl F_DUPFD_CLOEXEC", error.raw_os_error().unwrap_or(0));
        self.0.try_clone().map(Self).map_err(failed)
    }

    /// The descriptor.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn uffdio_range(range: HostRange) -> UffdioRange {
    UffdioRange { start: range.start.0, len: range.len }
}

fn syscall(flags: i32) -> Result<RawFd, Failed> {
    // SAFETY: userfaultfd(2) takes its flags by value and touches no memory of ours.
    let fd =
        Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).map_err(Failed::by("userfaultfd"))?;
    RawFd::try_from(fd).map_err(|_| Failed { op: "userfaultfd", errno: Errno::EOVERFLOW })
}
