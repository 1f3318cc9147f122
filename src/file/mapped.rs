//! Mapped restore: the image's flat RAM mapped privately into the place of guest RAM.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use ramshot_core::{BlockIndex, BlockName, HostAddr, OsError, PAGE_SIZE, PageId, Run};

use super::error::{LayoutMismatch, RestoreError};
use super::restore::fill;
use super::source::{PageSource, match_blocks};
use super::{Chain, PageState, SnapshotFile};
use crate::os::{MapTarget, Missing};

/// Most mappings over that of the oldest file. Each may split another one: half of what a process may have by default.
const MAX_PIECES: usize = 16 * 1024;

/// Why a snapshot was not mapped into guest RAM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The VM has other RAM. Nothing was mapped.
    #[error("snapshot {path:?} does not fit this VM: {mismatch}")]
    Layout {
        /// The file.
        path: PathBuf,
        /// The first difference.
        mismatch: LayoutMismatch,
    },
    /// Pages are in a parent: map the whole chain. Nothing was mapped.
    #[error(transparent)]
    Image(RestoreError),
    /// A page that had to be read, because the chain lies in too many pieces to map them all, could not be, or is damaged.
    /// Throw the memory away.
    #[error(transparent)]
    Read(#[from] RestoreError),
    /// A block of this RAM cannot become a mapping of a file. Nothing was mapped.
    #[error("{0}")]
    Refused(Missing),
    /// The system refused. Blocks before this one are mapped: throw the memory away.
    #[error("snapshot {path:?} cannot be mapped: {source}")]
    Os {
        /// The file.
        path: PathBuf,
        /// Its answer.
        source: OsError,
    },
}

impl SnapshotFile {
    /// Maps the flat RAM of this file privately into the place of the blocks of `target`: the VM has its memory at once,
    /// and what it writes stays its own. Returns how many bytes were mapped.
    ///
    /// What it does not do:
    /// - **No page is checked.** A damaged file is read as it is. [`verify`](Self::verify) the file beforehand if that matters.
    /// - **The file must stay as it is** for as long as the VM lives: who changes it changes the VM's memory, who truncates it has the
    ///   VM get SIGBUS. Snapshots are written under another name and renamed, so replacing it by ramshot is fine.
    /// - **No live snapshot can be taken of such memory:** the kernel cannot write-protect the mapping of a file, and
    ///   [`prepare`](crate::prepare) refuses it. Where that is wanted, restore [lazily](crate::lazy).
    /// - Only private anonymous memory can become such a mapping; memfd and hugetlbfs blocks are refused.
    ///
    /// # Errors
    /// What does not fit, and what to do about it.
    pub fn map_into(&self, target: &MapTarget) -> Result<MapReport, MapError> {
        self.check_whole().map_err(MapError::Image)?;
        let places = places(self, self.path(), target)?;
        Ok(MapReport { mapped_bytes: map_whole(self, target, &places)?, ..MapReport::default() })
    }
}

impl Chain {
    /// Maps the flat RAM of the oldest file, and over it what the others have, privately into the place of the blocks of
    /// `target`. Everything that [`SnapshotFile::map_into`] says of its file goes for all files of the chain.
    ///
    /// A chain whose pages are scattered would be more mappings than a process may have (65,530, unless
    /// `vm.max_map_count` says otherwise): the longest 16,384 pieces are mapped, and the rest is read now, and checked.
    /// That takes its time: [`flatten`](crate::flatten) such a chain if it is to be mapped often.
    ///
    /// # Errors
    /// What does not fit, and what to do about it.
    pub fn map_into(&self, target: &MapTarget) -> Result<MapReport, MapError> {
        let root = self.root();
        let places = places(self.tip(), self.tip().path(), target)?;
        let mut report = MapReport { mapped_bytes: map_whole(root, target, &places)?, ..MapReport::default() };
        let mut pieces = self.pieces_over_root();
        // Longest first: they are what mapping saves most on.
        pieces.sort_by_key(|piece| Reverse(piece.run.pages));
        let aligned =
            |place: &Place| [place.from, place.len].iter().all(|bytes| bytes.is_multiple_of(MapTarget::page_size()));
        for (number, piece) in pieces.iter().enumerate() {
            for place in places.iter().filter_map(|place| place.part(piece.run)) {
                if number < MAX_PIECES && aligned(&place) {
                    // What a file has no data for is zero in its flat RAM.
                    place.map(target, piece.file.unwrap_or(self.tip()))?;
                    report.pieces += 1;
                } else {
                    place.read(target, piece.file)?;
                    report.read_bytes += place.len;
                }
            }
        }
        Ok(report)
    }

