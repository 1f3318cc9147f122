//! What can go wrong with a snapshot file, as sentences: which file, where in it, what was found and what to do.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use ramshot_core::{BlockName, GuestAddr, OsError, PageId};

use super::{PageState, SnapshotId};

/// Why a snapshot file was not begun. Nothing has been written and nothing replaced.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The path does not end in a file name.
    #[error("{path:?} names no file: a snapshot needs a path that ends in a file name")]
    NoName {
        /// As given.
        path: PathBuf,
    },
    /// The directory of the target is not there, or is none.
    #[error("cannot write snapshot {path:?}: its directory {directory:?} is not there")]
    NoDirectory {
        /// The target.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
        /// The system's word for it.
        source: io::Error,
    },
    /// The target exists and may not be replaced.
    #[error("cannot write snapshot {path:?}: it exists, and replacing it was not asked for")]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target is a directory, device, pipe or dangling link.
    #[error("cannot write snapshot {path:?}: it exists and is {found}, not a regular file")]
    NotAFile {
        /// The target.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Somebody else holds the lock of the partial file.
    #[error("another snapshot is being written to {path:?} ({partial:?} is locked)")]
    Busy {
        /// The target.
        path: PathBuf,
        /// The file that is being written.
        partial: PathBuf,
    },
    /// The partial name is taken by something that is not ours, or that this system cannot tell from a live one.
    #[error("cannot write snapshot {path:?}: {partial:?} is in the way ({why}); remove it")]
    Leftover {
        /// The target.
        path: PathBuf,
        /// What is in the way.
        partial: PathBuf,
        /// Why it was not taken over.
        why: &'static str,
    },
    /// More RAM than the format can name.
    #[error("cannot write snapshot {path:?}: {pages} pages of RAM, the format ends at 2^40")]
    TooLarge {
        /// The target.
        path: PathBuf,
        /// Pages of the layout.
        pages: u64,
    },
    /// The system refused.
    #[error("cannot write snapshot {path:?}: {what}")]
    Io {
        /// The target.
        path: PathBuf,
        /// Which step, on which file.
        what: String,
        /// The system's word for it.
        source: io::Error,
    },
}

/// Why a file does not open as a snapshot.
#[derive(Debug)]
pub struct OpenError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub kind: OpenErrorKind,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot open snapshot {:?}: {}", self.path, self.kind)
    }
}

impl Error for OpenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.kind.source()
    }
}

/// What is wrong with a file that does not open. Offsets are bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum OpenErrorKind {
    /// The system refused.
    #[error("{what}")]
    Io {
        /// Which step.
        what: String,
        /// The system's word for it.
        source: io::Error,
    },
    /// A directory, device or pipe.
    #[error("it is {found}, not a regular file")]
    NotAFile {
        /// What it is.
        found: &'static str,
    },
    /// The file does not end as a snapshot ends.
    #[error(
        "this file is {len} bytes and has no ramshot tail: it was truncated, its writing was interrupted, or it is not a \
         snapshot (a raw memory image has no tail)"
    )]
    NoTail {
        /// Length of the file.
        len: u64,
    },
    /// A snapshot ends inside the file.
    #[error(
        "this file is {len} bytes, and a snapshot in it ends at byte {end}: {} bytes were appended to it; cut them off",
        len - end
    )]
    Appended {
        /// Length of the file.
        len: u64,
        /// Where the snapshot ends.
        end: u64,
    },
    /// The file has another length than when it was committed.
    #[error("this file is {found} bytes and its tail says {stated}: bytes were lost or inserted")]
    Length {
        /// By the tail.
        stated: u64,
        /// In fact.
        found: u64,
    },
    /// Another version of the format.
    #[error("it has format version {found}, this ramshot reads version {known}: use a ramshot that reads {found}")]
    Version {
        /// Of the file.
        found: u32,
        /// Of this reader.
        known: u32,
    },
    /// Bytes changed after they were written.
    #[error(
        "the {section} at byte {offset} is damaged (CRC-32C {found:#010x}, {stated:#010x} was written): restore the file \
         from a copy"
    )]
    Damaged {
        /// Which part.
        section: String,
        /// Where it starts.
        offset: u64,
        /// As stored.
        stated: u32,
        /// As computed.
        found: u32,
    },
    /// The checksums are right and the content is not: not written by a correct writer of this version.
    #[error("the {section} at byte {offset} is not valid: {what}")]
    Invalid {
        /// Which part.
        section: String,
        /// Where.
        offset: u64,
        /// What is wrong, with the values.
        what: String,
    },
    /// A section that one must understand to read the file, and this version does not.
    #[error(
        "it has a section {tag:?} at byte {offset} that this ramshot does not know and must not skip: use a newer one"
    )]
    UnknownSection {
        /// Its tag.
        tag: String,
        /// Where it starts.
        offset: u64,
    },
    /// The metadata does not fit into memory.
    #[error("its {section} is {len} bytes, more than this process can allocate")]
    OutOfMemory {
        /// Which part.
        section: String,
        /// Its length.
        len: u64,
    },
}

