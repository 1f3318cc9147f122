//! A live snapshot of a VM whose pages are still coming in.
//!
//! The snapshot's engine runs as ever, over two seams that know of the restore: pages that are missing and have data count as
//! there, and who wants to read one asks the server for it, rather than meet it as a fault. They share one userfaultfd: see
//! [`Filler::track`].

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ramshot_core::{
    Done, Event, FillFault, HostAddr, HostRange, OsError, PAGE_SIZE, PageId, RamSource, Residency, Run, WriteTracker,
};

use super::LazyRestore;
use super::read::Extents;
use super::shared::{Phase, Shared};
use crate::engine::{Parts, Prepared, prepare_with};
use crate::options::Options;
use crate::os::{GuestRam, TrackerOptions};
use crate::prepare::{PrepareError, Target};

/// What a page that the restore has lost answers.
const LOST: OsError = OsError::new("reading a page that the lazy restore has lost", 5);

impl LazyRestore {
    /// Prepares a snapshot of the VM while its pages come in, as [`prepare`](crate::prepare) does of any other; when everything is in,
    /// it is the same. Begin it with [`Pending::All`](crate::Pending::All): the image is whole, and pages that are not in
    /// at T0 are in it as they are in the image that is restored.
    ///
    /// What comes in while the snapshot runs comes in write-protected; the end of the restore waits for the end of the
    /// snapshot. A page that the restore has lost ends the snapshot without an image.
    ///
    /// # Errors
    /// As [`prepare`](crate::prepare); another snapshot of it is running; or the restore was begun with
    /// [`lazy_with`](super::lazy_with): see [`seams`](Self::seams).
    pub fn prepare(
        &self,
        ram: &Arc<GuestRam>,
        path: impl AsRef<Path>,
        options: &Options,
    ) -> Result<Prepared, PrepareError> {
        self.prepare_at(ram, path.as_ref(), options, Target::Full)
    }

    /// Prepares an increment, as [`prepare_increment`](crate::prepare_increment) does: on the snapshot that is restored, if
    /// [`Options::dirty`] has followed writes since before the VM ran. What is not in is in the parent.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare) and [`prepare_increment`](crate::prepare_increment).
    pub fn prepare_increment(
        &self,
        ram: &Arc<GuestRam>,
        path: impl AsRef<Path>,
        options: &Options,
    ) -> Result<Prepared, PrepareError> {
        self.prepare_at(ram, path.as_ref(), options, Target::Increment)
    }

    fn prepare_at(
        &self,
        ram: &Arc<GuestRam>,
        path: &Path,
        options: &Options,
        target: Target,
    ) -> Result<Prepared, PrepareError> {
        let sink = target.create(ram, path, options)?;
        let settings = TrackerOptions::default();
        let tracker = match self.filler.as_ref().filter(|filler| !filler.is_over()) {
            Some(filler) => filler.track(&settings)?,
            None => crate::os::Tracker::open(Arc::clone(ram), &settings)?,
        };
        let (tracker, ram_source) = self.seams(Arc::new(tracker), Arc::clone(ram) as Arc<dyn RamSource>);
        let parts = Parts { tracker, ram: ram_source, table: Arc::clone(ram.table()), sink: Box::new(sink) };
        Ok(prepare_with(parts, options)?)
    }

    /// For [`prepare_with`]: a tracker and a source of guest RAM that know which pages are still to come in,
    /// around yours. The tracker must share the context of the restore ([`Filler::track`](crate::Filler::track)).
    #[must_use]
    pub fn seams(
        &self,
        tracker: Arc<dyn WriteTracker>,
        ram: Arc<dyn RamSource>,
    ) -> (Arc<dyn WriteTracker>, Arc<dyn RamSource>) {
        let tracked = LazyTracker { shared: Arc::clone(&self.shared), inner: tracker };
        let read = LazyRam { shared: Arc::clone(&self.shared), inner: ram };
        (Arc::new(tracked), Arc::new(read))
    }
}

/// A tracker to which pages are there that are still to come in.
struct LazyTracker {
    shared: Arc<Shared>,
    inner: Arc<dyn WriteTracker>,
}

