//! What can go wrong before a snapshot starts.

use std::fmt;

use ramshot_core::{LayoutError, OsError};

/// Something that is needed and not there: which thing, why, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing {
    /// The thing.
    pub what: String,
    /// Why it is not there.
    pub why: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.remedy)
    }
}

/// Why a description of guest RAM is not one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The blocks do not make a RAM layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A name that the block table cannot hold.
    #[error("RAM block name {name:?} is {} bytes long; it must have 1 to {} bytes", name.len(), ramshot_core::MAX_NAME)]
    Name {
        /// The name given.
        name: String,
    },
    /// This system has no way to read guest RAM.
    #[error("{0}")]
    Unsupported(Missing),
}

/// Why write tracking cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// Not on this system.
    #[error("{0}")]
    Unavailable(Missing),
    /// A system call failed that should not.
    #[error(transparent)]
    Os(#[from] OsError),
}
