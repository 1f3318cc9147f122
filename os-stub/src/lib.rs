//! The shim of ramshot for systems on which writes to guest RAM cannot be tracked: the names and signatures of
//! `ramshot-linux`, so that everything builds on them. Describing guest RAM works, files work; starting says `Unsupported`.
//!
//! ```
//! use std::sync::Arc;
//! use ramshot_core::{GuestAddr, HostAddr, Treatment};
//! use ramshot_stub::{GuestRam, Region, Tracker, TrackerOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let region = Region {
//!     name: "ram0".into(),
//!     guest: GuestAddr(0),
//!     host: HostAddr(0x10_0000),
//!     len: 512 << 20,
//!     used: None,
//!     treatment: Treatment::Tracked,
//!     file: None,
//! };
//! let ram = Arc::new(GuestRam::from_regions(vec![region])?);
//! let error = Tracker::open(ram, &TrackerOptions::default()).err().expect("nothing to track with");
//! assert!(error.to_string().contains("not on this system"));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod anonymous;
mod dirty;
mod error;
mod filler;
mod handoff;
mod mapped;
pub mod memory;
pub mod priority;
mod probe;
mod ram;
pub mod seccomp;
pub mod storage;
mod tracker;

pub use anonymous::AnonymousRam;
pub use dirty::{KvmDirtyLog, KvmDirtyRing, KvmSlot};
pub use error::{Missing, RamError, TrackError};
pub use filler::{Filler, FillerOptions};
pub use handoff::Handoff;
pub use mapped::MapTarget;
pub use probe::{Probe, compatible, probe};
pub use ram::{GuestRam, Region, RegionFile};
pub use tracker::{Tracker, TrackerOptions};

/// Name of this shim.
pub const SYSTEM: &str = "stub";

/// Why nothing starts here.
pub(crate) fn unsupported(what: &str) -> Missing {
    Missing {
        what: what.to_owned(),
        why: "not on this system: ramshot tracks writes to guest RAM by userfaultfd, which only Linux has".to_owned(),
        remedy: "run the VM on Linux 5.7 or later (memfd and hugetlbfs: 5.19); snapshot files can be read, verified \
                 and converted here"
            .to_owned(),
    }
}
