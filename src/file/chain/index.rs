//! Which file of a chain has a page: one index for all of them, so that a lookup costs the same however long the chain is.

use ramshot_core::{PageId, Run};

use crate::file::{PageState, SnapshotFile};

/// Consecutive pages that one file has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Segment {
    first: u64,
    end: u64,
    /// Position of the file in the chain, 0 the newest; `None`: they are zero.
    file: Option<u16>,
}

/// Where the data pages of a chain are.
///
/// # Invariants
/// Segments ascend, do not overlap, are not empty, and have a file each; two that touch have different files. A page in none
/// of them is zero.
#[derive(Debug)]
pub(super) struct MergedIndex {
    segments: Vec<Segment>,
    data_pages: u64,
}

impl MergedIndex {
    /// Of `files`, the newest first, the last of which has no parent. Takes time for all their runs, times the logarithm of
    /// how many files there are.
    pub(super) fn new(files: &[&SnapshotFile]) -> Self {
        let mut segments = overlaid(files, 0);
        segments.retain(|segment| segment.file.is_some());
        let data_pages = segments.iter().map(|segment| segment.end - segment.first).sum();
        Self { segments, data_pages }
    }

    /// Pages that have data.
    pub(super) const fn data_pages(&self) -> u64 {
        self.data_pages
    }

    /// The pages from `first` on, before `pages`, that one file has, or that are zero; and which file it is.
    pub(super) fn extent(&self, first: PageId, pages: u64) -> (Run, Option<usize>) {
        let after = self.segments.partition_point(|segment| segment.first <= first.0);
        let before = after.checked_sub(1).and_then(|i| self.segments.get(i));
        if let Some(segment) = before.filter(|segment| first.0 < segment.end) {
            return (Run::new(first, segment.end - first.0), segment.file.map(usize::from));
        }
        let end = self.segments.get(after).map_or(pages, |segment| segment.first);
        (Run::new(first, end.saturating_sub(first.0)), None)
    }
}

/// What `files` say together of the pages that are not in a parent of the last one; the first of them is number `number` of
/// the chain. Halves are put together pairwise, so that each run is copied a few times and not once a file.
fn overlaid(files: &[&SnapshotFile], number: u16) -> Vec<Segment> {
    let (newer, older) = files.split_at(files.len() / 2);
    match (files, u16::try_from(newer.len())) {
        ([], _) => Vec::new(),
        ([file], _) => segments_of(file, number),
        (_, Ok(skip)) => overlay(overlaid(newer, number), overlaid(older, number.saturating_add(skip))),
        // A chain has no more files than a number can name.
        (_, Err(_)) => Vec::new(),
    }
}

/// What one file says. Zeros of a file without a parent hide nothing, so they need not be said.
fn segments_of(file: &SnapshotFile, number: u16) -> Vec<Segment> {
    let mut out = Vec::new();
    for part in file.state_runs() {
        let file = match part.state {
            PageState::Data => Some(number),
            PageState::Zero if file.parent().is_some() => None,
            PageState::Zero | PageState::InParent => continue,
        };
        join(&mut out, Segment { first: part.run.first.0, end: part.run.end().0, file });
    }
    out
}

/// `newer` on top of `older`: where both say something, the newer one counts.
fn overlay(newer: Vec<Segment>, older: Vec<Segment>) -> Vec<Segment> {
    let mut out = Vec::with_capacity(newer.len() + older.len());
    let mut older = older.into_iter();
    let mut below = older.next();
    for over in newer {
        // What lies before it.
        while let Some(segment) = below.filter(|segment| segment.first < over.first) {
            join(&mut out, Segment { end: segment.end.min(over.first), ..segment });
            below =
                if segment.end > over.first { Some(Segment { first: over.first, ..segment }) } else { older.next() };
        }
        join(&mut out, over);
        // What it hides.
        while let Some(segment) = below.filter(|segment| segment.end <= over.end) {
            debug_assert!(segment.first >= over.first);
            below = older.next();
        }
        below = below.map(|segment| Segment { first: segment.first.max(over.end), ..segment });
    }
    below.into_iter().chain(older).for_each(|segment| join(&mut out, segment));
    out
}

/// Appends `next`, to the last segment if it goes on with it.
fn join(out: &mut Vec<Segment>, next: Segment) {
    match out.last_mut() {
        Some(last) if last.end == next.first && last.file == next.file => last.end = next.end,
        _ => out.push(next),
    }
}
