//! Reading what was claimed, so that one bad page costs no more than its host page.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use ramshot_core::{Content, FillClaim, Holds, PAGE_SIZE, PageId, Run};

use super::lost::LostWhy;
use crate::file::{PageSource, PageState};

/// Pages read at a time: they are still in the cache when they are checked, and it is how long the prefetcher keeps a fault
/// waiting for the disk.
pub(super) const STEP_PAGES: u64 = 64;

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// A part of a claim that could not be read.
#[derive(Debug)]
pub(super) struct Bad {
    pub(super) run: Run,
    pub(super) why: LostWhy,
}

/// What the image has where, as core asks.
pub(super) struct Extents<'a>(pub(super) &'a dyn PageSource);

impl Content for Extents<'_> {
    fn extent(&self, first: PageId) -> Option<(Run, bool)> {
        match self.0.extent(first) {
            Some(found) if found.run.pages > 0 => Some((found.run, found.state == PageState::Zero)),
            // A page that the source does not know is not zero for that: reading it will say what is wrong.
            _ => (first.0 < self.0.pages()).then(|| (Run::new(first, 1), false)),
        }
    }
}

/// Bytes of so many pages.
pub(super) fn bytes_of(pages: u64) -> usize {
    usize::try_from(pages.saturating_mul(PAGE_SIZE)).unwrap_or(usize::MAX)
}

/// Reads the pages of `claim` into `into`, which is as long; what could not be read. `between` is called between two reads.
pub(super) fn read(source: &dyn PageSource, claim: &FillClaim, into: &mut [u8], mut between: impl FnMut()) -> Vec<Bad> {
    let run = claim.run();
    let mut bad = Vec::new();
    let mut at = run.first;
    while at < run.end() {
        let rest = run.end().0 - at.0;
        let (extent, zero) = match claim.holds() {
            Holds::Data => (Run::new(at, rest), false),
            Holds::Zero => (Run::new(at, rest), true),
            Holds::Mixed => Extents(source).extent(at).unwrap_or((Run::new(at, 1), false)),
        };
        let pages = extent.pages.min(rest).min(STEP_PAGES);
        let from = bytes_of(at.0 - run.first.0);
        let part = into.get_mut(from..).and_then(|rest| rest.get_mut(..bytes_of(pages))).unwrap_or_default();
        if zero {
            part.fill(0);
        } else {
            read_part(source, at, part, &mut bad);
            between();
        }
        at = PageId(at.0 + pages);
    }
    bad
}

/// At once, or page by page if that fails.
fn read_part(source: &dyn PageSource, first: PageId, into: &mut [u8], bad: &mut Vec<Bad>) {
    if try_read(source, first, into).is_ok() {
        return;
    }
    for (page, bytes) in (first.0..).zip(into.chunks_exact_mut(PAGE)) {
        if let Err(why) = try_read(source, PageId(page), bytes) {
            bad.push(Bad { run: Run::new(PageId(page), 1), why });
        }
    }
}

fn try_read(source: &dyn PageSource, first: PageId, into: &mut [u8]) -> Result<(), LostWhy> {
    // The source is foreign code, and somebody is blocked until this thread goes on.
    match catch_unwind(AssertUnwindSafe(|| source.read_run(first, into))) {
        Ok(result) => result.map_err(|error| LostWhy::Read(Arc::new(error))),
        Err(_) => Err(LostWhy::Source),
    }
}
