//! Writing a snapshot file: the image sink that ends in a file.

use std::fs::File;
use std::io::IoSlice;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ramshot_core::{BlockTable, PageId, RamBlock, Run};
use zerocopy::{FromZeros, IntoBytes};

use super::error::CreateError;
use super::format::{MARK_LEN, MAX_PAGES, Mark, PAGE, PAGE_BYTES};
use super::pages::PageTable;
use super::parse::Source;
use super::partial::Partial;
use super::sections::{Batch, Failed, write_all};
use super::verify::first_stray;
use super::{FileBlock, PageState, ParentRef, SnapshotId, trailer};
use crate::os::storage;
use crate::sink::{Committed, ImageMeta, ImageSink, PageDigest, Piece, SinkError};

/// Written at a time past the page cache: it is the device that works.
const DIRECT_WRITE: u64 = 4 << 20;
/// Written at a time through the page cache, at 2 to 5 GB/s: 0.1 to 0.25 ms of a processor.
const CACHED_WRITE: u64 = 512 << 10;

/// How a snapshot file is written.
#[derive(Clone, Copy, Debug)]
pub struct FileSinkOptions {
    /// Replace a file of that name, in the instant of the commit. Without it, one that exists is an error, at the
    /// beginning and (should it appear meanwhile) at the commit.
    pub replace: bool,
    /// Sync data, trailer and directory, so that a committed snapshot survives a power failure. Without it, it
    /// survives the death of this process.
    pub sync: bool,
    /// Write pages past the page cache where the file system can (`O_DIRECT`, Linux 6.1): faster, at half the processor
    /// time, and nobody is throttled for dirty pages. What is written is then not in the page cache, so a restore right
    /// afterwards reads it from the device.
    pub direct: bool,
}

impl Default for FileSinkOptions {
    /// Keeps what exists; syncs; past the page cache.
    fn default() -> Self {
        Self { replace: false, sync: true, direct: true }
    }
}

/// A snapshot file that is being written.
///
/// It stands as `NAME.partial` beside the target, locked, until [`commit`](ImageSink::commit) gives it its name.
/// Dropping it removes it. Its memory follows the pages given: 4 bytes and 2 bits each.
#[derive(Debug)]
pub struct FileSink {
    partial: Partial,
    blocks: Vec<FileBlock>,
    /// Pages of all blocks.
    total: u64,
    id: SnapshotId,
    parent: Option<ParentRef>,
    sync: bool,
    /// The same file for writes past the page cache.
    direct: Option<File>,
    /// Held while digests are noted, never during I/O.
    pages: Mutex<PageTable>,
    /// Pages that have blocks already.
    room: Mutex<Vec<Range<u64>>>,
    /// Pages may be given once more.
    again: AtomicBool,
    /// A write has failed: what is there can never be committed.
    failed: AtomicBool,
    /// The file holds pages already, of the same merge: nobody knows which, or whether they are whole.
    adopted: bool,
}

impl FileSink {
    /// Begins a full snapshot of the RAM in `table` at `path`.
    ///
    /// A new file is its owner's alone (mode 0600, where the system has modes); one that replaces another has that one's
    /// permissions.
    /// A link is followed: what it points to is replaced. What a killed writer left in `NAME.partial` is removed.
    ///
    /// # Errors
    /// What is in the way. Nothing is left behind then.
    pub fn create(path: &Path, table: &BlockTable, options: &FileSinkOptions) -> Result<Self, CreateError> {
        Self::create_as(path, table, options, None, None)
    }