    /// What the flat RAM of the oldest file does not show as it is in the image.
    fn pieces_over_root(&self) -> Vec<ChainPiece<'_>> {
        let root = self.root();
        let mut pieces = Vec::new();
        let mut page = PageId(0);
        while page.0 < self.tip().pages() {
            let (run, file) = self.locate(page);
            match file {
                Some(file) if std::ptr::eq(file, root) => {}
                Some(_) => pieces.push(ChainPiece { run, file }),
                None => {
                    let below = root.state_runs_from(run.first).take_while(|part| part.run.first < run.end());
                    let hidden = below.filter(|part| part.state == PageState::Data).map(|part| {
                        let (first, end) = (part.run.first.max(run.first), part.run.end().min(run.end()));
                        ChainPiece { run: Run::new(first, end.0 - first.0), file: None }
                    });
                    pieces.extend(hidden);
                }
            }
            page = run.end();
        }
        pieces
    }
}

/// What was mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapReport {
    /// Bytes of guest RAM that are a mapping now.
    pub mapped_bytes: u64,
    /// Mappings laid over that of the oldest file of a chain.
    pub pieces: u64,
    /// Bytes that were read instead, and checked: what was in more pieces than can be mapped.
    pub read_bytes: u64,
}

/// Pages of a chain that one file has, or (`None`) that are zero.
struct ChainPiece<'a> {
    run: Run,
    file: Option<&'a SnapshotFile>,
}

/// Where pages go: a part of one block.
#[derive(Clone, Copy)]
struct Place {
    block: BlockIndex,
    name: BlockName,
    /// Byte of the block, and how many from there on.
    from: u64,
    len: u64,
    first: PageId,
    host: HostAddr,
}

impl Place {
    /// Where the pages of `run` go that are in this place.
    fn part(&self, run: Run) -> Option<Self> {
        let end = (self.first.0 + self.len / PAGE_SIZE).min(run.end().0);
        let first = self.first.0.max(run.first.0);
        let from = (first.checked_sub(self.first.0)?).checked_mul(PAGE_SIZE)?;
        let len = end.checked_sub(first).filter(|pages| *pages > 0)? * PAGE_SIZE;
        Some(Self { from: self.from + from, len, first: PageId(first), host: HostAddr(self.host.0 + from), ..*self })
    }

    fn map(&self, target: &MapTarget, file: &SnapshotFile) -> Result<(), MapError> {
        let offset = self.first.0 * PAGE_SIZE;
        let mapped = target.map(self.block, (self.from, self.len), file.file(), offset);
        mapped.map_err(|source| MapError::Os { path: file.path().to_owned(), source })
    }

    fn read(&self, target: &MapTarget, file: Option<&SnapshotFile>) -> Result<(), RestoreError> {
        let run = Run::new(self.first, self.len / PAGE_SIZE);
        let ram = target.ram().as_ref();
        fill(ram, self.name, self.host, run, &mut |bytes| match file {
            Some(file) => file.read_run(run.first, bytes),
            None => {
                bytes.fill(0);
                Ok(())
            }
        })
    }
}

/// Where the blocks of an image go, all of them looked at before the first is touched.
fn places(file: &SnapshotFile, path: &Path, target: &MapTarget) -> Result<Vec<Place>, MapError> {
    let table = target.ram().table();
    let matched =
        match_blocks(file.blocks(), table).map_err(|mismatch| MapError::Layout { path: path.to_owned(), mismatch })?;
    let mut places = Vec::with_capacity(matched.len());
    for (block, index) in file.blocks().iter().zip(matched) {
        if let Some((index, in_vm)) = index.and_then(|index| Some((index, table.block(index)?))) {
            target.check(index, block.first_page.0 * PAGE_SIZE).map_err(MapError::Refused)?;
            places.push(Place {
                block: index,
                name: block.name,
                from: 0,
                len: block.used,
                first: block.first_page,
                host: in_vm.host,
            });
        }
    }
    Ok(places)
}

/// Maps the flat RAM of one file into all places; returns how many bytes.
fn map_whole(file: &SnapshotFile, target: &MapTarget, places: &[Place]) -> Result<u64, MapError> {
    places.iter().try_fold(0, |mapped, place| place.map(target, file).map(|()| mapped + place.len))
}
