//! What the writer remembers of the pages it was given: state and CRC, in chunks that exist only where pages came.

use std::fmt;

use ramshot_core::{PageId, Run};

use super::format::MAX_RUN;
use super::{PageState, StateRun};
use crate::sink::PageDigest;

/// Pages in one chunk: 16 MiB of RAM cost 17 KiB, once one of its pages has a record.
const CHUNK: u64 = 4096;
const CHUNK_PAGES: usize = 4096;
const WORDS: usize = CHUNK_PAGES / 64;

struct Chunk {
    /// The page was given.
    given: [u64; WORDS],
    /// It has data.
    data: [u64; WORDS],
    crcs: [u32; CHUNK_PAGES],
}

impl Chunk {
    const EMPTY: Self = Self { given: [0; WORDS], data: [0; WORDS], crcs: [0; CHUNK_PAGES] };

    /// State of the page at `slot`, `None` if it was not given.
    fn state(&self, slot: usize) -> Option<PageState> {
        let bit = 1 << (slot % 64);
        let (given, data) = (self.given[slot / 64] & bit != 0, self.data[slot / 64] & bit != 0);
        given.then_some(if data { PageState::Data } else { PageState::Zero })
    }
}

/// State and CRC of every page given so far.
pub(super) struct PageTable {
    /// What a page is that was never given.
    default: PageState,
    chunks: Vec<Option<Box<Chunk>>>,
    data_pages: u64,
}

/// A page that was given before.
#[derive(Debug)]
pub(super) struct GivenTwice(pub(super) PageId);

/// Chunk and place in it. Pages are less than 2^40, so a chunk number fits everywhere a file of that size can be.
fn slot_of(page: u64) -> (usize, usize) {
    (usize::try_from(page / CHUNK).unwrap_or(usize::MAX), usize::try_from(page % CHUNK).unwrap_or(0))
}

impl PageTable {
    /// For `pages` pages, none given. Costs 8 bytes for each 16 MiB of RAM.
    pub(super) fn new(pages: u64, default: PageState) -> Self {
        let (chunks, _) = slot_of(pages.next_multiple_of(CHUNK));
        Self { default, chunks: std::iter::repeat_with(|| None).take(chunks).collect(), data_pages: 0 }
    }

    /// Pages with data so far.
    pub(super) const fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// Whether `page` has data.
    pub(super) fn is_data(&self, page: PageId) -> bool {
        let (chunk, slot) = slot_of(page.0);
        let chunk = self.chunks.get(chunk).and_then(Option::as_ref);
        chunk.is_some_and(|chunk| chunk.state(slot) == Some(PageState::Data))
    }

    /// What a page is that was never given.
    pub(super) const fn default_state(&self) -> PageState {
        self.default
    }

    /// Notes the pages from `first` on, which lie inside the table.
    ///
    /// # Errors
    /// The first page that has a record already. Where zero is the default zero pages take none, so a zero page
    /// given twice goes unnoticed, and harms nobody.
    pub(super) fn record(&mut self, first: PageId, digests: &[PageDigest]) -> Result<(), GivenTwice> {
        for (page, digest) in (first.0..).zip(digests) {
            let (chunk, slot) = slot_of(page);
            let Some(place) = self.chunks.get_mut(chunk) else { continue };
            if *digest == PageDigest::Zero && self.default == PageState::Zero {
                if place.as_ref().is_some_and(|chunk| chunk.state(slot).is_some()) {
                    return Err(GivenTwice(PageId(page)));
                }
                continue;
            }
            let chunk = place.get_or_insert_with(|| Box::new(Chunk::EMPTY));
            if chunk.state(slot).is_some() {
                return Err(GivenTwice(PageId(page)));
            }
            let bit = 1 << (slot % 64);
            chunk.given[slot / 64] |= bit;
            if let PageDigest::Data(crc) = digest {
                chunk.data[slot / 64] |= bit;
                chunk.crcs[slot] = *crc;
                self.data_pages += 1;
            }
        }
        Ok(())
    }

    /// Notes the pages from `first` on, whatever was noted of them before. Returns which of them are zero and had data:
    /// their bytes in the file are not zero yet.
    pub(super) fn record_again(&mut self, first: PageId, digests: &[PageDigest]) -> Vec<bool> {
        let mut stale = vec![false; digests.len()];
        for ((page, digest), stale) in (first.0..).zip(digests).zip(&mut stale) {
            let (chunk, slot) = slot_of(page);
            let Some(place) = self.chunks.get_mut(chunk) else { continue };
            let zero = *digest == PageDigest::Zero;
            if zero && self.default == PageState::Zero && place.is_none() {
                continue;
            }
            let chunk = place.get_or_insert_with(|| Box::new(Chunk::EMPTY));
            let bit = 1 << (slot % 64);
            let had_data = chunk.data[slot / 64] & bit != 0;
            *stale = zero && had_data;
            chunk.given[slot / 64] |= bit;
            match digest {
                PageDigest::Data(crc) => {
                    chunk.data[slot / 64] |= bit;
                    chunk.crcs[slot] = *crc;
                }
                PageDigest::Zero => chunk.data[slot / 64] &= !bit,
            }
            self.data_pages = self.data_pages + u64::from(!zero) - u64::from(had_data);
        }
        stale
    }

    /// Calls `each` for every run of pages that differ from the default, ascending, none longer than a run record
    /// can say.
    pub(super) fn for_each_run<E>(&self, mut each: impl FnMut(StateRun) -> Result<(), E>) -> Result<(), E> {
        let mut open: Option<StateRun> = None;
        self.for_each_given(|page, state, _| {
            if state == self.default {
                return Ok(());
            }
            match &mut open {
                Some(last) if last.state == state && last.run.end().0 == page && last.run.pages < MAX_RUN => {
                    last.run.pages += 1;
                }
                _ => {
                    let next = StateRun { run: Run::new(PageId(page), 1), state };
                    if let Some(done) = open.replace(next) {
                        each(done)?;
                    }
                }
            }
            Ok(())
        })?;
        open.map_or(Ok(()), each)
    }

    /// Calls `each` with the CRC of every page that has data, ascending.
    pub(super) fn for_each_crc<E>(&self, mut each: impl FnMut(u32) -> Result<(), E>) -> Result<(), E> {
        self.for_each_given(|_, state, crc| if state == PageState::Data { each(crc) } else { Ok(()) })
    }

    /// Calls `each` with page, state and CRC of every page given, ascending. Words and chunks without one are skipped.
    fn for_each_given<E>(&self, mut each: impl FnMut(u64, PageState, u32) -> Result<(), E>) -> Result<(), E> {
        for (start, chunk) in (0u64..).step_by(CHUNK_PAGES).zip(&self.chunks) {
            let Some(chunk) = chunk else { continue };
            for (word, &given) in chunk.given.iter().enumerate() {
                if given == 0 {
                    continue;
                }
                for slot in word * 64..(word + 1) * 64 {
                    if let Some(state) = chunk.state(slot) {
                        each(start + slot as u64, state, chunk.crcs[slot])?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable").field("data_pages", &self.data_pages).finish_non_exhaustive()
    }
}
