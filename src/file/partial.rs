//! The file while it is being written: beside its final name, locked, gone unless it is published.
//!
//! Who holds the exclusive lock of the file called `NAME.partial` is its writer. The kernel drops the lock with the
//! process, so a leftover of one that was killed is recognised by being unlocked. It is never truncated but unlinked: a
//! process killed between link and unlink leaves two names for one file, and the other name is the committed
//! snapshot.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::error::CreateError;
use super::kind_of;
use crate::os::storage;
use crate::sink::SinkError;

/// How often a partial file may change hands under us before we call it busy.
const TRIES: u32 = 64;

/// A locked, empty file beside the target. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Partial {
    file: File,
    path: PathBuf,
    target: PathBuf,
    directory: PathBuf,
    replace: bool,
    /// The name `path` is still ours to remove.
    named: bool,
}

impl Partial {
    /// Checks that `target` can be written and creates the file beside it. Asks `adopt` about one that a dead writer left: if it
    /// says yes, that one is taken over with what is in it. It is asked only about regular files of our own that nobody
    /// else can write to and that have no other name, and with their lock held.
    pub(super) fn create(
        target: &Path,
        replace: bool,
        adopt: &mut dyn FnMut(&File) -> bool,
    ) -> Result<Self, CreateError> {
        let ends_in_separator = target.as_os_str().to_str().is_some_and(|text| text.ends_with(std::path::is_separator));
        if ends_in_separator && !target.is_dir() || target.file_name().is_none() && !target.exists() {
            return Err(CreateError::NoName { path: target.to_owned() });
        }
        let previous = match fs::symlink_metadata(target) {
            Ok(_) => Some(check_existing(target, replace)?),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            // The parent says more exactly what is wrong, below.
            Err(_) => None,
        };
        // Through a link, so that the partial file is on the file system of the file it replaces.
        let resolved = match previous {
            Some(_) => fs::canonicalize(target).map_err(|source| CreateError::Io {
                path: target.to_owned(),
                what: "it cannot be resolved".to_owned(),
                source,
            })?,
            None => target.to_owned(),
        };
        let Some(name) = resolved.file_name() else {
            return Err(CreateError::NoName { path: target.to_owned() });
        };
        let directory = match resolved.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        check_directory(target, &directory)?;
        let mut partial_name: OsString = name.to_owned();
        partial_name.push(".partial");
        let path = directory.join(partial_name);

        let file = claim(target, &path, adopt)?;
        if let Some(permissions) = previous.map(|metadata| metadata.permissions()).filter(|p| !p.readonly()) {
            // The new file is as private as the one it replaces. Best effort: not every file system has them.
            let _ = file.set_permissions(permissions);
        }
        Ok(Self { file, path, target: resolved, directory, replace, named: true })
    }

