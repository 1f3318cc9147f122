//! What the guest writes to around T0: a hint for who restores the image lazily.

use std::path::PathBuf;

use ramshot_core::{PageBitmap, PageId, Run};

use crate::restore::order;

/// Runs remembered: 16 MiB, touched as they are used.
const MOST: usize = 1 << 20;

/// What the guest writes to around T0, in order.
pub(crate) struct Written {
    path: PathBuf,
    runs: Vec<Run>,
}

impl Written {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, runs: Vec::with_capacity(MOST) }
    }

    pub(crate) fn push(&mut self, run: Run) {
        // Nothing is allocated while somebody waits.
        if self.runs.len() < self.runs.capacity() {
            self.runs.push(run);
        }
    }

    /// What was written just before T0: it will be written again. Takes half of the room at most.
    pub(crate) fn just_before(&mut self, pages: &PageBitmap<Vec<u64>>) {
        let mut from = PageId(0);
        while self.runs.len() < self.runs.capacity() / 2 {
            let Some(page) = pages.next_set(from) else { return };
            let Some(run) = pages.run_around(page, Run::new(page, pages.pages() - page.0)) else { return };
            self.push(run);
            from = run.end();
        }
    }

    /// Writes it down, for an image of `pages` pages. A hint: what goes wrong is logged.
    pub(crate) fn save(&self, pages: u64) {
        order::save(&self.path, pages, &[], &self.runs);
    }
}
