//! Rewriting chains: [`flatten`] merges one into a single full file, [`rebase`] moves an increment onto another parent.
//!
//! Both write a new file with a new id and leave every file they read as it is: until the commit there is the old chain,
//! after it there are both, and whoever wants the space back removes the old files then.
//!
//! **Why a new id:** a file is named by its id and the checksum of its trailer, and that covers page states and page
//! checksums, which a merge changes. A merged file under the old id would be what every child of the old one has to refuse: the
//! right id with other content. So children of a snapshot that was flattened go on naming the original. They are moved
//! with [`rebase`], onto the flat file, and keep their content: pages that are the same there stay in the parent.
//!
//! # Going on after a kill
//! A merge marks its partial file with what it is made of: ids and checksums of the snapshot and of the new parent, which
//! cover all the content that goes in. A partial file with the same mark, whole length, owned by us, unlocked and with no
//! other name was left by the same merge. Even so nothing in it is taken on trust: each page's bytes are read back and
//! compared with the checksum that the source has for that page, and what does not fit is copied again. Places that
//! must be zero are checked before the commit; if one is not, the merge starts again from nothing.

mod copy;
mod error;
mod plan;

#[cfg(test)]
mod tests_kill;
#[cfg(test)]
mod tests_merge;
#[cfg(test)]
mod tests_resume;

use std::fs;
use std::path::Path;

pub use error::MergeError;

use self::copy::Copier;
use self::plan::Action;
use super::batch::Batches;
use super::chain::{Chain, layout_difference};
use super::format::Mark;
use super::source::PageSource;
use super::{FileSink, FileSinkOptions, ParentRef, parallel};
use crate::sink::{ImageMeta, ImageSink};

/// How a merged file is written.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    /// As for a snapshot. The target may be the snapshot that is merged, if `replace` says so; it can be no other file that
    /// the result or the source needs.
    pub file: FileSinkOptions,
    /// Threads that copy, at least one, the caller among them.
    pub threads: usize,
}

impl Default for MergeOptions {
    /// Keeps what exists; syncs; past the page cache; two threads.
    fn default() -> Self {
        Self { file: FileSinkOptions::default(), threads: 2 }
    }
}

/// What a merge has written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MergeReport {
    /// How an increment names the new file.
    pub snapshot: ParentRef,
    /// Size of the new file in bytes.
    pub image_bytes: u64,
    /// Pages copied into it, each checked when it was read.
    pub copied_pages: u64,
    /// Pages that a merge that was killed had copied, each read back and checked.
    pub reused_pages: u64,
    /// Pages compared with those of the new parent, because nothing but their bytes could tell whether they are the same.
    pub compared_pages: u64,
    /// Pages said to be zero, where the new parent has data.
    pub zero_pages: u64,
}

/// Merges `chain` into one full snapshot at `target`, with the same memory, device state and statistics, and a new id.
/// `progress` hears of pages done and how many there are to do.
///
/// # Errors
/// What cannot be read, is damaged, or cannot be written, a full disk above all. Nothing is left behind then, and the
/// chain is as it was.
pub fn flatten(
    chain: &Chain,
    target: impl AsRef<Path>,
    options: &MergeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport, MergeError> {
    let target = target.as_ref();
    check_target(target, chain, None)?;
    let mut plan = Batches::new();
    plan::flatten(chain, |run, action| plan.push(run, action));
    merge(&Merge { child: chain, parent: None, target, options, plan }, progress)
}

/// Writes the snapshot of `child` at `target` as an increment on the snapshot of `parent`, with the same memory, device state
/// and statistics, and a new id. The two need not be related, but have the same RAM blocks; pages that `parent` has with
/// the same bytes stay there. `progress` as for [`flatten`].
///
/// # Errors
/// Other RAM, or as [`flatten`].
pub fn rebase(
    child: &Chain,
    parent: &Chain,
    target: impl AsRef<Path>,
    options: &MergeOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<MergeReport, MergeError> {
    let target = target.as_ref();
    if let Some(difference) = layout_difference(child.blocks(), parent.blocks()) {
        let (child, parent) = (child.tip().path().to_owned(), parent.tip().path().to_owned());
        return Err(MergeError::Layout { child, parent, difference });
    }
    check_target(target, child, Some(parent))?;
    let mut plan = Batches::new();
    plan::rebase(child, parent, |run, action| plan.push(run, action));
    merge(&Merge { child, parent: Some(parent), target, options, plan }, progress)
}

/// What is merged into what.
struct Merge<'a> {
    child: &'a Chain,
    parent: Option<&'a Chain>,
    target: &'a Path,
    options: &'a MergeOptions,
    plan: Batches<Action>,
}

fn merge(merge: &Merge<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<MergeReport, MergeError> {
    let tip = merge.child.tip();
    let parent = merge.parent.map(|parent| parent.tip().as_parent());
    let mark = Mark::new(tip.as_parent(), parent);
    let file = &merge.options.file;
    let total = merge.plan.pages();
    let mut adopt = true;
    loop {
        let sink = FileSink::create_merge(merge.target, tip.blocks(), file, parent, &mark, adopt)?;
        let adopted = sink.adopted();
        let copier = Copier::new(merge.child, merge.parent, &sink);
        let work = |buffers: &mut _, unit: u64| copier.unit(buffers, merge.plan.unit(unit));
        parallel::run(merge.plan.units(), merge.options.threads, &work, &mut |done| progress(done, total))?;
        let counts = copier.counts();
        if adopted && let Some(page) = sink.find_stray().map_err(|source| stray_error(merge.target, source))? {
            log::warn!("{:?}: {page} of what a killed merge left is not zero; starting again", merge.target);
            adopt = false;
            continue;
        }
        let meta = ImageMeta { device_state: tip.device_state().to_vec(), statistics: tip.statistics().to_vec() };
        let committed = Box::new(sink).commit(&meta)?;
        return Ok(MergeReport {
            // A file names itself always.
            snapshot: committed.snapshot.unwrap_or(tip.as_parent()),
            image_bytes: committed.image_bytes,
            copied_pages: counts.copied,
            reused_pages: counts.reused,
            compared_pages: counts.compared,
            zero_pages: counts.zero,
        });
    }
}

fn stray_error(target: &Path, source: std::io::Error) -> MergeError {
    let what = format!("what a killed merge left of {target:?} cannot be read");
    MergeError::Write(crate::sink::SinkError { what, source })
}

/// The target may take the place of the snapshot that is merged, but of no other that somebody builds on: neither of its
/// ancestors, nor of the new parent and its ancestors.
fn check_target(target: &Path, child: &Chain, parent: Option<&Chain>) -> Result<(), MergeError> {
    // What does not exist yet is nobody's.
    let Ok(real) = fs::canonicalize(target) else { return Ok(()) };
    let is_target = |path: &Path| fs::canonicalize(path).is_ok_and(|path| path == real);
    let ancestors = child.files().skip(1);
    let needed = ancestors.chain(parent.into_iter().flat_map(Chain::files)).find(|file| is_target(file.path()));
    match needed {
        Some(file) => Err(MergeError::Needed { target: target.to_owned(), snapshot: file.id() }),
        None => Ok(()),
    }
}
