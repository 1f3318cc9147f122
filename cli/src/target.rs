//! A file that appears under its name when it is complete, and not before.

use std::fs::File;
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::outcome::Failure;

/// An output file while it is being written: beside its final name, readable by its owner alone (it is a VM's memory),
/// gone unless it is committed.
#[derive(Debug)]
pub(crate) struct Target {
    file: NamedTempFile,
    path: PathBuf,
    replace: bool,
}

impl Target {
    /// Checks that `path` can be written and begins.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<Self, Failure> {
        let refuse = |why: &str| Failure::says(format!("cannot write {path:?}: {why}"));
        let Some(name) = path.file_name() else { return Err(refuse("it names no file")) };
        match path.symlink_metadata() {
            Ok(found) if !found.is_file() => return Err(refuse("it exists and is not a regular file")),
            Ok(_) if !replace => return Err(refuse("it exists; --replace replaces it")),
            _ => {}
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut prefix = name.to_owned();
        prefix.push(".partial-");
        let file = tempfile::Builder::new().prefix(&prefix).tempfile_in(directory).map_err(|source| {
            Failure::io(format!("cannot write {path:?}: no file can be created in {directory:?}"), source)
        })?;
        Ok(Self { file, path: path.to_owned(), replace })
    }

    /// Makes it `len` bytes long; what is never written is a hole.
    pub(crate) fn set_len(&self, len: u64) -> Result<(), Failure> {
        let file: &File = self.file.as_file();
        file.set_len(len).map_err(|source| {
            Failure::io(format!("cannot write {:?}: it cannot be made {len} bytes long", self.path), source)
        })
    }

    /// Writes at an offset.
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let path = &self.path;
        let file = self.file.as_file_mut();
        file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes)).map_err(|source| {
            Failure::io(format!("cannot write {} bytes at byte {offset} of {path:?}", bytes.len()), source)
        })
    }

    /// Gives it its name.
    pub(crate) fn commit(self) -> Result<(), Failure> {
        let Self { file, path, replace } = self;
        file.as_file()
            .sync_all()
            .map_err(|source| Failure::io(format!("cannot write {path:?}: it cannot be synced"), source))?;
        let named = if replace { file.persist(&path) } else { file.persist_noclobber(&path) };
        match named {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
                Err(Failure::says(format!("cannot write {path:?}: it has appeared meanwhile; --replace replaces it")))
            }
            Err(error) => Err(Failure::io(format!("cannot write {path:?}: it cannot get its name"), error.error)),
        }
    }
}
