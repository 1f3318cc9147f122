//! One userfaultfd for missing pages and for writes: the kernel allows a mapping one context, so a snapshot of a VM that is
//! still being restored lazily shares that of the restore.
//!
//! The [`Filler`](crate::Filler) goes on being the only one that reads events and puts pages in. What concerns writes it hands
//! on to the [`Tracker`](crate::Tracker); discards concern both. While memory is being protected, what is put in comes in
//! protected.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use ramshot_core::{Event, HostRange, OsError};

use crate::event::{self, Message, Waiter};
use crate::maps::intersection;
use crate::owner::Owner;

/// Whom the context serves besides the filler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Nobody.
    Alone,
    /// A tracker.
    Shared,
    /// Nobody, and nobody will any more: the filler is through.
    Over,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// For the tracker, in the order of the kernel.
    inbox: VecDeque<Message>,
}

/// What a filler and a tracker of one context have in common.
#[derive(Debug)]
pub(crate) struct Relay {
    state: Mutex<State>,
    /// Where the filler waits.
    pub(crate) filler: Waiter,
    /// Where the tracker waits.
    tracker: Waiter,
    /// What is put in here is write-protected at once. Held for reading while something is put in, so that who changes it knows
    /// of every page whether it came before or after.
    protecting: RwLock<Vec<HostRange>>,
}

/// Held while a page is put in.
pub(crate) struct PuttingIn<'a>(RwLockReadGuard<'a, Vec<HostRange>>);

impl PuttingIn<'_> {
    /// Whether it has to be protected.
    pub(crate) fn protected(&self, range: HostRange) -> bool {
        self.0.iter().any(|tracked| intersection(*tracked, range).is_some())
    }
}

impl Relay {
    pub(crate) fn new(owner: &Owner) -> Result<Self, OsError> {
        Ok(Self {
            state: Mutex::new(State { phase: Phase::Alone, inbox: VecDeque::new() }),
            filler: Waiter::new(owner)?,
            tracker: Waiter::new(owner)?,
            protecting: RwLock::new(Vec::new()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the filler

    /// Hands on what concerns the tracker. Whether it concerns the filler.
    pub(crate) fn pass(&self, message: Message) -> bool {
        let (writes, fills) = match message {
            Message::Event(Event::WriteFault { .. }) => (true, false),
            Message::Event(Event::Discarded(_) | Event::Unmapped(_)) | Message::Moved { .. } => (true, true),
            Message::Event(Event::MissingFault { .. }) | Message::Forked { .. } | Message::Unknown(_) => (false, true),
        };
        if writes {
            let mut state = self.state();
            // Without a tracker it is what one has left behind: its disarm has woken the writer.
            if state.phase == Phase::Shared {
                state.inbox.push_back(message);
                drop(state);
                self.tracker.interrupt();
            }
        }
        fills
    }

    /// To be held while a page is put in.
    pub(crate) fn putting_in(&self) -> PuttingIn<'_> {
        PuttingIn(self.protecting.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The filler wants to end its registrations. False while a tracker needs them.
    pub(crate) fn end(&self) -> bool {
        let mut state = self.state();
        let free = state.phase != Phase::Shared;
        if free {
            state.phase = Phase::Over;
        }
        free
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state().phase == Phase::Over
    }

    // ---- the tracker

    /// Begins to share. False: the filler is through, or another tracker shares already.
    pub(crate) fn attach(&self) -> Result<(), Attach> {
        let mut state = self.state();
        match state.phase {
            Phase::Over => Err(Attach::Over),
            Phase::Shared => Err(Attach::Busy),
            Phase::Alone => {
                state.phase = Phase::Shared;
                Ok(())
            }
        }
    }

    /// Ends sharing.
    pub(crate) fn detach(&self) {
        self.protect_no_more();
        let mut state = self.state();
        state.inbox.clear();
        state.phase = Phase::Alone;
        drop(state);
        // It may have waited for that.
        self.filler.interrupt();
    }

    /// From its return on, what is put into `range` comes in protected.
    pub(crate) fn protect_what_comes(&self, range: HostRange) {
        let covered = |list: &[HostRange]| list.iter().any(|known| intersection(*known, range) == Some(range));
        if covered(&self.protecting.read().unwrap_or_else(PoisonError::into_inner)) {
            return;
        }
        self.protecting.write().unwrap_or_else(PoisonError::into_inner).push(range);
    }

    /// From its return on, nothing comes in protected.
    pub(crate) fn protect_no_more(&self) {
        self.protecting.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// As [`WriteTracker::next_events`](ramshot_core::WriteTracker::next_events).
    pub(crate) fn next_events(
        &self,
        events: &mut [Event],
        timeout_ms: Option<u32>,
        take: &mut dyn FnMut(Message) -> Option<Event>,
    ) -> Result<usize, OsError> {
        let deadline = event::deadline(timeout_ms);
        loop {
            let mut count = 0;
            while count < events.len() {
                let Some(message) = self.state().inbox.pop_front() else { break };
                if let (Some(event), Some(place)) = (take(message), events.get_mut(count)) {
                    *place = event;
                    count += 1;
                }
            }
            let there = events.is_empty() && !self.state().inbox.is_empty();
            if count > 0 || there || deadline.is_some_and(|end| Instant::now() >= end) {
                return Ok(count);
            }
            let interrupted = self.tracker.wait_alone(deadline)?;
            if interrupted && self.state().inbox.is_empty() {
                return Ok(0);
            }
        }
    }

    /// Takes discards and the like out of turn.
    pub(crate) fn losses(&self, take: &mut dyn FnMut(Message)) {
        let mut state = self.state();
        if state.inbox.is_empty() {
            return;
        }
        let (writes, lost) =
            state.inbox.drain(..).partition(|message| matches!(message, Message::Event(Event::WriteFault { .. })));
        state.inbox = writes;
        drop(state);
        let lost: VecDeque<Message> = lost;
        lost.into_iter().for_each(take);
    }

    /// Wakes the tracker's reader.
    pub(crate) fn interrupt_tracker(&self) {
        self.tracker.interrupt();
    }
}

/// Why a tracker cannot share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Attach {
    /// Everything is in: memory is ordinary memory.
    Over,
    /// Another one does.
    Busy,
}
