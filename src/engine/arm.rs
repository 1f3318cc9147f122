//! Arming: ahead of T0 while the guest runs, and at T0.

use ramshot_core::{
    ArmAhead, BlockIndex, BlockTable, Cause, HostAddr, HostRange, PAGE_SIZE, PageBitmap, PageId, RamBlock, Treatment,
};

use super::shared::Shared;
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
        // What is mapped by huge pages is armed at T0: that takes 0.1 to 0.2 ms per GiB, less than a fault ahead of it.
        if block.treatment != Treatment::Tracked || is_huge(shared, index) {
            continue;
        }
        let mut ranges: Vec<HostRange> = Vec::new();
        shared.tracker.populated(block.used_range(), &mut |range| ranges.push(range)).map_err(Cause::Arm)?;
        if ranges.iter().map(|range| range.len).sum::<u64>() < WORTH_IT {
            continue;
        }
        log::trace!(target: "ramshot::snapshot", "arming {} ahead: {} ranges", block.name, ranges.len());
        ranges.into_iter().flat_map(chunks).try_for_each(|chunk| protect_ahead(shared, chunk))?;
    }
    ahead_again(shared)
}

/// Protects once more what the guest has written to meanwhile, as long as that gets less: so much less is left for the pause.
fn ahead_again(shared: &Shared) -> Result<(), Cause> {
    let open = || shared.lock().ahead.as_ref().map_or(0, Ahead::open_bytes);
    let (mut before, mut now) = (u64::MAX, open());
    while now > LEFT_OPEN && now <= before / 2 {
        let mut from = PageId(0);
        loop {
            let run = shared.lock().ahead.as_ref().and_then(|ahead| ahead.next_again(from));
            let Some(run) = run else { break };
            from = run.end();
            let range = shared.table.host_range(run);
            range.into_iter().flat_map(chunks).try_for_each(|chunk| protect_ahead(shared, chunk))?;
        }
        (before, now) = (now, open());
    }
    Ok(())
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

/// Finds what is there, while the guest runs, and protects nothing: what an increment needs to know at T0.
pub(crate) fn look(shared: &Shared) -> Result<(), Cause> {
    for block in shared.table.blocks().iter().filter(|block| block.treatment != Treatment::Ignored) {
        let mut ranges: Vec<HostRange> = Vec::new();
        shared.tracker.populated(block.used_range(), &mut |range| ranges.push(range)).map_err(Cause::Arm)?;
        let mut state = shared.lock();
        if let Some(ahead) = &mut state.ahead {
            ranges.into_iter().for_each(|range| ahead.protecting(range));
        }
    }
    Ok(())
}

/// Makes everything that is there pending and protected. Nobody writes and nobody lifts protection meanwhile.
pub(crate) fn at_t0(shared: &Shared, mut ahead: Ahead) -> Result<Armed, Cause> {
    let table = &shared.table;
    let protect = |range: HostRange| shared.tracker.protect(range).map_err(Cause::Arm);
    for (index, block) in table.iter().filter(|(_, block)| block.treatment != Treatment::Ignored) {
        let ranges = find(shared, &mut ahead, index)?;
        if block.treatment == Treatment::Tracked {
            merged(ranges.iter().copied()).try_for_each(protect)?;
        }
        log::trace!(
            target: "ramshot::snapshot",
            "armed {}: page size {}, host {}, {} ranges", block.name, block.page_size, block.mapping(), ranges.len()
        );
    }
    let mut from = PageId(0);
    let open = std::iter::from_fn(|| {
        let run = ahead.next_open(from)?;
        from = run.end();
        table.host_range(run)
    });
    merged(open).try_for_each(protect)?;
    Ok(ahead.into_pending())
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
    for (index, _) in table.iter().filter(|(_, block)| block.treatment != Treatment::Ignored) {
        find(shared, &mut ahead, index)?;
    }
    let (there, _) = ahead.into_pending();
    let mut pending = bitmap(table).map_err(Cause::Arm)?;
    dirty.pages(|pages| pages.begin(table, &there, drafted, &mut pending));
    if gaps > 0 {
        pending.fill_gaps(&there, gaps);
    }
    for (index, block) in table.iter().filter(|(_, block)| block.treatment == Treatment::Tracked) {
        let whole = table.block_run(index);
        let mut from = whole.first;
        let runs = std::iter::from_fn(|| {
            let page = pending.next_set(from).filter(|&page| whole.contains(page))?;
            let run = pending.run_around(page, whole)?;
            from = run.end();
            table.host_range(run).map(|range| whole_host_pages(range, block))
        });
        merged(runs).try_for_each(|range| shared.tracker.protect(range).map_err(Cause::Arm))?;
    }
    log::trace!(target: "ramshot::snapshot", "armed {} dirty pages", pending.count());
    Ok(AtT0 { pending, there, all: false })
}

/// The kernel protects no less.
fn whole_host_pages(range: HostRange, block: &RamBlock) -> HostRange {
    let unit = block.page_size;
    let start = range.start.0 & !(unit - 1);
    HostRange::new(HostAddr(start), (range.end().0 - start).next_multiple_of(unit))
}

/// Looks at what was not there before, and notes what is there now.
fn find(shared: &Shared, ahead: &mut Ahead, index: BlockIndex) -> Result<Vec<HostRange>, Cause> {
    let mut ranges: Vec<HostRange> = Vec::new();
    for stretch in stretches(&shared.table, ahead, index) {
        shared.tracker.populated(stretch, &mut |range| ranges.push(range)).map_err(Cause::Arm)?;
    }
    ranges.iter().for_each(|&range| ahead.found(range));
    Ok(ranges)
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

fn chunks(range: HostRange) -> impl Iterator<Item = HostRange> {
    (range.start.0..range.end().0)
        .step_by(usize::try_from(CHUNK).unwrap_or(usize::MAX))
        .map(move |start| HostRange::new(HostAddr(start), CHUNK.min(range.end().0 - start)))
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

    #[test]
    fn chunks_cover_a_range_exactly() {
        let pages = 3 * CHUNK / PAGE_SIZE + 5;
        let cut: Vec<_> = chunks(range(7, pages)).collect();
        assert_eq!((cut.len(), cut.last().map(|r| r.len)), (4, Some(5 * PAGE_SIZE)));
        assert!(cut.windows(2).all(|pair| pair[0].end() == pair[1].start));
    }
}
