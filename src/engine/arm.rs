//! Arming: ahead of T0 while the guest runs, and at T0.

use heapless::Vec as Array;
use ramshot_core::{
    ArmAhead, BlockIndex, BlockTable, Cause, HostAddr, HostRange, PAGE_SIZE, PageBitmap, PageId, RamBlock, Run,
    Treatment,
};

use super::shared::{Shared, State};
use super::{HUGE_PAGE, zeroed};
use crate::dirty::{AtT0, DirtyUse, bitmap};
use crate::sync::Arc;

pub(crate) type Ahead = ArmAhead<Arc<BlockTable>, Vec<u64>>;
/// The pages of the snapshot, and those of them that the scan takes first.
pub(crate) type Armed = (PageBitmap<Vec<u64>>, PageBitmap<Vec<u64>>);

/// A block with less than this resident is armed at T0: about 1 ms at 4 KiB a page. (The worlds of tests are small.)
const WORTH_IT: u64 = if cfg!(test) { PAGE_SIZE } else { 64 << 20 };
/// Protected at a time ahead of T0. So long a vCPU waits that writes there: KVM does not map what is being changed. The shorter it
/// waits, the more it opens again meanwhile, which adds to the pause: with 64 MiB the longest gap is 7 to 12 ms at 1 GiB, with
/// 8 MiB 2.5 to 4 ms, with 2 MiB the pause is 7 ms.
const CHUNK: u64 = 8 << 20;
/// What may well be protected in the pause: 0.6 ms.
const LEFT_OPEN: u64 = 16 << 20;
/// Pages opened by a write ahead of T0: 2 MiB. Protecting them again takes 36 us, each further fault there 90 us.
const AROUND: u64 = if cfg!(test) { 1 } else { 512 };
/// Gaps up to this many pages are protected along with what is around them: another call costs more (1.1 to 1.5 us).
const MERGE: u64 = 12;
/// Pages that are copied once more after the drafts, if they lie between others: 6 us, and a fault costs 50 to 90.
pub(crate) const GAPS: u64 = 16;
/// Protected under one look at what the guest has opened, at most.
const RANGES: usize = 64;
/// With more stretches than this to look at in a block, all of it is looked at instead.
const STRETCHES: usize = 4096;

/// Nothing armed yet.
pub(crate) fn nothing(table: &Arc<BlockTable>) -> Option<Ahead> {
    let bitmap = || PageBitmap::new(zeroed(PageBitmap::<Vec<u64>>::words_for(table.pages())), table.pages(), true);
    Ahead::new(Arc::clone(table), [bitmap()?, bitmap()?, bitmap()?, bitmap()?], AROUND).ok()
}

/// Protects what is there and mapped by small pages, while the guest runs.
pub(crate) fn ahead(shared: &Shared) -> Result<(), Cause> {
    for (index, block) in shared.table.iter() {
        if !is_armed_ahead(shared, index, block) {
            continue;
        }
        let ranges = populated(shared, [block.used_range()])?;
        if ranges.iter().map(|range| range.len).sum::<u64>() < WORTH_IT {
            continue;
        }
        log::trace!(target: "ramshot::snapshot", "arming {} ahead: {} ranges", block.name, ranges.len());
        let mut state = shared.lock();
        if let Some(ahead) = &mut state.ahead {
            ranges.into_iter().for_each(|range| ahead.seen(range));
        }
    }
    // Where the guest is known to write comes last: it would be opened again at once, and KVM would have dropped its mapping for nothing.
    let mut cold = bitmap(&shared.table).map_err(Cause::Arm)?;
    if let Some(ahead) = &shared.lock().ahead {
        cold.insert_all_but(ahead.there(), ahead.written());
    }
    pass(shared, Some(&cold))?;
    again(shared, None, LEFT_OPEN)
}

/// Finds what is there, while the guest runs, and protects what of it is certain to be pending at T0: what was written already.
/// For an increment, and after drafts.
pub(crate) fn dirty_ahead(shared: &Shared, dirty: &DirtyUse, drafted: bool, gaps: u64) -> Result<(), Cause> {
    let mut there = bitmap(&shared.table).map_err(Cause::Arm)?;
    for block in shared.table.blocks().iter().filter(|block| block.treatment != Treatment::Ignored) {
        let ranges = populated(shared, [block.used_range()])?;
        ranges.iter().flat_map(|&range| shared.table.runs_in(range)).for_each(|run| there.insert(run));
        let mut state = shared.lock();
        if let Some(ahead) = &mut state.ahead {
            ranges.into_iter().for_each(|range| ahead.seen(range));
        }
    }
    let mut known = bitmap(&shared.table).map_err(Cause::Arm)?;
    dirty.pages(|pages| pages.known(drafted, &mut known));
    if gaps > 0 {
        known.fill_gaps(&there, gaps);
    }
    for (index, _) in shared.table.iter().filter(|&(index, block)| !is_armed_ahead(shared, index, block)) {
        known.remove(shared.table.block_run(index));
    }
    // What is not there cannot be protected everywhere.
    known.remove_all_but(&known.clone(), &there);
    again(shared, Some(&known), 0)
}

