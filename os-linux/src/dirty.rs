//! KVM's dirty log: which guest memory the vCPUs, and KVM itself, have written.

mod ring;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use ramshot_core::{DirtyLog, HostAddr, HostRange, OsError, PAGE_SIZE};

use crate::uapi::{self, KvmDirtyLogArg};

pub use ring::KvmDirtyRing;

/// A memory slot of a KVM VM, as the VMM registered it (`KVM_SET_USER_MEMORY_REGION`) with `KVM_MEM_LOG_DIRTY_PAGES`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvmSlot {
    /// Number of the slot, address space in the upper half.
    pub slot: u32,
    /// Where it is mapped in this process.
    pub host: HostAddr,
    /// Its length in bytes.
    pub len: u64,
}

/// The dirty log of a KVM VM (`KVM_GET_DIRTY_LOG`). Reading it protects the pages again that were reported, in KVM's own
/// page tables: the first write to each then costs the vCPU a fault inside the kernel (4 to 5 us).
///
/// The VMM switches logging on, slot by slot, with the flag `KVM_MEM_LOG_DIRTY_PAGES`. It splits KVM's huge mappings. It
/// does not see what the VMM itself writes: that is for [`DirtyTracking::mark`] or a bitmap of the VMM's own. A VM that
/// uses the dirty *ring* has no dirty log: [`KvmDirtyRing`].
///
/// [`DirtyTracking::mark`]: https://docs.rs/ramshot
pub struct KvmDirtyLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    /// What the kernel fills; large enough for the largest slot.
    bitmap: Mutex<Vec<u64>>,
}

impl KvmDirtyLog {
    /// The log of the VM behind `vm`, whose descriptor is duplicated, for these slots.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn new(vm: impl AsFd, slots: Vec<KvmSlot>) -> std::io::Result<Self> {
        let words = slots.iter().map(|slot| words(slot.len)).max().unwrap_or(0);
        Ok(Self { vm: vm.as_fd().try_clone_to_owned()?, slots, bitmap: Mutex::new(vec![0; words]) })
    }
}

/// Words that the kernel fills for a slot of `len` bytes.
fn words(len: u64) -> usize {
    usize::try_from(len.div_ceil(PAGE_SIZE).div_ceil(64)).unwrap_or(usize::MAX)
}

impl DirtyLog for KvmDirtyLog {
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let mut bitmap = self.bitmap.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in &self.slots {
            let used = words(slot.len);
            let Some(map) = bitmap.get_mut(..used) else { continue };
            map.fill(0);
            let arg = KvmDirtyLogArg { slot: slot.slot, padding: 0, bitmap: map.as_mut_ptr() as u64 };
            // SAFETY: the descriptor is open; the kernel reads `arg` and fills the bitmap of the slot, of which `map` has
            // one bit for each page of the length that the VMM gave. A descriptor that is no VM answers ENOTTY.
            let done = unsafe { uapi::ioctl_get_dirty_log(self.vm.as_raw_fd(), &raw const arg) };
            if let Err(errno) = done {
                let range = HostRange::new(slot.host, slot.len);
                let op = match errno {
                    Errno::ENOENT => "KVM_GET_DIRTY_LOG (the slot is unknown, or has no KVM_MEM_LOG_DIRTY_PAGES)",
                    Errno::ENXIO => "KVM_GET_DIRTY_LOG (this VM uses the dirty ring: KvmDirtyRing)",
                    _ => "KVM_GET_DIRTY_LOG",
                };
                return Err(OsError::new(op, errno as i32).on(range));
            }
            report(map, slot, each);
        }
        Ok(())
    }
}

/// Calls `each` for every run of bits in `map`.
fn report(map: &[u64], slot: &KvmSlot, each: &mut dyn FnMut(HostRange)) {
    let mut open: Option<(u64, u64)> = None;
    let host = |from: u64, to: u64| HostRange::new(HostAddr(slot.host.0 + from * PAGE_SIZE), (to - from) * PAGE_SIZE);
    for (first, &word) in (0..).step_by(64).zip(map) {
        let mut left = word;
        while left != 0 {
            let from = first + u64::from(left.trailing_zeros());
            let count = u64::from((left >> left.trailing_zeros()).trailing_ones());
            open = match open {
                Some((start, end)) if end == from => Some((start, from + count)),
                Some((start, end)) => {
                    each(host(start, end));
                    Some((from, from + count))
                }
                None => Some((from, from + count)),
            };
            let to = from + count - first;
            left = if to >= 64 { 0 } else { left & (u64::MAX << to) };
        }
    }
    if let Some((start, end)) = open {
        each(host(start, end));
    }
}

impl fmt::Debug for KvmDirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmDirtyLog").field("slots", &self.slots).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_are_reported_across_words() {
        let slot = KvmSlot { slot: 0, host: HostAddr(0x10_0000), len: 200 * PAGE_SIZE };
        let runs = |map: &[u64]| {
            let mut runs = Vec::new();
            report(map, &slot, &mut |range| {
                runs.push(((range.start.0 - 0x10_0000) / PAGE_SIZE, range.len / PAGE_SIZE));
            });
            runs
        };
        assert_eq!(runs(&[0, 0, 0]), []);
        assert_eq!(runs(&[0b1011, 1 << 63, 0b11]), [(0, 2), (3, 1), (127, 3)]);
        assert_eq!(runs(&[u64::MAX, u64::MAX, 1]), [(0, 129)]);
        assert_eq!(runs(&[1 << 63, 0, 1 << 5 | 1]), [(63, 1), (128, 1), (133, 1)]);
    }

    #[test]
    fn what_is_no_vm_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let slot = KvmSlot { slot: 0, host: HostAddr(0x10_0000), len: PAGE_SIZE };
        let error = KvmDirtyLog::new(&file, vec![slot]).unwrap().take(&mut |_| {}).unwrap_err();
        assert_eq!((error.op, error.errno), ("KVM_GET_DIRTY_LOG", libc::ENOTTY));
    }
}
