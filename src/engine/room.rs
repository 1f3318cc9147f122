//! Room made in the image ahead of T0, where the guest writes. A guest that writes all over more memory than the pool holds
//! stands still until what it writes to has gone through the pool and into the image; how fast that goes is up to the image,
//! and a file in the page cache takes pages more than twice as fast once it has blocks for them.

use std::collections::VecDeque;
use std::time::Duration;

use ramshot_core::{BlockIndex, Cause, HostAddr, HostRange, PAGE_SIZE, PageId, Run, Treatment};

use super::shared::{Phase, Shared, State};
use super::{HUGE_PAGE, arm};
use crate::sink::ImageSink;
use crate::sync::{make_way, pause};

/// Most of it: more takes longer (90 ms for 256 MiB on a tmpfs) than a snapshot should take to begin.
const MOST: u64 = (512 << 20) / PAGE_SIZE;
/// Made at a time: 0.2 ms of a processor.
const PIECE: u64 = (512 << 10) / PAGE_SIZE;
/// Most small pages watched in a block: protecting one by itself takes 2 to 5 us.
const WATCHED: u64 = 4096;
/// Where memory is mapped by small pages, the first that is there in each of these is watched.
const STEP: u64 = if cfg!(test) { PAGE_SIZE } else { HUGE_PAGE };
/// How long the guest is watched at a time, and how often at most. (The worlds of tests are small, and patient.)
const WATCH: Duration = Duration::from_millis(2);
const WATCHES: u32 = if cfg!(test) { 1000 } else { 20 };

/// What is to be done, and by how many writers it is being done.
#[derive(Debug, Default)]
pub(crate) struct Room {
    wanted: VecDeque<Run>,
    makers: usize,
}

/// Watches where the guest writes, and if that is more than `pool` pages has the writers make room for it.
pub(crate) fn make(shared: &Shared, pool: u64) -> Result<(), Cause> {
    for (index, block) in shared.table.iter().filter(|(_, block)| block.treatment == Treatment::Tracked) {
        if block.used > pool * PAGE_SIZE {
            watch(shared, index)?;
        }
    }
    let mut written = 0;
    for _ in 0..WATCHES {
        pause(WATCH);
        let now = written_pages(&shared.lock())?;
        if now <= written + written / 8 {
            break;
        }
        written = now;
    }
    if written <= pool {
        return Ok(());
    }
    let mut state = shared.lock();
    let (mut from, mut left) = (PageId(0), MOST);
    while let Some(run) = state.ahead.as_ref().and_then(|ahead| ahead.next_written(from)).filter(|_| left > 0) {
        // The run may have begun before.
        let first = run.first.max(from);
        let pages = (run.end().0 - first.0).min(left).min(PIECE);
        state.room.wanted.push_back(Run::new(first, pages));
        (from, left) = (PageId(first.0 + pages), left - pages);
    }
    log::debug!(target: "ramshot::snapshot", "the guest writes to {written} pages: room for {} of them", MOST - left);
    shared.wake_all();
    while state.room.makers > 0 || !state.room.wanted.is_empty() && state.cause().is_none() {
        state = shared.wait_for_end(state);
    }
    state.cause().map_or(Ok(()), Err)
}

/// Protects enough of a block to see where the guest writes: whole huge pages, a page here and there of small ones. (To
/// protect them all would cost the guest a second-level fault for each, twice.)
fn watch(shared: &Shared, index: BlockIndex) -> Result<(), Cause> {
    let Some(block) = shared.table.block(index) else { return Ok(()) };
    let ranges = arm::populated(shared, [block.used_range()])?;
    if arm::is_huge(shared, index) {
        return ranges.into_iter().try_for_each(|range| arm::protect_ahead(shared, range));
    }
    let step = STEP * (block.used / STEP).div_ceil(WATCHED).max(1);
    let mut next = 0;
    for range in ranges {
        while next < range.end().0 {
            let at = HostAddr(next.max(range.start.0) & !(block.page_size - 1));
            arm::protect_ahead(shared, HostRange::new(at, block.page_size))?;
            next = (at.0 + step) & !(step - 1);
        }
    }
    Ok(())
}

fn written_pages(state: &State) -> Result<u64, Cause> {
    let written = state.ahead.as_ref().map_or(0, |ahead| ahead.written().count());
    state.cause().map_or(Ok(written), Err)
}

/// A piece of it, for a writer: [`make_piece`].
pub(crate) fn next(state: &mut State) -> Option<Run> {
    if state.phase != Phase::Prepared || state.cause().is_some() {
        return None;
    }
    let run = state.room.wanted.pop_front()?;
    state.room.makers += 1;
    Some(run)
}

/// Makes room for `run`, which came from [`next`].
pub(crate) fn make_piece(shared: &Shared, sink: &dyn ImageSink, run: Run) {
    let made = shared.survive(|| sink.make_room(run)).unwrap_or(false);
    make_way();
    let mut state = shared.lock();
    state.room.makers -= 1;
    if !made {
        state.room.wanted.clear();
    }
    if state.room.makers == 0 && state.room.wanted.is_empty() {
        shared.wake_all();
    }
}
