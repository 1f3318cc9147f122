//! Where the pages of an open snapshot are: from a page to its state and checksum, and from a data page's number back.

use ramshot_core::{PageId, Run};

use super::format::unpack_run;
use super::{PageState, StateRun};

/// A run record, and how many data pages come before it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    record: u64,
    rank: u64,
}

impl Entry {
    fn first(self) -> u64 {
        unpack_run(self.record).0
    }

    fn end(self) -> u64 {
        let (first, pages, _) = unpack_run(self.record);
        first + pages
    }

    /// Only records with a known state are ever kept.
    fn state(self) -> PageState {
        PageState::from_code(unpack_run(self.record).2).unwrap_or(PageState::Data)
    }

    fn run(self) -> StateRun {
        let (first, pages, _) = unpack_run(self.record);
        StateRun { run: Run::new(PageId(first), pages), state: self.state() }
    }
}

/// The page states of a file.
///
/// # Invariants
/// Entries ascend, do not overlap, and end at `pages` at the latest; none has the default state.
#[derive(Debug)]
pub(super) struct StateIndex {
    pages: u64,
    default: PageState,
    entries: Vec<Entry>,
    data_pages: u64,
    in_parent: u64,
}

impl StateIndex {
    /// For `pages` pages, with room for `records` run records.
    pub(super) fn new(pages: u64, default: PageState, records: usize) -> Option<Self> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(records).ok()?;
        let in_parent = if default == PageState::InParent { pages } else { 0 };
        Some(Self { pages, default, entries, data_pages: 0, in_parent })
    }

    /// Adds the next record.
    ///
    /// # Errors
    /// What makes it no valid one.
    pub(super) fn push(&mut self, record: u64) -> Result<(), String> {
        let (first, count, code) = unpack_run(record);
        let end = first + count;
        let state = PageState::from_code(code).ok_or_else(|| format!("page state {code} does not exist"))?;
        if state == self.default {
            return Err(format!("a record for pages {first}+{count}, which are {state:?} without one"));
        }
        if end > self.pages {
            return Err(format!("pages {first}+{count} of {}", self.pages));
        }
        if let Some(last) = self.entries.last()
            && first < last.end()
        {
            return Err(format!("pages {first}+{count} after pages up to {}", last.end() - 1));
        }
        self.entries.push(Entry { record, rank: self.data_pages });
        if self.default == PageState::InParent {
            self.in_parent -= count;
        }
        match state {
            PageState::Data => self.data_pages += count,
            PageState::InParent => self.in_parent += count,
            PageState::Zero => {}
        }
        Ok(())
    }

    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) const fn default_state(&self) -> PageState {
        self.default
    }

    pub(super) const fn data_pages(&self) -> u64 {
        self.data_pages
    }

    pub(super) const fn in_parent_pages(&self) -> u64 {
        self.in_parent
    }

    pub(super) const fn zero_pages(&self) -> u64 {
        self.pages - self.data_pages - self.in_parent
    }

    /// State of a page of the file, and its number among the data pages if it is one.
    pub(super) fn state(&self, page: PageId) -> (PageState, u64) {
        let after = self.entries.partition_point(|entry| entry.first() <= page.0);
        match after.checked_sub(1).and_then(|i| self.entries.get(i)) {
            Some(entry) if page.0 < entry.end() => (entry.state(), entry.rank + (page.0 - entry.first())),
            _ => (self.default, 0),
        }
    }

    /// The data page with number `rank` and those that follow it in its run; empty past the last.
    pub(super) fn data_run(&self, rank: u64) -> Run {
        let after = self.entries.partition_point(|entry| entry.rank <= rank);
        match after.checked_sub(1).and_then(|i| self.entries.get(i)) {
            Some(entry) if rank < self.data_pages => {
                let skip = rank - entry.rank;
                Run::new(PageId(entry.first() + skip), entry.end() - entry.first() - skip)
            }
            _ => Run::new(PageId(self.pages), 0),
        }
    }

    /// All pages from `from` on as runs without gaps; the first run may start before `from`.
    pub(super) fn runs_from(&self, from: PageId) -> impl Iterator<Item = StateRun> {
        let mut next = self.entries.partition_point(|entry| entry.end() <= from.0);
        let mut page = next.checked_sub(1).and_then(|i| self.entries.get(i)).map_or(0, |entry| entry.end());
        std::iter::from_fn(move || {
            let run = match self.entries.get(next) {
                Some(entry) if entry.first() == page => {
                    next += 1;
                    entry.run()
                }
                Some(entry) => self.gap(page, entry.first()),
                None if page < self.pages => self.gap(page, self.pages),
                None => return None,
            };
            page = run.run.end().0;
            Some(run)
        })
    }

    fn gap(&self, from: u64, to: u64) -> StateRun {
        StateRun { run: Run::new(PageId(from), to - from), state: self.default }
    }
}
