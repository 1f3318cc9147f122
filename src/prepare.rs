//! The usual way in: guest RAM of this process, an image in a file.

use std::path::Path;
use std::sync::Arc;

use crate::dirty::DirtyError;
use crate::engine::{Parts, Prepared, SetupFailed, prepare_with};
use crate::file::{CreateError, FileSink, FileSinkOptions};
use crate::options::Options;
use crate::os::{GuestRam, TrackError, Tracker, TrackerOptions};

/// Why a snapshot could not be prepared. The VM was not touched, nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// Writes to this RAM cannot be tracked here.
    #[error("writes to guest RAM cannot be tracked: {0}")]
    Track(#[from] TrackError),
    /// The snapshot file cannot be created.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The increment has nothing to build on.
    #[error("no increment: {0}")]
    Dirty(#[from] DirtyError),
    /// Options or resources.
    #[error(transparent)]
    Setup(#[from] SetupFailed),
}

/// Prepares a snapshot of `ram` into the file `path`: opens and registers a userfaultfd, creates the file (under a name
/// of its own until it is complete), allocates the pool, starts the threads. The VM runs meanwhile.
///
/// # Errors
/// What is missing and what to do about it. `path` exists and `options.replace` is not set; its directory does not exist
/// or cannot be written; another snapshot is being written to it; a setting is out of range.
pub fn prepare(ram: &Arc<GuestRam>, path: impl AsRef<Path>, options: &Options) -> Result<Prepared, PrepareError> {
    let sink = Target::Full.create(ram, path.as_ref(), options)?;
    with_sink(ram, sink, options)
}

/// Prepares an increment: a snapshot that holds what was written since the last one committed with the same
/// [`Options::dirty`], which must be given. Begin it with [`Pending::Dirty`](crate::Pending::Dirty).
///
/// # Errors
/// As [`prepare`]; there is no snapshot to build on.
pub fn prepare_increment(
    ram: &Arc<GuestRam>,
    path: impl AsRef<Path>,
    options: &Options,
) -> Result<Prepared, PrepareError> {
    let sink = Target::Increment.create(ram, path.as_ref(), options)?;
    with_sink(ram, sink, options)
}

/// What a snapshot file is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Full,
    Increment,
}

impl Target {
    /// Begins the file.
    pub(crate) fn create(self, ram: &GuestRam, path: &Path, options: &Options) -> Result<FileSink, PrepareError> {
        options.check().map_err(SetupFailed::from)?;
        let file = FileSinkOptions { replace: options.replace, sync: options.sync, direct: options.direct };
        Ok(match self {
            Self::Full => FileSink::create(path, ram.table(), &file)?,
            Self::Increment => {
                let base = options.dirty.as_ref().and_then(|dirty| dirty.base()).ok_or(DirtyError::NoBase)?;
                FileSink::create_child(path, ram.table(), &file, base)?
            }
        })
    }
}

fn with_sink(ram: &Arc<GuestRam>, sink: FileSink, options: &Options) -> Result<Prepared, PrepareError> {
    let tracker = Tracker::open(Arc::clone(ram), &TrackerOptions::default())?;
    let parts = Parts {
        tracker: Arc::new(tracker),
        ram: Arc::clone(ram) as Arc<dyn ramshot_core::RamSource>,
        table: Arc::clone(ram.table()),
        sink: Box::new(sink),
    };
    Ok(prepare_with(parts, options)?)
}
