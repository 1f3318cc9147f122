//! What this system offers, asked beforehand at no cost: on throw-away contexts, with nothing protected.

use std::fmt;

use nix::errno::Errno;
use ramshot_core::{Backing, BlockIndex, RamBlock, Treatment};

use crate::error::{Missing, TrackError};
use crate::owner::Owner;
use crate::populated::PageTable;
use crate::ram::GuestRam;
use crate::register::{check_backing, check_block, register};
use crate::uapi;
use crate::uffd::{Failed, Uffd, Way};

/// The features that matter to a snapshot, by name, with the kernel that brought each and what it is for.
const FEATURES: [(u64, &str, &str, &str); 9] = [
    (uapi::FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP", "5.7 (aarch64: 6.10)", "tracking writes at all"),
    (uapi::FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM", "5.19", "tracking writes to memfd, tmpfs and hugetlbfs"),
    (uapi::FEATURE_EVENT_REMOVE, "EVENT_REMOVE", "4.11", "noticing discards under a snapshot"),
    (uapi::FEATURE_EVENT_UNMAP, "EVENT_UNMAP", "4.11", "noticing that a block goes away"),
    (uapi::FEATURE_EVENT_REMAP, "EVENT_REMAP", "4.11", "noticing that a block is moved"),
    (uapi::FEATURE_THREAD_ID, "THREAD_ID", "4.14", "naming the thread that waits"),
    (uapi::FEATURE_EXACT_ADDRESS, "EXACT_ADDRESS", "5.18", "the address within the page"),
    (
        uapi::FEATURE_WP_UNPOPULATED,
        "WP_UNPOPULATED",
        "6.4",
        "protecting absent anonymous pages (not needed: they are zero)",
    ),
    (uapi::FEATURE_WP_ASYNC, "WP_ASYNC", "6.7", "dirty tracking without faults"),
];

/// What a tracker switches on where the kernel has it. Not WP_UNPOPULATED: absent anonymous memory is zero at T0 and
/// never pending. Not WP_ASYNC and SIGBUS: with them no fault is reported.
pub(crate) const WANTED: u64 = uapi::FEATURE_PAGEFAULT_FLAG_WP
    | uapi::FEATURE_WP_HUGETLBFS_SHMEM
    | uapi::FEATURE_EVENT_REMOVE
    | uapi::FEATURE_EVENT_UNMAP
    | uapi::FEATURE_EVENT_REMAP
    | uapi::FEATURE_THREAD_ID
    | uapi::FEATURE_EXACT_ADDRESS;

/// What write tracking this system has. [`Display`](fmt::Display) prints it as a list for a person.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Each way to a userfaultfd, with the features it offers or why it does not open.
    ways: Vec<(Way, Result<u64, Failed>)>,
    scan: Result<(), Errno>,
    missing: Vec<Missing>,
}

/// Asks the kernel what it offers. Never fails: what is not there is in [`Probe::missing`].
#[must_use]
pub fn probe() -> Probe {
    let ways: Vec<_> = Way::ALL.into_iter().map(|way| (way, offered(way))).collect();
    let scan = PageTable::open(&Owner::Us).scan;
    let mut probe = Probe { ways, scan, missing: Vec::new() };
    probe.missing = probe.find_missing();
    probe
}

/// The features the kernel offers that way.
pub(crate) fn offered(way: Way) -> Result<u64, Failed> {
    Uffd::open(way)?.api(0)
}

/// A context that has of `wanted` what the kernel offers, and what that is. `/dev/userfaultfd` is tried first, then the
/// system call, on any failure; the one of user mode only last, if it is allowed.
pub(crate) fn open_context(wanted: u64, user_mode_only: bool) -> Result<(Uffd, u64), TrackError> {
    let mut failures = Vec::new();
    for way in Way::ALL.into_iter().filter(|&way| way != Way::UserModeOnly || user_mode_only) {
        let open = || {
            let features = offered(way)? & wanted;
            let uffd = Uffd::open(way)?;
            uffd.api(features)?;
            Ok((uffd, features))
        };
        match open() {
            Ok((uffd, features)) => {
                log::debug!(target: "ramshot::track", "opened {way}, features {features:#x}");
                if way == Way::UserModeOnly {
                    log::warn!(target: "ramshot::track", "user mode only: accesses by the kernel (KVM) will fail");
                }
                return Ok((uffd, features));
            }
            Err(failed) => failures.push((way, failed)),
        }
    }
    Err(TrackError::Unavailable(unavailable(&failures, user_mode_only)))
}

impl Probe {
    /// Whether writes to some kind of guest RAM can be tracked, those of a KVM guest included.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.can_track(Backing::Anonymous).is_ok()
    }

    /// Whether writes to this kind of memory can be tracked.
    ///
    /// # Errors
    /// What is missing.
    pub fn can_track(&self, backing: Backing) -> Result<(), Missing> {
        let what = format!("write tracking of {backing:?} memory");
        match self.features() {
            Some(features) => check_backing(what, backing, features),
            None => Err(unavailable(&self.failures(), false)),
        }
    }

    /// Everything that is not there, with the reason and the way out; the grave things first.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// What a context that serves KVM guests offers.
    fn features(&self) -> Option<u64> {
        self.ways.iter().filter(|(way, _)| *way != Way::UserModeOnly).find_map(|(_, offer)| offer.ok())
    }

    fn failures(&self) -> Vec<(Way, Failed)> {
        self.ways.iter().filter_map(|(way, offer)| Some((*way, offer.err()?))).collect()
    }

    fn find_missing(&self) -> Vec<Missing> {
        let mut missing = Vec::new();
        match self.features() {
            None => missing.push(unavailable(&self.failures(), false)),
            Some(features) => {
                for (bit, name, since, purpose) in FEATURES {
                    if features & bit == 0 {
                        missing.push(no_feature(name, purpose, since));
                    }
                }
            }
        }
        if let Err(errno) = self.scan {
            missing.push(Missing::new(
                "PAGEMAP_SCAN",
                format!("{errno}"),
                "Linux 6.7 has it; without, what is resident is read entry by entry, slowly for large sparse guests",
            ));
        }
        missing
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (way, offer) in &self.ways {
            match offer {
                Ok(_) => writeln!(f, "  yes  {way}")?,
                Err(failed) => writeln!(f, "  no   {way} ({failed})")?,
            }
        }
        let features = self.features().unwrap_or(0);
        for (bit, name, since, purpose) in FEATURES {
            let answer = if features & bit != 0 { "yes" } else { "no " };
            writeln!(f, "  {answer}  {name} (Linux {since}): {purpose}")?;
        }
        match self.scan {
            Ok(()) => writeln!(f, "  yes  PAGEMAP_SCAN (Linux 6.7): finding resident pages fast")?,
            Err(errno) => writeln!(f, "  no   PAGEMAP_SCAN (Linux 6.7; {errno}): finding resident pages fast")?,
        }
        for missing in &self.missing {
            writeln!(f, "missing: {missing}")?;
        }
        Ok(())
    }
}

