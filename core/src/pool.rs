//! Which slots of the pool are free. The buffers themselves belong to the engine.

use crate::bitmap::PageBitmap;
use crate::claim::{SlotId, SlotList};
use crate::units::{PageId, Run};

/// The slots of the pool: `count` of them, `slot_pages` pages each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SlotPool<W> {
    free: PageBitmap<W>,
    slot_pages: u64,
    reserve: u64,
}

/// Who takes slots: the scan leaves the reserve alone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Budget {
    Scan,
    Urgent,
}

impl<W: AsRef<[u64]> + AsMut<[u64]>> SlotPool<W> {
    pub(crate) fn new(words: W, count: u16, slot_pages: u64, reserve: u64) -> Option<Self> {
        let mut free = PageBitmap::new(words, u64::from(count), false)?;
        free.insert(Run::new(PageId(0), u64::from(count)));
        Some(Self { free, slot_pages, reserve })
    }

    /// How many pages a claim may have now, in whole host pages of `unit` pages.
    pub(crate) fn room(&self, budget: Budget, unit: u64) -> u64 {
        let free = self.free.count();
        let slots = match budget {
            Budget::Scan => free.saturating_sub(self.reserve),
            Budget::Urgent => free,
        };
        let room = self.pages_in(slots) / unit * unit;
        if room == 0 && budget == Budget::Scan && self.all_free() {
            // A host page that never fits beside the reserve may have the empty pool, or the scan would stop there.
            return (self.pages_in(free) / unit * unit).min(unit);
        }
        room
    }

    /// How many pages `slots` slots hold, as far as one claim can have them.
    fn pages_in(&self, slots: u64) -> u64 {
        slots.min(crate::claim::MAX_SLOTS_PER_CLAIM as u64).saturating_mul(self.slot_pages)
    }

    /// Takes slots for `pages` pages, lowest first: those were used last and are still in the cache.
    pub(crate) fn take(&mut self, pages: u64) -> Option<SlotList> {
        let mut slots = SlotList::new();
        let mut at = PageId(0);
        for _ in 0..pages.div_ceil(self.slot_pages) {
            at = self.free.next_set(at)?;
            slots.push(SlotId(u16::try_from(at.0).ok()?)).ok()?;
            at = PageId(at.0 + 1);
        }
        for slot in &slots {
            self.free.remove(Run::new(PageId(u64::from(slot.0)), 1));
        }
        Some(slots)
    }

    pub(crate) fn give_back(&mut self, slots: &[SlotId]) {
        for slot in slots {
            self.free.insert(Run::new(PageId(u64::from(slot.0)), 1));
        }
    }

    pub(crate) fn slot_pages(&self) -> u64 {
        self.slot_pages
    }

    pub(crate) fn all_free(&self) -> bool {
        self.free.count() == self.free.pages()
    }

    #[cfg(test)]
    pub(crate) fn slots(&self) -> u64 {
        self.free.pages()
    }

    #[cfg(test)]
    pub(crate) fn is_full(&self) -> bool {
        self.free.count() == 0
    }

    pub(crate) fn in_use(&self) -> u64 {
        self.free.pages() - self.free.count()
    }
}
