//! The prefetcher: reads what nobody has touched yet, and makes way for faults.

use std::sync::Arc;

use ramshot_core::{Content, NextFill, PAGE_SIZE, PageId, Run};

use super::order;
use super::read::{Extents, bytes_of, read};
use super::shared::{Offer, Shared, State};
use crate::sync::{MutexGuard, make_way, run_behind};

/// Pages it reads at once: 1 MiB.
pub(super) const CHUNK_PAGES: u64 = 256;

/// The thread.
pub(super) fn prefetch(shared: &Shared) {
    run_behind();
    let content = Extents(shared.source.as_ref());
    let pages = shared.source.pages();
    let all = Run::new(PageId(0), pages);
    let data = count_data(&content, pages);
    let order: Arc<[Run]> = shared.order_file.as_deref().and_then(|path| order::load(path, pages)).unwrap_or_default();
    let mut state = shared.lock();
    state.data_pages = data;
    state.order = Arc::clone(&order);
    let mut ordered = order.iter().copied();
    let mut within = ordered.next();
    loop {
        let buffer;
        (state, buffer) = wait_for_turn(shared, state);
        let Some(mut buffer) = buffer else { return };
        match state.core.next_prefetch(within.unwrap_or(all), &content) {
            NextFill::Fill(claim) => {
                drop(state);
                let len = bytes_of(claim.run().pages);
                if buffer.len() < len {
                    buffer.resize(bytes_of(CHUNK_PAGES.max(shared.host_page / PAGE_SIZE)).max(len), 0);
                }
                let into = buffer.get_mut(..len).unwrap_or_default();
                let bad = read(shared.source.as_ref(), &claim, into, || let_pass(shared));
                state = shared.lock();
                let at = claim.run().first;
                state.offers.push_back(Offer { claim, buffer, bad, at });
                shared.filler.interrupt();
            }
            NextFill::Idle if within.is_some() => {
                state.free.push(buffer);
                within = ordered.next();
            }
            NextFill::Done => {
                drop(state);
                shared.filler.interrupt();
                return;
            }
            NextFill::Ended => return,
            // What is left is in others' hands: it comes in, or comes back.
            NextFill::Idle | NextFill::Full | NextFill::Zero(_) | NextFill::Lost(_) => {
                state.free.push(buffer);
                if state.core.is_complete() {
                    shared.filler.interrupt();
                    return;
                }
                state = shared.wait(state);
            }
        }
    }
}

/// Until there is a buffer and no fault; `None`: it is over.
fn wait_for_turn<'a>(shared: &Shared, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, Option<Vec<u8>>) {
    loop {
        if state.is_over() {
            return (state, None);
        }
        if state.prefetch && !state.serving {
            if let Some(buffer) = state.free.pop() {
                return (state, Some(buffer));
            }
            if state.to_make > 0 {
                state.to_make -= 1;
                return (state, Some(Vec::new()));
            }
        }
        state = shared.wait(state);
    }
}

/// Waits while a fault is being served, and makes way for the vCPU.
fn let_pass(shared: &Shared) {
    make_way();
    let mut state = shared.lock();
    while state.serving && !state.is_over() {
        state = shared.wait(state);
    }
}

fn count_data(content: &Extents<'_>, pages: u64) -> u64 {
    let (mut at, mut data) = (PageId(0), 0);
    while at.0 < pages {
        let Some((run, zero)) = content.extent(at) else { break };
        data += if zero { 0 } else { run.pages.min(pages - at.0) };
        at = run.end();
    }
    data
}
