//! Checking every byte of an open snapshot.

use std::fs::File;
use std::io::{self, ErrorKind};

use ramshot_core::{PageId, Run};

use super::error::{ReadError, ReadErrorKind};
use super::format::{PAGE, PAGE_BYTES};
use super::parse::Source;
use super::{PageState, SnapshotFile, parallel, place};
use crate::os::storage;

/// Data pages that one thread checks before it asks for more: 1 MiB.
const DATA_UNIT: u64 = 256;
/// Pages of any state in which one thread looks for stray bytes before it asks for more: 64 MiB.
const HOLE_UNIT: u64 = 16 * 1024;
/// Bytes read at a time: they are still in the cache when they are checked.
const STEP_PAGES: u64 = 64;

/// What was verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifyReport {
    /// Pages with data, each of which has its checksum.
    pub data_pages: u64,
    /// Pages without, whose place in the file reads as zeros.
    pub other_pages: u64,
}

impl SnapshotFile {
    /// Reads the whole snapshot and checks it: every data page has its checksum, and the place of every other page in the
    /// flat RAM reads as zeros (whoever uses that without the trailer sees the same memory). Holes are not read
    /// where the system can name them.
    ///
    /// Works on `threads` threads (at least one), the caller among them. `progress` hears of pages done and their
    /// total.
    ///
    /// # Errors
    /// The first page that is wrong, or what could not be read.
    pub fn verify(&self, threads: usize, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, ReadError> {
        let total = self.pages();
        let data_units = self.data_pages().div_ceil(DATA_UNIT);
        let hole_units = total.div_ceil(HOLE_UNIT);
        let work = |buffer: &mut Vec<u8>, unit: u64| match unit.checked_sub(data_units) {
            None => {
                self.for_each_data_run(unit * DATA_UNIT, DATA_UNIT, |run, rank| self.verify_data(buffer, run, rank))
            }
            Some(unit) => self.verify_holes(buffer, PageId(unit * HOLE_UNIT), HOLE_UNIT),
        };
        progress(0, total);
        parallel::run(data_units + hole_units, threads, &work, &mut |done| progress(done, total))?;
        Ok(VerifyReport { data_pages: self.data_pages(), other_pages: total - self.data_pages() })
    }

    /// Calls `each` with the data pages number `rank..rank + count` (as far as they exist), run by run; returns how
    /// many there were.
    pub(super) fn for_each_data_run<E>(
        &self,
        rank: u64,
        count: u64,
        mut each: impl FnMut(Run, u64) -> Result<(), E>,
    ) -> Result<u64, E> {
        let end = self.data_pages().min(rank.saturating_add(count));
        let mut at = rank;
        while at < end {
            let run = self.meta().states.data_run(at);
            let run = Run::new(run.first, run.pages.min(end - at));
            each(run, at)?;
            at += run.pages;
        }
        Ok(end.saturating_sub(rank))
    }

    fn verify_data(&self, buffer: &mut Vec<u8>, run: Run, rank: u64) -> Result<(), ReadError> {
        let mut done = 0;
        while done < run.pages {
            let pages = STEP_PAGES.min(run.pages - done);
            let bytes = scratch(buffer, pages);
            self.read_data(PageId(run.first.0 + done), rank + done, bytes)?;
            done += pages;
        }
        Ok(())
    }

    /// Checks that what lies in the flat RAM between the data pages is zero.
    fn verify_holes(&self, buffer: &mut Vec<u8>, first: PageId, count: u64) -> Result<u64, ReadError> {
        let window = Run::new(first, count.min(self.pages() - first.0));
        let mut checked = 0;
        for part in self.meta().states.runs_from(first).take_while(|part| part.run.first < window.end()) {
            let from = part.run.first.max(first);
            let to = part.run.end().min(window.end());
            if part.state != PageState::Data && from < to {
                self.verify_hole(buffer, from, to)?;
                checked += to.0 - from.0;
            }
        }
        Ok(checked)
    }

    fn verify_hole(&self, buffer: &mut Vec<u8>, from: PageId, to: PageId) -> Result<(), ReadError> {
        let (offset, len) = (from.0 * PAGE_BYTES, PAGE);
        match first_stray(self.file(), buffer, from, to) {
            Ok(None) => Ok(()),
            Ok(Some(page)) => {
                let (place, offset) = (place(self.blocks(), page), page.0 * PAGE_BYTES);
                Err(self.error(ReadErrorKind::NotZero { page, place, offset }))
            }
            Err(source) if source.kind() == ErrorKind::UnexpectedEof => {
                Err(self
                    .error(ReadErrorKind::Shrunk { offset: self.file().metadata().map_or(offset, |now| now.len()) }))
            }
            Err(source) => Err(self.error(ReadErrorKind::Io { offset, len, source })),
        }
    }
}

/// The first page from `from` on, before `to`, whose place in the file is not zero. Holes are not read where the system
/// can name them.
pub(super) fn first_stray(file: &File, buffer: &mut Vec<u8>, from: PageId, to: PageId) -> io::Result<Option<PageId>> {
    let mut page = from.0;
    while page < to.0 {
        // A system that cannot tell answers with the offset itself: then everything is read.
        let Some(next) = storage::next_data(file, page * PAGE_BYTES)? else { return Ok(None) };
        page = page.max(next / PAGE_BYTES);
        if page >= to.0 {
            return Ok(None);
        }
        let pages = STEP_PAGES.min(to.0 - page);
        let bytes = scratch(buffer, pages);
        file.read_exact_at(bytes, page * PAGE_BYTES)?;
        if let Some(bad) = bytes.as_chunks::<PAGE>().0.iter().position(|page| *page != [0; PAGE]) {
            return Ok(Some(PageId(page + bad as u64)));
        }
        page += pages;
    }
    Ok(None)
}

/// Room for `pages` pages, at most [`STEP_PAGES`]. Allocated once a thread.
fn scratch(buffer: &mut Vec<u8>, pages: u64) -> &mut [u8] {
    let len = usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
    if buffer.len() < len {
        buffer.resize(usize::try_from(STEP_PAGES * PAGE_BYTES).unwrap_or(len).max(len), 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}
