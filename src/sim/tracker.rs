//! The simulated userfaultfd.

use std::time::Duration;

use ramshot_core::{Done, Event, HostRange, OsError, PAGE_SIZE, WriteTracker};

use super::trouble::{Call, Mishap, happen};
use super::{Context, PAGE, Queued, SimVm, State, Until, span};
use crate::sync::{Arc, MutexGuard, wait, wait_for};

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;

/// The write tracker of one snapshot of a [`SimVm`]; [`SimVm::track`] makes it. Dropping it disarms.
#[derive(Debug)]
pub struct SimTracker {
    vm: Arc<SimVm>,
    id: usize,
}

impl SimTracker {
    pub(super) fn new(vm: Arc<SimVm>, id: usize) -> Self {
        Self { vm, id }
    }

    /// Counts a call and lets happen to it what is planned.
    fn call(&self, call: Call) -> Result<MutexGuard<'_, State>, OsError> {
        let mut state = self.vm.lock();
        let mishap = state.plan.next(call);
        if mishap.is_some() {
            drop(state);
            happen(mishap, call)?;
            state = self.vm.lock();
        }
        Ok(state)
    }

    /// The kernel takes whole host pages only.
    fn check(&self, op: &'static str, range: HostRange) -> Result<(), OsError> {
        let blocks = self.vm.table.blocks().iter().filter(|block| block.mapping().overlaps(range));
        let unit = blocks.map(|block| block.page_size).max().unwrap_or(PAGE_SIZE);
        if range.start.is_aligned(unit) && range.len.is_multiple_of(unit) && range.len > 0 {
            Ok(())
        } else {
            Err(OsError::new(op, EINVAL).on(range))
        }
    }

    fn disarm_now(&self) {
        let mut state = self.vm.lock();
        if state.registered == Some(self.id) {
            state.registered = None;
            state.pages.iter_mut().for_each(|page| page.protected = false);
        }
        if let Some(context) = state.contexts.get_mut(self.id) {
            *context = Context::default();
        }
        state.blocked.retain(|blocked| blocked.context != self.id);
        drop(state);
        self.vm.guest.notify_all();
        self.vm.reader.notify_all();
    }
}

impl State {
    /// The events that fit into `events`; who waits for his event to be read goes on.
    fn read_events(&mut self, id: usize, events: &mut [Event]) -> usize {
        let Self { contexts, blocked, plan, counts, .. } = self;
        let Some(context) = contexts.get_mut(id) else { return 0 };
        let trouble = &plan.trouble;
        let most = if trouble.one_by_one { events.len().min(1) } else { events.len() };
        let (mut count, mut again) = (0, Vec::new());
        for place in events.iter_mut().take(most) {
            let queue = &mut context.queue;
            let next = if trouble.newest_first { queue.pop_back() } else { queue.pop_front() };
            let Some(Queued { event, ticket }) = next else { break };
            blocked.retain(|b| !(Some(b.ticket) == ticket && b.until == Until::Read));
            if trouble.twice && ticket.is_some() && matches!(event, Event::WriteFault { .. }) {
                again.push(Queued { event, ticket: None });
            }
            *place = event;
            count += 1;
        }
        context.queue.extend(again);
        counts.events += count as u64;
        count
    }
}

