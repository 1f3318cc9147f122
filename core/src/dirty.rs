//! What an increment consists of: the pages written since the snapshot that it builds on.

use crate::bitmap::PageBitmap;
use crate::block::{BlockTable, LayoutError, Treatment};
use crate::units::Run;

/// What was written since the last committed snapshot, the base, and what the base holds.
///
/// # Invariants
/// A page whose content may differ from the base's is in `written` or in `owed`, or is not there any more and in `saved`.
/// That holds if every write from the base's T0 on is handed in; what was handed in is forgotten only when a snapshot
/// that contains it is committed.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct DirtyPages<W> {
    /// Written since the snapshot under way began, or its last draft; since the base's T0 if there is none.
    written: PageBitmap<W>,
    /// Written before that, and in no committed snapshot yet.
    owed: PageBitmap<W>,
    /// What the base, or a draft of the next snapshot, may hold something other than zeros for.
    saved: PageBitmap<W>,
}

impl<W: AsRef<[u64]> + AsMut<[u64]>> DirtyPages<W> {
    /// Nothing written, nothing saved.
    ///
    /// # Errors
    /// A bitmap smaller than the layout.
    pub fn new(table: &BlockTable, bitmaps: [PageBitmap<W>; 3]) -> Result<Self, LayoutError> {
        let bits = bitmaps.iter().map(PageBitmap::pages).min().unwrap_or(0);
        if bits < table.pages() {
            return Err(LayoutError::BitmapTooSmall { bits, pages: table.pages() });
        }
        let [written, owed, saved] = bitmaps;
        Ok(Self { written, owed, saved })
    }

    /// `run` was written, discarded, or changed in any other way.
    pub fn handle_written(&mut self, run: Run) {
        self.written.insert(run);
    }

    /// The base holds something for `run`, or a draft does.
    pub fn handle_saved(&mut self, run: Run) {
        self.saved.insert(run);
    }

    /// Pages written since the snapshot under way began, or its last draft.
    pub fn written(&self) -> u64 {
        self.written.count()
    }

    /// A draft begins: these pages are copied while the guest runs, and what is written from here on is copied again.
    /// The `first` draft of an increment needs everything that the base does not have; a later one what was written since
    /// the one before. (The first draft of a full snapshot needs whatever is there; call this all the same.)
    pub fn draft(&mut self, first: bool, pages: &mut PageBitmap<W>) {
        if !first {
            pages.insert_all(&self.written);
        }
        self.settle();
        if first {
            pages.insert_all(&self.owed);
        }
    }

    /// Ahead of T0: puts into `pages` what [`begin`](Self::begin) will put into `pending` for certain, unless it is not there by then.
    pub fn known(&self, drafted: bool, pages: &mut PageBitmap<W>) {
        pages.insert_all(&self.written);
        if !drafted {
            pages.insert_all(&self.owed);
        }
    }

    /// T0 of a full snapshot that has no draft: it takes everything, whatever was written.
    pub fn begin_full(&mut self) {
        self.settle();
    }

    /// T0: puts into `pending` what the image does not have, which is the base, or the drafts if there were any
    /// (`drafted`). `there`: the pages that hold something at T0.
    ///
    /// That is what was written since; what is saved and not there any more (it is zero now, and nobody has told us); and
    /// the blocks that are captured inside the pause because they are written without our knowing.
    pub fn begin(&mut self, table: &BlockTable, there: &PageBitmap<W>, drafted: bool, pending: &mut PageBitmap<W>) {
        if drafted {
            pending.insert_all(&self.written);
        }
        self.settle();
        if !drafted {
            pending.insert_all(&self.owed);
        }
        pending.insert_all_but(&self.saved, there);
        for (index, _) in table.iter().filter(|(_, block)| block.treatment == Treatment::InPause) {
            pending.insert(table.block_run(index));
        }
    }

    /// The snapshot that began is committed and is the base from now on. `pending` and `there`, as they were at T0;
    /// `all`: it holds all pages that are there, and no others.
    pub fn committed(&mut self, pending: &PageBitmap<W>, there: &PageBitmap<W>, all: bool) {
        self.owed.clear();
        if all {
            self.saved.clear();
            self.saved.insert_all(there);
        } else {
            self.saved.insert_all(pending);
            self.saved.remove_all_but(pending, there);
        }
    }

