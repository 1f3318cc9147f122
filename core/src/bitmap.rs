//! A bitmap of pages over lent storage, with a summary so that empty stretches cost nothing.

use crate::units::{PageId, Run};

const BITS: u64 = 64;

/// One bit a page, in `u64` words that the caller lends (`[u64; N]`, `&mut [u64]`, `Vec<u64>`).
///
/// Behind the words lies a summary with one bit a word, so finding the next page in 1 TiB of nothing reads 512 KiB,
/// not 32 MiB.
///
/// # Invariants
/// A summary bit is set if and only if its word is not zero. `count` is the number of bits set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageBitmap<W> {
    words: W,
    pages: u64,
    count: u64,
}

impl<W: AsRef<[u64]> + AsMut<[u64]>> PageBitmap<W> {
    /// How many `u64` a bitmap of `pages` pages needs, summary included.
    #[must_use]
    pub const fn words_for(pages: u64) -> u64 {
        let words = pages.div_ceil(BITS);
        words.saturating_add(words.div_ceil(BITS))
    }

    /// An empty bitmap of `pages` pages in `words`, or `None` if `words` is shorter than
    /// [`words_for`](Self::words_for) says.
    ///
    /// Clears the storage, unless `fresh` promises that it is all zeros already (a new allocation: clearing would
    /// touch it).
    pub fn new(mut words: W, pages: u64, fresh: bool) -> Option<Self> {
        let need = usize::try_from(Self::words_for(pages)).ok()?;
        let lent = words.as_mut().get_mut(..need)?;
        if !fresh {
            lent.fill(0);
        }
        Some(Self { words, pages, count: 0 })
    }

    /// How many pages it covers.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// How many bits are set.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether the bit of `page` is set.
    pub fn contains(&self, page: PageId) -> bool {
        page.0 < self.pages && self.word(page.0 / BITS) >> (page.0 % BITS) & 1 == 1
    }

    /// Sets the bits of `run` (what lies beyond the end is left out).
    pub fn insert(&mut self, run: Run) {
        self.change(run, true);
    }

    /// Clears the bits of `run`.
    pub fn remove(&mut self, run: Run) {
        self.change(run, false);
    }

    /// Clears every bit.
    pub fn clear(&mut self) {
        let mut from = 0;
        while let Some(index) = self.next_word(from) {
            self.change_word(index, u64::MAX, false);
            from = index + 1;
        }
    }

    /// Sets every bit that is set in `other`.
    pub fn insert_all(&mut self, other: &Self) {
        self.change_all(other, None, true);
    }

    /// Sets every bit that is set in `other` and not in `except`.
    pub fn insert_all_but(&mut self, other: &Self, except: &Self) {
        self.change_all(other, Some(except), true);
    }

    /// Clears every bit that is set in `other` and not in `except`.
    pub fn remove_all_but(&mut self, other: &Self, except: &Self) {
        self.change_all(other, Some(except), false);
    }

    /// Sets what is clear between two set bits, where that is at most `most` pages and all of them are set in `of`.
    pub fn fill_gaps(&mut self, of: &Self, most: u64) {
        let mut at = self.next_set(PageId(0));
        while let Some(page) = at {
            let end = self.first_clear(page.0, self.pages);
            let Some(next) = self.next_set(PageId(end)) else { return };
            if next.0 - end <= most && of.contains(PageId(end)) && of.first_clear(end, next.0) == next.0 {
                self.insert(Run::new(PageId(end), next.0 - end));
            }
            at = Some(next);
        }
    }

    /// The first page at or after `from` whose bit is set.
    pub fn next_set(&self, from: PageId) -> Option<PageId> {
        if from.0 >= self.pages {
            return None;
        }
        let start = from.0 / BITS;
        let head = self.word(start) & (u64::MAX << (from.0 % BITS));
        let (index, word) = if head != 0 {
            (start, head)
        } else {
            let index = self.next_word(start + 1)?;
            (index, self.word(index))
        };
        Some(PageId(index * BITS + u64::from(word.trailing_zeros())))
    }

    /// The longest run of set bits that holds `page` and lies inside `within`; `None` if `page` is not set.
    pub fn run_around(&self, page: PageId, within: Run) -> Option<Run> {
        if !self.contains(page) || !within.contains(page) {
            return None;
        }
        let mut first = page.0;
        while first > within.first.0 {
            // Word by word where a whole word is set, bit by bit at the edges.
            if first.is_multiple_of(BITS) && first - within.first.0 >= BITS && self.word(first / BITS - 1) == u64::MAX {
                first -= BITS;
            } else if self.contains(PageId(first - 1)) {
                first -= 1;
            } else {
                break;
            }
        }
        Some(Run::new(PageId(first), self.first_clear(page.0 + 1, within.end().0) - first))
    }