impl LazyTracker {
    /// What is missing of `within` and has data, ascending.
    fn missing(&self, within: HostRange) -> Vec<HostRange> {
        let content = Extents(self.shared.source.as_ref());
        let mut missing = Vec::new();
        for run in self.shared.runs_in(within) {
            let mut at = run.first;
            // A piece under one lock: faults wait for it.
            loop {
                let state = self.shared.lock();
                let found = state.core.next_missing(at, &content).filter(|found| found.first < run.end());
                let Some(found) = found else { break };
                let end = found.end().min(run.end());
                missing.push(state.core.range_of(Run::new(found.first, end.0 - found.first.0)));
                at = end;
                if at >= run.end() {
                    break;
                }
            }
        }
        missing.sort_by_key(|range| range.start);
        missing
    }
}

impl WriteTracker for LazyTracker {
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        // In this order: what comes in between the two looks is seen by both.
        let mut ranges = self.missing(within);
        if ranges.is_empty() {
            return self.inner.populated(within, each);
        }
        self.inner.populated(within, &mut |range| ranges.push(range))?;
        ranges.sort_by_key(|range| range.start);
        let mut joined: Option<HostRange> = None;
        for range in ranges {
            match &mut joined {
                Some(last) if range.start <= last.end() => {
                    let end = last.end().max(range.end());
                    *last = HostRange::new(last.start, end.0 - last.start.0);
                }
                _ => joined.replace(range).into_iter().for_each(&mut *each),
            }
        }
        joined.into_iter().for_each(each);
        Ok(())
    }

    fn residency(&self, within: HostRange) -> Residency {
        self.inner.residency(within)
    }

    fn protect(&self, range: HostRange) -> Result<(), OsError> {
        self.inner.protect(range)
    }

    fn release(&self, range: HostRange) -> Result<Done, OsError> {
        self.inner.release(range)
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        self.inner.next_events(events, timeout_ms)
    }

    fn losses(&self, each: &mut dyn FnMut(Event)) {
        self.inner.losses(each);
    }

    fn interrupt(&self) {
        self.inner.interrupt();
    }

    fn disarm(&self) -> Result<(), OsError> {
        self.inner.disarm()
    }
}

/// Guest RAM that asks for what is not in.
struct LazyRam {
    shared: Arc<Shared>,
    inner: Arc<dyn RamSource>,
}

impl RamSource for LazyRam {
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        let range = HostRange::new(from, into.len() as u64);
        self.shared.bring_in(range).map_err(|error| error.on(range))?;
        self.inner.read(from, into)
    }
}

impl Shared {
    /// The image's pages in `range`.
    fn runs_in(&self, range: HostRange) -> Vec<Run> {
        self.lock().core.table().runs_in(range).collect()
    }

    /// Waits until all pages of `range` that have data are in. A page that was lost is an error: to touch it would be the end of
    /// this process.
    fn bring_in(&self, range: HostRange) -> Result<(), OsError> {
        {
            let state = self.lock();
            if state.core.is_complete() && state.core.lost_pages() == 0 {
                return Ok(());
            }
        }
        let content = Extents(self.source.as_ref());
        let whole = HostRange::new(HostAddr(range.start.0 & !(PAGE_SIZE - 1)), range.len.next_multiple_of(PAGE_SIZE));
        let runs = self.runs_in(whole);
        let mut state = self.lock();
        for run in runs {
            let mut asked: Option<PageId> = None;
            loop {
                if state.core.next_lost(run).is_some() {
                    return Err(LOST);
                }
                let Some(missing) = state.core.next_missing(run.first, &content).filter(|m| m.first < run.end()) else {
                    break;
                };
                if state.cancelled || state.abandoned || state.phase != Phase::Filling {
                    return Err(LOST);
                }
                if asked != Some(missing.first) {
                    let at = state.core.range_of(Run::new(missing.first, 1)).start;
                    // A queue that is full is asked again after the next change.
                    if !matches!(state.core.handle_fault(at), FillFault::QueueFull) {
                        asked = Some(missing.first);
                        state.for_snapshot.push(missing.first);
                    }
                    self.filler.interrupt();
                }
                state = self.wait(state);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for LazyTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyTracker").finish_non_exhaustive()
    }
}
