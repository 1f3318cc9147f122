//! Finding what to read: pages that are missing, that nobody reads, and that hold data.

use core::ops::Deref;

use super::{Fill, Holds, cut, host_run};
use crate::block::BlockTable;
use crate::fill::seam::Content;
use crate::units::{PageId, Run};

impl<T, W, const FAULTS: usize, const CLAIMS: usize> Fill<T, W, FAULTS, CLAIMS>
where
    T: Deref<Target = BlockTable>,
    W: AsRef<[u64]> + AsMut<[u64]>,
{
    /// The first pages in `from..end` to prefetch, leaving out what is being read if it is to `make_way`; and up to where all is settled or zero, or was skipped for being read.
    /// What is being read is not passed: it may come back.
    pub(super) fn find_data(
        &self,
        from: PageId,
        end: PageId,
        content: &impl Content,
        make_way: bool,
    ) -> (Option<(Run, Holds)>, PageId) {
        let mut at = from;
        let mut passed = None;
        loop {
            at = PageId(self.settled.first_clear(at.0, end.0));
            if at >= end {
                return (None, passed.unwrap_or(end));
            }
            let per_host = self.per_host_page(at);
            let own = host_run(&self.table, at, per_host);
            if let Some(out) = self.claims.iter().find(|out| make_way && out.run.contains(at)) {
                #[cfg(test)]
                if self.defect == Some(crate::tests::FillDefect::CompleteTooEarly) {
                    at = out.run.end();
                    continue;
                }
                let _ = passed.get_or_insert(at);
                at = out.run.end();
                continue;
            }
            let Some((extent, zero)) = content.extent(own.first) else { return (None, passed.unwrap_or(end)) };
            let block = self.table.block_of(at).map_or(own, |index| self.table.block_run(index));
            // Whole host pages of it, in this block.
            let alike = cut(extent, Run::new(own.first, block.end().0 - own.first.0));
            let alike = alike.pages / per_host * per_host;
            if zero && alike > 0 {
                at = PageId(own.first.0 + alike);
                continue;
            }
            let most = self.limits.scan_pages.max(per_host) / per_host * per_host;
            let (holds, pages) = if alike > 0 { (Holds::Data, alike.min(most)) } else { (Holds::Mixed, per_host) };
            let run = self.free_part(Run::new(own.first, pages));
            return (Some((run, holds)), passed.unwrap_or(own.first));
        }
    }

    /// The start of `run` that is missing and that nobody reads; its first host page is.
    fn free_part(&self, run: Run) -> Run {
        let settled = self.settled.next_set(run.first).unwrap_or(run.end());
        let claimed = self.claims.iter().map(|out| out.run.first).filter(|&first| first > run.first);
        let end = claimed.fold(settled.min(run.end()), PageId::min);
        Run::new(run.first, end.0 - run.first.0)
    }
}

/// Cuts `run` to the pages around `own` that are alike, and says what they are.
pub(super) fn holds_around(run: &mut Run, own: Run, content: &impl Content) -> Holds {
    let per_host = own.pages;
    let mut at = run.first;
    // What is alike from one end of the run to the other is found in one look; else as many as there are pieces.
    while at < run.end() {
        let Some((extent, zero)) = content.extent(at) else { break };
        if own.first >= at && own.first < extent.end() {
            // The piece that `own` begins in: whole host pages of it.
            let skip = (at.0 - run.first.0).div_ceil(per_host) * per_host;
            let first = run.first.0 + skip;
            let end = run.first.0 + (extent.end().min(run.end()).0 - run.first.0) / per_host * per_host;
            if first > own.first.0 || end < own.end().0 {
                break;
            }
            *run = Run::new(PageId(first), end - first);
            return if zero { Holds::Zero } else { Holds::Data };
        }
        at = extent.end();
    }
    *run = own;
    Holds::Mixed
}
