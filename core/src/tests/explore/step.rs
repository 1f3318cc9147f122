//! The steps of a world: which are possible, and what each does.

use std::{format, string::String, vec::Vec};

use super::world::{DISCARD, DiscardStage, FAULT_THREAD, ODD, Seen, Setup, Stage, VMM, World, mask};
use crate::tests::Defect;
use crate::*;

/// One step of one thread, of a vCPU, of the kernel, or of fate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// A vCPU writes its next page, or blocks on it.
    Write(u8),
    /// A blocked vCPU wakes for no reason.
    Spurious(u8),
    /// The fault thread reads an unread message and hands it in; or it comes twice.
    Read {
        index: u8,
        twice: bool,
    },
    /// It hands in the discard event that it read before.
    HandIn,
    /// It releases what stale faults asked for.
    LiftStale,
    /// It takes up a release that was put off.
    Retry(u8),
    /// A thread asks for something to do.
    Next(u8),
    /// It copies one page.
    Copy(u8),
    /// It has copied all of them.
    Captured(u8),
    /// The kernel lifts the protection of its run.
    Lift(u8),
    /// The kernel says EAGAIN.
    Again(u8),
    /// Core hears of the release.
    Released(u8),
    CopyFails(u8),
    LiftFails(u8),
    /// The writer writes a job, any job.
    Save(u8),
    SaveFails(u8),
    Request,
    /// Before a discard.
    Ask,
    /// The discard reaches the kernel.
    Post,
    /// The memory goes.
    Zap,
    Resume,
    Cancel,
    /// For a while nobody faulted.
    Lull,
    Commit,
    Disarm,
}

impl Step {
    /// Whether it happens sooner or later by itself; the others are fate, and nothing may depend on them.
    pub(super) fn is_certain(self, posted: bool) -> bool {
        match self {
            Self::Again(_) => posted,
            Self::Read { twice, .. } => !twice,
            Self::Spurious(_)
            | Self::CopyFails(_)
            | Self::LiftFails(_)
            | Self::SaveFails(_)
            | Self::Cancel
            | Self::Lull => false,
            _ => true,
        }
    }

    /// The thread whose own step it is.
    pub(super) fn thread(self) -> Option<u8> {
        match self {
            Self::Copy(t) | Self::Captured(t) | Self::Lift(t) | Self::Again(t) | Self::Released(t) => Some(t),
            _ => None,
        }
    }
}

const ERROR: OsError = OsError::new("injected", 5);

impl<const F: usize, const C: usize> World<F, C> {
    pub(super) fn is_posted(&self) -> bool {
        self.discard == DiscardStage::Posted
    }

