//! What must hold in every state, and in every state in which nothing is left to happen.

use std::{format, string::String};

use super::step::Step;
use super::world::{DiscardStage, Judge, ODD, Setup, Stage, World, mask, pages_where};
use crate::*;

impl<const F: usize, const C: usize> World<F, C> {
    /// The invariants of the design.
    pub(super) fn check(&self, setup: &Setup) -> Result<(), String> {
        if self.committed {
            self.check_image(setup)?;
        }
        if setup.judge == Judge::Outcome {
            return Ok(());
        }
        self.check_places(setup)?;
        self.check_slots()?;
        self.check_waiters(setup)?;
        if self.core.can_serve_a_fault() && !matches!(self.core.clone().next_claim(Worker::Faults), Next::Claim(_)) {
            return Err("invariant 3: a fault waits for the writer, although there is a slot for it".into());
        }
        Ok(())
    }

    /// Nobody who holds a claim waits for anybody.
    pub(super) fn check_steps(&self, setup: &Setup, steps: &[Step]) -> Result<(), String> {
        for (thread, stage) in (0u8..).zip(&self.threads) {
            let judged = setup.judge == Judge::Invariants;
            if judged && stage.in_hand().is_some() && !steps.iter().any(|step| step.thread() == Some(thread)) {
                return Err(format!(
                    "invariant 3: {} waits with a claim in hand",
                    super::trace::NAMES[usize::from(thread)]
                ));
            }
        }
        Ok(())
    }