    /// The first page in `from..limit` whose bit is clear, or `limit`.
    pub(crate) fn first_clear(&self, from: u64, limit: u64) -> u64 {
        let limit = limit.min(self.pages);
        let mut at = from;
        while at < limit {
            let inverted = !self.word(at / BITS) >> (at % BITS);
            if inverted != 0 {
                return (at + u64::from(inverted.trailing_zeros())).min(limit);
            }
            at = (at / BITS + 1) * BITS;
        }
        limit
    }

    fn change(&mut self, run: Run, set: bool) {
        let end = run.end().0.min(self.pages);
        let mut at = run.first.0;
        while at < end {
            let index = at / BITS;
            let upto = end.min((index + 1) * BITS);
            let mask = (u64::MAX >> (BITS - (upto - at))) << (at % BITS);
            self.change_word(index, mask, set);
            at = upto;
        }
    }

    fn change_all(&mut self, other: &Self, except: Option<&Self>, set: bool) {
        let mut from = 0;
        while let Some(index) = other.next_word(from) {
            let inside = self.pages.saturating_sub(index.saturating_mul(BITS)).min(BITS);
            if inside == 0 {
                return;
            }
            let mask = other.word(index) & !except.map_or(0, |e| e.bits_of(index)) & (u64::MAX >> (BITS - inside));
            self.change_word(index, mask, set);
            from = index + 1;
        }
    }

    /// The bits of the pages of word `index`; none beyond the end, where the summary lies.
    fn bits_of(&self, index: u64) -> u64 {
        if index < self.pages.div_ceil(BITS) { self.word(index) } else { 0 }
    }

    fn change_word(&mut self, index: u64, mask: u64, set: bool) {
        let before = self.word(index);
        let after = if set { before | mask } else { before & !mask };
        if before == after {
            return;
        }
        self.count = self.count + u64::from(after.count_ones()) - u64::from(before.count_ones());
        let summary_at = self.pages.div_ceil(BITS) + index / BITS;
        let bit = 1u64 << (index % BITS);
        self.store(index, after);
        let summary = self.word(summary_at);
        self.store(summary_at, if after == 0 { summary & !bit } else { summary | bit });
    }

    /// Index of the first non-zero word at or after `from`.
    fn next_word(&self, from: u64) -> Option<u64> {
        let words = self.pages.div_ceil(BITS);
        let mut at = from / BITS;
        let mut mask = u64::MAX << (from % BITS);
        while at < words.div_ceil(BITS) {
            let summary = self.word(words + at) & mask;
            if summary != 0 {
                return Some(at * BITS + u64::from(summary.trailing_zeros()));
            }
            mask = u64::MAX;
            at += 1;
        }
        None
    }