    /// Puts every step that is possible now into `steps`.
    pub(super) fn steps(&self, setup: &Setup, steps: &mut Vec<Step>) {
        steps.clear();
        let ended = self.core.cause().is_some();
        let posted = self.is_posted();
        for (i, vcpu) in (0u8..).zip(&self.vcpus) {
            if vcpu.blocked {
                steps.extend((self.spurious > 0).then_some(Step::Spurious(i)));
            } else if !self.paused && self.target(setup, usize::from(i)).is_some() {
                steps.push(Step::Write(i));
            }
        }
        if matches!(self.threads[FAULT_THREAD], Stage::Idle) {
            self.fault_thread_steps(setup, steps);
        }
        for (i, stage) in (0u8..).zip(&self.threads) {
            match stage {
                Stage::Idle if self.asks(setup, i) => steps.push(Step::Next(i)),
                Stage::Claimed(claim, copied) => {
                    steps.push(if *copied < claim.run().pages { Step::Copy(i) } else { Step::Captured(i) });
                    steps.extend((setup.errors && *copied == 0).then_some(Step::CopyFails(i)));
                }
                Stage::Captured(_) if setup.defect == Some(Defect::ClaimHeldAcrossWrite) => {}
                Stage::Captured(run) => {
                    steps.extend((!posted || !run.is_protected()).then_some(Step::Lift(i)));
                    steps.extend((run.is_protected() && (posted || self.again > 0)).then_some(Step::Again(i)));
                    steps.extend(setup.errors.then_some(Step::LiftFails(i)));
                }
                Stage::Lifted(_) => steps.push(Step::Released(i)),
                Stage::Event => steps.push(Step::HandIn),
                Stage::Idle | Stage::Gone => {}
            }
        }
        for job in (0u8..).take(self.jobs.len()) {
            steps.push(Step::Save(job));
            steps.extend((setup.errors && !ended).then_some(Step::SaveFails(job)));
        }
        steps.extend((self.requested < setup.requests.len()).then_some(Step::Request));
        match self.discard {
            DiscardStage::Asking if matches!(self.threads[VMM], Stage::Idle) => steps.push(Step::Ask),
            DiscardStage::Allowed => steps.push(Step::Post),
            DiscardStage::Read => steps.push(Step::Zap),
            DiscardStage::Asking | DiscardStage::Posted | DiscardStage::Done => {}
        }
        steps.extend((self.paused && (ended || self.core.is_pause_captured())).then_some(Step::Resume));
        steps.extend((setup.errors && !ended && !self.committed).then_some(Step::Cancel));
        let window_moves = setup.limits.around_max > setup.limits.around_min;
        steps.extend((window_moves && !self.core.is_lull()).then_some(Step::Lull));
        steps.extend((self.core.is_written() && !self.committed).then_some(Step::Commit));
        let over = ended || self.core.is_captured();
        let disarms = setup.defect != Some(Defect::NoDisarm);
        steps.extend((over && !self.disarmed && disarms).then_some(Step::Disarm));
    }

    fn fault_thread_steps(&self, setup: &Setup, steps: &mut Vec<Step>) {
        let deaf = setup.defect == Some(Defect::NoEventsWhileFull)
            && matches!(self.core.clone().next_claim(Worker::Faults), Next::Full);
        if !deaf {
            for (index, &message) in (0u8..).zip(&self.unread) {
                steps.push(Step::Read { index, twice: false });
                steps.extend((self.spurious > 0 && message < ODD).then_some(Step::Read { index, twice: true }));
            }
        }
        if !self.is_posted() {
            steps.extend((self.stale != 0).then_some(Step::LiftStale));
            steps.extend((0u8..).take(self.retries.len()).map(Step::Retry));
        }
    }

    /// Whether thread `i` asks for claims.
    fn asks(&self, setup: &Setup, i: u8) -> bool {
        match usize::from(i) {
            FAULT_THREAD => true,
            VMM => self.paused,
            i => i <= setup.workers,
        }
    }