/// Where something is in the ranges of `within`.
pub(super) fn populated(shared: &Shared, within: impl IntoIterator<Item = HostRange>) -> Result<Vec<HostRange>, Cause> {
    let mut ranges = Vec::new();
    for range in within {
        shared.tracker.populated(range, &mut |range| ranges.push(range)).map_err(Cause::Arm)?;
    }
    Ok(ranges)
}

/// What is mapped by huge pages is armed at T0: that takes 0.1 to 0.2 ms per GiB, less than a fault ahead of it.
fn is_armed_ahead(shared: &Shared, index: BlockIndex, block: &RamBlock) -> bool {
    block.treatment == Treatment::Tracked && !is_huge(shared, index)
}

/// Protects what is not protected, or not any more because the guest has written to it: of `of`, or of all that is there. Once more as
/// long as that gets less than half each time and more than `enough` bytes: so much less is left for the pause.
fn again(shared: &Shared, of: Option<&PageBitmap<Vec<u64>>>, mut enough: u64) -> Result<(), Cause> {
    let mut before = u64::MAX;
    loop {
        let (mut from, mut left) = (PageId(0), 0);
        while let Some(run) = next_unprotected(&shared.lock(), of, from) {
            left += run.bytes();
            from = run.end();
        }
        if left <= enough || left > before / 2 {
            return Ok(());
        }
        (before, enough) = (left, LEFT_OPEN);
        pass(shared, of)?;
    }
}

/// Protects what is there and not protected, once.
fn pass(shared: &Shared, of: Option<&PageBitmap<Vec<u64>>>) -> Result<(), Cause> {
    let mut from = PageId(0);
    loop {
        let ranges = protecting(shared, of, &mut from)?;
        if ranges.is_empty() {
            return Ok(());
        }
        // One by one: protecting the gaps between them would leave marks on absent pages where the descriptor was made for that
        // (UFFD_FEATURE_WP_UNPOPULATED), and at T0 these would look as if something were there.
        ranges.into_iter().try_for_each(|range| shared.tracker.protect(range).map_err(Cause::Arm))?;
    }
}

fn next_unprotected(state: &State, of: Option<&PageBitmap<Vec<u64>>>, from: PageId) -> Option<Run> {
    let ahead = state.ahead.as_ref()?;
    ahead.next_unprotected(of.unwrap_or(ahead.there()), from)
}

/// The next ranges to protect once more, which count as protected from here on.
fn protecting(
    shared: &Shared,
    of: Option<&PageBitmap<Vec<u64>>>,
    from: &mut PageId,
) -> Result<Array<HostRange, RANGES>, Cause> {
    let (mut ranges, mut bytes) = (Array::new(), 0);
    let mut state = shared.lock_unopened();
    if let Some(cause) = state.cause() {
        return Err(cause);
    }
    while let Some(run) = next_unprotected(&state, of, *from).filter(|_| bytes < CHUNK && !ranges.is_full()) {
        let run = Run::new(run.first, run.pages.min((CHUNK - bytes).div_ceil(PAGE_SIZE)));
        let Some((range, ahead)) = shared.table.host_range(run).zip(state.ahead.as_mut()) else { break };
        ahead.protecting(range);
        // Cannot fail: it is not full.
        let _ = ranges.push(range);
        bytes += range.len;
        *from = run.end();
    }
    Ok(ranges)
}

/// Whether a block is captured in huge pages.
pub(crate) fn is_huge(shared: &Shared, index: BlockIndex) -> bool {
    shared.table.granule_pages(index).saturating_mul(PAGE_SIZE) >= HUGE_PAGE
}

/// Protects `range`, where something is, while the guest runs.
pub(crate) fn protect_ahead(shared: &Shared, range: HostRange) -> Result<(), Cause> {
    let mut state = shared.lock_unopened();
    if let Some(cause) = state.cause() {
        return Err(cause);
    }
    let Some(ahead) = &mut state.ahead else { return Ok(()) };
    ahead.protecting(range);
    drop(state);
    shared.tracker.protect(range).map_err(Cause::Arm)
}