impl WriteTracker for SimTracker {
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let state = self.call(Call::Populated)?;
        let table = &self.vm.table;
        let Some(ram_block) = table.block_at(within.start).and_then(|block| table.block(block)) else {
            return Err(OsError::new("populated", EINVAL).on(within));
        };
        let Some((from, to)) = table.runs_in(within).next().map(span) else {
            return Err(OsError::new("populated", EINVAL).on(within));
        };
        let unit = usize::try_from(ram_block.page_size).unwrap_or(PAGE) / PAGE;
        let touched: Vec<bool> = state
            .pages
            .get(from..to)
            .unwrap_or_default()
            .chunks(unit)
            .map(|host_page| host_page.iter().any(|page| page.touched && page.mapped))
            .collect();
        drop(state);
        let mut start = within.start;
        for host_pages in touched.chunk_by(|a, b| a == b) {
            let range = HostRange::new(start, host_pages.len() as u64 * ram_block.page_size);
            if host_pages.first() == Some(&true) {
                each(range);
            }
            start = range.end();
        }
        Ok(())
    }

    fn protect(&self, range: HostRange) -> Result<(), OsError> {
        self.check("protect", range)?;
        drop(self.call(Call::Protect)?);
        let gone = OsError::new("protect", ENOENT).on(range);
        for run in self.vm.table.runs_in(range) {
            let (from, to) = span(run);
            // Page by page, so that a write or a release can come in between.
            for index in from..to {
                let mut state = self.vm.lock();
                let registered = state.registered == Some(self.id);
                let page = state.pages.get_mut(index).filter(|page| page.mapped && registered).ok_or(gone)?;
                page.protected = true;
            }
        }
        Ok(())
    }

    fn release(&self, range: HostRange) -> Result<Done, OsError> {
        self.check("release", range)?;
        let mut state = self.vm.lock();
        state.counts.releases += 1;
        let mishap = state.plan.next(Call::Release);
        drop(state);
        if mishap == Some(Mishap::Again) {
            return Ok(Done::Again);
        }
        happen(mishap, Call::Release)?;
        let mut state = self.vm.lock();
        if state.blocked.iter().any(|b| b.context == self.id && b.until == Until::Read) {
            return Ok(Done::Again);
        }
        let mut lifted = false;
        for run in self.vm.table.runs_in(range) {
            let (from, to) = span(run);
            for page in state.pages.get_mut(from..to).unwrap_or_default() {
                if !page.mapped {
                    return Err(OsError::new("release", ENOENT).on(range));
                }
                lifted |= std::mem::take(&mut page.protected);
            }
        }
        if lifted && state.registered != Some(self.id) {
            state.counts.intrusions += 1;
        }
        // Whoever waits there goes on; his event, if nobody has read it, is gone.
        let State { blocked, contexts, .. } = &mut *state;
        blocked.retain(|b| {
            let wakes = matches!(b.until, Until::Released(at) if range.contains(at));
            if wakes && let Some(context) = contexts.get_mut(b.context) {
                context.queue.retain(|queued| queued.ticket != Some(b.ticket));
            }
            !wakes
        });
        drop(state);
        self.vm.guest.notify_all();
        Ok(Done::Yes)
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        let mut state = self.vm.lock();
        state.counts.reads += 1;
        let mishap = state.plan.next(Call::NextEvents);
        if mishap.is_some() {
            drop(state);
            happen(mishap, Call::NextEvents)?;
            if mishap == Some(Mishap::Early) {
                return Ok(0);
            }
            state = self.vm.lock();
        }
        let mut waited = false;
        loop {
            let Some(context) = state.contexts.get_mut(self.id) else { return Ok(0) };
            let interrupted = std::mem::take(&mut context.interrupted);
            if interrupted || waited || !context.queue.is_empty() || timeout_ms == Some(0) {
                break;
            }
            state = match timeout_ms {
                None => wait(&self.vm.reader, state),
                Some(ms) => {
                    waited = true;
                    let time = Duration::from_millis(u64::from(ms));
                    wait_for(&self.vm.reader, &self.vm.state, state, time)
                }
            };
        }
        let count = state.read_events(self.id, events);
        drop(state);
        if count > 0 {
            // Discards whose event was among them.
            self.vm.guest.notify_all();
        }
        Ok(count)
    }

    fn interrupt(&self) {
        if let Some(context) = self.vm.lock().contexts.get_mut(self.id) {
            context.interrupted = true;
        }
        self.vm.reader.notify_all();
    }

    fn disarm(&self) -> Result<(), OsError> {
        let mut state = self.vm.lock();
        state.counts.disarms += 1;
        let mishap = state.plan.next(Call::Disarm);
        drop(state);
        if mishap != Some(Mishap::Panic) {
            self.disarm_now();
        }
        happen(mishap, Call::Disarm)
    }
}

impl Drop for SimTracker {
    fn drop(&mut self) {
        self.disarm_now();
    }
}
