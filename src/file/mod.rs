//! The snapshot file: one file that holds a VM's RAM at T0 and everything needed to give it back.
//!
//! ```text
//! 0                                    pages * 4096                                        end - 64      end
//! ┌───────────────────────────────────┬───────────────────────────────────────────────────┬─────────────┐
//! │ flat RAM: the blocks back to back │ trailer: header, directory, block table,          │ tail: where │
//! │ in table order; a page that has   │ page states, page checksums, device state,        │ the trailer │
//! │ no data is a hole                 │ statistics                                        │ is, and CRC │
//! └───────────────────────────────────┴───────────────────────────────────────────────────┴─────────────┘
//! ```
//! `docs/FORMAT.md` specifies every byte. [`FileSink`] writes such a file, page by page in any order from any number
//! of threads, beside its final name, and renames it into place when it is complete; [`SnapshotFile`] opens one,
//! verifies it and fills guest RAM from it.
//!
//! An increment is such a file that names its parent. [`Chain`] opens it with all its ancestors; [`PageSource`] is what both
//! are to a restore. [`flatten`] makes one file of a chain, [`rebase`] moves an increment onto another parent.
//!
//! # Invariants
//! - A file that opens is complete: its length, header, directory and every section were checked before
//!   [`SnapshotFile::open`] returned. Page bytes are checked when they are read.
//! - Memory and time follow the pages that have data, not the nominal size of RAM, in the writer and in the reader.
//! - Nothing in a file can make the reader panic, overflow, or allocate more than a small multiple of what it read.
//!
//! Nothing here knows an address space, a VM or an operating system; positional I/O comes from the shim's `storage`.

mod batch;
mod chain;
mod error;
mod format;
mod index;
mod mapped;
mod merge;
mod pages;
mod parallel;
mod parse;
mod partial;
mod reader;
mod restore;
mod sections;
mod sink;
mod source;
mod trailer;
mod verify;

#[cfg(test)]
mod tests_attack;
#[cfg(test)]
mod tests_kill;
#[cfg(test)]
mod tests_memory;
#[cfg(test)]
mod tests_names;
#[cfg(test)]
mod tests_read;
#[cfg(all(test, target_os = "linux"))]
mod tests_room;
#[cfg(test)]
mod tests_round_trip;
#[cfg(test)]
mod tests_support;

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::time::SystemTime;

use ramshot_core::{Backing, BlockName, GuestAddr, PageId, Run, Treatment};

pub use chain::{Ancestry, Chain, ChainError, Looked, MAX_CHAIN};
pub use error::{CreateError, LayoutMismatch, OpenError, OpenErrorKind, ReadError, ReadErrorKind, RestoreError};
pub use mapped::{MapError, MapReport};
pub use merge::{MergeError, MergeOptions, MergeReport, flatten, rebase};
pub use reader::SnapshotFile;
pub use restore::RestoreReport;
pub use sink::{FileSink, FileSinkOptions};
pub use source::{PageSource, match_blocks};
pub use verify::VerifyReport;

/// What a snapshot knows of one page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageState {
    /// All bytes are zero; nothing is stored.
    Zero,
    /// The bytes are in this file.
    Data,
    /// Unchanged since the parent snapshot, which has it. Never the same as zero.
    InParent,
}

/// Consecutive pages in the same state; may reach over a block boundary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateRun {
    /// The pages.
    pub run: Run,
    /// Their state.
    pub state: PageState,
}

/// Tells one snapshot from all others: 128 random bits, never all zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// A new one. Unpredictable as far as the hasher of the standard library is (it is seeded by the system); it
    /// distinguishes snapshots and authenticates nothing.
    fn random() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let seed = (now.as_nanos(), std::process::id(), std::thread::current().id());
        let half = |salt: u8| RandomState::new().hash_one((seed, salt)).to_le_bytes();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&half(0));
        id[8..].copy_from_slice(&half(1));
        id[0] |= u8::from(id == [0; 16]);
        Self(id)
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The snapshot that an increment builds on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParentRef {
    /// Its id.
    pub id: SnapshotId,
    /// Its [trailer checksum](SnapshotFile::checksum), which covers everything in it.
    pub checksum: u32,
}

/// A RAM block as the snapshot file records it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileBlock {
    /// Name, unique in the file.
    pub name: BlockName,
    /// Where the guest saw it.
    pub guest: GuestAddr,
    /// Length of the mapping in bytes.
    pub len: u64,
    /// How much of it was in use: what the file holds, unless the block is ignored.
    pub used: u64,
    /// Host page size at capture, in bytes. A restore may use another.
    pub page_size: u64,
    /// Its first page; byte `first_page * 4096` of the file.
    pub first_page: PageId,
    /// What the snapshot did with it.
    pub treatment: Treatment,
    /// What the memory came from.
    pub backing: Backing,
}

impl FileBlock {
    /// Pages it has in the file: none if it was ignored.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        match self.treatment {
            Treatment::Ignored => 0,
            _ => self.used / format::PAGE_BYTES,
        }
    }

    /// Its pages.
    #[must_use]
    pub const fn run(&self) -> Run {
        Run::new(self.first_page, self.pages())
    }
}

/// Where the next stored data of any file begins, at byte `at` or after it; `None` if only a hole follows. For importers of
/// sparse memory images. A system or file system that knows no holes answers `at`.
///
/// # Errors
/// What the system answered.
pub fn next_data(file: &std::fs::File, at: u64) -> std::io::Result<Option<u64>> {
    crate::os::storage::next_data(file, at)
}

/// The block that holds `page`, with its position. Blocks lie in page order; ignored ones are empty.
fn block_of(blocks: &[FileBlock], page: PageId) -> Option<(usize, &FileBlock)> {
    let after = blocks.partition_point(|block| block.first_page <= page);
    let index = after.checked_sub(1)?;
    let block = blocks.get(index)?;
    block.run().contains(page).then_some((index, block))
}

/// Block and guest address of a page, for people.
fn place(blocks: &[FileBlock], page: PageId) -> String {
    match block_of(blocks, page) {
        Some((_, block)) => {
            let offset = (page.0 - block.first_page.0) * format::PAGE_BYTES;
            format!("block {:?}, guest address {:#x}", block.name, block.guest.0.saturating_add(offset))
        }
        None => "in no block".to_owned(),
    }
}

/// What a file that is not a regular one is, for people.
fn kind_of(metadata: &std::fs::Metadata) -> &'static str {
    if metadata.is_dir() {
        "a directory"
    } else if metadata.is_symlink() {
        "a link to nothing"
    } else {
        "a device, pipe or socket"
    }
}
