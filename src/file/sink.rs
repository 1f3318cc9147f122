//! Writing a snapshot file: the image sink that ends in a file.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ramshot_core::{BlockTable, PageId};

use super::error::CreateError;
use super::format::{MAX_PAGES, PAGE, PAGE_BYTES};
use super::pages::PageTable;
use super::partial::Partial;
use super::sections::{Batch, Failed};
use super::{PageState, ParentRef, SnapshotId, trailer};
use crate::os::storage;
use crate::sink::{Committed, ImageMeta, ImageSink, PageDigest, Piece, SinkError};

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
    table: BlockTable,
    id: SnapshotId,
    parent: Option<ParentRef>,
    sync: bool,
    /// The same file for writes past the page cache.
    direct: Option<File>,
    /// Held while digests are noted, never during I/O.
    pages: Mutex<PageTable>,
    /// Pages may be given once more.
    again: AtomicBool,
    /// A write has failed: what is there can never be committed.
    failed: AtomicBool,
}

impl FileSink {
    /// Begins a full snapshot of the RAM in `table` at `path`.
    ///
    /// A new file has the permissions that the process's umask leaves; one that replaces another has that one's.
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
        if table.pages() > MAX_PAGES {
            return Err(CreateError::TooLarge { path: path.to_owned(), pages: table.pages() });
        }
        let partial = Partial::create(path, options.replace)?;
        // Now rather than at the commit: a file system that cannot hold a (sparse) file of this length says so.
        partial.file().set_len(table.pages() * PAGE_BYTES).map_err(|source| CreateError::Io {
            path: path.to_owned(),
            what: format!("{:?} cannot be made {} bytes long", partial.path(), table.pages() * PAGE_BYTES),
            source,
        })?;
        let direct = options.direct.then(|| storage::direct(partial.file(), partial.path())).flatten();
        log::debug!(target: "ramshot::file", "{path:?}: direct I/O: {}", direct.is_some());
        let default = if parent.is_some() { PageState::InParent } else { PageState::Zero };
        Ok(Self {
            partial,
            table: table.clone(),
            id: id.unwrap_or_else(SnapshotId::random),
            parent,
            sync: options.sync,
            direct,
            pages: Mutex::new(PageTable::new(table.pages(), default)),
            again: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        })
    }

    /// The id that the snapshot will have.
    #[must_use]
    pub const fn id(&self) -> SnapshotId {
        self.id
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
        let mut batch = Batch::new(direct.unwrap_or(self.partial.file()));
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
            Some(end) if end <= self.table.pages() => Ok(()),
            _ => Err(self.misuse(format!("{} and {count} from it on: there are {}", piece.first, self.table.pages()))),
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
        if self.sync {
            file.sync_data().map_err(|e| io("its pages cannot be synced", e))?;
        }
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = trailer::Contents { id: self.id, parent: self.parent, table: &self.table, meta };
        let (image_bytes, checksum) = trailer::write(file, &contents, &pages).map_err(|e| self.write_error(e))?;
        if self.sync {
            file.sync_all().map_err(|e| io("its trailer cannot be synced", e))?;
        }
        let trailer_bytes = image_bytes - self.table.pages() * PAGE_BYTES;
        let written_bytes = pages.data_pages() * PAGE_BYTES + trailer_bytes;
        drop(pages);
        self.partial.publish(self.sync)?;
        let snapshot = Some(ParentRef { id: self.id, checksum });
        Ok(Committed { image_bytes, written_bytes, snapshot })
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