fn no_feature(name: &str, purpose: &str, since: &str) -> Missing {
    Missing::new(
        format!("UFFD_FEATURE_{name} ({purpose})"),
        "the kernel does not offer it",
        format!("it takes Linux {since} or later, built with CONFIG_USERFAULTFD"),
    )
}

/// That no way leads to a userfaultfd.
pub(crate) fn unavailable(attempts: &[(Way, Failed)], user_mode_tried: bool) -> Missing {
    let tried: Vec<_> = attempts
        .iter()
        .filter(|(way, _)| user_mode_tried || *way != Way::UserModeOnly)
        .map(|(way, failed)| format!("{way}: {failed}"))
        .collect();
    let mut remedy = String::from(
        "give the process access to /dev/userfaultfd (Linux 6.1), or CAP_SYS_PTRACE, or set \
         vm.unprivileged_userfaultfd=1, and allow it in the seccomp filter",
    );
    if !user_mode_tried {
        remedy.push_str("; if no writes but those of this process's own threads matter (no KVM), allow user_mode_only");
    }
    Missing::new("userfaultfd", tried.join("; "), remedy)
}

/// Whether each block could be tracked now, without starting anything: block by block it is registered on a throw-away
/// context and unregistered again. Blocks that a snapshot does not track are fine as they are.
///
/// A VM whose RAM is registered with a userfaultfd already (a lazy restore still running) is answered with EBUSY: hand that
/// descriptor to [`Tracker::from_fd`](crate::Tracker::from_fd).
#[must_use]
pub fn compatible(ram: &GuestRam) -> Vec<(BlockIndex, Result<(), Missing>)> {
    if !ram.owner().is_us() {
        return compatible_over_there(ram);
    }
    let context = throw_away();
    let verdict = |block: &RamBlock| {
        if block.treatment != Treatment::Tracked {
            return Ok(());
        }
        let (uffd, features) = context.as_ref().map_err(Clone::clone)?;
        check_block(block, *features)?;
        register(uffd, block, 0)?;
        // Nothing is protected, so there is nothing this can fail to lift; closing the context would do as well.
        let _ = uffd.unregister(block.mapping());
        Ok(())
    };
    ram.table().iter().map(|(index, block)| (index, verdict(block))).collect()
}

/// Of another process only what its context can do is asked, and nothing is registered on it: it may be in use.
fn compatible_over_there(ram: &GuestRam) -> Vec<(BlockIndex, Result<(), Missing>)> {
    let features = ram.owner().features().unwrap_or(0);
    let verdict = |block: &RamBlock| match block.treatment {
        Treatment::Tracked => check_block(block, features),
        _ => Ok(()),
    };
    ram.table().iter().map(|(index, block)| (index, verdict(block))).collect()
}

/// A context without events: nobody reads it.
fn throw_away() -> Result<(Uffd, u64), Missing> {
    let mut failures = Vec::new();
    for way in [Way::Device, Way::Syscall] {
        let open = || {
            let wanted = offered(way)? & (uapi::FEATURE_PAGEFAULT_FLAG_WP | uapi::FEATURE_WP_HUGETLBFS_SHMEM);
            let uffd = Uffd::open(way)?;
            uffd.api(wanted)?;
            Ok((uffd, wanted))
        };
        match open() {
            Ok(context) => return Ok(context),
            Err(failed) => failures.push((way, failed)),
        }
    }
    Err(unavailable(&failures, false))
}
