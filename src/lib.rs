//! Snapshots the memory of a running virtual machine without stopping it, and gives it back.
//!
//! The VM is paused for an instant (T0), its RAM is write-protected, and it runs on. Pages are copied in the background;
//! a vCPU that writes to a page not copied yet waits a moment, its page is copied first. The image is the memory at T0,
//! exactly, or there is no image.
//!
//! What it is not: a hypervisor. It pauses no vCPU and saves no device; the VMM does, between [`prepare`] and
//! [`Prepared::begin`].
//!
//! ```no_run
//! use std::sync::Arc;
//! use ramshot::{GuestRam, Options, Pending};
//! # struct Vm; impl Vm { fn pause(&self) {} fn save_devices(&self) -> Vec<u8> { vec![] } fn resume(&self) {} }
//! # fn embed(vm: &Vm, ram: Arc<GuestRam>) -> Result<(), Box<dyn std::error::Error>> {
//! // While the VM runs: everything that can fail or wait. Before a seccomp filter, if there is one.
//! let prepared = ramshot::prepare(&ram, "vm.ramshot", &Options::default())?;
//!
//! vm.pause();
//! let begun = prepared.begin(Pending::All, vm.save_devices()); // the only call inside the pause
//! vm.resume(); // whatever it said
//! let report = begun?.finish()?; // pages are saved while the VM runs; commits
//! println!("{} pages, {} write faults, {:?}", report.counts.total, report.counts.faults, report.total);
//! # Ok(()) }
//! ```
//!
//! # A tour
//! - [`prepare`], [`Prepared`], [`Live`], [`Report`]: the engine, as typestates around T0. [`Handle`] is for the VMM's
//!   other threads: progress, cancel, discards.
//! - [`GuestRam`], [`Region`]: guest RAM as the VMM describes it. [`probe`] and [`compatible`] say beforehand whether
//!   tracking will work, and why not.
//! - [`SnapshotFile`]: reading, verifying and restoring a snapshot. Works on every platform.
//! - [`Chain`]: an increment with all it builds on, restored in the same ways. [`flatten`], [`rebase`]: chains made shorter.
//! - [`lazy`], [`LazyRestore`]: the VM runs at once, its pages come in as it touches them.
//! - [`seccomp`]: what a filter must allow, for VMMs that have one.
//! - [`prepare_with`], [`ImageSink`], [`core`]: the parts, for a memory or a target of your own.
//! - [`sim`]: a simulated VM with a kernel that has bad days, for tests.
#![forbid(unsafe_code)]

mod costs;
mod dirty;
mod engine;
pub mod file;
mod options;
mod prepare;
mod report;
pub mod restore;
pub mod sim;
pub mod sink;
mod sync;

pub use costs::{Cost, Costs};
pub use dirty::{DirtyError, DirtyTracking};
pub use engine::{Handle, Live, Parts, Pending, Prepared, SetupFailed, SnapshotFailed, prepare_with};
pub use file::{Chain, SnapshotFile, flatten, rebase};
pub use options::{OptionError, Options};
#[cfg(all(feature = "handoff", target_os = "linux"))]
pub use os::HandoffError;
pub use os::{
    AnonymousRam, Filler, FillerOptions, GuestRam, Handoff, KvmDirtyLog, KvmDirtyRing, KvmSlot, MapTarget, Missing,
    Probe, RamError, Region, RegionFile, TrackError, Tracker, TrackerOptions, compatible, probe, seccomp,
};
pub use prepare::{PrepareError, prepare, prepare_increment};
pub use ramshot_core as core;
pub use ramshot_core::{Cause, DirtyLog, GuestAddr, HostAddr, Treatment, WhenFull};
pub use report::{Drafts, Latencies, Progress, Report};
pub use restore::{LazyOptions, LazyRestore, lazy};
pub use sink::ImageSink;

/// The README's example compiles.
#[cfg(all(doctest, feature = "vm-memory"))]
#[doc = include_str!("../README.md")]
struct Readme;

// The one place where the operating system is chosen.
#[cfg(target_os = "linux")]
use ramshot_linux as os;
#[cfg(not(target_os = "linux"))]
use ramshot_stub as os;
