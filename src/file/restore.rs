//! Eager restore: all of a snapshot into guest RAM, before a vCPU runs.

use ramshot_core::{BlockName, BlockTable, HostAddr, OsError, PageId, RamTarget, Run};

use super::error::{ReadError, RestoreError};
use super::format::PAGE_BYTES;
use super::source::PageSource;
use super::{SnapshotFile, block_of, parallel};

/// Data pages that one thread restores before it asks for more: 1 MiB.
const UNIT: u64 = 256;
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
        let hosts = self.host_addresses(table)?;
        PageSource::check_whole(self)?;
        let work = |(): &mut (), unit: u64| {
            self.for_each_data_run(unit * UNIT, UNIT, |run, rank| self.restore_run(&hosts, ram, run, rank))
        };
        parallel::run(self.data_pages().div_ceil(UNIT), threads, &work, &mut |_| {})?;
        Ok(RestoreReport { data_pages: self.data_pages(), zero_pages: self.zero_pages() })
    }

    /// Where each block of the file goes; ignored ones nowhere.
    fn host_addresses(&self, table: &BlockTable) -> Result<Vec<Option<HostAddr>>, RestoreError> {
        let matched = self
            .match_blocks(table)
            .map_err(|mismatch| RestoreError::Layout { path: self.path().to_owned(), mismatch })?;
        Ok(matched
            .into_iter()
            .map(|index| index.and_then(|index| table.block(index)).map(|block| block.host))
            .collect())
    }

    /// Reads one run of data pages into the blocks it lies in.
    fn restore_run(
        &self,
        hosts: &[Option<HostAddr>],
        ram: &dyn RamTarget,
        run: Run,
        rank: u64,
    ) -> Result<(), RestoreError> {
        let mut done = 0;
        while done < run.pages {
            let page = PageId(run.first.0 + done);
            // Every page of the file is in a block, and each such block has a place: checked before.
            let Some((index, block)) = block_of(self.blocks(), page) else { break };
            let Some(host) = hosts.get(index).copied().flatten() else { break };
            let pages = (run.pages - done).min(block.run().end().0 - page.0).min(STEP_PAGES);
            let at = HostAddr(host.0 + (page.0 - block.first_page.0) * PAGE_BYTES);
            self.fill(ram, block.name, at, Run::new(page, pages), rank + done)?;
            done += pages;
        }
        Ok(())
    }

    fn fill(
        &self,
        ram: &dyn RamTarget,
        block: BlockName,
        at: HostAddr,
        run: Run,
        rank: u64,
    ) -> Result<(), RestoreError> {
        let len = usize::try_from(run.bytes()).unwrap_or(usize::MAX);
        // A target that hands out something else than it was asked for has not been filled.
        let mut outcome: Option<Result<(), ReadError>> = None;
        ram.with_mut(at, len, &mut |bytes| {
            if bytes.len() == len {
                outcome = Some(self.read_data(run.first, rank, bytes));
            }
        })
        .map_err(|source| RestoreError::Ram { block, source })?;
        match outcome {
            Some(result) => Ok(result?),
            None => Err(RestoreError::Ram { block, source: OsError::new("RamTarget::with_mut", 14) }),
        }
    }
}
