//! Runs of pages, cut and gathered into units of about the same size, for threads to share.

use std::ops::Range;

use ramshot_core::{PageId, Run};

/// Pages of one unit, and the longest run in one: 1 MiB.
pub(super) const UNIT_PAGES: u64 = 256;

/// Runs with something to say about each, in the order in which they were added. Memory follows the runs.
#[derive(Debug)]
pub(super) struct Batches<T> {
    items: Vec<(Run, T)>,
    /// First item of each unit.
    starts: Vec<usize>,
    /// Pages in the last unit.
    filled: u64,
    /// Pages in all.
    pages: u64,
}

impl<T: Copy> Batches<T> {
    pub(super) const fn new() -> Self {
        Self { items: Vec::new(), starts: Vec::new(), filled: UNIT_PAGES, pages: 0 }
    }

    /// Adds a run, in pieces if it is long.
    pub(super) fn push(&mut self, run: Run, what: T) {
        self.pages += run.pages;
        let mut first = run.first.0;
        while first < run.end().0 {
            if self.filled >= UNIT_PAGES {
                self.starts.push(self.items.len());
                self.filled = 0;
            }
            let pages = (run.end().0 - first).min(UNIT_PAGES - self.filled);
            self.items.push((Run::new(PageId(first), pages), what));
            self.filled += pages;
            first += pages;
        }
    }

    /// Pages of all units.
    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }

    /// How many units there are.
    pub(super) const fn units(&self) -> u64 {
        self.starts.len() as u64
    }

    /// The runs of one unit, at most [`UNIT_PAGES`] pages.
    pub(super) fn unit(&self, unit: u64) -> &[(Run, T)] {
        let at = usize::try_from(unit).unwrap_or(usize::MAX);
        let Some(&start) = self.starts.get(at) else { return &[] };
        let end = self.starts.get(at + 1).copied().unwrap_or(self.items.len());
        self.items.get(Range { start, end }).unwrap_or_default()
    }
}
