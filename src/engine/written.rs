//! What the guest writes to around T0: a hint for who restores the image lazily.

use std::path::PathBuf;

use ramshot_core::{PageBitmap, PageId, Run};

use crate::restore::order;

/// Runs remembered of each kind: 16 MiB, touched as they are used.
const MOST: usize = 1 << 20;

/// What the guest writes to around T0, in order.
pub(crate) struct Written {
    path: PathBuf,
    /// What was written just before T0: it will be written again. Runs are made of it when nobody waits any more.
    pub(crate) just_before: Option<PageBitmap<Vec<u64>>>,
    /// For what a writer waited.
    faults: Vec<Run>,
}

impl Written {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, just_before: None, faults: Vec::with_capacity(MOST) }
    }

    pub(crate) fn push(&mut self, run: Run) {
        // Nothing is allocated while somebody waits.
        if self.faults.len() < self.faults.capacity() {
            self.faults.push(run);
        }
    }

    /// Writes it down, for an image of `pages` pages. A hint: what goes wrong is logged.
    pub(crate) fn save(self, pages: u64) {
        let mut runs: Vec<Run> = self.just_before.iter().flat_map(runs_of).take(MOST).collect();
        runs.extend(self.faults);
        order::save(&self.path, pages, &[], &runs);
    }
}

fn runs_of(pages: &PageBitmap<Vec<u64>>) -> impl Iterator<Item = Run> {
    let mut from = PageId(0);
    std::iter::from_fn(move || {
        let page = pages.next_set(from)?;
        let run = pages.run_around(page, Run::new(page, pages.pages() - page.0))?;
        from = run.end();
        Some(run)
    })
}
