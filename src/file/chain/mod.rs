//! A snapshot together with its ancestors: what an increment needs to be restored.
//!
//! An increment names its parent by id and checksum; `docs/FORMAT.md` says how the file is found. All files of a chain are
//! opened and checked together, and one index says which of them has a page, so reading from a hundred increments
//! is reading from one file that lies in pieces.

mod error;
mod find;
mod index;

#[cfg(test)]
mod tests_errors;
#[cfg(test)]
pub(super) mod tests_oracle;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ramshot_core::{BlockTable, PageId, RamTarget, Run, Treatment};

pub use error::{ChainError, Looked};

use self::find::Search;
use self::index::MergedIndex;
use super::error::{ReadError, ReadErrorKind, RestoreError};
use super::format::PAGE;
use super::restore::restore;
use super::source::PageSource;
use super::{FileBlock, PageState, RestoreReport, SnapshotFile, StateRun, VerifyReport, place};

/// Most snapshots of one chain.
pub const MAX_CHAIN: usize = 4096;

/// A snapshot and all its ancestors, open for reading. One full snapshot is a chain, too. May be shared by threads.
///
/// # Invariants
/// Each file is the parent that the one before it names, by id and checksum, and has the same RAM blocks; the last one has
/// no parent. So every page is found.
#[derive(Debug)]
pub struct Chain {
    tip: SnapshotFile,
    /// The nearest first.
    ancestors: Vec<SnapshotFile>,
    index: MergedIndex,
}

impl Chain {
    /// Opens the snapshot at `path` and its ancestors, which lie beside it: each parent is looked for among the regular files
    /// in the directory of the file that names it. Files that are no snapshots are skipped.
    ///
    /// Takes a descriptor a file, the memory of each open [`SnapshotFile`], and 24 bytes for every run of pages that lie
    /// together in one file.
    ///
    /// # Errors
    /// The snapshot or a parent does not open, a parent is missing or was modified, or the files are no chain.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ChainError> {
        Self::open_with(path, &[] as &[&Path])
    }

    /// The same, with the files at `parents` looked at first. They may be in any order, and more than are needed; what is
    /// missing among them is looked for as [`open`](Self::open) does.
    ///
    /// # Errors
    /// As there; also a file given that is no snapshot.
    pub fn open_with(path: impl AsRef<Path>, parents: &[impl AsRef<Path>]) -> Result<Self, ChainError> {
        let parents: Vec<PathBuf> = parents.iter().map(|path| path.as_ref().to_owned()).collect();
        Self::open_up_to(path.as_ref(), &parents, MAX_CHAIN)
    }

    fn open_up_to(path: &Path, given: &[PathBuf], limit: usize) -> Result<Self, ChainError> {
        find_up_to(path, given, limit)?.whole()
    }

    /// Of files that are one.
    fn of(tip: SnapshotFile, ancestors: Vec<SnapshotFile>) -> Self {
        let files: Vec<&SnapshotFile> = std::iter::once(&tip).chain(&ancestors).collect();
        let index = MergedIndex::new(&files);
        Self { tip, ancestors, index }
    }

    /// The snapshot itself, the newest of the chain.
    #[must_use]
    pub const fn tip(&self) -> &SnapshotFile {
        &self.tip
    }

    /// The oldest of the chain, a full snapshot.
    #[must_use]
    pub fn root(&self) -> &SnapshotFile {
        self.ancestors.last().unwrap_or(&self.tip)
    }

    /// All files, the newest first.
    pub fn files(&self) -> impl Iterator<Item = &SnapshotFile> {
        std::iter::once(&self.tip).chain(&self.ancestors)
    }

    /// How many files there are.
    #[must_use]
    pub fn depth(&self) -> usize {
        1 + self.ancestors.len()
    }

    /// Pages of the image that have data, in whichever file.
    #[must_use]
    pub const fn data_pages(&self) -> u64 {
        self.index.data_pages()
    }

    /// Fills the RAM blocks of `table`, as [`SnapshotFile::restore_into`] does from a full snapshot: in parallel, checking every
    /// page, not touching zero pages. **The blocks must be fresh.**
    ///
    /// # Errors
    /// Another RAM layout: nothing was touched. A page that is damaged or cannot be read, or RAM that cannot be
    /// filled: the blocks are undefined and must be thrown away.
    pub fn restore_into(
        &self,
        table: &BlockTable,
        ram: &dyn RamTarget,
        threads: usize,
    ) -> Result<RestoreReport, RestoreError> {
        restore(self, self.tip.path(), table, ram, threads)
    }

    /// [Verifies](SnapshotFile::verify) every file of the chain in full. `progress` hears of pages done and their total, each
    /// file counted with all its pages.
    ///
    /// # Errors
    /// The first page that is wrong, or what could not be read.
    pub fn verify(&self, threads: usize, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport, ReadError> {
        let total = self.files().map(SnapshotFile::pages).sum();
        let mut before = 0;
        let mut report = VerifyReport { data_pages: 0, other_pages: 0 };
        for file in self.files() {
            let one = file.verify(threads, &mut |done, _| progress(before + done, total))?;
            before += file.pages();
            report.data_pages += one.data_pages;
            report.other_pages += one.other_pages;
        }
        Ok(report)
    }

    /// The pages from `first` on that one file has, or that are zero; and that file.
    pub(in crate::file) fn locate(&self, first: PageId) -> (Run, Option<&SnapshotFile>) {
        let (run, file) = self.index.extent(first, self.tip.pages());
        let file = file.and_then(|number| match number.checked_sub(1) {
            None => Some(&self.tip),
            Some(ancestor) => self.ancestors.get(ancestor),
        });
        (run, file)
    }
}

