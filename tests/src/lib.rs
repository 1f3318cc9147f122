//! The test VM of ramshot: a small VMM, foreign to the library, and a guest that checks its own memory.
//!
//! It knows nothing of snapshots. It has guest RAM ([`Memory`]) and a guest in it ([`Guest`]): a KVM virtual machine that
//! runs the image of `ramshot-images` ([`KvmGuest`]), or, where there is no KVM, threads of this process that do the same
//! ([`ThreadGuest`]). Both can be paused, saved, restored, asked for their statistics and told to check themselves.
//!
//! ```no_run
//! use std::time::Duration;
//! use ramshot_tests::{Accel, Backing, GuestConfig, Memory, new_guest};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = GuestConfig { vcpus: 2, ..GuestConfig::default() };
//! let guest = new_guest(Accel::Kvm, Memory::new(512 << 20, Backing::Anon)?, config)?;
//! guest.start()?;
//! guest.pause()?;
//! let (state, ram) = (guest.save_state()?, guest.memory().copy()?);
//! guest.resume()?;
//!
//! let memory = Memory::new(512 << 20, Backing::Anon)?;
//! memory.paste(&ram)?;
//! let again = new_guest(Accel::Kvm, memory, config)?;
//! again.restore(&state)?;
//! again.resume()?;
//! assert!(again.self_check(Duration::from_secs(30))?.is_ok());
//! # Ok(()) }
//! ```

pub mod chaos;
mod gate;
mod guest;
mod hugepages;
#[cfg(target_arch = "x86_64")]
mod kvm;
#[cfg(target_arch = "x86_64")]
mod loader;
mod memory;
mod scratch;
pub mod snapshot_run;
#[cfg(target_arch = "x86_64")]
mod state;
mod stats;
mod threads;
#[cfg(target_arch = "x86_64")]
mod vcpu;
pub mod verify;
mod worker;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use guest::{CheckReport, Guest, GuestConfig, GuestError, Talk, Workload};
#[cfg(target_arch = "x86_64")]
pub use kvm::{KvmGuest, kvm_unavailable};
pub use memory::{Backing, HOLE_END, HOLE_START, HUGE_PAGE, Memory, MemoryError, RegionInfo};
pub use scratch::Scratch;
pub use stats::{Gaps, GuestStats, RateSlot, VcpuStats};
pub use threads::ThreadGuest;

/// Who runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accel {
    /// A KVM virtual machine.
    Kvm,
    /// Threads of this process.
    Threads,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Threads => "threads",
        })
    }
}

impl FromStr for Accel {
    type Err = GuestError;

    fn from_str(s: &str) -> Result<Self, GuestError> {
        match s {
            "kvm" => Ok(Self::Kvm),
            "threads" => Ok(Self::Threads),
            _ => Err(GuestError::Config(format!("unknown accelerator {s:?}: it is one of kvm, threads"))),
        }
    }
}

/// Why a KVM guest cannot run here, or `None` if it can.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn kvm_unavailable() -> Option<String> {
    Some("the test VM runs on x86-64 only".to_owned())
}

/// A guest in `memory`, not started.
///
/// # Errors
/// The configuration makes no sense, or KVM cannot be used ([`kvm_unavailable`] says so beforehand).
pub fn new_guest(accel: Accel, memory: Arc<Memory>, config: GuestConfig) -> Result<Box<dyn Guest>, GuestError> {
    match accel {
        #[cfg(target_arch = "x86_64")]
        Accel::Kvm => Ok(Box::new(KvmGuest::new(memory, config)?)),
        #[cfg(not(target_arch = "x86_64"))]
        Accel::Kvm => Err(GuestError::Config(kvm_unavailable().unwrap_or_default())),
        Accel::Threads => Ok(Box::new(ThreadGuest::new(memory, config)?)),
    }
}
