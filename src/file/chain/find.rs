//! Finding the file that an increment names as its parent.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use zerocopy::{FromZeros, IntoBytes};

use super::error::{ChainError, Looked};
use crate::file::format::{HEADER_MAGIC, Header, PAGE_BYTES, TAIL_LEN, TAIL_MAGIC, Tail};
use crate::file::parse::Source;
use crate::file::trailer::tail_crc;
use crate::file::{OpenError, ParentRef, SnapshotFile, SnapshotId};

/// A file that says which snapshot it is.
#[derive(Clone, Debug)]
struct Candidate {
    path: PathBuf,
    id: SnapshotId,
    /// As its tail says; `None` if it has lost its tail, and only its header tells the id.
    checksum: Option<u32>,
}

/// What a directory holds.
#[derive(Debug, Default)]
struct Listing {
    candidates: Vec<Candidate>,
    others: usize,
    largest: Option<(u64, PathBuf)>,
}

/// Looks for parents: each directory is read once, however long the chain is.
#[derive(Debug)]
pub(super) struct Search {
    given: Vec<Candidate>,
    directories: HashMap<PathBuf, Listing>,
    /// Pages of the RAM in question: where a file that has lost its tail has its header.
    pages: u64,
}

impl Search {
    /// With the files at `given` to be asked first.
    ///
    /// # Errors
    /// One of them is no snapshot: whoever gave it means something else.
    pub(super) fn new(given: &[PathBuf], pages: u64) -> Result<Self, OpenError> {
        let mut candidates = Vec::with_capacity(given.len());
        for path in given {
            let candidate = match look(path, pages) {
                Ok(Some(candidate)) => candidate,
                // Opening says what is wrong with it.
                _ => {
                    let file = SnapshotFile::open(path)?;
                    Candidate { path: path.clone(), id: file.id(), checksum: Some(file.checksum()) }
                }
            };
            candidates.push(candidate);
        }
        Ok(Self { given: candidates, directories: HashMap::new(), pages })
    }

    /// Opens the parent of `child`: the first file that has its id and its checksum and opens.
    pub(super) fn open_parent(&mut self, child: &SnapshotFile, parent: ParentRef) -> Result<SnapshotFile, ChainError> {
        let mut failed: Option<OpenError> = None;
        let mut modified: Option<ChainError> = None;
        // A copy may be as good as the original, so one that does not open is not the last word.
        let mut try_all = |candidates: &[Candidate]| {
            for candidate in candidates.iter().filter(|candidate| candidate.id == parent.id) {
                let found = match candidate.checksum {
                    Some(checksum) if checksum != parent.checksum => checksum,
                    _ => match SnapshotFile::open(&candidate.path) {
                        Ok(file) if file.as_parent() == parent => return Some(file),
                        // It has changed between the two looks.
                        Ok(file) => file.checksum(),
                        Err(error) => {
                            failed.get_or_insert(error);
                            continue;
                        }
                    },
                };
                let path = candidate.path.clone();
                let (child, stated) = (child.path().to_owned(), parent.checksum);
                modified.get_or_insert(ChainError::Modified { child, path, id: parent.id, stated, found });
            }
            None
        };
        if let Some(file) = try_all(&self.given) {
            return Ok(file);
        }
        let mut looked = Looked { given: self.given.len(), ..Looked::default() };
        for directory in directories(child.path()) {
            let listing = match self.directories.entry(directory.clone()) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => match list(&directory, self.pages) {
                    Ok(listing) => new.insert(listing),
                    Err(source) => {
                        let child = child.path().to_owned();
                        return Err(ChainError::Directory { child, directory, source });
                    }
                },
            };
            if let Some(file) = try_all(&listing.candidates) {
                return Ok(file);
            }
            looked.snapshots += listing.candidates.len();
            looked.others += listing.others;
            looked.largest_other = listing.largest.as_ref().map(|(_, path)| path.clone()).or(looked.largest_other);
            looked.directories.push(directory);
        }
        Err(match (failed, modified) {
            (Some(source), _) => ChainError::Parent { child: child.path().to_owned(), parent: parent.id, source },
            (None, Some(modified)) => modified,
            (None, None) => ChainError::Missing { child: child.path().to_owned(), parent, looked },
        })
    }
}

/// The directory of the file at `path`; if that is a link, also the one where it leads to.
fn directories(path: &Path) -> Vec<PathBuf> {
    let of = |path: &Path| match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let named = of(path);
    let canonical = |directory: &Path| fs::canonicalize(directory).ok();
    let real = fs::canonicalize(path).ok().map(|real| of(&real));
    let other = real.filter(|real| canonical(&named).is_some_and(|named| named != *real));
    std::iter::once(named).chain(other).collect()
}

/// Looks at every regular file of a directory, in the order of their names.
fn list(directory: &Path, pages: u64) -> io::Result<Listing> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        // Still being written, or left by a writer that was killed.
        if path.extension().is_none_or(|extension| extension != "partial") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut listing = Listing::default();
    for path in paths {
        match look(&path, pages) {
            Ok(Some(candidate)) => listing.candidates.push(candidate),
            // Nothing, or nothing that we may read: it may be anybody's.
            Ok(None) | Err(_) => {
                let Ok(metadata) = fs::metadata(&path) else { continue };
                if metadata.is_file() {
                    listing.others += 1;
                    let larger = listing.largest.as_ref().is_none_or(|(len, _)| *len < metadata.len());
                    listing.largest = if larger { Some((metadata.len(), path)) } else { listing.largest };
                }
            }
        }
    }
    Ok(listing)
}

/// Which snapshot the file at `path` says it is, by its tail; or, if that is gone, by a header behind `pages` pages of RAM.
fn look(path: &Path, pages: u64) -> io::Result<Option<Candidate>> {
    // Before it is opened: a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let candidate = |id, checksum| Some(Candidate { path: path.to_owned(), id: SnapshotId(id), checksum });
    let mut tail = Tail::new_zeroed();
    if let Some(offset) = len.checked_sub(TAIL_LEN) {
        file.read_exact_at(tail.as_mut_bytes(), offset)?;
        if tail.magic == TAIL_MAGIC && tail.tail_crc.get() == tail_crc(&tail) {
            return Ok(candidate(tail.id, Some(tail.trailer_crc.get())));
        }
    }
    let mut header = Header::new_zeroed();
    match pages.checked_mul(PAGE_BYTES) {
        Some(offset) if offset < len && file.read_exact_at(header.as_mut_bytes(), offset).is_ok() => {
            Ok(if header.magic == HEADER_MAGIC { candidate(header.id, None) } else { None })
        }
        _ => Ok(None),
    }
}
