//! What the threads of a lazy restore share: core's state, what was read and waits to be put in, how it ended.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot_core::{BlockTable, Fill, FillClaim, GuestAddr, HostAddr, OsError, PAGE_SIZE, PageId, RamFiller, Run};

use super::lost::{LostPages, LostWhy, WhenLost};
use super::read::Bad;
use super::{LazyFailed, LazyOptions, LazyProgress, LazyReport, OnLost};
use crate::file::PageSource;
use crate::report::Latencies;
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait};

/// Faults that can wait in core's queue: more than vCPUs and device threads fault at once.
const FAULTS: usize = 256;
/// One for the server, one for each buffer of the prefetcher, and some.
const CLAIMS: usize = 16;

pub(super) type Core = Fill<Arc<BlockTable>, Vec<u64>, FAULTS, CLAIMS>;

/// What the prefetcher has read.
pub(super) struct Offer {
    pub(super) claim: FillClaim,
    pub(super) buffer: Vec<u8>,
    pub(super) bad: Vec<Bad>,
    /// Up to where it has been put in.
    pub(super) at: PageId,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Pages come in.
    Filling,
    /// Everything is in that can be had, and the handler has ended.
    Over,
    /// Everything is in that can be had, and the handler stays because of lost pages that are not poisoned.
    Staying,
}

pub(super) struct State {
    pub(super) core: Core,
    pub(super) offers: VecDeque<Offer>,
    /// Buffers of the prefetcher that are free, and how many more it may make.
    pub(super) free: Vec<Vec<u8>>,
    pub(super) to_make: usize,
    /// The server reads for a fault: the prefetcher makes way.
    pub(super) serving: bool,
    pub(super) prefetch: bool,
    /// Given up: read nothing more.
    pub(super) cancelled: bool,
    /// Never began: leave.
    pub(super) abandoned: bool,
    pub(super) phase: Phase,
    /// What a snapshot has asked for: nobody's working set.
    pub(super) for_snapshot: Vec<PageId>,
    /// What was read for faults, in order.
    pub(super) touched: Vec<Run>,
    /// The order of the last time.
    pub(super) order: Arc<[Run]>,
    pub(super) data_pages: u64,
    pub(super) all_in: Option<Duration>,
    pub(super) service: Latencies,
    pub(super) first_lost: Option<LostPages>,
    pub(super) failure: Option<LazyFailed>,
}

impl State {
    pub(super) fn progress(&self) -> LazyProgress {
        let counts = self.core.counts();
        LazyProgress {
            data_pages: self.data_pages,
            faults: counts.faults,
            by_fault: counts.by_fault,
            prefetched: counts.prefetched,
            lost: counts.lost,
            complete: self.phase != Phase::Filling && self.failure.is_none() && !self.cancelled,
        }
    }

    /// Whether nothing more is to be read.
    pub(super) fn is_over(&self) -> bool {
        self.cancelled || self.abandoned || self.phase != Phase::Filling
    }
}

pub(super) struct Shared {
    pub(super) filler: Arc<dyn RamFiller>,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) order_file: Option<PathBuf>,
    pub(super) when_lost: WhenLost,
    on_lost: Option<Arc<OnLost>>,
    pub(super) begun: Instant,
    /// Bytes of the largest host page.
    pub(super) host_page: u64,
    pub(super) around_max: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(
        filler: Arc<dyn RamFiller>,
        source: Arc<dyn PageSource>,
        core: Core,
        options: &LazyOptions,
        begun: Instant,
        host_page: u64,
    ) -> Self {
        let state = State {
            core,
            offers: VecDeque::new(),
            free: Vec::new(),
            // Two: one is read into while the other is put in. (A buffer holds a host page, which can be 1 GiB.)
            to_make: if host_page > 32 << 20 { 1 } else { 4 },
            serving: false,
            prefetch: options.prefetch,
            cancelled: false,
            abandoned: false,
            phase: Phase::Filling,
            for_snapshot: Vec::new(),
            touched: Vec::new(),
            order: Arc::new([]),
            data_pages: 0,
            all_in: None,
            service: Latencies::default(),
            first_lost: None,
            failure: None,
        };
        let when_lost = if filler.can_poison() { options.when_lost } else { WhenLost::Block };
        Self {
            filler,
            source,
            order_file: options.order.clone(),
            when_lost,
            on_lost: options.on_lost.clone(),
            begun,
            host_page,
            around_max: options.around_max,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits for the next change.
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        wait(&self.changed, state)
    }

    /// Something that somebody may wait for has changed.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    pub(super) fn start_prefetching(&self) {
        self.lock().prefetch = true;
        self.notify();
    }

    pub(super) fn cancel(&self) {
        self.lock().cancelled = true;
        self.notify();
        self.filler.interrupt();
    }

    pub(super) fn abandon(&self) {
        self.lock().abandoned = true;
        self.notify();
        self.filler.interrupt();
    }

    /// The server has no more to do, or only to stay.
    pub(super) fn over(&self, phase: Phase, failure: Option<LazyFailed>) {
        let mut state = self.lock();
        state.phase = phase;
        state.all_in.get_or_insert(self.begun.elapsed());
        if let Some(failure) = failure {
            log::error!(target: "ramshot::restore", "{failure}");
            state.failure.get_or_insert(failure);
        }
        drop(state);
        self.notify();
    }

    pub(super) fn wait_until_over(&self) -> Result<LazyReport, LazyFailed> {
        let mut state = self.lock();
        while state.phase == Phase::Filling {
            state = self.wait(state);
        }
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        let report = LazyReport {
            progress: state.progress(),
            all_in: state.all_in.unwrap_or_default(),
            fault_service: state.service.clone(),
        };
        match state.first_lost.clone() {
            Some(first) if report.progress.lost > 0 => {
                Err(LazyFailed::Lost { first: Box::new(first), report: Box::new(report) })
            }
            _ => Ok(report),
        }
    }

    /// Tells the embedder.
    pub(super) fn tell_lost(&self, run: Run, why: LostWhy) {
        let mut state = self.lock();
        let host = state.core.range_of(run).start;
        let table = state.core.table();
        let Some((index, block)) = table.block_at(host).and_then(|index| Some((index, table.block(index)?))) else {
            return;
        };
        let offset = (run.first.0 - table.block_run(index).first.0) * PAGE_SIZE;
        let guest = GuestAddr(block.guest.0.saturating_add(offset));
        let lost = LostPages { block: block.name, guest, host: HostAddr(host.0), len: run.bytes(), why };
        log::error!(target: "ramshot::restore", "lost: {lost}");
        state.first_lost.get_or_insert_with(|| lost.clone());
        drop(state);
        if let Some(told) = &self.on_lost
            // Foreign code, on the thread that everybody waits for.
            && catch_unwind(AssertUnwindSafe(|| told(&lost))).is_err()
        {
            log::error!(target: "ramshot::restore", "on_lost panicked");
        }
    }

    /// That the server has died: an error nobody foresaw.
    pub(super) fn died(&self) {
        self.over(Phase::Staying, Some(LazyFailed::Events(OsError::new("the thread that serves faults", 0))));
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("progress", &self.lock().progress()).finish_non_exhaustive()
    }
}
