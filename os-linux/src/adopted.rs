//! A userfaultfd that somebody else has made: whether it will do, and what it can.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use ramshot_core::OsError;

use crate::error::Missing;
use crate::probe;
use crate::uapi;
use crate::uffd::{Uffd, Way};

/// A userfaultfd that reports faults, of whatever process. Closing the last descriptor of it ends all registrations, and what is
/// missing reads as zeros.
#[derive(Debug)]
pub(crate) struct Adopted {
    uffd: Uffd,
    features: u64,
}

impl Adopted {
    /// Takes it over. It is made non-blocking, for all who have it.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, Missing> {
        let unsuitable =
            |why: String, remedy: &str| Err(Missing::new("the userfaultfd handed over", why, remedy.to_owned()));
        let Some(enabled) = features_of(&fd) else {
            return unsuitable(
                "/proc/self/fdinfo does not show it to be a userfaultfd on which UFFDIO_API was called".into(),
                "call UFFDIO_API on it, with PAGEFAULT_FLAG_WP",
            );
        };
        for (bit, name) in [(uapi::FEATURE_WP_ASYNC, "WP_ASYNC"), (uapi::FEATURE_SIGBUS, "SIGBUS")] {
            if enabled & bit != 0 {
                return unsuitable(
                    format!("it was opened with UFFD_FEATURE_{name}, under which no write fault is reported"),
                    "open it without; the features of a context cannot be changed",
                );
            }
        }
        let heard = uapi::FEATURE_EVENT_REMOVE | uapi::FEATURE_EVENT_UNMAP | uapi::FEATURE_EVENT_REMAP;
        if enabled & heard != heard {
            log::warn!(
                target: "ramshot::track",
                "the userfaultfd handed over has features {enabled:#x}: some discards and unmappings will go unnoticed"
            );
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let set = flags.and_then(|flags| fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)));
        if let Err(errno) = set {
            return unsuitable(format!("fcntl O_NONBLOCK: {errno}"), "hand over one that is non-blocking");
        }
        // What a context can do is what the kernel can; only what it reports is what was asked for (5.7 to 6.18). Where none
        // can be opened here, registering will tell.
        let offered = Way::ALL.into_iter().find_map(|way| probe::offered(way).ok()).unwrap_or(u64::MAX);
        Ok(Self { uffd: Uffd::new(fd), features: enabled | (offered & CAN_DO) })
    }

    /// Another descriptor of it, and what it can do.
    pub(crate) fn duplicate(&self) -> Result<(Uffd, u64), OsError> {
        Ok((self.uffd.duplicate()?, self.features))
    }

    /// What it can do.
    pub(crate) const fn features(&self) -> u64 {
        self.features
    }

    /// The descriptor, and what it can do.
    pub(crate) fn into_parts(self) -> (Uffd, u64) {
        (self.uffd, self.features)
    }
}

/// Features that say what the kernel can do, and change nothing when they are asked for.
const CAN_DO: u64 = uapi::FEATURE_PAGEFAULT_FLAG_WP
    | uapi::FEATURE_WP_HUGETLBFS_SHMEM
    | uapi::FEATURE_MISSING_SHMEM
    | uapi::FEATURE_MISSING_HUGETLBFS
    | uapi::FEATURE_POISON;

/// The features of a userfaultfd that somebody else initialised, from `/proc/self/fdinfo`; `None` if it is none or
/// its UFFDIO_API has not been called.
fn features_of(fd: impl AsFd) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let text = std::io::read_to_string(File::open(path).ok()?).ok()?;
    parse_fdinfo(&text)
}

/// `API:\taa:80001055:80000000000001ff`: version, features enabled, features the kernel has.
fn parse_fdinfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("API:"))?;
    let features = u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok()?;
    (features & uapi::FEATURE_INITIALIZED != 0).then_some(features & !uapi::FEATURE_INITIALIZED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_found_in_fdinfo() {
        let text = |features: &str| format!("pos:\t0\nflags:\t02004000\nAPI:\taa:{features}:80000000000001ff\n\n");
        assert_eq!(parse_fdinfo(&text("80001055")), Some(0x1055));
        assert_eq!(parse_fdinfo(&text("0")), None, "UFFDIO_API not called");
        assert_eq!(parse_fdinfo("pos:\t0\n"), None);
        assert_eq!(parse_fdinfo("API:\taa\n"), None);
    }
}