    /// Begins an increment on `parent`: a page that is never given is in the parent.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_child(
        path: &Path,
        table: &BlockTable,
        options: &FileSinkOptions,
        parent: ParentRef,
    ) -> Result<Self, CreateError> {
        Self::create_as(path, table, options, Some(parent), None)
    }

    /// As [`create`](Self::create), on top of `parent`: pages that are never given are in the parent then.
    /// The id is chosen here unless it is given.
    pub(super) fn create_as(
        path: &Path,
        table: &BlockTable,
        options: &FileSinkOptions,
        parent: Option<ParentRef>,
        id: Option<SnapshotId>,
    ) -> Result<Self, CreateError> {
        Self::begin(path, blocks_of(table), options, parent, id, None)
    }

    /// Begins a merge, which says by `mark` which one it is. What a killed one with the same mark left is taken over if `adopt`
    /// says so: [`adopted`](Self::adopted) tells.
    pub(super) fn create_merge(
        path: &Path,
        blocks: &[FileBlock],
        options: &FileSinkOptions,
        parent: Option<ParentRef>,
        mark: &Mark,
        adopt: bool,
    ) -> Result<Self, CreateError> {
        Self::begin(path, blocks.to_vec(), options, parent, None, Some((mark, adopt)))
    }

    fn begin(
        path: &Path,
        blocks: Vec<FileBlock>,
        options: &FileSinkOptions,
        parent: Option<ParentRef>,
        id: Option<SnapshotId>,
        mark: Option<(&Mark, bool)>,
    ) -> Result<Self, CreateError> {
        let total = blocks.last().map_or(0, |block| block.run().end().0);
        if total > MAX_PAGES {
            return Err(CreateError::TooLarge { path: path.to_owned(), pages: total });
        }
        let mut adopted = false;
        let partial = Partial::create(path, options.replace, &mut |file| {
            adopted = mark.is_some_and(|(mark, adopt)| adopt && has_mark(file, total, mark));
            adopted
        })?;
        let io = |what: String| |source| CreateError::Io { path: path.to_owned(), what, source };
        // Now rather than at the commit: a file system that cannot hold a (sparse) file of this length says so.
        let len = total * PAGE_BYTES;
        if !adopted {
            let no_length = io(format!("{:?} cannot be made {len} bytes long", partial.path()));
            partial.file().set_len(len).map_err(no_length)?;
        }
        if let Some((mark, _)) = mark.filter(|_| !adopted) {
            let no_mark = io(format!("{:?} cannot be written", partial.path()));
            write_all(partial.file(), &mut [IoSlice::new(mark.as_bytes())], len).map_err(no_mark)?;
        }
        let direct = options.direct.then(|| storage::direct(partial.file(), partial.path())).flatten();
        log::debug!(target: "ramshot::file", "{path:?}: direct I/O: {}, adopted: {adopted}", direct.is_some());
        let default = if parent.is_some() { PageState::InParent } else { PageState::Zero };
        Ok(Self {
            partial,
            blocks,
            total,
            id: id.unwrap_or_else(SnapshotId::random),
            parent,
            sync: options.sync,
            direct,
            pages: Mutex::new(PageTable::new(total, default)),
            room: Mutex::new(Vec::new()),
            again: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            adopted,
        })
    }

    /// The id that the snapshot will have.
    #[must_use]
    pub const fn id(&self) -> SnapshotId {
        self.id
    }

    /// Whether the file has been taken over from a merge that was killed.
    pub(super) const fn adopted(&self) -> bool {
        self.adopted
    }

    /// The file, to see what is in one that was adopted.
    pub(super) const fn file(&self) -> &File {
        self.partial.file()
    }

    /// Notes pages as [`write`](ImageSink::write) does, without their bytes: they are in the file already, or zero.
    pub(super) fn keep(&self, first: PageId, digests: &[PageDigest]) -> Result<(), SinkError> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.record(first, digests).map_err(|twice| self.misuse(format!("{} was given twice", twice.0)))
    }

    /// The first place in the flat RAM that has no data by what was given, and is not zero in the file all the same: what
    /// must not be committed. Only an adopted file can have one.
    pub(super) fn find_stray(&self) -> std::io::Result<Option<PageId>> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = Vec::new();
        // Ends with the first thing found, a page or an error.
        let mut look = |from, to| match first_stray(self.partial.file(), &mut buffer, from, to) {
            Ok(None) => Ok(()),
            Ok(Some(page)) => Err(Ok(page)),
            Err(error) => Err(Err(error)),
        };
        let mut from = PageId(0);
        let between = pages.for_each_run(|run| {
            if run.state == PageState::Data {
                look(from, run.run.first)?;
                from = run.run.end();
            }
            Ok(())
        });
        match between.and_then(|()| look(from, PageId(self.total))) {
            Ok(()) => Ok(None),
            Err(Ok(page)) => Ok(Some(page)),
            Err(Err(error)) => Err(error),
        }
    }

    fn write_pieces(&self, pieces: &[Piece<'_>]) -> Result<(), SinkError> {
        for piece in pieces {
            self.check(piece)?;
        }
        let mut stale = Vec::new();
        {
            let again = self.again.load(Ordering::Acquire);
            let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            for piece in pieces {
                if again {
                    stale.push(pages.record_again(piece.first, piece.digests));
                } else {
                    pages
                        .record(piece.first, piece.digests)
                        .map_err(|twice| self.misuse(format!("{} was given twice", twice.0)))?;
                }
            }
        }
        let mut stale = stale.iter();
        // The pool's slots are aligned; who calls this by hand may not care.
        let aligned = |piece: &Piece<'_>| piece.bytes.as_ptr().align_offset(PAGE) == 0;
        let direct = self.direct.as_ref().filter(|_| pieces.iter().all(aligned));
        let mut batch = Batch::new(self.partial.file(), direct);
        for piece in pieces {
            let stale = stale.next().map_or(&[][..], Vec::as_slice);
            for_each_run_to_write(piece, stale, |first, bytes| batch.add(first.0, bytes))
                .map_err(|e| self.write_error(e))?;
        }
        batch.flush().map_err(|e| self.write_error(e))
    }

    fn check(&self, piece: &Piece<'_>) -> Result<(), SinkError> {
        let count = piece.digests.len() as u64;
        if piece.bytes.len() as u64 != count * PAGE_BYTES {
            return Err(self.misuse(format!("{} bytes were given as {count} pages", piece.bytes.len())));
        }
        match piece.first.0.checked_add(count) {
            Some(end) if end <= self.total => Ok(()),
            _ => Err(self.misuse(format!("{} and {count} from it on: there are {}", piece.first, self.total))),
        }
    }

    fn commit_all(self, meta: &ImageMeta) -> Result<Committed, SinkError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.misuse("a write to it has failed".to_owned()));
        }
        if let Some(key) = trailer::bad_key(meta) {
            return Err(self.misuse(format!("the key of a statistic is {} bytes, not 1 to 255", key.len())));
        }
        let io = |what: &str, source| SinkError {
            what: format!("cannot commit snapshot {:?}: {what}", self.partial.target()),
            source,
        };
        let file = self.partial.file();
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        self.give_back_room(&pages);
        if self.sync {
            file.sync_data().map_err(|e| io("its pages cannot be synced", e))?;
        }
        let contents = trailer::Contents { id: self.id, parent: self.parent, blocks: &self.blocks, meta };
        let (image_bytes, checksum) = trailer::write(file, &contents, &pages).map_err(|e| self.write_error(e))?;
        if self.sync {
            file.sync_all().map_err(|e| io("its trailer cannot be synced", e))?;
        }
        let trailer_bytes = image_bytes - self.total * PAGE_BYTES;
        let written_bytes = pages.data_pages() * PAGE_BYTES + trailer_bytes;
        drop(pages);
        self.partial.publish(self.sync)?;
        let snapshot = Some(ParentRef { id: self.id, checksum });
        Ok(Committed { image_bytes, written_bytes, snapshot })
    }

    /// Whether the file has blocks for `run` now. If not (the disk is full, the file system cannot), writing will tell: it may
    /// need fewer.
    fn allocate(&self, run: Run) -> bool {
        let pages = run.first.0..run.end().0.min(self.total);
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        match storage::allocate(self.partial.file(), pages.start * PAGE_BYTES, (pages.end - pages.start) * PAGE_BYTES) {
            Ok(()) => room.push(pages),
            Err(error) => {
                log::debug!(target: "ramshot::file", "{:?}: no room ahead at {}: {error}", self.partial.path(), run.first);
                return false;
            }
        }
        true
    }

    /// Gives back the room for pages that turned out zero: they are holes.
    fn give_back_room(&self, pages: &PageTable) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        for range in room.drain(..) {
            let mut from = range.start;
            while from < range.end {
                let data = pages.is_data(PageId(from));
                let to = (from..range.end).find(|&page| pages.is_data(PageId(page)) != data).unwrap_or(range.end);
                if !data
                    && let Err(error) =
                        storage::give_back(self.partial.file(), from * PAGE_BYTES, (to - from) * PAGE_BYTES)
                {
                    // They read as zeros all the same.
                    log::debug!(target: "ramshot::file", "{:?}: page {from} stays allocated: {error}", self.partial.path());
                }
                from = to;
            }
        }
    }

    fn write_error(&self, failed: Failed) -> SinkError {
        SinkError {
            what: format!("cannot write {} bytes at byte {} of {:?}", failed.len, failed.offset, self.partial.path()),
            source: failed.source,
        }
    }

    fn misuse(&self, what: String) -> SinkError {
        SinkError {
            what: format!("cannot write snapshot {:?}", self.partial.target()),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, what),
        }
    }
}

