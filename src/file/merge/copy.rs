//! Copying pages into the new file, or finding that they are there.

use std::sync::atomic::{AtomicU64, Ordering};

use ramshot_core::{PageId, Run};

use super::error::MergeError;
use super::plan::Action;
use crate::file::batch::UNIT_PAGES;
use crate::file::chain::Chain;
use crate::file::error::{ReadError, ReadErrorKind};
use crate::file::format::{PAGE, PAGE_BYTES};
use crate::file::parse::Source;
use crate::file::source::PageSource;
use crate::file::{FileSink, PageState, SnapshotFile, place};
use crate::os::storage;
use crate::sink::{ImageSink, PageDigest, Piece};

/// Does what the plan says. Shared by the threads.
pub(super) struct Copier<'a> {
    child: &'a Chain,
    parent: Option<&'a Chain>,
    sink: &'a FileSink,
    copied: AtomicU64,
    reused: AtomicU64,
    compared: AtomicU64,
    zero: AtomicU64,
}

/// Pages done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) copied: u64,
    pub(super) reused: u64,
    pub(super) compared: u64,
    pub(super) zero: u64,
}

/// What one thread works in. Allocated once a thread, when it is needed.
#[derive(Default)]
pub(super) struct Buffers {
    first: PageBuffer,
    second: PageBuffer,
}

/// Room for the pages of one unit, at a multiple of the page size so that it can be written past the page cache.
#[derive(Default)]
struct PageBuffer {
    bytes: Vec<u8>,
}

impl PageBuffer {
    /// `pages` pages of it, at most [`UNIT_PAGES`].
    fn get(&mut self, pages: u64) -> &mut [u8] {
        if self.bytes.is_empty() {
            self.bytes = vec![0; bytes_of(UNIT_PAGES + 1)];
        }
        let from = self.bytes.as_ptr().align_offset(PAGE).min(PAGE);
        self.bytes.get_mut(from..from + bytes_of(pages)).unwrap_or_default()
    }
}

fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages * PAGE_BYTES).unwrap_or(0)
}

impl<'a> Copier<'a> {
    pub(super) fn new(child: &'a Chain, parent: Option<&'a Chain>, sink: &'a FileSink) -> Self {
        let zero = || AtomicU64::new(0);
        Self { child, parent, sink, copied: zero(), reused: zero(), compared: zero(), zero: zero() }
    }