/// Makes everything that is there pending and protected. Nobody writes and nobody lifts protection meanwhile.
pub(crate) fn at_t0(shared: &Shared, mut ahead: Ahead) -> Result<Armed, Cause> {
    find_all(shared, &mut ahead)?;
    protect_rest(shared, &ahead, ahead.there())?;
    Ok(ahead.into_there())
}

/// Makes pending and protects what the image does not have: the base of an increment, or the drafts. `gaps`: pages that lie in
/// gaps no longer than this are taken along.
pub(crate) fn dirty_at_t0(
    shared: &Shared,
    mut ahead: Ahead,
    dirty: &DirtyUse,
    drafted: bool,
    gaps: u64,
) -> Result<AtT0, Cause> {
    let table = &shared.table;
    find_all(shared, &mut ahead)?;
    let mut pending = bitmap(table).map_err(Cause::Arm)?;
    dirty.pages(|pages| pages.begin(table, ahead.there(), drafted, &mut pending));
    if gaps > 0 {
        pending.fill_gaps(ahead.there(), gaps);
    }
    protect_rest(shared, &ahead, &pending)?;
    let (there, _) = ahead.into_there();
    Ok(AtT0 { pending, there, all: false })
}

/// Protects what of `pending` is not.
fn protect_rest(shared: &Shared, ahead: &Ahead, pending: &PageBitmap<Vec<u64>>) -> Result<(), Cause> {
    for (index, block) in shared.table.iter().filter(|(_, block)| block.treatment == Treatment::Tracked) {
        let whole = shared.table.block_run(index);
        let mut from = whole.first;
        let runs = std::iter::from_fn(|| {
            let run = ahead.next_unprotected(pending, from).filter(|run| whole.contains(run.first))?;
            from = run.end();
            shared.table.host_range(run).map(|range| whole_host_pages(range, block))
        });
        let (mut calls, mut bytes) = (0u64, 0);
        merged(runs).try_for_each(|range| {
            (calls, bytes) = (calls + 1, bytes + range.len);
            shared.tracker.protect(range).map_err(Cause::Arm)
        })?;
        log::trace!(
            target: "ramshot::snapshot",
            "armed {}: page size {}, host {}, {bytes} bytes in {calls} ranges", block.name, block.page_size, block.mapping()
        );
    }
    Ok(())
}

/// The kernel protects no less.
fn whole_host_pages(range: HostRange, block: &RamBlock) -> HostRange {
    let unit = block.page_size;
    let start = range.start.0 & !(unit - 1);
    HostRange::new(HostAddr(start), (range.end().0 - start).next_multiple_of(unit))
}

/// Looks at what was not there before, and notes what is there now.
fn find_all(shared: &Shared, ahead: &mut Ahead) -> Result<(), Cause> {
    for (index, _) in shared.table.iter().filter(|(_, block)| block.treatment != Treatment::Ignored) {
        populated(shared, stretches(&shared.table, ahead, index))?.into_iter().for_each(|range| ahead.found(range));
    }
    Ok(())
}

/// The parts of a block that have to be looked at.
fn stretches(table: &BlockTable, ahead: &Ahead, index: BlockIndex) -> Vec<HostRange> {
    let block = table.block_run(index);
    let mut from = block.first;
    let mut stretches = Vec::new();
    while let Some(run) = ahead.next_absent(from, block) {
        if stretches.len() == STRETCHES {
            return table.host_range(block).into_iter().collect();
        }
        stretches.extend(table.host_range(run));
        from = run.end();
    }
    stretches
}

/// Joins ranges with small gaps between them. (Two blocks are never joined: blocks that lie that close in the host's
/// address space are one mapping to the kernel, too, and what is protected too much is released at its first fault.)
fn merged(mut ranges: impl Iterator<Item = HostRange>) -> impl Iterator<Item = HostRange> {
    let mut current = ranges.next();
    std::iter::from_fn(move || {
        loop {
            let range = current?;
            match ranges.next() {
                Some(next) if next.start >= range.end() && next.start.0 - range.end().0 <= MERGE * PAGE_SIZE => {
                    current = Some(HostRange::new(range.start, next.end().0 - range.start.0));
                }
                next => {
                    current = next;
                    return Some(range);
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> HostRange {
        HostRange::new(HostAddr(page * PAGE_SIZE), pages * PAGE_SIZE)
    }

    #[test]
    fn small_gaps_are_merged_and_larger_ones_are_not() {
        let ranges = [range(0, 1), range(13, 2), range(28, 1), range(29, 1)];
        assert_eq!(merged(ranges.into_iter()).collect::<Vec<_>>(), [range(0, 15), range(28, 2)]);
        assert_eq!(merged([].into_iter()).count(), 0);
        assert_eq!(merged([range(9, 1), range(2, 1)].into_iter()).count(), 2, "not ascending: left alone");
    }
}
