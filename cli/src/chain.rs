//! A snapshot, and those it builds on: where each page's bytes are.

use std::path::PathBuf;

use clap::Args;
use ramshot::SnapshotFile;
use ramshot::core::{PageId, Run};
use ramshot::file::{Ancestry, PageState, ParentRef};

use crate::outcome::Failure;

/// Bytes of a page, as an index.
pub(crate) const PAGE: usize = 4096;
/// The same as a length in a file.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Pages read at a time: 1 MiB.
const STEP: u64 = 256;

/// What is done with some pages' bytes.
pub(crate) type Take<'a> = dyn FnMut(PageId, &[u8]) -> Result<(), Failure> + 'a;

/// The option that names the snapshots an increment builds on.
#[derive(Args, Debug, Default)]
pub(crate) struct Parents {
    /// A snapshot that SNAPSHOT builds on, if it is an increment. May be given several times, in any order: they are
    /// found by their ids. What is not given is looked for beside the file that needs it.
    #[arg(long = "parent", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Where the bytes of a page are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// Nowhere: they are zero.
    Zero,
    /// In this file of the chain, 0 being the newest.
    Data(usize),
    /// In a parent that was not given.
    Missing,
}

/// A snapshot and as many of its ancestors as are found, newest first.
#[derive(Debug)]
pub(crate) struct Chain(Ancestry);

impl Chain {
    /// Opens `path` and what it builds on, those of `parents` first, each checked to be exactly the one that is meant.
    pub(crate) fn open(path: &std::path::Path, parents: &[PathBuf]) -> Result<Self, Failure> {
        Ok(Self(Ancestry::open(path, parents)?))
    }

    /// The snapshot itself, the newest of the chain.
    pub(crate) const fn top(&self) -> &SnapshotFile {
        &self.0.tip
    }

    /// Those it builds on, as far as they were found, newest first.
    pub(crate) fn ancestors(&self) -> &[SnapshotFile] {
        &self.0.ancestors
    }

    /// Number `depth` of the chain, the newest being 0.
    pub(crate) fn file(&self, depth: usize) -> Option<&SnapshotFile> {
        match depth.checked_sub(1) {
            None => Some(&self.0.tip),
            Some(depth) => self.0.ancestors.get(depth),
        }
    }

    /// The ancestor that is needed and was not found.
    pub(crate) fn missing(&self) -> Option<ParentRef> {
        self.0.ancestors.last().unwrap_or(&self.0.tip).parent()
    }

    /// Fails unless every page's bytes are at hand.
    pub(crate) fn complete(&self) -> Result<(), Failure> {
        let Some(missing) = &self.0.missing else { return Ok(()) };
        let all = Run::new(PageId(0), self.top().pages());
        let mut pages = 0;
        self.resolve(all, &mut |run, origin| {
            pages += if origin == Origin::Missing { run.pages } else { 0 };
            Ok(())
        })?;
        if pages == 0 {
            return Ok(());
        }
        Err(Failure::says(format!("{missing} (--parent FILE); {pages} pages are in it")))
    }

    /// Calls `each` for all pages of `run` in order, in pieces that have one origin.
    pub(crate) fn resolve(
        &self,
        run: Run,
        each: &mut dyn FnMut(Run, Origin) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.resolve_from(0, run, each)
    }

    fn resolve_from(
        &self,
        depth: usize,
        run: Run,
        each: &mut dyn FnMut(Run, Origin) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(file) = self.file(depth) else { return each(run, Origin::Missing) };
        for part in file.state_runs_from(run.first).take_while(|part| part.run.first < run.end()) {
            let (first, end) = (part.run.first.max(run.first), part.run.end().min(run.end()));
            let cut = Run::new(first, end.0 - first.0);
            match part.state {
                PageState::Zero => each(cut, Origin::Zero)?,
                PageState::Data => each(cut, Origin::Data(depth))?,
                PageState::InParent => self.resolve_from(depth + 1, cut, each)?,
            }
        }
        Ok(())
    }

    /// Reads and checks the data pages of `run`, which lie in file `depth`, a piece at a time.
    pub(crate) fn read(
        &self,
        run: Run,
        depth: usize,
        buffer: &mut Vec<u8>,
        each: &mut Take<'_>,
    ) -> Result<(), Failure> {
        let Some(file) = self.file(depth) else { return Ok(()) };
        let mut page = run.first.0;
        while page < run.end().0 {
            let pages = STEP.min(run.end().0 - page);
            let bytes = scratch(buffer, pages);
            file.read_run(PageId(page), bytes)?;
            each(PageId(page), bytes)?;
            page += pages;
        }
        Ok(())
    }
}

/// Room for `pages` pages, at most [`STEP`].
fn scratch(buffer: &mut Vec<u8>, pages: u64) -> &mut [u8] {
    let len = usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.get_mut(..len).unwrap_or_default()
}