    /// Takes `step`; `Err` says what the core did that it must not do.
    pub(super) fn take(&mut self, setup: &Setup, step: Step) -> Result<(), String> {
        let cause = self.core.cause();
        match step {
            Step::Write(i) => self.write(setup, i),
            Step::Spurious(i) => {
                self.spurious -= 1;
                self.vcpus[usize::from(i)].blocked = false;
            }
            Step::Read { index, twice } => self.read(setup, index, twice)?,
            Step::HandIn => {
                self.threads[FAULT_THREAD] = Stage::Idle;
                self.lose(setup)?;
            }
            Step::LiftStale => {
                let pages = core::mem::take(&mut self.stale);
                self.lift(setup, pages);
            }
            Step::Retry(i) => self.threads[FAULT_THREAD] = Stage::Captured(self.retries.remove(usize::from(i))),
            Step::Next(i) => self.next(setup, usize::from(i))?,
            Step::Save(i) | Step::SaveFails(i) => self.save(setup, usize::from(i), step == Step::Save(i))?,
            Step::Request => self.request(setup)?,
            Step::Ask => {
                let seen = match self.core.claim_for_discard(setup.discard.unwrap().run) {
                    Discard::Claim(claim) => {
                        self.threads[VMM] = Stage::Claimed(claim, 0);
                        Seen::ClaimedForDiscard
                    }
                    Discard::Wait => Seen::DiscardWait,
                    Discard::Clear => {
                        self.discard = DiscardStage::Allowed;
                        Seen::DiscardClear
                    }
                };
                self.see(seen);
            }
            Step::Post if self.disarmed => self.discard = DiscardStage::Read,
            Step::Post => {
                self.discard = DiscardStage::Posted;
                self.unread.push(DISCARD).unwrap();
            }
            Step::Zap => {
                let pages = mask(setup.discard.unwrap().run);
                self.discard = DiscardStage::Done;
                self.changed |= pages;
                self.protected &= !pages;
            }
            Step::Resume => self.paused = false,
            Step::Cancel => drop(self.core.cancel(Cause::Cancelled)),
            Step::Lull => self.core.handle_lull(),
            Step::Commit => self.committed = true,
            Step::Disarm => self.disarm(setup),
            _ => self.advance(setup, step),
        }
        match self.core.cause().filter(|_| cause.is_none()) {
            Some(Cause::Cancelled) => self.see(Seen::EndedByCancel),
            Some(Cause::Capture(_)) => self.see(Seen::EndedByCapture),
            Some(Cause::Release(_)) => self.see(Seen::EndedByRelease),
            Some(Cause::Sink) => self.see(Seen::EndedBySink),
            Some(Cause::PoolFull) => self.see(Seen::EndedByFullPool),
            Some(Cause::Discarded(_)) => self.see(Seen::EndedByDiscard),
            _ => {}
        }
        match cause {
            Some(first) if self.core.cause() != cause => {
                Err(format!("invariant 6: the first cause was {first:?}, now it is {:?}", self.core.cause()))
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, setup: &Setup, i: u8) {
        let page = self.target(setup, usize::from(i)).unwrap();
        let vcpu = &mut self.vcpus[usize::from(i)];
        if self.protected >> page & 1 == 1 {
            vcpu.blocked = true;
            self.unread.push(u8::try_from(page).unwrap()).unwrap();
            self.unread.sort_unstable();
        } else {
            vcpu.writes += 1;
            self.changed |= 1 << page;
        }
    }

    fn read(&mut self, setup: &Setup, index: u8, twice: bool) -> Result<(), String> {
        let message = self.unread[usize::from(index)];
        if twice {
            self.spurious -= 1;
        } else {
            self.unread.remove(usize::from(index));
        }
        if message == DISCARD {
            self.discard = DiscardStage::Read;
            if setup.defect == Some(Defect::EventReadOutsideLock) {
                self.threads[FAULT_THREAD] = Stage::Event;
                return Ok(());
            }
            return self.lose(setup);
        }
        let at = self.address(setup, message);
        let outcome = self.core.handle_fault(at);
        self.see(match outcome {
            FaultOutcome::Queued => Seen::FaultQueued,
            FaultOutcome::Waits => Seen::FaultWaits,
            FaultOutcome::Stale(_) => Seen::FaultStale,
            FaultOutcome::NotOurs => Seen::FaultNotOurs,
            FaultOutcome::QueueFull => Seen::FaultQueueFull,
        });
        match outcome {
            FaultOutcome::Queued | FaultOutcome::Waits if message < ODD => {}
            FaultOutcome::Queued | FaultOutcome::Waits => return Err(format!("{at} was taken for a page of ours")),
            FaultOutcome::Stale(range) if range.contains(at) => {
                let table = self.core.table();
                self.stale |= table.runs_in(range).map(mask).sum::<u64>();
            }
            FaultOutcome::Stale(range) => return Err(format!("stale fault at {at}, but {range} is to be released")),
            FaultOutcome::NotOurs if self.core.table().block_at(at).is_none() => {}
            FaultOutcome::NotOurs => return Err(format!("{at} belongs to a block, but was not recognised")),
            // The driver keeps it, and hands it in again.
            FaultOutcome::QueueFull if twice => {}
            FaultOutcome::QueueFull => {
                self.unread.push(message).unwrap();
                self.unread.sort_unstable();
            }
        }
        Ok(())
    }

    fn request(&mut self, setup: &Setup) -> Result<(), String> {
        let page = PageId(setup.requests[self.requested]);
        let free = !self.core.is_pending(page) && !self.core.claimed_runs().any(|run| run.contains(page));
        let outcome = self.core.handle_request(page);
        if (outcome == RequestOutcome::NotPending) != free {
            return Err(format!("{outcome:?} for a request for {page}, which is free: {free}"));
        }
        self.requested += usize::from(outcome != RequestOutcome::QueueFull);
        self.see(match outcome {
            RequestOutcome::Queued => Seen::RequestQueued,
            RequestOutcome::Claimed => Seen::RequestClaimed,
            RequestOutcome::NotPending => Seen::RequestNotPending,
            RequestOutcome::QueueFull => Seen::RequestQueueFull,
            RequestOutcome::NoSuchPage => return Err(format!("{page} is not found")),
        });
        Ok(())
    }

    /// Hands the discard in.
    fn lose(&mut self, setup: &Setup) -> Result<(), String> {
        let plan = setup.discard.unwrap();
        let range = self.core.table().host_range(plan.run).unwrap();
        let alive = self.core.cause().is_none();
        if self.core.handle_discarded(range) && alive && plan.announced {
            return Err("a discard that was announced and allowed lost pages".into());
        }
        Ok(())
    }

    fn next(&mut self, setup: &Setup, thread: usize) -> Result<(), String> {
        let who = match thread {
            FAULT_THREAD => Worker::Faults,
            VMM => Worker::Pause,
            _ => Worker::Scan,
        };
        let empty = self.core.slots_in_use() == 0;
        let next = self.core.next_claim(who);
        self.see(match &next {
            Next::Claim(claim) => Seen::origin(claim.origin()),
            Next::Idle => Seen::NextIdle,
            Next::Full => Seen::NextFull,
            Next::Done => Seen::NextDone,
            Next::Ended => Seen::NextEnded,
        });
        let Next::Claim(claim) = next else {
            let no_slot = matches!(next, Next::Full) && self.core.claimed_runs().count() < C;
            if no_slot && setup.limits.when_full == WhenFull::Cancel && self.core.has_a_fault() {
                return Err("invariant 5: a writer waits for a slot, although the policy is to cancel".into());
            }
            return Ok(());
        };
        let block = self.core.table().block_of(claim.run().first).and_then(|b| self.core.table().block(b)).unwrap();
        if (block.treatment == Treatment::InPause) != (who == Worker::Pause) {
            return Err(format!("{who:?} got {} of a {:?} block", claim.run(), block.treatment));
        }
        let reserve = setup.limits.reserve_slots.min(u64::from(setup.slots - setup.slots.div_ceil(4)));
        let free = u64::from(setup.slots) - self.core.slots_in_use();
        let one_host_page = empty && claim.run().pages == block.pages_per_host_page();
        if claim.origin() == Origin::Scan && free < reserve && !one_host_page {
            return Err("invariant 5: the scan took slots of the reserve".into());
        }
        if setup.defect == Some(Defect::ReleaseBeforeCapture) {
            self.lift(setup, mask(claim.run()));
        }
        self.threads[thread] = Stage::Claimed(claim, 0);
        Ok(())
    }

    /// A thread goes on with the run that it has in hand.
    fn advance(&mut self, setup: &Setup, step: Step) {
        let (Step::Copy(i)
        | Step::Captured(i)
        | Step::Lift(i)
        | Step::Again(i)
        | Step::Released(i)
        | Step::CopyFails(i)
        | Step::LiftFails(i)) = step
        else {
            return;
        };
        let thread = usize::from(i);
        let stage = core::mem::replace(&mut self.threads[thread], Stage::Idle);
        self.threads[thread] = match (step, stage) {
            (Step::Copy(_), Stage::Claimed(claim, copied)) => {
                let page = claim.run().first.0 + copied;
                let slot = claim.slots()[usize::try_from(copied / setup.limits.slot_pages).unwrap()];
                let cell = usize::try_from(copied % setup.limits.slot_pages).unwrap();
                self.slots[usize::from(slot.0)][cell] =
                    Some((u8::try_from(page).unwrap(), self.changed >> page & 1 == 0));
                Stage::Claimed(claim, copied + 1)
            }
            (Step::Captured(_), Stage::Claimed(claim, _)) => Stage::Captured(self.core.captured(claim)),
            (Step::CopyFails(_), Stage::Claimed(claim, _)) => {
                self.clear(setup, claim.slots());
                self.core.capture_failed(claim, ERROR);
                Stage::Idle
            }
            (Step::Lift(_), Stage::Captured(run)) => {
                if run.is_protected() {
                    self.lift(setup, mask(run.run()));
                }
                Stage::Lifted(run)
            }
            (Step::Again(_), Stage::Captured(_))
                if thread == FAULT_THREAD && setup.defect == Some(Defect::FaultLoopEndsAtAgain) =>
            {
                Stage::Gone
            }
            (Step::Again(_), Stage::Captured(run)) => {
                self.again -= u8::from(!self.is_posted());
                self.retries.push(run).unwrap();
                self.retries.sort_unstable_by_key(|run| run.run().first);
                Stage::Idle
            }
            (Step::LiftFails(_), Stage::Captured(run)) => {
                self.clear(setup, run.slots());
                self.core.release_failed(run, ERROR);
                Stage::Idle
            }
            (Step::Released(_), Stage::Lifted(run)) => {
                self.jobs.push(self.core.released(run)).unwrap();
                self.jobs.sort_unstable_by_key(|job| job.run().first);
                Stage::Idle
            }
            (_, stage) => stage,
        };
    }

    fn save(&mut self, setup: &Setup, index: usize, works: bool) -> Result<(), String> {
        let job = self.jobs.remove(index);
        if !works {
            self.core.cancel(Cause::Sink);
        }
        if self.core.cause().is_none() {
            for (page, cell) in (job.run().first.0..).zip(self.cells(setup, job.run(), job.slots())) {
                let in_image = &mut self.image[usize::try_from(page).unwrap()];
                if in_image.is_some() {
                    return Err(format!("invariant 1: page {page} was saved twice"));
                }
                *in_image = Some(cell.is_some_and(|(saved, as_at_t0)| u64::from(saved) == page && as_at_t0));
            }
        }
        self.clear(setup, job.slots());
        self.core.written(job);
        Ok(())
    }

    /// The kernel unprotects `pages` and wakes who waits there.
    fn lift(&mut self, setup: &Setup, pages: u64) {
        self.protected &= !pages;
        for i in 0..self.vcpus.len() {
            let waits_there = self.target(setup, i).is_some_and(|page| pages >> page & 1 == 1);
            self.vcpus[i].blocked &= !waits_there;
        }
    }

    fn disarm(&mut self, setup: &Setup) {
        self.lift(setup, u64::MAX);
        self.disarmed = true;
        self.unread.clear();
        self.stale = 0;
        if self.is_posted() {
            self.discard = DiscardStage::Read;
        }
    }

    /// What lies in `slots`, one cell for each page of `run`.
    pub(super) fn cells(&self, setup: &Setup, run: Run, slots: &[SlotId]) -> Vec<super::world::Cell> {
        let per_slot = usize::try_from(setup.limits.slot_pages).unwrap();
        let cells = slots.iter().flat_map(|slot| self.slots[usize::from(slot.0)].iter().take(per_slot));
        cells.copied().take(usize::try_from(run.pages).unwrap()).collect()
    }

    fn clear(&mut self, setup: &Setup, slots: &[SlotId]) {
        if setup.defect != Some(Defect::SlotFreedAtRelease) {
            slots.iter().for_each(|slot| self.slots[usize::from(slot.0)] = [None; 2]);
        }
    }
}