impl ImageSink for FileSink {
    fn write(&self, pieces: &[Piece<'_>]) -> Result<(), SinkError> {
        self.write_pieces(pieces).inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    fn make_room(&self, run: Run) -> bool {
        // Past the page cache it is the device that is waited for.
        self.direct.is_none() && (run.pages == 0 || self.allocate(run))
    }

    fn write_size(&self) -> u64 {
        if self.direct.is_some() { DIRECT_WRITE } else { CACHED_WRITE }
    }

    fn omitted(&self) -> PageState {
        if self.parent.is_some() { PageState::InParent } else { PageState::Zero }
    }

    fn again(&self) -> Result<(), SinkError> {
        self.again.store(true, Ordering::Release);
        Ok(())
    }

    fn commit(self: Box<Self>, meta: &ImageMeta) -> Result<Committed, SinkError> {
        (*self).commit_all(meta)
    }

    fn abort(self: Box<Self>) {
        drop(self);
    }
}

/// The blocks of a table as the file records them.
fn blocks_of(table: &BlockTable) -> Vec<FileBlock> {
    let mut first_page = PageId(0);
    let file_block = |block: &RamBlock| {
        let block = FileBlock {
            name: block.name,
            guest: block.guest,
            len: block.len,
            used: block.used,
            page_size: block.page_size,
            first_page,
            treatment: block.treatment,
            backing: block.backing,
        };
        first_page = block.run().end();
        block
    };
    table.blocks().iter().map(file_block).collect()
}

/// Whether `file` is that of a merge with this mark, as long as it copies pages. The length is that of no other partial
/// file: what lies at the place of the mark cannot be RAM, which a guest could have written.
fn has_mark(file: &File, pages: u64, mark: &Mark) -> bool {
    let offset = pages * PAGE_BYTES;
    let mut found = Mark::new_zeroed();
    file.metadata().is_ok_and(|now| now.len() == offset + MARK_LEN)
        && file.read_exact_at(found.as_mut_bytes(), offset).is_ok()
        && found == *mark
}

/// Calls `each` for every run of pages in `piece` whose bytes belong into the file: data, and zeros over `stale` data.
fn for_each_run_to_write<'a, E>(
    piece: &Piece<'a>,
    stale: &[bool],
    mut each: impl FnMut(PageId, &'a [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let is_written = |at: usize| {
        matches!(piece.digests.get(at), Some(PageDigest::Data(_))) || stale.get(at).is_some_and(|&stale| stale)
    };
    let mut at = 0;
    while at < piece.digests.len() {
        let mut end = at + 1;
        while end < piece.digests.len() && is_written(end) == is_written(at) {
            end += 1;
        }
        if is_written(at) {
            let bytes = piece.bytes.get(at * PAGE..end * PAGE).unwrap_or_default();
            each(PageId(piece.first.0 + at as u64), bytes)?;
        }
        at = end;
    }
    Ok(())
}
