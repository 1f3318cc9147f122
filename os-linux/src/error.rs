//! What can go wrong before a snapshot starts. (What goes wrong later is an [`OsError`].)

use std::fmt;
use std::io;

use ramshot_core::{Backing, BlockName, HostRange, LayoutError, OsError};

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

impl Missing {
    pub(crate) fn new(what: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into(), remedy: remedy.into() }
    }
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
    /// The list of mappings cannot be read.
    #[error("cannot read {path} to learn what guest RAM is made of; mount /proc or allow it in the sandbox")]
    Maps {
        /// The file.
        path: String,
        /// What the system answered.
        source: io::Error,
    },
    /// Another process cannot be looked into.
    #[error("cannot {what} process {pid}, whose memory was handed over; {remedy}")]
    Process {
        /// The process.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// A part of a block is not mapped.
    #[error("RAM block {block:?}: nothing is mapped at {gap}; describe only what is mapped in this process")]
    Gap {
        /// The block.
        block: BlockName,
        /// The first part that is not mapped.
        gap: HostRange,
    },
    /// A block is made of unlike mappings.
    #[error(
        "RAM block {block:?} is {backing:?} memory with {page_size}-byte pages at its start, \
         but {other_backing:?} with {other_page_size}-byte pages at {other}; describe them as two blocks"
    )]
    Mixed {
        /// The block.
        block: BlockName,
        /// What it starts as.
        backing: Backing,
        /// Page size at its start.
        page_size: u64,
        /// The first mapping that is different.
        other: HostRange,
        /// What that is.
        other_backing: Backing,
        /// Its page size.
        other_page_size: u64,
    },
    /// A block that cannot be read or, if it is tracked, written.
    #[error("RAM block {block:?}: {range} is mapped without {right} permission; {remedy}")]
    Permission {
        /// The block.
        block: BlockName,
        /// The mapping.
        range: HostRange,
        /// The permission missing: `read` or `write`.
        right: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The file given for a block is not what is mapped there.
    #[error(
        "RAM block {block:?}: what is mapped at {range} ({mapped}) is not the file given at offset {offset:#x}; \
         give the file and offset that were passed to mmap, or none"
    )]
    WrongFile {
        /// The block.
        block: BlockName,
        /// The mapping.
        range: HostRange,
        /// What `/proc/self/maps` says is there.
        mapped: String,
        /// Offset the file was given with, for this mapping.
        offset: u64,
    },
    /// The file given for a block cannot be examined.
    #[error("RAM block {block:?}: cannot examine the file behind it")]
    File {
        /// The block.
        block: BlockName,
        /// What the system answered.
        source: io::Error,
    },
    /// Memory for guest RAM cannot be had.
    #[error("cannot map {len:#x} bytes of anonymous memory for guest RAM")]
    Allocate {
        /// How much was asked for.
        len: u64,
        /// What the system answered.
        source: io::Error,
    },
    /// This system has no way to read guest RAM.
    #[error("{0}")]
    Unsupported(Missing),
}

/// Why write tracking cannot start. Nothing stays open or registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// Not on this system, or not for this process.
    #[error("{0}")]
    Unavailable(Missing),
    /// Not for this block.
    #[error("{0}")]
    Block(Missing),
    /// Not on the userfaultfd that was handed over.
    #[error("{0}")]
    Unsuitable(Missing),
    /// A system call failed that should not.
    #[error(transparent)]
    Os(#[from] OsError),
}