    /// A page is in one place, was read before it was released, and is as it was at T0 wherever it was read to.
    fn check_places(&self, setup: &Setup) -> Result<(), String> {
        let table = self.core.table();
        let alive = self.core.cause().is_none();
        let pending = pages_where(table, |page, _| self.core.is_pending(page));
        let mut seen = pending;
        let mut read = 0;
        let mut in_flight = 0;
        for (run, slots, copied) in self.runs() {
            let pages = mask(run);
            if seen & pages != 0 {
                return Err(format!("invariant 1: {run} is in two places"));
            }
            seen |= pages;
            for (page, cell) in (run.first.0..).zip(self.cells(setup, run, slots)).take(copied) {
                if alive && cell.is_none_or(|(of, as_at_t0)| u64::from(of) != page || !as_at_t0) {
                    return Err(format!("invariant 1: page {page} was captured, but not as it was at T0 ({cell:?})"));
                }
                read |= 1 << page;
            }
        }
        for (run, _) in self.claimed() {
            in_flight |= mask(run);
        }
        for (page, saved) in (0u64..).zip(&self.image) {
            let Some(as_at_t0) = saved else { continue };
            if alive && !as_at_t0 {
                return Err(format!("invariant 1: page {page} is in the image, but not as it was at T0"));
            }
            if seen >> page & 1 == 1 {
                return Err(format!("invariant 1: page {page} is in the image and somewhere else"));
            }
            seen |= 1 << page;
            read |= 1 << page;
        }
        let claims: u64 = self.core.claimed_runs().map(mask).sum();
        let members = pages_where(table, |page, _| setup.members >> page.0 & 1 == 1);
        let tracked = pages_where(table, |_, block| block.treatment == Treatment::Tracked);
        // The torn page first: it is what all this is about.
        if alive && members & tracked & !self.protected & !read != 0 {
            let page = (members & tracked & !self.protected & !read).trailing_zeros();
            return Err(format!("invariant 2: page {page} was released before it was captured"));
        }
        if alive && members & !seen != 0 {
            return Err(format!("invariant 1: page {} is nowhere", (members & !seen).trailing_zeros()));
        }
        if claims != in_flight && (alive || claims & !in_flight != 0) {
            return Err("a claim leaked".into());
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), String> {
        let mut taken = 0u64;
        for slot in self.runs().flat_map(|(_, slots, _)| slots) {
            if taken >> slot.0 & 1 == 1 {
                return Err(format!("invariant 5: slot {} belongs to two runs", slot.0));
            }
            taken |= 1 << slot.0;
        }
        if u64::from(taken.count_ones()) != self.core.slots_in_use() {
            return Err("a slot leaked, or was freed too early".into());
        }
        Ok(())
    }

    /// For every blocked vCPU there is something that will wake it.
    fn check_waiters(&self, setup: &Setup) -> Result<(), String> {
        for i in (0..self.vcpus.len()).filter(|&i| self.vcpus[i].blocked) {
            let page = self.target(setup, i).unwrap();
            let id = PageId(page);
            let held = self.claimed().any(|(run, _)| run.contains(id))
                && !self.threads.iter().any(|t| matches!(t, Stage::Lifted(run) if run.run().contains(id)));
            let will_wake = !self.disarmed && self.core.cause().is_some()
                || self.unread.iter().any(|&message| message < ODD && u64::from(message) == page)
                || self.stale >> page & 1 == 1
                || self.core.is_queued(id) && self.core.is_pending(id)
                || held;
            if self.disarmed || !will_wake {
                return Err(format!("invariant 4: vCPU {i} is blocked on page {page}, and nobody will wake it"));
            }
        }
        Ok(())
    }

    fn check_image(&self, setup: &Setup) -> Result<(), String> {
        let members = pages_where(self.core.table(), |page, _| setup.members >> page.0 & 1 == 1);
        for (page, saved) in (0..self.core.table().pages()).zip(self.image) {
            let what = match (members >> page & 1 == 1, saved) {
                (true, Some(true)) | (false, None) => continue,
                (true, Some(false)) => "is not as it was at T0",
                (true, None) => "is missing",
                (false, Some(_)) => "does not belong there",
            };
            return Err(format!("the image is complete, but page {page} {what}"));
        }
        Ok(())
    }

    /// Nothing is left to happen: is everything as it should be at the end?
    pub(super) fn check_final(&self, setup: &Setup) -> Result<(), String> {
        for (i, vcpu) in self.vcpus.iter().enumerate() {
            if let Some(page) = self.target(setup, i) {
                let state = if vcpu.blocked { "blocked" } else { "stopped" };
                return Err(format!("deadlock: vCPU {i} is {state} for ever before its write to page {page}"));
            }
        }
        if self.committed == self.core.cause().is_some() {
            return Err(format!(
                "deadlock: neither an image nor a cause ({} pages pending, {} slots in use)",
                self.core.pending(),
                self.core.slots_in_use()
            ));
        }
        let idle = self.threads.iter().all(|stage| matches!(stage, Stage::Idle));
        let clear = self.jobs.is_empty() && self.retries.is_empty() && self.core.claimed_runs().next().is_none();
        if !idle || !clear || self.core.slots_in_use() != 0 {
            return Err("deadlock: a claim or a slot is left over at the end".into());
        }
        if !self.disarmed || self.protected != 0 {
            return Err("memory is still protected at the end".into());
        }
        if self.discard != DiscardStage::Done || (self.core.cause().is_none() && self.requested < setup.requests.len())
        {
            return Err("deadlock: a discard or a request is never answered".into());
        }
        Ok(())
    }

    /// Every run that has slots: pages, slots, and how many pages must be in them.
    fn runs(&self) -> impl Iterator<Item = (Run, &[SlotId], usize)> {
        let all = usize::MAX;
        let in_hand = self.threads.iter().filter_map(move |stage| {
            let copied = match stage {
                Stage::Claimed(_, copied) => usize::try_from(*copied).unwrap(),
                _ => all,
            };
            stage.in_hand().map(|(run, slots)| (run, slots, copied))
        });
        let retries = self.retries.iter().map(move |run| (run.run(), run.slots(), all));
        in_hand.chain(retries).chain(self.jobs.iter().map(move |job| (job.run(), job.slots(), all)))
    }

    /// Every run that core must count as claimed.
    fn claimed(&self) -> impl Iterator<Item = (Run, &[SlotId])> {
        let in_hand = self.threads.iter().filter_map(Stage::in_hand);
        in_hand.chain(self.retries.iter().map(|run| (run.run(), run.slots())))
    }
}
