//! The part of the VM: threads that write, can be paused, and notice how long each write took.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramshot::AnonymousRam;

use super::WORDS;
use crate::outcome::Failure;

/// What is going on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Phase {
    /// No snapshot.
    Before = 0,
    /// Memory is being protected, ahead of the pause.
    Arming = 1,
    /// From the pause to the image committed.
    During = 2,
    /// No snapshot any more.
    After = 3,
}

/// Codes beyond the phases.
const PAUSED: u8 = 4;
const STOPPED: u8 = 5;

/// What counts as a stall: far longer than a write that finds its page.
pub(super) const SLOW: Duration = Duration::from_micros(50);

/// What the writers counted, by phase.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub(super) phases: [Counted; 4],
}

/// In one phase.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    pub(super) writes: u64,
    /// How long it lasted.
    pub(super) time: Duration,
    /// Writes that took [`SLOW`] or longer.
    pub(super) slow: u64,
    /// The longest.
    pub(super) longest: Duration,
}

#[derive(Debug)]
struct Shared {
    /// A [`Phase`], [`PAUSED`] or [`STOPPED`]; changed under the lock, read without.
    state: AtomicU8,
    /// How many threads stand still.
    parked: Mutex<usize>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: u8) {
        let _held = self.lock();
        self.state.store(state, Ordering::Release);
        self.changed.notify_all();
    }

    /// What a thread does that has seen the pause.
    fn park(&self) {
        let mut parked = self.lock();
        *parked += 1;
        self.changed.notify_all();
        while self.state.load(Ordering::Acquire) == PAUSED {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
    }
}

/// Running writers. Dropping it stops them.
#[derive(Debug)]
pub(super) struct Guest {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Counts>>,
    /// When each phase began; `None`: a pause.
    entered: Mutex<Vec<(Option<Phase>, Instant)>>,
}

impl Guest {
    pub(super) fn start(memory: &Arc<AnonymousRam>, threads: u16, pages: u64) -> Result<Self, Failure> {
        let state = AtomicU8::new(Phase::Before as u8);
        let shared = Arc::new(Shared { state, parked: Mutex::new(0), changed: Condvar::new() });
        let entered = Mutex::new(vec![(Some(Phase::Before), Instant::now())]);
        let mut guest = Self { shared: Arc::clone(&shared), threads: Vec::new(), entered };
        for number in 1..=u64::from(threads) {
            let (memory, shared) = (Arc::clone(memory), Arc::clone(&shared));
            let thread = thread::Builder::new().spawn(move || write(&memory, &shared, number, pages));
            guest.threads.push(thread.map_err(|source| Failure::io("a writer cannot be started", source))?);
        }
        Ok(guest)
    }

    /// Returns when no thread writes any more.
    pub(super) fn pause(&self) {
        self.shared.set(PAUSED);
        self.note(None);
        let mut parked = self.shared.lock();
        while *parked < self.threads.len() {
            parked = self.shared.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn resume(&self, phase: Phase) {
        self.enter(phase);
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.shared.set(phase as u8);
        self.note(Some(phase));
    }

    fn note(&self, phase: Option<Phase>) {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner).push((phase, Instant::now()));
    }

    /// What they counted.
    pub(super) fn stop(mut self) -> Result<Counts, Failure> {
        let stopped = Instant::now();
        self.shared.set(STOPPED);
        let mut all = Counts::default();
        for thread in std::mem::take(&mut self.threads) {
            let counts = thread.join().map_err(|_| Failure::says("a writer died"))?;
            for (sum, counted) in all.phases.iter_mut().zip(counts.phases) {
                sum.writes += counted.writes;
                sum.slow += counted.slow;
                sum.longest = sum.longest.max(counted.longest);
            }
        }
        let entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = entered.iter().skip(1).map(|(_, at)| *at).chain([stopped]);
        for ((phase, began), ended) in entered.iter().zip(ends) {
            if let Some(counted) = phase.and_then(|phase| all.phases.get_mut(phase as usize)) {
                counted.time += ended.duration_since(*began);
            }
        }
        drop(entered);
        Ok(all)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.set(STOPPED);
        for thread in std::mem::take(&mut self.threads) {
            let _ = thread.join();
        }
    }
}

/// One writer: counts up a word of a page, each time another one of the first `pages` at random, until it is stopped.
fn write(memory: &AnonymousRam, shared: &Shared, number: u64, pages: u64) -> Counts {
    let words = memory.words();
    let mut counts = Counts::default();
    // xorshift64: any state but zero.
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut before = Instant::now();
    loop {
        match shared.state.load(Ordering::Acquire) {
            STOPPED => return counts,
            PAUSED => {
                shared.park();
                before = Instant::now();
            }
            phase => {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let page = usize::try_from((random >> 16) % pages).unwrap_or(0);
                if let Some(word) = words.get(page * WORDS + usize::try_from(random % WORDS as u64).unwrap_or(0)) {
                    word.fetch_add(1, Ordering::Relaxed);
                }
                let now = Instant::now();
                let took = now.duration_since(before);
                if let Some(counted) = counts.phases.get_mut(usize::from(phase)) {
                    counted.writes += 1;
                    counted.slow += u64::from(took >= SLOW);
                    counted.longest = counted.longest.max(took);
                }
                before = now;
            }
        }
    }
}