    pub(super) fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            copied: get(&self.copied),
            reused: get(&self.reused),
            compared: get(&self.compared),
            zero: get(&self.zero),
        }
    }

    /// Does one unit of the plan; returns how many pages it has.
    pub(super) fn unit(&self, buffers: &mut Buffers, steps: &[(Run, Action)]) -> Result<u64, MergeError> {
        for &(run, action) in steps {
            match action {
                Action::Zero => self.zero(run)?,
                Action::Copy => self.copy(buffers, run)?,
                Action::Compare => self.compare(buffers, run)?,
            }
        }
        Ok(steps.iter().map(|(run, _)| run.pages).sum())
    }

    fn zero(&self, run: Run) -> Result<(), MergeError> {
        let digests = vec![PageDigest::Zero; usize::try_from(run.pages).unwrap_or(0)];
        self.sink.keep(run.first, &digests)?;
        self.zero.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Brings a run of data pages of one file into the new one; those that are there already are kept.
    fn copy(&self, buffers: &mut Buffers, run: Run) -> Result<(), MergeError> {
        let digests = digests(self.child, run)?;
        if !self.sink.adopted() {
            return self.write(buffers, run, &digests);
        }
        let there = self.find(buffers, run, &digests);
        for_each_stretch(&there, |from, len, there| {
            let part = Run::new(PageId(run.first.0 + from as u64), len as u64);
            let digests = digests.get(from..from + len).unwrap_or_default();
            if !there {
                return self.write(buffers, part, digests);
            }
            self.sink.keep(part.first, digests)?;
            self.reused.fetch_add(part.pages, Ordering::Relaxed);
            Ok(())
        })
    }

    /// Copies a run, checking each page on the way.
    fn write(&self, buffers: &mut Buffers, run: Run, digests: &[PageDigest]) -> Result<(), MergeError> {
        let bytes = buffers.first.get(run.pages);
        self.child.read_run(run.first, bytes)?;
        self.sink.write(&[Piece { first: run.first, bytes, digests }])?;
        self.copied.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Which pages of a run are in an adopted file with the bytes that they must have, by their checksums.
    fn find(&self, buffers: &mut Buffers, run: Run, digests: &[PageDigest]) -> Vec<bool> {
        let nothing = || vec![false; digests.len()];
        let (file, offset) = (self.sink.file(), run.first.0 * PAGE_BYTES);
        // A hole is not read; what cannot be read is not there.
        if storage::next_data(file, offset).is_ok_and(|next| next.is_none_or(|next| next >= run.end().0 * PAGE_BYTES)) {
            return nothing();
        }
        let bytes = buffers.first.get(run.pages);
        if file.read_exact_at(bytes, offset).is_err() {
            return nothing();
        }
        let pages = bytes.as_chunks::<PAGE>().0.iter();
        pages.zip(digests).map(|(page, digest)| *digest == PageDigest::Data(crc32c::crc32c(page))).collect()
    }

    /// Copies the pages of a run that are not the same in the new parent. The same checksum does not make them the same: among
    /// millions of pages there will be two that share one.
    fn compare(&self, buffers: &mut Buffers, run: Run) -> Result<(), MergeError> {
        let Some(parent) = self.parent else { return self.copy(buffers, run) };
        let (ours, theirs) = (digests(self.child, run)?, digests(parent, run)?);
        let maybe: Vec<bool> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours == theirs).collect();
        for_each_stretch(&maybe, |from, len, maybe| {
            let part = Run::new(PageId(run.first.0 + from as u64), len as u64);
            if !maybe {
                return self.copy(buffers, part);
            }
            let Buffers { first, second } = buffers;
            let (ours, theirs) = (first.get(part.pages), second.get(part.pages));
            self.child.read_run(part.first, ours)?;
            parent.read_run(part.first, theirs)?;
            self.compared.fetch_add(part.pages, Ordering::Relaxed);
            let (ours, theirs) = (ours.as_chunks::<PAGE>().0, theirs.as_chunks::<PAGE>().0);
            let same: Vec<bool> = ours.iter().zip(theirs).map(|(ours, theirs)| ours == theirs).collect();
            for_each_stretch(&same, |from, len, same| {
                let part = Run::new(PageId(part.first.0 + from as u64), len as u64);
                if same { Ok(()) } else { self.copy(buffers, part) }
            })
        })
    }
}

/// The digests of data pages, as the file has them that has the pages.
fn digests(chain: &Chain, run: Run) -> Result<Vec<PageDigest>, ReadError> {
    let (found, file) = chain.locate(run.first);
    match file.filter(|_| found.pages >= run.pages).and_then(|file| stored_digests(file, run)) {
        Some(digests) => Ok(digests),
        // Not a run of one file: the plan has none of those.
        None => {
            let place = place(chain.blocks(), run.first);
            Err(chain.tip().error(ReadErrorKind::NoData { page: run.first, place, state: PageState::Zero }))
        }
    }
}

fn stored_digests(file: &SnapshotFile, run: Run) -> Option<Vec<PageDigest>> {
    let (PageState::Data, rank) = file.meta().states.state(run.first) else { return None };
    let from = usize::try_from(rank).ok()?;
    let crcs = file.meta().crcs.get(from..from.checked_add(usize::try_from(run.pages).ok()?)?)?;
    Some(crcs.iter().map(|crc| PageDigest::Data(crc.get())).collect())
}

/// Calls `each` with start, length and value of every stretch of equal values.
fn for_each_stretch<E>(values: &[bool], mut each: impl FnMut(usize, usize, bool) -> Result<(), E>) -> Result<(), E> {
    let mut from = 0;
    for stretch in values.chunk_by(|a, b| a == b) {
        each(from, stretch.len(), stretch.first().is_some_and(|&value| value))?;
        from += stretch.len();
    }
    Ok(())
}
