//! Mapped restore: the image's flat RAM mapped privately into the place of guest RAM.

use std::path::PathBuf;

use ramshot_core::{BlockIndex, OsError, PAGE_SIZE};

use super::SnapshotFile;
use super::error::{LayoutMismatch, RestoreError};
use super::source::{PageSource, match_blocks};
use crate::os::{MapTarget, Missing};

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
    /// Pages are in a parent: there is no flat RAM to map. Nothing was mapped.
    #[error("a chain cannot be mapped, flatten it or restore it lazily: {0}")]
    Image(RestoreError),
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
    pub fn map_into(&self, target: &MapTarget) -> Result<u64, MapError> {
        let path = || self.path().to_owned();
        let matched = match_blocks(self.blocks(), target.ram().table())
            .map_err(|mismatch| MapError::Layout { path: path(), mismatch })?;
        self.check_whole().map_err(MapError::Image)?;
        let places: Vec<(BlockIndex, u64, u64)> = (self.blocks().iter().zip(matched))
            .filter_map(|(block, index)| Some((index?, block.first_page.0 * PAGE_SIZE, block.used)))
            .collect();
        // All of them before the first.
        places.iter().try_for_each(|&(index, offset, _)| target.check(index, offset)).map_err(MapError::Refused)?;
        let mut mapped = 0;
        for (index, offset, len) in places {
            target.map(index, self.file(), offset).map_err(|source| MapError::Os { path: path(), source })?;
            mapped += len;
        }
        Ok(mapped)
    }
}