/// Why pages could not be read from an open snapshot.
#[derive(Debug)]
pub struct ReadError {
    /// The file.
    pub path: PathBuf,
    /// What happened.
    pub kind: ReadErrorKind,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot {:?}: {}", self.path, self.kind)
    }
}

impl Error for ReadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.kind.source()
    }
}

/// What happened while reading pages. Offsets are bytes from the start of the file.
#[derive(Debug, thiserror::Error)]
pub enum ReadErrorKind {
    /// The system refused.
    #[error("cannot read {len} bytes at byte {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// How many.
        len: usize,
        /// The system's word for it.
        source: io::Error,
    },
    /// The file has become shorter since it was opened.
    #[error("it ends at byte {offset}: it was cut off after it was opened")]
    Shrunk {
        /// Where reading ended.
        offset: u64,
    },
    /// A page is not what was written.
    #[error(
        "{page} ({place}) at byte {offset} is damaged (CRC-32C {found:#010x}, {stated:#010x} was written): restore the \
         file from a copy"
    )]
    Checksum {
        /// The page.
        page: PageId,
        /// Its block and guest address.
        place: String,
        /// Where it lies.
        offset: u64,
        /// As stored.
        stated: u32,
        /// As computed.
        found: u32,
    },
    /// A page without data has bytes other than zero in the flat RAM.
    #[error(
        "{page} ({place}) at byte {offset} has no data in this snapshot, and its place in the file is not zero: restore \
         the file from a copy"
    )]
    NotZero {
        /// The page.
        page: PageId,
        /// Its block and guest address.
        place: String,
        /// Where it lies.
        offset: u64,
    },
    /// There is no such page.
    #[error("it has {pages} pages, {page} and {count} from it on were asked for")]
    OutOfRange {
        /// First page asked for.
        page: PageId,
        /// How many were asked for.
        count: u64,
        /// How many there are.
        pages: u64,
    },
    /// A page that has no data here.
    #[error("{page} ({place}) has no data in this file, it is {state:?}")]
    NoData {
        /// The page.
        page: PageId,
        /// Its block and guest address.
        place: String,
        /// What it is instead.
        state: PageState,
    },
    /// A buffer that is not a whole number of pages.
    #[error("a buffer of {len} bytes is not a whole number of pages")]
    Buffer {
        /// Its length.
        len: usize,
    },
}

/// How the RAM of a VM differs from that of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutMismatch {
    /// The VM lacks a block.
    #[error("RAM block {block:?} is in the snapshot, and this VM has none of that name (or leaves it out)")]
    Missing {
        /// Its name.
        block: BlockName,
    },
    /// The VM has a block too many.
    #[error("RAM block {block:?} of this VM is not in the snapshot (or was left out of it)")]
    Unknown {
        /// Its name.
        block: BlockName,
    },
    /// Other guest addresses.
    #[error("RAM block {block:?} is at guest address {snapshot} in the snapshot and at {vm} in this VM")]
    GuestAddress {
        /// Its name.
        block: BlockName,
        /// In the snapshot.
        snapshot: GuestAddr,
        /// In the VM.
        vm: GuestAddr,
    },
    /// Other sizes.
    #[error("RAM block {block:?} has {snapshot:#x} bytes in use in the snapshot and {vm:#x} in this VM")]
    UsedLength {
        /// Its name.
        block: BlockName,
        /// In the snapshot.
        snapshot: u64,
        /// In the VM.
        vm: u64,
    },
}

/// Why guest RAM was not restored. What is in the blocks after it is undefined: throw them away.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The VM has other RAM. Nothing was written to it.
    #[error("snapshot {path:?} does not fit this VM: {mismatch}")]
    Layout {
        /// The file.
        path: PathBuf,
        /// The first difference.
        mismatch: LayoutMismatch,
    },
    /// Pages are in a parent, which was not given. Nothing was written to the blocks.
    #[error(
        "snapshot {path:?} is an increment: {pages} of its pages are in its parent {parent}; restore the whole chain \
         (open it with Chain::open, which finds the parents)"
    )]
    NeedsParent {
        /// The file.
        path: PathBuf,
        /// The parent's id.
        parent: SnapshotId,
        /// How many pages.
        pages: u64,
    },
    /// The source of the pages does not have them all. Nothing was written to the blocks.
    #[error(
        "{page} ({place}) is not in this image, which is an increment without its parents; restore the whole chain (open \
         it with Chain::open, which finds the parents)"
    )]
    Incomplete {
        /// The first page missing.
        page: PageId,
        /// Its block and guest address.
        place: String,
    },
    /// The file could not be read, or is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Guest RAM could not be written.
    #[error("RAM block {block:?} cannot be filled: {source}")]
    Ram {
        /// Its name.
        block: BlockName,
        /// What the target answered.
        source: OsError,
    },
}
