//! Whose memory guest RAM is: this process's, or that of another one, which has handed it over.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use ramshot_core::{HostAddr, HostRange, OsError};

use crate::adopted::Adopted;
use crate::error::{Missing, RamError, TrackError};
use crate::maps::{self, Detail};
use crate::uapi;
use crate::uffd::Uffd;

/// The process that guest RAM is mapped in.
#[derive(Clone, Debug)]
pub(crate) enum Owner {
    Us,
    Other(Arc<Other>),
}

/// Another process, and its userfaultfd: from outside no other can be made for its memory.
#[derive(Debug)]
pub(crate) struct Other {
    pid: Pid,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
    /// `/proc/PID`. Stays that process's, whoever has its number later.
    proc: File,
    adopted: Adopted,
    /// Two readers would take each other's faults.
    in_use: AtomicBool,
}

/// A context that was handed over.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) uffd: Uffd,
    pub(crate) features: u64,
    /// As long as it is in use.
    pub(crate) lease: Lease,
}

/// The right to use the context that was handed over.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Other>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.in_use.store(false, Ordering::Release);
    }
}

/// What is registered in a process.
pub(crate) struct Registrations(Vec<Detail>);

impl Registrations {
    /// The modes in which any of `range` is.
    pub(crate) fn modes(&self, range: HostRange) -> u64 {
        let over = |flag| self.0.iter().any(|detail| detail.range.overlaps(range) && detail.has(flag));
        let mode = |flag, mode| if over(flag) { mode } else { 0 };
        mode("um", uapi::REGISTER_MODE_MISSING)
            | mode("ui", uapi::REGISTER_MODE_MINOR)
            | mode("uw", uapi::REGISTER_MODE_WP)
    }
}

impl Owner {
    /// The process with this number, whose memory `userfaultfd` is about.
    pub(crate) fn other(pid: u32, userfaultfd: OwnedFd) -> Result<Self, RamError> {
        let failed = |what, source, remedy| RamError::Process { pid, what, source, remedy };
        let gone = "it has ended, or runs in another PID namespace: pass its number as this process sees it";
        let numbered = i32::try_from(pid).ok().filter(|&pid| pid > 0);
        let raw = numbered.ok_or_else(|| failed("find", io::Error::from(io::ErrorKind::InvalidInput), gone))?;
        let pidfd = pidfd_open(raw).map_err(|errno| failed("find", errno.into(), gone))?;
        let proc = File::open(format!("/proc/{pid}")).map_err(|source| failed("find", source, gone))?;
        let adopted = Adopted::new(userfaultfd).map_err(RamError::Unsupported)?;
        let other = Other { pid: Pid::from_raw(raw), pidfd, proc, adopted, in_use: AtomicBool::new(false) };
        let owner = Self::Other(Arc::new(other));
        // What process_vm_readv asks for, without reading a page that may be missing.
        File::open(owner.proc("mem")).map_err(|source| {
            let remedy = "run as the same user with CAP_SYS_PTRACE, or have that process call \
                          prctl(PR_SET_PTRACER) for this one; and it must be dumpable";
            failed("read the memory of", source, remedy)
        })?;
        Ok(owner)
    }

    pub(crate) fn is_us(&self) -> bool {
        matches!(self, Self::Us)
    }

    /// A file of its directory in `/proc`.
    pub(crate) fn proc(&self, name: &str) -> PathBuf {
        match self {
            Self::Us => PathBuf::from(format!("/proc/self/{name}")),
            Self::Other(other) => PathBuf::from(format!("/proc/self/fd/{}/{name}", other.proc.as_raw_fd())),
        }
    }

    /// The same, as a person knows it.
    pub(crate) fn proc_name(&self, name: &str) -> String {
        match self {
            Self::Us => format!("/proc/self/{name}"),
            Self::Other(other) => format!("/proc/{}/{name}", other.pid),
        }
    }

    /// Whether it is another process that has ended: nothing is registered there any more, and nobody blocked.
    pub(crate) fn has_ended(&self) -> bool {
        match self {
            Self::Us => false,
            Self::Other(other) => other.has_ended(),
        }
    }

    /// Readable once it has ended.
    pub(crate) fn ending(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Us => None,
            Self::Other(other) => Some(other.pidfd.as_fd()),
        }
    }

    /// The context that was handed over, for one user at a time; `None` where one has to be opened.
    pub(crate) fn context(&self) -> Result<Option<Context>, TrackError> {
        let Self::Other(other) = self else { return Ok(None) };
        if other.in_use.swap(true, Ordering::AcqRel) {
            let (why, remedy) = ("another snapshot or lazy restore uses it", "wait until that is over");
            return Err(TrackError::Unsuitable(Missing::new("the userfaultfd handed over", why, remedy)));
        }
        let lease = Lease(Arc::clone(other));
        let (uffd, features) = other.adopted.duplicate()?;
        Ok(Some(Context { uffd, features, lease }))
    }

    /// What the context that was handed over can do.
    pub(crate) fn features(&self) -> Option<u64> {
        match self {
            Self::Us => None,
            Self::Other(other) => Some(other.adopted.features()),
        }
    }

    /// With which modes what is registered.
    pub(crate) fn registrations(&self) -> io::Result<Registrations> {
        maps::read_details(self).map(Registrations)
    }

    /// That registering `ranges` with `mode` has shown in that process. The descriptor of a third process would have
    /// registered memory of that one.
    pub(crate) fn check_registered(&self, ranges: &[HostRange], mode: u64) -> Result<(), TrackError> {
        let Self::Other(other) = self else { return Ok(()) };
        let why = match self.registrations() {
            Ok(found) => match ranges.iter().find(|range| found.modes(**range) & mode == 0) {
                None => return Ok(()),
                Some(range) => format!(
                    "registering {range} did not show in process {}: it is about the memory of another one",
                    other.pid
                ),
            },
            Err(error) => format!("what is registered in process {} cannot be read: {error}", other.pid),
        };
        let remedy = "have the process that made it hand it over itself, or pass that one's number";
        Err(TrackError::Unsuitable(Missing::new("the userfaultfd handed over", why, remedy)))
    }

    /// Reads its memory, as it is now.
    pub(crate) fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        const OP: &str = "process_vm_readv";
        let range = HostRange::new(from, u64::try_from(into.len()).unwrap_or(u64::MAX));
        let failed = |errno: Errno| Err(OsError::new(OP, errno as i32).on(range));
        let Self::Other(other) = self else { return failed(Errno::EINVAL) };
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let Some(base) = usize::try_from(from.0).ok().and_then(|from| from.checked_add(done)) else {
                return failed(Errno::EFAULT);
            };
            let remote = [RemoteIoVec { base, len: rest.len() }];
            match process_vm_readv(other.pid, &mut [IoSliceMut::new(rest)], &remote) {
                Ok(0) => return failed(Errno::EFAULT),
                Ok(got) => done += got,
                Err(Errno::EINTR) => {}
                Err(errno) => return failed(errno),
            }
        }
        // It was that process and not one that has got its number since: that takes that it has ended.
        if other.has_ended() { failed(Errno::ESRCH) } else { Ok(()) }
    }
}

impl Other {
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // An error would be one of memory.
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

/// `pidfd_open` (Linux 5.3), close-on-exec.
fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes a number and flags by value and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
