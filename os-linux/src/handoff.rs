//! Guest RAM handed over from one process to another.

#[cfg(feature = "handoff")]
mod wire;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ramshot_core::{HostRange, OsError, Treatment};

use crate::error::TrackError;
use crate::owner::Owner;
use crate::probe::{self, WANTED};
use crate::ram::Region;
use crate::uffd::Uffd;
use crate::{event, maps, uapi};

#[cfg(feature = "handoff")]
pub use wire::HandoffError;

/// A VM's memory and its userfaultfd, handed over by the process that runs it to one that snapshots and restores it.
///
/// ```text
///   VMM: maps RAM, Handoff::of_this_process ── Handoff::send ──▶ handler: Handoff::receive, GuestRam::from_handoff
///   its vCPUs wait in the kernel            ◀── faults served ── prepare, lazy: as for memory of its own
/// ```
/// It is neutral: how it gets to the other process is the VMM's. With feature `handoff` it goes over a Unix socket, in the
/// form of Firecracker's page fault handlers.
///
/// # What differs from memory of this process
/// - **If the handler dies while a snapshot runs,** and the VMM has closed its own descriptor, the kernel lifts every protection
///   and the VM runs on. A VMM that keeps it calls [`lift_protection`](Self::lift_protection) when it notices.
/// - **If the handler dies while a restore runs,** and the VMM has closed its own descriptor, what is not in reads as zeros.
///   So the VMM keeps it until the restore is over; then whoever touches a page that is not in waits, and the VM has
///   to be ended.
/// - **If the VMM dies,** the snapshot fails, no image is left, and the handler's calls return.
/// - Reading is by system call: see [`GuestRam::from_handoff`](crate::GuestRam::from_handoff) for what it takes. A
///   [`KvmDirtyLog`](crate::KvmDirtyLog) or [`KvmDirtyRing`](crate::KvmDirtyRing) belongs to the process that has the VM, so increments take a
///   [`DirtyLog`](ramshot_core::DirtyLog) of your own.
#[derive(Debug)]
pub struct Handoff {
    /// The process whose memory it is, as the one that takes over sees it.
    pub pid: u32,
    /// Its userfaultfd, on which UFFDIO_API was called, without SIGBUS and WP_ASYNC. Its owner asks for PAGEFAULT_FLAG_WP and the
    /// events REMOVE, UNMAP and REMAP: without them discards under a snapshot go unnoticed. Blocks may be registered for
    /// missing pages already; before a restore they should be.
    pub userfaultfd: OwnedFd,
    /// Guest RAM, at the addresses of that process, with the files behind it where there are any.
    pub regions: Vec<Region>,
}

impl Handoff {
    /// For the memory of this process: opens a userfaultfd with what snapshots and restores need. With `missing`, what
    /// is not there of the regions is registered as missing: from then on who touches it waits for the one who takes over.
    ///
    /// # Errors
    /// What is missing.
    pub fn of_this_process(regions: Vec<Region>, missing: bool) -> Result<Self, TrackError> {
        let wanted = WANTED | uapi::FEATURE_MISSING_SHMEM | uapi::FEATURE_MISSING_HUGETLBFS | uapi::FEATURE_POISON;
        let (uffd, _) = probe::open_context(wanted, false)?;
        if missing {
            for region in regions.iter().filter(|region| region.treatment != Treatment::Ignored) {
                let range = HostRange::new(region.host, region.len);
                // Closing the context ends what was registered so far.
                uffd.register(range, uapi::REGISTER_MODE_MISSING)
                    .map_err(|errno| OsError::new("UFFDIO_REGISTER", errno as i32).on(range))?;
            }
        }
        Ok(Self { pid: std::process::id(), userfaultfd: uffd.into_fd(), regions })
    }

    /// Lifts every write protection and wakes everybody: the process that took over has died, and this one has kept its
    /// descriptor. Missing pages stay missing. Only in the process whose memory it is.
    ///
    /// # Errors
    /// The first error met; the rest is lifted all the same.
    pub fn lift_protection(&self) -> Result<(), OsError> {
        let failed = |error: std::io::Error| OsError::new("fcntl F_DUPFD_CLOEXEC", error.raw_os_error().unwrap_or(0));
        let uffd = Uffd::new(self.userfaultfd.try_clone().map_err(failed)?);
        let mut first = Ok(());
        for region in &self.regions {
            first = first.and(lift(&uffd, HostRange::new(region.host, region.len)));
        }
        first
    }
}

/// How long lifting waits for mappings that are being changed.
const PATIENCE: Duration = Duration::from_secs(1);

fn lift(uffd: &Uffd, range: HostRange) -> Result<(), OsError> {
    let failed = |errno: Errno| OsError::new("UFFDIO_WRITEPROTECT", errno as i32).on(range);
    let registered = maps::read_details(&Owner::Us)
        .map_err(|error| OsError::new("reading /proc/self/smaps", error.raw_os_error().unwrap_or(0)))?;
    let begun = Instant::now();
    for piece in registered.iter().filter(|detail| detail.has("uw")) {
        let Some(piece) = maps::intersection(piece.range, range) else { continue };
        loop {
            // Who changes the mappings waits until somebody reads of it.
            while event::read_now(uffd, usize::MAX, &mut |_| {})? > 0 {}
            match uffd.write_protect(piece, false) {
                Ok(()) => break,
                Err(Errno::EAGAIN) if begun.elapsed() < PATIENCE => std::thread::yield_now(),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
    // Also those of whom the one that died had read.
    uffd.wake(range).map_err(failed)
}