/// As much of a chain as is there: for looking at snapshots, not for restoring them.
#[derive(Debug)]
pub struct Ancestry {
    /// The snapshot itself.
    pub tip: SnapshotFile,
    /// Its ancestors, the nearest first: each the parent that the one before it names.
    pub ancestors: Vec<SnapshotFile>,
    /// What was looked for in vain, if the last one is an increment itself: [`ChainError::Missing`].
    pub missing: Option<ChainError>,
}

impl Ancestry {
    /// Opens the snapshot at `path` and what is found of its ancestors, as [`Chain::open_with`] does. A parent that is not
    /// found ends the search, and is no error.
    ///
    /// # Errors
    /// As there, but for [`ChainError::Missing`].
    pub fn open(path: impl AsRef<Path>, parents: &[impl AsRef<Path>]) -> Result<Self, ChainError> {
        let parents: Vec<PathBuf> = parents.iter().map(|path| path.as_ref().to_owned()).collect();
        find_up_to(path.as_ref(), &parents, MAX_CHAIN)
    }

    /// The chain, if it is whole.
    ///
    /// # Errors
    /// What is missing.
    pub fn whole(self) -> Result<Chain, ChainError> {
        match self.missing {
            Some(missing) => Err(missing),
            None => Ok(Chain::of(self.tip, self.ancestors)),
        }
    }
}

fn find_up_to(path: &Path, given: &[PathBuf], limit: usize) -> Result<Ancestry, ChainError> {
    let tip = SnapshotFile::open(path)?;
    let mut search = Search::new(given, tip.pages())?;
    let mut ids = HashSet::from([tip.id()]);
    let mut ancestors: Vec<SnapshotFile> = Vec::new();
    let mut missing = None;
    loop {
        let child = ancestors.last().unwrap_or(&tip);
        let Some(parent) = child.parent() else { break };
        // By the id alone: ids are never given twice, so no checksum can make this a chain.
        if !ids.insert(parent.id) {
            return Err(ChainError::Cycle { child: child.path().to_owned(), id: parent.id });
        }
        if ids.len() > limit {
            return Err(ChainError::TooDeep { path: path.to_owned(), limit });
        }
        let file = match search.open_parent(child, parent) {
            Ok(file) => file,
            Err(error @ ChainError::Missing { .. }) => {
                missing = Some(error);
                break;
            }
            Err(error) => return Err(error),
        };
        if let Some(difference) = layout_difference(child.blocks(), file.blocks()) {
            let (child, parent) = (child.path().to_owned(), file.path().to_owned());
            return Err(ChainError::Layout { child, parent, difference });
        }
        ancestors.push(file);
    }
    Ok(Ancestry { tip, ancestors, missing })
}

impl PageSource for Chain {
    fn blocks(&self) -> &[FileBlock] {
        self.tip.blocks()
    }

    fn pages(&self) -> u64 {
        self.tip.pages()
    }

    fn extent(&self, first: PageId) -> Option<StateRun> {
        if first.0 >= self.tip.pages() {
            return None;
        }
        let (run, file) = self.locate(first);
        Some(StateRun { run, state: if file.is_some() { PageState::Data } else { PageState::Zero } })
    }

    /// Also reads pages of several extents, as long as all of them have data.
    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        if !into.len().is_multiple_of(PAGE) {
            return Err(self.tip.error(ReadErrorKind::Buffer { len: into.len() }));
        }
        let (count, pages) = ((into.len() / PAGE) as u64, self.tip.pages());
        if first.0.checked_add(count).is_none_or(|end| end > pages) {
            return Err(self.tip.error(ReadErrorKind::OutOfRange { page: first, count, pages }));
        }
        let (mut page, mut rest) = (first, into);
        while !rest.is_empty() {
            let (run, Some(file)) = self.locate(page) else {
                let place = place(self.tip.blocks(), page);
                return Err(self.tip.error(ReadErrorKind::NoData { page, place, state: PageState::Zero }));
            };
            let len = usize::try_from(run.bytes()).map_or(rest.len(), |len| len.min(rest.len()));
            let (now, later) = rest.split_at_mut(len);
            file.read_run(page, now)?;
            page = run.end();
            rest = later;
        }
        Ok(())
    }

    fn device_state(&self) -> &[u8] {
        self.tip.device_state()
    }
}

/// How the RAM of two snapshots differs: the blocks that are in the image, by name, guest address and length in use, and
/// their order. `None` if it does not, so that a page has the same number in both.
pub(in crate::file) fn layout_difference(child: &[FileBlock], parent: &[FileBlock]) -> Option<String> {
    let in_image = |block: &&FileBlock| block.treatment != Treatment::Ignored;
    let say = |block: Option<&FileBlock>| match block {
        Some(block) => format!("block {:?} at {} with {:#x} bytes in use", block.name, block.guest, block.used),
        None => "no more block".to_owned(),
    };
    let key = |block: &FileBlock| (block.name, block.guest, block.used);
    let (mut ours, mut theirs) = (child.iter().filter(in_image), parent.iter().filter(in_image));
    loop {
        match (ours.next(), theirs.next()) {
            (None, None) => return None,
            (Some(ours), Some(theirs)) if key(ours) == key(theirs) => {}
            (ours, theirs) => return Some(format!("{} against {}", say(ours), say(theirs))),
        }
    }
}