    // Both are in range by construction; the fallbacks keep core free of panics.
    fn word(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|i| self.words.as_ref().get(i)).copied().unwrap_or(0)
    }

    fn store(&mut self, index: u64, value: u64) {
        if let Some(word) = usize::try_from(index).ok().and_then(|i| self.words.as_mut().get_mut(i)) {
            *word = value;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    fn bitmap(pages: u64) -> PageBitmap<Vec<u64>> {
        let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(pages)).unwrap();
        PageBitmap::new(vec![0; words], pages, true).unwrap()
    }

    #[test]
    fn too_little_storage_is_refused() {
        assert!(PageBitmap::new([0u64; 1], 64, true).is_none());
        assert!(PageBitmap::new([0u64; 2], 64, true).is_some());
    }

    #[test]
    fn storage_that_is_not_fresh_is_cleared() {
        let map = PageBitmap::new([u64::MAX; 4], 128, false).unwrap();
        assert_eq!((map.count(), map.next_set(PageId(0))), (0, None));
    }

    #[test]
    fn runs_beyond_the_end_are_cut() {
        let mut map = bitmap(100);
        map.insert(Run::new(PageId(90), u64::MAX));
        assert_eq!(map.count(), 10);
        assert_eq!(map.run_around(PageId(95), Run::new(PageId(0), 1000)), Some(Run::new(PageId(90), 10)));
        assert!(!map.contains(PageId(100)));
    }

    #[test]
    fn gaps_are_filled_that_are_short_and_not_empty() {
        let runs = |map: &PageBitmap<Vec<u64>>| {
            let set = (0..map.pages()).filter(|&page| map.contains(PageId(page)));
            set.collect::<Vec<_>>()
        };
        let of_runs = |runs: &[(u64, u64)]| {
            let mut map = bitmap(200);
            runs.iter().for_each(|&(first, pages)| map.insert(Run::new(PageId(first), pages)));
            map
        };
        let there = of_runs(&[(0, 100), (102, 98)]);
        let mut map = of_runs(&[(60, 2), (66, 1), (99, 1), (103, 1), (106, 1), (195, 2)]);
        map.fill_gaps(&there, 4);
        let wanted = of_runs(&[(60, 7), (99, 1), (103, 4), (195, 2)]);
        assert_eq!(runs(&map), runs(&wanted));
        assert_eq!(map.count(), wanted.count());
        bitmap(200).fill_gaps(&there, 4);
    }

    proptest! {
        #[test]
        fn whole_bitmaps_are_combined(
            (pages, others) in (1u64..300, 1u64..300),
            sets in prop::collection::vec(prop::collection::vec((0u64..320, 0u64..90), 0..6), 3),
        ) {
            let filled = |pages: u64, runs: &[(u64, u64)]| {
                let mut map = bitmap(pages);
                runs.iter().for_each(|&(first, count)| map.insert(Run::new(PageId(first), count)));
                map
            };
            let (map, other, except) = (filled(pages, &sets[0]), filled(others, &sets[1]), filled(others, &sets[2]));
            let check = |after: PageBitmap<Vec<u64>>, expected: &dyn Fn(PageId) -> bool| {
                let wrong = (0..pages).map(PageId).find(|&page| after.contains(page) != expected(page));
                prop_assert_eq!(wrong, None);
                prop_assert_eq!(after.count(), (0..pages).filter(|&page| after.contains(PageId(page))).count() as u64);
                prop_assert_eq!(after.next_set(PageId(0)), (0..pages).map(PageId).find(|&page| after.contains(page)));
                Ok(())
            };
            let mut all = map.clone();
            all.insert_all(&other);
            check(all, &|page| map.contains(page) || other.contains(page))?;
            let mut but = map.clone();
            but.insert_all_but(&other, &except);
            check(but, &|page| map.contains(page) || other.contains(page) && !except.contains(page))?;
            let mut removed = map.clone();
            removed.remove_all_but(&other, &except);
            check(removed, &|page| map.contains(page) && (!other.contains(page) || except.contains(page)))?;
            let mut cleared = map.clone();
            cleared.clear();
            check(cleared, &|_| false)?;
        }

        // Against a Vec<bool>: every query after every change.
        #[test]
        fn behaves_like_a_vector_of_bools(
            pages in 1u64..700,
            changes in prop::collection::vec((0u64..720, 0u64..300, any::<bool>()), 1..30),
            probes in prop::collection::vec((0u64..720, 0u64..720, 0u64..300), 20),
        ) {
            let mut map = bitmap(pages);
            let mut naive = vec![false; usize::try_from(pages).unwrap()];
            let len = naive.len();
            for (first, count, set) in changes {
                let run = Run::new(PageId(first), count);
                if set { map.insert(run) } else { map.remove(run) }
                let (from, to) = (usize::try_from(first).unwrap().min(len), usize::try_from(first + count).unwrap().min(len));
                naive[from..to].fill(set);
            }
            prop_assert_eq!(map.count(), naive.iter().filter(|&&b| b).count() as u64);
            for (at, first, count) in probes {
                let set = |p: u64| usize::try_from(p).ok().and_then(|i| naive.get(i)).copied().unwrap_or(false);
                prop_assert_eq!(map.contains(PageId(at)), set(at));
                prop_assert_eq!(map.next_set(PageId(at)), (at..pages).find(|&p| set(p)).map(PageId));
                let within = Run::new(PageId(first), count);
                let expected = (set(at) && within.contains(PageId(at))).then(|| {
                    let start = (first..=at).rev().take_while(|&p| set(p)).last().unwrap();
                    let end = (at..within.end().0).take_while(|&p| set(p)).last().unwrap();
                    Run::new(PageId(start), end - start + 1)
                });
                prop_assert_eq!(map.run_around(PageId(at), within), expected);
            }
        }
    }
}