    /// The open file.
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Where it is now.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its final name. The content must be complete (and synced, if it is to be durable).
    ///
    /// # Errors
    /// Nothing was replaced and the file is removed, except where the text says otherwise.
    pub(super) fn publish(mut self, sync: bool) -> Result<(), SinkError> {
        if let Ok(false) = storage::same_file(&self.file, &self.path) {
            self.named = false;
            return Err(self.error("the file being written was moved or replaced", ErrorKind::NotFound.into()));
        }
        if self.replace {
            if let Err(source) = fs::rename(&self.path, &self.target) {
                return Err(self.error("it cannot be renamed into place", source));
            }
            self.named = false;
        } else {
            self.publish_new()?;
        }
        if sync
            && let Err(source) = storage::sync_dir(&self.directory)
            && !matches!(source.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
        {
            return Err(self.unsynced(source));
        }
        Ok(())
    }

    /// Publishes under a name that nobody else has, or fails.
    fn publish_new(&mut self) -> Result<(), SinkError> {
        match fs::hard_link(&self.path, &self.target) {
            Ok(()) => {
                // Should this fail the snapshot is complete all the same, and the next writer removes the other name.
                self.named = fs::remove_file(&self.path).is_err();
                Ok(())
            }
            Err(source) if source.kind() == ErrorKind::AlreadyExists => {
                Err(self.error("a file of that name has appeared meanwhile", source))
            }
            Err(_) => self.publish_by_placeholder(),
        }
    }

    /// For file systems without hard links: an empty file reserves the name, then is replaced. A kill in between
    /// leaves the empty file, which does not open as a snapshot.
    pub(super) fn publish_by_placeholder(&mut self) -> Result<(), SinkError> {
        if let Err(source) = File::create_new(&self.target) {
            return Err(self.error("its name cannot be reserved", source));
        }
        if let Err(source) = fs::rename(&self.path, &self.target) {
            let _ = fs::remove_file(&self.target);
            return Err(self.error("it cannot be renamed into place", source));
        }
        self.named = false;
        Ok(())
    }

    /// The directory was not synced. A new name can be taken back; one that was replaced cannot.
    fn unsynced(&self, source: io::Error) -> SinkError {
        if !self.replace && fs::remove_file(&self.target).is_ok() {
            return self.error("its directory cannot be synced", source);
        }
        self.error(
            "the file is complete and in place, but its directory cannot be synced: it may not survive a power failure",
            source,
        )
    }

    fn error(&self, what: &str, source: io::Error) -> SinkError {
        SinkError { what: format!("cannot commit snapshot {:?}: {what}", self.target), source }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Not if somebody put another file under that name: we hold the lock of ours, not of theirs.
        if self.named && !matches!(storage::same_file(&self.file, &self.path), Ok(false)) {
            let _ = fs::remove_file(&self.path);
        }
        // Not left to closing: a child that another thread is just starting has the descriptor, too, until it executes.
        let _ = self.file.unlock();
    }
}

/// Refuses an existing target that may not or cannot be replaced; otherwise tells what it is.
fn check_existing(target: &Path, replace: bool) -> Result<fs::Metadata, CreateError> {
    // A link to nothing has only metadata of its own.
    let metadata = fs::metadata(target).or_else(|_| fs::symlink_metadata(target)).map_err(|source| {
        CreateError::Io { path: target.to_owned(), what: "it cannot be examined".to_owned(), source }
    })?;
    if !metadata.is_file() {
        return Err(CreateError::NotAFile { path: target.to_owned(), found: kind_of(&metadata) });
    }
    if !replace {
        return Err(CreateError::Exists { path: target.to_owned() });
    }
    Ok(metadata)
}

fn check_directory(target: &Path, directory: &Path) -> Result<(), CreateError> {
    let no_directory =
        |source| CreateError::NoDirectory { path: target.to_owned(), directory: directory.to_owned(), source };
    if fs::metadata(directory).map_err(no_directory)?.is_dir() {
        return Ok(());
    }
    Err(no_directory(ErrorKind::NotADirectory.into()))
}

/// Creates and locks the file at `path`, removing what a dead writer left there unless `adopt` wants it.
fn claim(target: &Path, path: &Path, adopt: &mut dyn FnMut(&File) -> bool) -> Result<File, CreateError> {
    let io = |what: &str, source| CreateError::Io {
        path: target.to_owned(),
        what: format!("{path:?} cannot be {what}"),
        source,
    };
    let leftover = |why| CreateError::Leftover { path: target.to_owned(), partial: path.to_owned(), why };
    let busy = || CreateError::Busy { path: target.to_owned(), partial: path.to_owned() };

    for _ in 0..TRIES {
        let (file, created) = match storage::create_private(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Looked at before it is opened: opening a pipe would wait for a reader.
                match fs::symlink_metadata(path) {
                    Ok(metadata) if metadata.is_file() => {}
                    Ok(_) => return Err(leftover("it is not a regular file")),
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(io("examined", error)),
                }
                // Reading is for who adopts it; one that cannot be read can be removed all the same.
                let open = |read| OpenOptions::new().read(read).write(true).open(path);
                match open(true).or_else(|_| open(false)) {
                    Ok(file) => (file, false),
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(io("opened", error)),
                }
            }
            Err(error) => return Err(io("created", error)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy()),
            // No locks here: a file that we created is ours all the same, one that we found may be anybody's.
            Err(TryLockError::Error(_)) if created => return Ok(file),
            Err(TryLockError::Error(_)) => {
                return Err(leftover("left by a writer that may be alive: this file system has no locks"));
            }
        }
        // Between opening and locking, the writer may have published or removed what we hold now.
        match storage::same_file(&file, path) {
            Ok(true) if created => return Ok(file),
            Ok(true) if storage::ours_alone(&file).unwrap_or(false) && adopt(&file) => return Ok(file),
            Ok(true) => match fs::remove_file(path) {
                Ok(()) => log::info!("removed {path:?}, left by a writer that was killed"),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(io("removed", error)),
            },
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                if created {
                    return Ok(file);
                }
                return Err(leftover("left by a writer that was killed; this system cannot tell it from another file"));
            }
            Err(error) => return Err(io("examined", error)),
        }
    }
    Err(busy())
}
