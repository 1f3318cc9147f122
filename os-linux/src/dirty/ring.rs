//! KVM's dirty rings: each vCPU's list of the pages that it has written.

use std::fmt;
use std::io::IoSliceMut;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use ramshot_core::{DirtyLog, HostRange, OsError};

use super::{KvmSlot, report, words};
use crate::backing::base_page_size;
use crate::uapi::{self, KvmDirtyGfn};

/// The dirty rings of a KVM VM: what its vCPUs have written, without a bitmap to go through. Harvesting protects the pages again that
/// were reported, as [`KvmDirtyLog`](super::KvmDirtyLog) does, and costs the guest the same.
///
/// The VMM enables `KVM_CAP_DIRTY_LOG_RING_ACQ_REL` (Linux 5.18; on x86 `KVM_CAP_DIRTY_LOG_RING`, 5.11, will do) before it makes its vCPUs, gives the
/// slots `KVM_MEM_LOG_DIRTY_PAGES`, and calls [`harvest`](Self::harvest) when a vCPU leaves with `KVM_EXIT_DIRTY_RING_FULL`. Clones are the
/// same rings.
#[derive(Clone)]
pub struct KvmDirtyRing(Arc<Rings>);

struct Rings {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    state: Mutex<State>,
}

struct State {
    rings: Vec<Ring>,
    /// What was harvested and not taken yet, a bit for each page of each slot.
    noted: Vec<Vec<u64>>,
}

/// One vCPU's ring, which KVM fills from the front.
struct Ring {
    entries: NonNull<KvmDirtyGfn>,
    count: NonZeroUsize,
    /// Of the mapping, in bytes.
    len: NonZeroUsize,
    /// Number of the next entry to be looked at.
    next: usize,
}

// SAFETY: the mapping belongs to this value alone and is reached through a mutex; KVM, which writes it too, hands entries
// over by their flags.
unsafe impl Send for Ring {}

impl KvmDirtyRing {
    /// The rings of the VM behind `vm`, of which `vcpus` are all vCPUs; `bytes` is the size of each ring as it was enabled.
    ///
    /// # Errors
    /// A descriptor cannot be duplicated, or a ring cannot be mapped: there is none, or it has another size.
    pub fn new<V: AsFd>(
        vm: impl AsFd,
        vcpus: impl IntoIterator<Item = V>,
        bytes: usize,
        slots: Vec<KvmSlot>,
    ) -> std::io::Result<Self> {
        let rings = vcpus.into_iter().map(|vcpu| Ring::map(vcpu, bytes)).collect::<Result<_, _>>()?;
        let noted = slots.iter().map(|slot| vec![0; words(slot.len)]).collect();
        let state = Mutex::new(State { rings, noted });
        Ok(Self(Arc::new(Rings { vm: vm.as_fd().try_clone_to_owned()?, slots, state })))
    }

    /// Notes what the vCPUs have written, and gives them their rings back. From any thread; a vCPU that has left with
    /// `KVM_EXIT_DIRTY_RING_FULL` may go on after it.
    ///
    /// # Errors
    /// What `KVM_RESET_DIRTY_RINGS` answered.
    pub fn harvest(&self) -> Result<(), OsError> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.harvest(&mut state)
    }
}

impl Rings {
    fn harvest(&self, state: &mut State) -> Result<(), OsError> {
        let State { rings, noted } = state;
        let mut any = false;
        for ring in rings {
            while let Some((slot, page)) = ring.take() {
                any = true;
                // A slot that nobody has named is no guest RAM of ours.
                let index = self.slots.iter().position(|known| known.slot == slot);
                let map = index.and_then(|index| noted.get_mut(index));
                let word = usize::try_from(page / 64).ok();
                if let Some(word) = map.zip(word).and_then(|(map, word)| map.get_mut(word)) {
                    *word |= 1 << (page % 64);
                }
            }
        }
        if !any {
            return Ok(());
        }
        // Before it returns, a page that was harvested can be written without a word; after it, not.
        // SAFETY: the descriptor is open; the request has no argument.
        let reset = unsafe { uapi::ioctl_reset_dirty_rings(self.vm.as_raw_fd()) };
        reset.map(drop).map_err(|errno| OsError::new("KVM_RESET_DIRTY_RINGS", errno as i32))
    }
}

impl DirtyLog for KvmDirtyRing {
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        // First all of it, then the reset, then the report: who copies a page upon the report copies it after the
        // page was protected again.
        self.0.harvest(&mut state)?;
        for (slot, map) in self.0.slots.iter().zip(&mut state.noted) {
            report(map, slot, each);
            map.fill(0);
        }
        Ok(())
    }
}

impl Ring {
    fn map(vcpu: impl AsFd, bytes: usize) -> std::io::Result<Self> {
        let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let page = usize::try_from(base_page_size()).map_err(|_| invalid())?;
        let count = NonZeroUsize::new(bytes / size_of::<KvmDirtyGfn>()).ok_or_else(invalid)?;
        if !bytes.is_multiple_of(page) {
            return Err(invalid());
        }
        // One page more than there should be: KVM maps whatever is asked for, and faults where there is no ring. To read
        // past its end would be the end of this process, and to turn back before it would miss what is written there.
        let len = bytes.checked_add(page).and_then(NonZeroUsize::new).ok_or_else(invalid)?;
        let offset = i64::try_from(uapi::KVM_DIRTY_LOG_PAGE_OFFSET * base_page_size()).map_err(|_| invalid())?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let mapped = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, vcpu.as_fd(), offset) }?;
        let ring = Self { entries: mapped.cast(), count, len, next: 0 };
        let start = mapped.as_ptr().addr();
        if is_there(start) && is_there(start + bytes - page) && !is_there(start + bytes) {
            return Ok(ring);
        }
        let text = format!(
            "the vCPU has no dirty ring of {bytes} bytes: give the size that was enabled, before the vCPU was made"
        );
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text))
    }

    /// The next page that was written: its slot, and its number in it.
    fn take(&mut self) -> Option<(u32, u64)> {
        const DIRTY: u32 = 1;
        const RESET: u32 = 2;
        // SAFETY: below `count`, so inside the mapping, which lives as long as `self`.
        let entry = unsafe { self.entries.add(self.next % self.count) };
        // SAFETY: aligned, and shared with KVM, which accesses flags atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry.as_ptr()).flags) };
        // Pairs with KVM's release: what is in the entry is there before the flag is.
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: the entry is ours until its flag says that it is collected.
        let found =
            unsafe { ((&raw const (*entry.as_ptr()).slot).read(), (&raw const (*entry.as_ptr()).offset).read()) };
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(found)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; nobody else knows of it. It cannot fail for a mapping that is there.
        let _ = unsafe { munmap(self.entries.cast(), self.len.get()) };
    }
}

/// Whether there is memory at an address of this process, asked of the kernel: a look would fault.
fn is_there(at: usize) -> bool {
    let mut byte = [0];
    let remote = [RemoteIoVec { base: at, len: 1 }];
    process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut byte)], &remote) == Ok(1)
}

impl fmt::Debug for KvmDirtyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmDirtyRing").field("slots", &self.0.slots).finish_non_exhaustive()
    }
}
