//! Eager restore: all of an image into guest RAM, before a vCPU runs.

use std::path::Path;

use ramshot_core::{BlockName, BlockTable, HostAddr, OsError, PageId, RamTarget, Run};

use super::batch::Batches;
use super::error::{ReadError, RestoreError};
use super::format::PAGE_BYTES;
use super::source::{PageSource, extents, match_blocks};
use super::{PageState, SnapshotFile, block_of, parallel};

/// Pages read at a time: they are still in the cache when they are checked.
const STEP_PAGES: u64 = 64;

/// What was restored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RestoreReport {
    /// Pages written to guest RAM, each checked.
    pub data_pages: u64,
    /// Pages left as they were, because they are zero.
    pub zero_pages: u64,
}

impl SnapshotFile {
    /// Fills the RAM blocks of `table` through `ram`, on `threads` threads (at least one), reading straight into guest RAM
    /// and checking every page there.
    ///
    /// **The blocks must be fresh**: zero pages are not written, so that they stay holes, and whatever the memory held
    /// there before would remain. No vCPU may run yet.
    ///
    /// # Errors
    /// Another RAM layout or pages that only a parent has: nothing was touched. A page that is damaged or cannot be
    /// read, or RAM that cannot be filled: the blocks are undefined and must be thrown away.
    pub fn restore_into(
        &self,
        table: &BlockTable,
        ram: &dyn RamTarget,
        threads: usize,
    ) -> Result<RestoreReport, RestoreError> {
        restore(self, self.path(), table, ram, threads)
    }
}

/// Fills the blocks of `table` from `source`, which was opened at `path`.
pub(super) fn restore(
    source: &dyn PageSource,
    path: &Path,
    table: &BlockTable,
    ram: &dyn RamTarget,
    threads: usize,
) -> Result<RestoreReport, RestoreError> {
    let matched = match_blocks(source.blocks(), table)
        .map_err(|mismatch| RestoreError::Layout { path: path.to_owned(), mismatch })?;
    let host = |index: Option<_>| index.and_then(|index| table.block(index)).map(|block| block.host);
    let hosts: Vec<Option<HostAddr>> = matched.into_iter().map(host).collect();

    source.check_whole()?;
    let mut report = RestoreReport { data_pages: 0, zero_pages: 0 };
    let mut plan = Batches::new();
    for extent in extents(source) {
        let extent = extent?;
        match extent.state {
            PageState::Data => {
                plan.push(extent.run, ());
                report.data_pages += extent.run.pages;
            }
            PageState::Zero | PageState::InParent => report.zero_pages += extent.run.pages,
        }
    }
    let work = |(): &mut (), unit: u64| -> Result<u64, RestoreError> {
        let runs = plan.unit(unit);
        runs.iter().try_for_each(|&(run, ())| restore_run(source, &hosts, ram, run))?;
        Ok(runs.iter().map(|(run, ())| run.pages).sum())
    };
    parallel::run(plan.units(), threads, &work, &mut |_| {})?;
    Ok(report)
}

/// Reads one run of data pages into the blocks it lies in.
fn restore_run(
    source: &dyn PageSource,
    hosts: &[Option<HostAddr>],
    ram: &dyn RamTarget,
    run: Run,
) -> Result<(), RestoreError> {
    let mut done = 0;
    while done < run.pages {
        let page = PageId(run.first.0 + done);
        // Every page of an image is in a block, and each such block has a place: checked before, for the files that we read.
        let place = block_of(source.blocks(), page)
            .and_then(|(index, block)| Some((block, hosts.get(index).copied().flatten()?)));
        let Some((block, host)) = place else {
            return Err(RestoreError::Incomplete { page, place: "in no block".to_owned() });
        };
        let pages = (run.pages - done).min(block.run().end().0 - page.0).min(STEP_PAGES);
        let at = HostAddr(host.0 + (page.0 - block.first_page.0) * PAGE_BYTES);
        fill(ram, block.name, at, Run::new(page, pages), &mut |bytes| source.read_run(page, bytes))?;
        done += pages;
    }
    Ok(())
}

/// Has `read` fill the pages of `run`, which are at `at` in a block.
pub(super) fn fill(
    ram: &dyn RamTarget,
    block: BlockName,
    at: HostAddr,
    run: Run,
    read: &mut dyn FnMut(&mut [u8]) -> Result<(), ReadError>,
) -> Result<(), RestoreError> {
    let len = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
    // A target that hands out something else than it was asked for has not been filled.
    let mut outcome: Option<Result<(), ReadError>> = None;
    ram.with_mut(at, len, &mut |bytes| {
        if bytes.len() == len {
            outcome = Some(read(bytes));
        }
    })
    .map_err(|source| RestoreError::Ram { block, source })?;
    match outcome {
        Some(result) => Ok(result?),
        None => Err(RestoreError::Ram { block, source: OsError::new("RamTarget::with_mut", 14) }),
    }
}
