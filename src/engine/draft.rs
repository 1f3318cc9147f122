//! Pre-copy: drafts of the image, made while the guest runs and writes, so that at T0 there is little left to protect.

use std::time::Instant;

use ramshot_core::{Cause, OsError, PageBitmap, PageId, RamBlock, Run, Treatment};

use super::shared::Core;
use super::{Prepared, SnapshotFailed};
use crate::dirty::{DirtyUse, bitmap};
use crate::report::Drafts;
use crate::sync::Arc;

/// A further draft pays if at most this share (one over it) of the last one was written again meanwhile.
const SHRINKS: u64 = 2;

impl Prepared {
    /// Copies everything into the image while the guest runs and writes on: no page is protected, no vCPU waits. What is
    /// written meanwhile is copied again at T0, or by a further draft if that shrinks the rest: at most `passes` drafts
    /// (0 is taken for 1), and a further one only if the guest has written at most half as much as the last one copied. So
    /// it always ends. [`begin`](Self::begin) with [`Pending::Dirty`](super::Pending::Dirty) then protects only what was
    /// written since the last draft.
    ///
    /// It spares the guest the faults of what it does not write meanwhile, for copying twice what it does. A guest that keeps writing
    /// all over its memory is better off without: the log costs it a fault for each page as well. T0 is the pause, as ever.
    ///
    /// Needs [`Options::dirty`](crate::Options::dirty). [`arm_ahead`](Self::arm_ahead) belongs after it.
    ///
    /// # Errors
    /// There is no dirty tracking; a page or a log cannot be read; the image cannot be written. Everything is undone.
    pub fn precopy(mut self, passes: u32) -> Result<Self, SnapshotFailed> {
        match self.drafts(passes.max(1)) {
            Ok(drafts) => {
                self.drafts = drafts;
                Ok(self)
            }
            Err(cause) => {
                self.running.shared.end(cause);
                Err(self.running.fail())
            }
        }
    }

    fn drafts(&self, passes: u32) -> Result<Drafts, Cause> {
        let shared = &self.running.shared;
        let Some(dirty) = shared.dirty.as_ref().filter(|_| self.drafts.passes == 0) else {
            return Err(Cause::Arm(OsError::new("pre-copy without Options::dirty, or for the second time", 22)));
        };
        let (mut drafts, start) = (Drafts::default(), Instant::now());
        while drafts.passes < passes {
            let pages = self.pages_of_draft(dirty, drafts.passes == 0)?;
            let copied = pages.count();
            if drafts.passes > 0 {
                self.running.again().map_err(|()| Cause::Sink)?;
            }
            log::debug!(target: "ramshot::snapshot", "draft {}: {copied} pages", drafts.passes + 1);
            self.copy(dirty, pages)?;
            drafts.passes += 1;
            drafts.pages += copied;
            if drafts.passes == 1 {
                drafts.first_pages = copied;
            }
            dirty.read_logs().map_err(Cause::Arm)?;
            if dirty.written() > copied / SHRINKS {
                break;
            }
        }
        self.running.again().map_err(|()| Cause::Sink)?;
        drafts.took = start.elapsed();
        Ok(drafts)
    }

    /// What the next draft copies. What is written from here on counts afresh.
    fn pages_of_draft(&self, dirty: &DirtyUse, first: bool) -> Result<PageBitmap<Vec<u64>>, Cause> {
        let shared = &self.running.shared;
        let mut pages = bitmap(&shared.table).map_err(Cause::Arm)?;
        dirty.read_logs().map_err(Cause::Arm)?;
        dirty.pages(|known| known.draft(first, &mut pages));
        let in_pause = |block: &RamBlock| block.treatment == Treatment::InPause;
        if first && !self.increment {
            let blocks = shared.table.blocks().iter().filter(|b| b.treatment != Treatment::Ignored && !in_pause(b));
            for block in blocks {
                let mut found = |range| shared.table.runs_in(range).for_each(|run| pages.insert(run));
                shared.tracker.populated(block.used_range(), &mut found).map_err(Cause::Arm)?;
            }
        }
        // They are captured inside the pause, whatever a draft would say.
        for (index, _) in shared.table.iter().filter(|(_, block)| in_pause(block)) {
            pages.remove(shared.table.block_run(index));
        }
        Ok(pages)
    }

    /// One draft, from its first page to all of them in the image.
    fn copy(&self, dirty: &DirtyUse, pages: PageBitmap<Vec<u64>>) -> Result<(), Cause> {
        let shared = &self.running.shared;
        dirty.pages(|known| {
            let mut at = PageId(0);
            while let Some(page) = pages.next_set(at) {
                let run = pages.run_around(page, Run::new(page, u64::MAX - page.0));
                let run = run.unwrap_or(Run::new(page, 1));
                known.handle_saved(run);
                at = run.end();
            }
        });
        let table = Arc::new(shared.table.unprotected());
        let core = Core::new(table, pages, self.slots, self.slot_words.clone(), self.limits)
            .map_err(|_| Cause::Arm(OsError::new("setting up core", 0)))?;
        let mut state = shared.lock();
        if let Some(cause) = state.cause() {
            return Err(cause);
        }
        state.core = Some(core);
        drop(state);
        shared.wake_all();
        let mut state = shared.lock();
        while !state.is_written() && state.cause().is_none() {
            state = shared.wait_for_end(state);
        }
        match state.cause() {
            Some(cause) => Err(cause),
            None => {
                state.core = None;
                Ok(())
            }
        }
    }
}
