//! The Linux shim of ramshot: tracks writes to guest RAM by userfaultfd write protection, and knows what guest RAM is made
//! of. It decides nothing: which page when is `ramshot-core`'s, threads and files are `ramshot`'s.
//!
//! - [`GuestRam`]: the RAM blocks of this process, what backs them, how to read and fill them.
//! - [`Tracker`]: one userfaultfd context over them; implements [`WriteTracker`](ramshot_core::WriteTracker).
//! - [`Filler`]: the way back, memory whose pages come in as they are touched; implements
//!   [`RamFiller`](ramshot_core::RamFiller).
//! - [`Handoff`]: guest RAM of another process.
//! - [`probe`], [`compatible`]: what this system offers and whether each block can be tracked, asked beforehand.
//! - [`storage`]: file access at offsets. [`memory`], [`priority`]: what the engine itself runs on.
//! - [`MapTarget`]: memory that becomes a mapping of a file.
//! - [`seccomp`]: what a filter must allow.
//!
//! All unsafe code of the project's library part stands in this crate: in `uffd` (ioctls), `mapped` (mmap), `ram` and
//! `anonymous` (guest memory by pointer), `filler`, `populated` (PAGEMAP_SCAN), `event` and `handoff` (descriptors in messages),
//! `owner` (pidfd), `storage` (statx), `dirty` (KVM's log and rings), `priority` and `memory`.
//!
//! ```
//! # use std::sync::Arc;
//! # use ramshot_core::{Event, GuestAddr, HostAddr, Treatment, WriteTracker};
//! use ramshot_linux::{GuestRam, Region, Tracker, TrackerOptions};
//!
//! # fn example(host: HostAddr) -> Result<(), Box<dyn std::error::Error>> {
//! let region = Region {
//!     name: "ram0".into(),
//!     guest: GuestAddr(0),
//!     host, // where the VMM mapped it
//!     len: 512 << 20,
//!     used: None,
//!     treatment: Treatment::Tracked,
//!     file: None,
//! };
//! // SAFETY: the VMM keeps the mapping until it has dropped `ram`.
//! let ram = Arc::new(unsafe { GuestRam::from_regions(vec![region])? });
//! let tracker = Tracker::open(Arc::clone(&ram), &TrackerOptions::default())?;
//! // ... the VM is paused ...
//! for block in ram.table().blocks() {
//!     let mut ranges = Vec::new();
//!     tracker.populated(block.used_range(), &mut |range| ranges.push(range))?;
//!     ranges.into_iter().try_for_each(|range| tracker.protect(range))?;
//! }
//! // ... the VM runs again; on the thread that serves faults: ...
//! let mut events = [Event::WriteFault { at: HostAddr(0) }; 16];
//! let count = tracker.next_events(&mut events, Some(100))?;
//! # let _ = count;
//! tracker.disarm()?;
//! # Ok(())
//! # }
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adopted;
mod aliases;
mod anonymous;
mod backing;
mod dirty;
mod error;
mod event;
mod filler;
#[cfg(feature = "vm-memory")]
mod guest_memory;
mod handoff;
mod mapped;
mod maps;
pub mod memory;
mod owner;
mod populated;
pub mod priority;
mod probe;
mod ram;
mod register;
mod relay;
pub mod seccomp;
pub mod storage;
mod storm;
mod tracker;
mod uapi;
mod uffd;

pub use anonymous::AnonymousRam;
pub use dirty::{KvmDirtyLog, KvmDirtyRing, KvmSlot};
pub use error::{Missing, RamError, TrackError};
pub use filler::{Filler, FillerOptions};
pub use handoff::Handoff;
#[cfg(feature = "handoff")]
pub use handoff::HandoffError;
pub use mapped::MapTarget;
pub use probe::{Probe, compatible, probe};
pub use ram::{GuestRam, Region, RegionFile};
pub use tracker::{Tracker, TrackerOptions};

/// Name of this shim.
pub const SYSTEM: &str = "linux";
