//! Why a chain of snapshots does not open, as sentences.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::file::{OpenError, ParentRef, SnapshotId};

/// Why a snapshot does not open together with its ancestors. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The snapshot itself does not open, or a file that was given as a parent.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The parent is there, and does not open: it was cut off, damaged, or may not be read.
    #[error(
        "snapshot {child:?} is an increment on {parent}, which is there and does not open; restore that file from a copy"
    )]
    Parent {
        /// The increment.
        child: PathBuf,
        /// Its parent's id.
        parent: SnapshotId,
        /// Which file, and what is wrong with it.
        #[source]
        source: OpenError,
    },
    /// No file is the parent.
    #[error("snapshot {child:?} is an increment on {}, which was not found: looked at {looked}", parent.id)]
    Missing {
        /// The increment.
        child: PathBuf,
        /// What it names.
        parent: ParentRef,
        /// Where it was looked for.
        looked: Looked,
    },
    /// A file has the parent's id and other content than when the increment was taken.
    #[error(
        "{path:?} is not the parent of snapshot {child:?} any more: its id is {id}, but its checksum is {found:#010x} and \
         the increment was taken on {stated:#010x}; put the original back"
    )]
    Modified {
        /// The increment.
        child: PathBuf,
        /// The file.
        path: PathBuf,
        /// The parent's id, which it has.
        id: SnapshotId,
        /// The checksum that the increment names.
        stated: u32,
        /// That of the file.
        found: u32,
    },
    /// A snapshot is its own ancestor.
    #[error(
        "snapshot {child:?} names {id} as its parent, which is itself an increment on it: no chain can begin like that"
    )]
    Cycle {
        /// The last increment before it closes.
        child: PathBuf,
        /// The snapshot that is there twice.
        id: SnapshotId,
    },
    /// The parent is of other RAM.
    #[error("snapshot {child:?} and its parent {parent:?} have different RAM: {difference}")]
    Layout {
        /// The increment.
        child: PathBuf,
        /// The parent.
        parent: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// More snapshots than a chain may have.
    #[error("snapshot {path:?} is the last of more than {limit} in a row: flatten one further back, which still opens")]
    TooDeep {
        /// The snapshot.
        path: PathBuf,
        /// The most a chain can have.
        limit: usize,
    },
    /// The directory of an increment cannot be read.
    #[error("the parent of snapshot {child:?} cannot be looked for in {directory:?}; give its path")]
    Directory {
        /// The increment.
        child: PathBuf,
        /// Its directory.
        directory: PathBuf,
        /// The system's word for it.
        source: io::Error,
    },
}

/// Where a parent was looked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Looked {
    /// How many files were given.
    pub given: usize,
    /// The directories.
    pub directories: Vec<PathBuf>,
    /// How many files are in them that end as a snapshot does.
    pub snapshots: usize,
    /// How many do not.
    pub others: usize,
    /// One of those, the largest: perhaps a snapshot that was cut off.
    pub largest_other: Option<PathBuf>,
}

impl fmt::Display for Looked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.given > 0 {
            write!(f, "{} given files and ", self.given)?;
        }
        write!(f, "{} snapshots in {:?}", self.snapshots, self.directories)?;
        if let Some(path) = &self.largest_other {
            write!(f, " ({} files there are none or were cut off, {path:?} for one)", self.others)?;
        }
        f.write_str("; give its path, or put it there")
    }
}