    fn settle(&mut self) {
        self.owed.insert_all(&self.written);
        self.written.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{collections::BTreeSet, vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::tests::rig::{part, ram, table};
    use crate::{PAGE_SIZE, PageId};

    const PAGES: u64 = 12;

    fn bitmap() -> PageBitmap<Vec<u64>> {
        PageBitmap::new(vec![0; 2], PAGES, true).unwrap()
    }

    fn set(pages: &BTreeSet<u64>) -> PageBitmap<Vec<u64>> {
        let mut map = bitmap();
        pages.iter().for_each(|&page| map.insert(Run::new(PageId(page), 1)));
        map
    }

    /// A guest, the images of its snapshots laid over one another, and what the tracking makes of it.
    struct World {
        dirty: DirtyPages<Vec<u64>>,
        table: BlockTable,
        /// Content of each page; 0 is zero and not there.
        memory: [u32; 12],
        base: [u32; 12],
        clock: u32,
    }

    impl World {
        fn write(&mut self, page: u64) {
            self.clock += 1;
            self.memory[usize::try_from(page).unwrap()] = self.clock;
            // Pages 10 and 11 are a block that is written without our knowing.
            if page < 10 {
                self.dirty.handle_written(Run::new(PageId(page), 1));
            }
        }

        fn there(&self) -> PageBitmap<Vec<u64>> {
            let there = (0..).zip(&self.memory).filter(|(_, content)| **content != 0).map(|(page, _)| page);
            set(&there.collect())
        }

        fn copy(&self, pages: &PageBitmap<Vec<u64>>, image: &mut [u32; 12]) {
            (0..PAGES).filter(|&page| pages.contains(PageId(page))).for_each(|page| {
                let page = usize::try_from(page).unwrap();
                image[page] = self.memory[page];
            });
        }

        /// A snapshot: `drafts` of it with writes after each, then T0, then more writes, then committed or not.
        fn snapshot(&mut self, full: bool, drafts: &[Vec<u64>], after: &[u64], committed: bool) {
            let mut image = if full { [0; 12] } else { self.base };
            for (at, writes) in drafts.iter().enumerate() {
                let mut pages = bitmap();
                self.dirty.draft(at == 0, &mut pages);
                if full && at == 0 {
                    pages = self.there();
                }
                (0..PAGES).filter(|&p| pages.contains(PageId(p))).for_each(|p| {
                    self.dirty.handle_saved(Run::new(PageId(p), 1));
                });
                // A draft may be torn: it is copied before and after the writes.
                self.copy(&pages, &mut image);
                writes.iter().for_each(|&page| self.write(page));
            }
            let there = self.there();
            let mut pending = bitmap();
            let all = full && drafts.is_empty();
            if all {
                self.dirty.begin_full();
                pending = there.clone();
            } else {
                self.dirty.begin(&self.table, &there, !drafts.is_empty(), &mut pending);
            }
            let at_t0 = self.memory;
            self.copy(&pending, &mut image);
            after.iter().for_each(|&page| self.write(page));
            assert_eq!(image, at_t0, "the image, with its base under it, is memory at T0");
            if committed {
                self.dirty.committed(&pending, &there, all);
                self.base = image;
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64),
        /// Nobody tells of it.
        Discard(u64),
        Snapshot {
            full: bool,
            drafts: Vec<Vec<u64>>,
            after: Vec<u64>,
            committed: bool,
        },
    }

    fn op() -> impl Strategy<Value = Op> {
        let page = 0..PAGES;
        let pages = || prop::collection::vec(0..PAGES, 0..4);
        prop_oneof![
            3 => page.clone().prop_map(Op::Write),
            1 => page.prop_map(Op::Discard),
            2 => (any::<bool>(), prop::collection::vec(pages(), 0..3), pages(), any::<bool>())
                .prop_map(|(full, drafts, after, committed)| Op::Snapshot { full, drafts, after, committed }),
        ]
    }

    #[test]
    fn an_increment_holds_no_more_than_it_must() {
        let table = table(&[ram(PAGES)]);
        let mut dirty = DirtyPages::new(&table, [bitmap(), bitmap(), bitmap()]).unwrap();
        let (all, some) = (set(&(0..PAGES).collect()), set(&(0..PAGES - 2).collect()));
        let pending_of = |dirty: &mut DirtyPages<Vec<u64>>, there: &PageBitmap<Vec<u64>>| {
            let mut pending = bitmap();
            dirty.begin(&table, there, false, &mut pending);
            let count = pending.count();
            dirty.committed(&pending, there, false);
            count
        };
        dirty.begin_full();
        dirty.committed(&all, &all, true);
        assert_eq!(pending_of(&mut dirty, &all), 0, "nothing was written");
        dirty.handle_written(Run::new(PageId(3), 2));
        assert_eq!(dirty.written(), 2);
        assert_eq!(pending_of(&mut dirty, &all), 2);
        assert_eq!(pending_of(&mut dirty, &all), 0, "committed is not owed");
        assert_eq!(pending_of(&mut dirty, &some), 2, "two pages are gone");
        assert_eq!(pending_of(&mut dirty, &some), 0, "and known to be zero");
        // A draft takes what is owed; what was written before it is not taken again at T0.
        dirty.handle_written(Run::new(PageId(1), 1));
        let mut draft = bitmap();
        dirty.draft(true, &mut draft);
        assert_eq!((draft.count(), dirty.written()), (1, 0));
        let mut pending = bitmap();
        dirty.begin(&table, &some, true, &mut pending);
        assert_eq!(pending.count(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_image_of_a_chain_is_memory_at_its_t0(ops in prop::collection::vec(op(), 1..25)) {
            let in_pause = part(2, PAGE_SIZE, Treatment::InPause);
            let table = table(&[ram(10), in_pause]);
            let dirty = DirtyPages::new(&table, [bitmap(), bitmap(), bitmap()]).unwrap();
            let mut world = World { dirty, table, memory: [0; 12], base: [0; 12], clock: 0 };
            world.snapshot(true, &[], &[], true);
            for op in ops {
                match op {
                    Op::Write(page) => world.write(page),
                    Op::Discard(page) => world.memory[usize::try_from(page).unwrap()] = 0,
                    Op::Snapshot { full, drafts, after, committed } => {
                        world.snapshot(full, &drafts, &after, committed);
                    }
                }
            }
        }
    }
}
