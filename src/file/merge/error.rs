//! Why chains could not be rewritten.

use std::path::PathBuf;

use crate::file::{CreateError, ReadError, SnapshotId};
use crate::sink::SinkError;

/// Why a merge has written nothing. The files it read are as they were, and its own is removed.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The new file cannot be begun.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A page cannot be read, or is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The new file cannot be written, or committed.
    #[error(transparent)]
    Write(#[from] SinkError),
    /// The new parent has other RAM.
    #[error("snapshot {child:?} cannot be moved onto {parent:?}, which has different RAM: {difference}")]
    Layout {
        /// The snapshot.
        child: PathBuf,
        /// The one it was to be moved onto.
        parent: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// The target is a file that others build on.
    #[error(
        "the result cannot be written to {target:?}: that is snapshot {snapshot}, which this merge or its result builds on; \
         write it under another name"
    )]
    Needed {
        /// The target.
        target: PathBuf,
        /// Which snapshot it is.
        snapshot: SnapshotId,
    },
}
