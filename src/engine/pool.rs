//! The buffers of the pool. Which are free is core's knowledge; here they are owned values that move from thread to
//! thread, so no two threads can touch one at a time.

use std::collections::VecDeque;

use bytes::BytesMut;
use heapless::Vec as Array;
use ramshot_core::{Claim, MAX_SLOTS_PER_CLAIM, PAGE_SIZE, PageId, ReleasedRun, SlotId};

use crate::os::memory::prefer_huge_pages;
use crate::sink::{PageDigest, Piece};

/// One buffer of the pool.
#[derive(Debug)]
pub(crate) struct Slot {
    storage: BytesMut,
    digests: Vec<PageDigest>,
}

const PAGE: usize = 4096;
/// A huge page: one segment of a direct write, where the kernel has one for us.
const HUGE: usize = 2 << 20;

/// `pages` pages as bytes.
fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(PAGE)
}

impl Slot {
    /// How many pages it holds.
    pub(crate) fn capacity(&self) -> u64 {
        (self.storage.len() / PAGE) as u64
    }

    /// Its first `pages` pages.
    fn bytes(&self, pages: u64) -> &[u8] {
        self.storage.get(..bytes_of(pages.min(self.capacity()))).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self, pages: u64) -> &mut [u8] {
        let len = bytes_of(pages.min(self.capacity()));
        self.storage.get_mut(..len).unwrap_or_default()
    }

    /// Computes the digests of its first `pages` pages. Returns how many are zero.
    fn digest(&mut self, pages: u64) -> u64 {
        let bytes = self.storage.get(..bytes_of(pages.min(self.capacity()))).unwrap_or_default();
        self.digests.clear();
        self.digests.extend(bytes.as_chunks::<PAGE>().0.iter().map(PageDigest::of));
        self.digests.iter().filter(|d| **d == PageDigest::Zero).count() as u64
    }
}

/// The buffers that belong to one run, in order.
pub(crate) type Buffers = Array<Box<Slot>, MAX_SLOTS_PER_CLAIM>;

/// All buffers, each at home or out with a run.
#[derive(Debug)]
pub(crate) struct Pool {
    slots: Vec<Option<Box<Slot>>>,
}

impl Pool {
    /// Allocates `count` buffers of `slot_pages` pages, aligned to a page (for direct I/O) and touched (so that capturing never
    /// faults). They are parts of one allocation, in huge pages where the kernel has some.
    pub(crate) fn new(count: u16, slot_pages: u64) -> Self {
        let slot = bytes_of(slot_pages);
        let len = slot.saturating_mul(usize::from(count));
        let mut memory = BytesMut::zeroed(len.saturating_add(HUGE));
        let _ = memory.split_to(memory.as_ptr().align_offset(HUGE).min(HUGE));
        memory.truncate(len);
        prefer_huge_pages(&mut memory);
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        let capacity = usize::try_from(slot_pages).unwrap_or(0);
        let mut slot = || Slot { storage: memory.split_to(slot), digests: Vec::with_capacity(capacity) };
        Self { slots: (0..count).map(|_| Some(Box::new(slot()))).collect() }
    }

    /// The buffers of `claim`.
    pub(crate) fn take(&mut self, claim: &Claim) -> Buffers {
        claim.slots().iter().filter_map(|id| self.slots.get_mut(usize::from(id.0))?.take()).collect()
    }

    /// Back home.
    pub(crate) fn put(&mut self, ids: &[SlotId], buffers: Buffers) {
        for (id, buffer) in ids.iter().zip(buffers) {
            if let Some(home) = self.slots.get_mut(usize::from(id.0)) {
                *home = Some(buffer);
            }
        }
    }
}

/// A captured, released run on its way to the image.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) run: ReleasedRun,
    pub(crate) buffers: Buffers,
}

impl Job {
    /// Computes the digests. Returns how many pages are zero.
    pub(crate) fn digest(&mut self) -> u64 {
        let mut left = self.run.run().pages;
        let mut zero = 0;
        for slot in &mut self.buffers {
            let pages = slot.capacity().min(left);
            zero += slot.digest(pages);
            left -= pages;
        }
        zero
    }

    /// The pieces to write, appended to `pieces`.
    pub(crate) fn pieces<'a>(&'a self, pieces: &mut Vec<Piece<'a>>) {
        let mut first = self.run.run().first;
        for slot in &self.buffers {
            let pages = slot.digests.len() as u64;
            pieces.push(Piece { first, bytes: slot.bytes(pages), digests: &slot.digests });
            first = PageId(first.0 + pages);
        }
    }
}

/// A queue of runs that never grows, so that nothing is allocated while a claim is held.
pub(crate) fn queue(slots: u16) -> VecDeque<Job> {
    VecDeque::with_capacity(usize::from(slots))
}

const _: () = assert!(PAGE as u64 == PAGE_SIZE);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_for_direct_io() {
        for pages in [1, 16, 512] {
            let mut pool = Pool::new(3, pages);
            for slot in pool.slots.iter_mut().flatten() {
                assert_eq!(slot.capacity(), pages);
                let bytes = slot.bytes_mut(pages);
                assert_eq!((bytes.len(), bytes.as_ptr().align_offset(PAGE)), (bytes_of(pages), 0));
            }
        }
    }
}
