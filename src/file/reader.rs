//! An open snapshot file.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use ramshot_core::{BlockTable, PageId, Run};

use super::error::{LayoutMismatch, OpenError, OpenErrorKind, ReadError, ReadErrorKind};
use super::format::{PAGE, PAGE_BYTES};
use super::parse::{Metadata, Source, parse};
use super::source::match_blocks;
use super::{FileBlock, PageState, ParentRef, SnapshotId, StateRun, kind_of, place};
use crate::os::storage;

/// A snapshot file, open for reading: its metadata is in memory and was checked, its pages are read when asked for and
/// checked then. May be shared by threads.
#[derive(Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    file: File,
    meta: Metadata,
}

impl SnapshotFile {
    /// Opens a snapshot and checks everything but the bytes of its pages.
    ///
    /// Takes memory for 4 bytes a data page, 16 a run of them, and the device state.
    ///
    /// # Errors
    /// Why this is no complete snapshot that this version reads, and where in the file it shows.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        Self::open_kind(path).map_err(|kind| OpenError { path: path.to_owned(), kind })
    }

    fn open_kind(path: &Path) -> Result<Self, OpenErrorKind> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| OpenErrorKind::Io { what, source }
        };
        let regular = |metadata: &fs::Metadata| {
            if metadata.is_file() { Ok(()) } else { Err(OpenErrorKind::NotAFile { found: kind_of(metadata) }) }
        };
        // Before it is opened (a pipe would wait for its writer) and after (it may have changed).
        regular(&fs::metadata(path).map_err(io("it cannot be examined"))?)?;
        let file = File::open(path).map_err(io("it cannot be read"))?;
        let metadata = file.metadata().map_err(io("it cannot be examined"))?;
        regular(&metadata)?;
        let meta = parse(&file, metadata.len())?;
        Ok(Self { path: path.to_owned(), file, meta })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> SnapshotId {
        self.meta.id
    }

    /// The trailer checksum: covers the checksum of every section, and so of every page. With the [`id`](Self::id),
    /// this is how an increment names its parent.
    #[must_use]
    pub const fn checksum(&self) -> u32 {
        self.meta.checksum
    }

    /// The snapshot it builds on, if it is an increment.
    #[must_use]
    pub const fn parent(&self) -> Option<ParentRef> {
        self.meta.parent
    }

    /// How an increment on it names it.
    #[must_use]
    pub const fn as_parent(&self) -> ParentRef {
        ParentRef { id: self.id(), checksum: self.checksum() }
    }

    /// The RAM blocks, in the order in which they lie in the file. Ignored blocks are listed, and have no pages.
    #[must_use]
    pub fn blocks(&self) -> &[FileBlock] {
        &self.meta.blocks
    }

    /// Pages of RAM, whatever their state.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.meta.states.pages()
    }

    /// Pages that have data in this file.
    #[must_use]
    pub const fn data_pages(&self) -> u64 {
        self.meta.states.data_pages()
    }

    /// Pages known to be zero.
    #[must_use]
    pub const fn zero_pages(&self) -> u64 {
        self.meta.states.zero_pages()
    }

    /// Pages that the parent has.
    #[must_use]
    pub const fn in_parent_pages(&self) -> u64 {
        self.meta.states.in_parent_pages()
    }

    /// The state of pages that no record names: zero in a full snapshot, in the parent in an increment.
    #[must_use]
    pub const fn default_state(&self) -> PageState {
        self.meta.states.default_state()
    }

    /// State of one page; `None` if there is no such page.
    #[must_use]
    pub fn page_state(&self, page: PageId) -> Option<PageState> {
        (page.0 < self.pages()).then(|| self.meta.states.state(page).0)
    }

    /// All pages, as runs in ascending order without gaps. Neighbouring runs may have the same state.
    pub fn state_runs(&self) -> impl Iterator<Item = StateRun> {
        self.meta.states.runs_from(PageId(0))
    }

    /// The pages from `page` on, as [`state_runs`](Self::state_runs): the first run may start before it.
    pub fn state_runs_from(&self, page: PageId) -> impl Iterator<Item = StateRun> {
        self.meta.states.runs_from(page).skip_while(move |part| part.run.end() <= page)
    }

    /// The embedder's device state, as it was given.
    #[must_use]
    pub fn device_state(&self) -> &[u8] {
        &self.meta.device_state
    }

    /// What the writer counted, in its order.
    #[must_use]
    pub fn statistics(&self) -> &[(String, u64)] {
        &self.meta.statistics
    }

    /// Apparent size of the file in bytes. What it occupies is about 4096 bytes a data page.
    #[must_use]
    pub const fn image_bytes(&self) -> u64 {
        self.meta.file_len
    }

    /// Size of the flat RAM at the start of the file, in bytes.
    #[must_use]
    pub const fn ram_bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES
    }

    /// Reads one page and checks it. Zero pages are filled in; for a page in the parent **`into` is left as it was**,
    /// and the parent must be asked.
    ///
    /// # Errors
    /// No such page, it cannot be read, or it is damaged (`into` holds the damaged bytes then).
    pub fn read_page(&self, page: PageId, into: &mut [u8; PAGE]) -> Result<PageState, ReadError> {
        if page.0 >= self.pages() {
            return Err(self.error(ReadErrorKind::OutOfRange { page, count: 1, pages: self.pages() }));
        }
        let (state, rank) = self.meta.states.state(page);
        match state {
            PageState::Data => self.read_data(page, rank, into)?,
            PageState::Zero => into.fill(0),
            PageState::InParent => {}
        }
        Ok(state)
    }

    /// The CRC-32C that was written for a page; `None` if it has no data here. Pages with different ones are different;
    /// pages with the same one are almost certainly, but not provably, the same.
    #[must_use]
    pub fn page_checksum(&self, page: PageId) -> Option<u32> {
        if page.0 >= self.pages() {
            return None;
        }
        match self.meta.states.state(page) {
            (PageState::Data, rank) => self.meta.crcs.get(usize::try_from(rank).ok()?).map(|crc| crc.get()),
            _ => None,
        }
    }

    /// Reads consecutive pages, all of which must have data here, and checks each.
    ///
    /// # Errors
    /// As [`read_page`](Self::read_page); also a buffer that is not whole pages, or the first page without data.
    pub fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        if !into.len().is_multiple_of(PAGE) {
            return Err(self.error(ReadErrorKind::Buffer { len: into.len() }));
        }
        let count = (into.len() / PAGE) as u64;
        if first.0.checked_add(count).is_none_or(|end| end > self.pages()) {
            return Err(self.error(ReadErrorKind::OutOfRange { page: first, count, pages: self.pages() }));
        }
        let run = Run::new(first, count);
        let not_data = |part: &StateRun| part.state != PageState::Data;
        let covering = self.meta.states.runs_from(first).take_while(|part| part.run.first.0 < run.end().0);
        if let Some(part) = covering.filter(|part| part.run.overlaps(run)).find(not_data) {
            let page = part.run.first.max(first);
            let place = place(self.blocks(), page);
            return Err(self.error(ReadErrorKind::NoData { page, place, state: part.state }));
        }
        let (_, rank) = self.meta.states.state(first);
        self.read_data(first, rank, into)
    }

    /// Reads data pages, the first of which is number `rank` among all data pages, and checks each.
    pub(super) fn read_data(&self, first: PageId, rank: u64, into: &mut [u8]) -> Result<(), ReadError> {
        self.read_bytes(first.0 * PAGE_BYTES, into)?;
        let from = usize::try_from(rank).unwrap_or(usize::MAX);
        let crcs = self.meta.crcs.get(from..).unwrap_or_default();
        for ((page, bytes), stated) in (first.0..).zip(into.as_chunks::<PAGE>().0).zip(crcs) {
            let (stated, found) = (stated.get(), crc32c::crc32c(bytes));
            if stated != found {
                let page = PageId(page);
                let (place, offset) = (place(self.blocks(), page), page.0 * PAGE_BYTES);
                return Err(self.error(ReadErrorKind::Checksum { page, place, offset, stated, found }));
            }
        }
        Ok(())
    }

    /// Reads bytes of the file.
    pub(super) fn read_bytes(&self, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let len = into.len();
        self.file.read_exact_at(into, offset).map_err(|source| {
            self.error(match source.kind() {
                ErrorKind::UnexpectedEof => {
                    ReadErrorKind::Shrunk { offset: self.file.metadata().map_or(offset, |now| now.len()) }
                }
                _ => ReadErrorKind::Io { offset, len, source },
            })
        })
    }

    /// Whether a VM with the RAM of `table` can be restored from this file: the same blocks by name (in any order), each
    /// at the same guest address with the same length in use. Host page size, host address, backing and the length
    /// of the mapping may differ. Ignored blocks count on neither side.
    ///
    /// # Errors
    /// The first difference, with both values.
    pub fn check_layout(&self, table: &BlockTable) -> Result<(), LayoutMismatch> {
        match_blocks(self.blocks(), table).map(drop)
    }

    pub(super) const fn meta(&self) -> &Metadata {
        &self.meta
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn error(&self, kind: ReadErrorKind) -> ReadError {
        ReadError { path: self.path.clone(), kind }
    }
}

impl Source for File {
    fn read_exact_at(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            match storage::read_at(self, into, offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    into = into.get_mut(read..).unwrap_or_default();
                    offset = offset.checked_add(read as u64).ok_or(ErrorKind::FileTooLarge)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
