//! How a command ends: with an answer, or with a failure that says what, why and which exit code.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::process::ExitCode;

use ramshot::SnapshotFile;
use ramshot::file::{ChainError, MergeError, OpenError, OpenErrorKind, ReadError, ReadErrorKind};

/// What a command that did its work has to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// Done, intact, the same.
    Yes,
    /// Damaged, different, wrong.
    No,
}

/// Why a command did not do its work.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A snapshot is damaged.
    Damaged(Box<dyn Error>),
    /// Wrong usage, or something cannot be read or written.
    Refused(Box<dyn Error>),
}

impl Failure {
    /// A sentence of our own.
    pub(crate) fn says(sentence: impl Into<String>) -> Self {
        Self::Refused(sentence.into().into())
    }

    /// `what` failed, and the system says why.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Refused(Box::new(Failed { what: what.into(), source }))
    }

    /// With the exit code of something that cannot be read, where 1 means something else.
    pub(crate) fn refused(self) -> Self {
        match self {
            Self::Damaged(error) | Self::Refused(error) => Self::Refused(error),
        }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Damaged(_) => ExitCode::from(1),
            Self::Refused(_) => ExitCode::from(2),
        }
    }
}

impl fmt::Display for Failure {
    /// The error and its causes, as one sentence.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Damaged(error) | Self::Refused(error)) = self;
        let mut said = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let next = error.to_string();
            // Some errors repeat their cause in their own sentence.
            if !said.contains(&next) {
                write!(said, ": {next}")?;
            }
            cause = error.source();
        }
        f.write_str(&said)
    }
}

/// An operation of ours that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
struct Failed {
    what: String,
    source: io::Error,
}

/// Opens a snapshot.
pub(crate) fn open(path: &std::path::Path) -> Result<SnapshotFile, Failure> {
    Ok(SnapshotFile::open(path)?)
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        if is_damage(&error.kind) { Self::Damaged(Box::new(error)) } else { Self::Refused(Box::new(error)) }
    }
}

/// Whether the file is a snapshot that has come to harm, and not something else or out of reach.
const fn is_damage(kind: &OpenErrorKind) -> bool {
    match kind {
        OpenErrorKind::NoTail { .. }
        | OpenErrorKind::Appended { .. }
        | OpenErrorKind::Length { .. }
        | OpenErrorKind::Damaged { .. }
        | OpenErrorKind::Invalid { .. } => true,
        OpenErrorKind::Io { .. }
        | OpenErrorKind::NotAFile { .. }
        | OpenErrorKind::Version { .. }
        | OpenErrorKind::UnknownSection { .. }
        | OpenErrorKind::OutOfMemory { .. } => false,
    }
}

impl From<ChainError> for Failure {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::Open(error) => error.into(),
            ChainError::Parent { ref source, .. } => {
                if is_damage(&source.kind) {
                    Self::Damaged(Box::new(error))
                } else {
                    Self::Refused(Box::new(error))
                }
            }
            ChainError::Modified { .. } | ChainError::Cycle { .. } | ChainError::Layout { .. } => {
                Self::Damaged(Box::new(error))
            }
            ChainError::Missing { .. } | ChainError::TooDeep { .. } | ChainError::Directory { .. } => {
                Self::Refused(Box::new(error))
            }
        }
    }
}

impl From<MergeError> for Failure {
    fn from(error: MergeError) -> Self {
        match error {
            MergeError::Read(error) => error.into(),
            MergeError::Create(_) | MergeError::Write(_) | MergeError::Layout { .. } | MergeError::Needed { .. } => {
                Self::Refused(Box::new(error))
            }
        }
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error.kind {
            ReadErrorKind::Checksum { .. } | ReadErrorKind::NotZero { .. } | ReadErrorKind::Shrunk { .. } => {
                Self::Damaged(Box::new(error))
            }
            ReadErrorKind::Io { .. }
            | ReadErrorKind::OutOfRange { .. }
            | ReadErrorKind::NoData { .. }
            | ReadErrorKind::Buffer { .. } => Self::Refused(Box::new(error)),
        }
    }
}

/// Only standard output is written to without a word of what it was: everything else goes through [`Failure::io`].
impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Self {
        Self::io("cannot write to standard output", source)
    }
}

/// Says it on standard error, if that is there.
pub(crate) fn complain(what: &impl fmt::Display) {
    let _ = writeln!(io::stderr(), "ramshot: {what}");
}
