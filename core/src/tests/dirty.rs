//! Increments and pre-copy, every interleaving: a vCPU and a device model write, each with a log of its own, memory is
//! discarded and nobody tells, snapshots of all kinds follow one another and may fail at any moment. The image, laid over
//! what it builds on, is memory at its T0.

use core::hash::{Hash, Hasher};
use std::{
    collections::{HashSet, VecDeque},
    format, println,
    string::String,
    vec,
    vec::Vec,
};

use super::rig::{ram, table};
use crate::*;

const PAGES: usize = 2;

/// Deliberate mistakes of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    None,
    /// Logs are read before the pause only.
    LogNotReadInPause,
    /// A log is read, and what it says taken for copied, when the draft has been copied.
    LogReadAfterDraft,
    /// What a snapshot took is forgotten although it failed.
    FailureForgotten,
    /// The device model's log is not asked.
    OneLogIgnored,
    /// A page that became zero is left to the parent.
    ZeroLeftToParent,
    /// What is there is looked up before the pause.
    LooksBeforePause,
    /// The draft's pages count as saved only if it is committed.
    DraftNotSaved,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Kind {
    full: bool,
    drafts: u8,
}

/// How far a snapshot is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Idle,
    /// Before a draft: logs are read, then its pages are chosen.
    ReadLogs(Kind, usize),
    Choose(Kind),
    /// Of a full snapshot: what is there, once writes count afresh.
    LookForAll(Kind, [bool; PAGES]),
    /// Copies the next page of a draft.
    Copy(Kind, [bool; PAGES], usize),
    /// Nothing left to do before the pause.
    Ready(Kind, Option<[bool; PAGES]>),
    /// T0 has passed; what was pending and there.
    Live(Kind, [bool; PAGES], [bool; PAGES]),
}

#[derive(Clone)]
struct World {
    dirty: DirtyPages<Vec<u64>>,
    /// 0: not there.
    memory: [u8; PAGES],
    /// Of the vCPU, of the device model.
    logs: [[bool; PAGES]; 2],
    wrote: usize,
    /// What the device has written, and whether its log knows.
    device: (usize, bool),
    discards: u8,
    phase: Phase,
    first: bool,
    /// `None`: the parent's.
    image: [Option<u8>; PAGES],
    base: [u8; PAGES],
    has_base: bool,
    snapshots: u8,
    failures: u8,
}

struct Setup {
    name: &'static str,
    writes: &'static [usize],
    device: &'static [usize],
    discards: u8,
    snapshots: u8,
    failures: u8,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write,
    Device,
    Discard(usize),
    Begin(Kind),
    Go,
    AnotherDraft,
    Fail,
}

fn bitmap(pages: [bool; PAGES]) -> PageBitmap<Vec<u64>> {
    let mut map = PageBitmap::new(vec![0; 2], PAGES as u64, true).unwrap();
    (0..PAGES).filter(|at| pages[*at]).for_each(|at| map.insert(page(at)));
    map
}

fn array(map: &PageBitmap<Vec<u64>>) -> [bool; PAGES] {
    core::array::from_fn(|at| map.contains(PageId(at as u64)))
}

fn page(at: usize) -> Run {
    Run::new(PageId(at as u64), 1)
}

impl World {
    fn new(table: &BlockTable) -> Self {
        let none = || bitmap([false; PAGES]);
        Self {
            dirty: DirtyPages::new(table, [none(), none(), none()]).unwrap(),
            memory: core::array::from_fn(|at| if at == 0 { 100 } else { 0 }),
            logs: [[false; PAGES]; 2],
            wrote: 0,
            device: (0, true),
            discards: 0,
            phase: Phase::Idle,
            first: true,
            image: [None; PAGES],
            base: [0; PAGES],
            has_base: false,
            snapshots: 0,
            failures: 0,
        }
    }

    fn key(&self) -> u128 {
        let half = |seed: u8| {
            let mut hasher = std::hash::DefaultHasher::new();
            (seed, &self.dirty, self.memory, self.logs, self.wrote, self.device, self.discards).hash(&mut hasher);
            (&self.phase, self.first, self.image, self.base, self.has_base, self.snapshots, self.failures)
                .hash(&mut hasher);
            u128::from(hasher.finish())
        };
        half(1) << 64 | half(2)
    }

    fn there(&self) -> [bool; PAGES] {
        self.memory.map(|content| content != 0)
    }

    fn steps(&self, setup: &Setup) -> Vec<Step> {
        let mut steps = Vec::new();
        steps.extend((self.wrote < setup.writes.len()).then_some(Step::Write));
        steps.extend((self.device.0 < setup.device.len() || !self.device.1).then_some(Step::Device));
        if self.discards < setup.discards {
            steps.extend((0..PAGES).map(Step::Discard));
        }
        match &self.phase {
            Phase::Idle if self.snapshots < setup.snapshots => {
                let kinds = [(true, 0), (true, 1), (false, 0), (false, 1)].map(|(full, drafts)| Kind { full, drafts });
                steps.extend(kinds.into_iter().filter(|kind| kind.full || self.has_base).map(Step::Begin));
            }
            Phase::Idle => {}
            phase => {
                // The pause waits for the device model to be through with what it writes.
                let pauses = matches!(phase, Phase::Ready(..));
                steps.extend((!pauses || self.device.1).then_some(Step::Go));
                let again = matches!(phase, Phase::Ready(kind, _) if kind.drafts == 1);
                steps.extend(again.then_some(Step::AnotherDraft));
                steps.extend((self.failures < setup.failures).then_some(Step::Fail));
            }
        }
        steps
    }

    fn take(&mut self, setup: &Setup, table: &BlockTable, mistake: Mistake, step: Step) -> Result<(), String> {
        match step {
            Step::Write => {
                // KVM: who reads the log sees the write and its bit, or neither.
                let at = setup.writes[self.wrote];
                self.wrote += 1;
                self.memory[at] = u8::try_from(self.wrote).unwrap();
                self.logs[0][at] = true;
            }
            Step::Device if self.device.1 => {
                let at = setup.device[self.device.0];
                self.memory[at] = 50 + u8::try_from(self.device.0).unwrap();
                self.device = (self.device.0 + 1, false);
            }
            // vm-memory notes a write when it is done.
            Step::Device => {
                self.logs[1][setup.device[self.device.0 - 1]] = true;
                self.device.1 = true;
            }
            Step::Discard(at) => {
                self.memory[at] = 0;
                self.discards += 1;
            }
            Step::Begin(kind) => {
                self.snapshots += 1;
                self.first = true;
                self.image = [if kind.full { Some(0) } else { None }; PAGES];
                self.phase = if kind.drafts > 0 { Phase::ReadLogs(kind, 0) } else { Phase::Ready(kind, None) };
            }
            Step::AnotherDraft => {
                let Phase::Ready(kind, _) = self.phase else { return Err("no draft".into()) };
                self.phase = Phase::ReadLogs(Kind { drafts: 2, ..kind }, 0);
            }
            Step::Fail => {
                self.failures += 1;
                if let (Mistake::FailureForgotten, Phase::Live(_, pending, there)) = (mistake, &self.phase) {
                    self.dirty.committed(&bitmap(*pending), &bitmap(*there), false);
                }
                self.phase = Phase::Idle;
            }
            Step::Go => self.go(table, mistake)?,
        }
        Ok(())
    }

    fn read_log(&mut self, log: usize, mistake: Mistake) {
        let said = core::mem::replace(&mut self.logs[log], [false; PAGES]);
        if log == 0 || mistake != Mistake::OneLogIgnored {
            (0..PAGES).filter(|at| said[*at]).for_each(|at| self.dirty.handle_written(page(at)));
        }
    }

    fn go(&mut self, table: &BlockTable, mistake: Mistake) -> Result<(), String> {
        let late = mistake == Mistake::LogReadAfterDraft;
        self.phase = match self.phase.clone() {
            Phase::ReadLogs(kind, log) if log < 2 => {
                self.read_log(log, mistake);
                Phase::ReadLogs(kind, log + 1)
            }
            Phase::ReadLogs(kind, _) => Phase::Choose(kind),
            Phase::Choose(kind) => {
                let mut pages = bitmap([false; PAGES]);
                self.dirty.draft(self.first, &mut pages);
                if core::mem::take(&mut self.first) && kind.full {
                    Phase::LookForAll(kind, array(&pages))
                } else {
                    Phase::Copy(kind, array(&pages), 0)
                }
            }
            Phase::LookForAll(kind, pages) => {
                let there = self.there();
                Phase::Copy(kind, core::array::from_fn(|at| pages[at] || there[at]), 0)
            }
            Phase::Copy(kind, pages, at) if at < PAGES => {
                if pages[at] {
                    if mistake != Mistake::DraftNotSaved {
                        self.dirty.handle_saved(page(at));
                    }
                    self.image[at] = Some(self.memory[at]);
                }
                Phase::Copy(kind, pages, at + 1)
            }
            Phase::Copy(kind, ..) => {
                if late {
                    (0..2).for_each(|log| self.read_log(log, mistake));
                    self.dirty.draft(false, &mut bitmap([false; PAGES]));
                }
                Phase::Ready(kind, None)
            }
            Phase::Ready(kind, None) if mistake == Mistake::LooksBeforePause => Phase::Ready(kind, Some(self.there())),
            Phase::Ready(kind, looked) => {
                // The pause: T0.
                if mistake != Mistake::LogNotReadInPause {
                    (0..2).for_each(|log| self.read_log(log, mistake));
                }
                let there = looked.unwrap_or(self.there());
                let drafted = kind.drafts > 0;
                let mut pending = bitmap([false; PAGES]);
                if kind.full && !drafted {
                    self.dirty.begin_full();
                    pending = bitmap(there);
                } else {
                    self.dirty.begin(table, &bitmap(there), drafted, &mut pending);
                }
                let pending = array(&pending);
                for at in (0..PAGES).filter(|at| pending[*at]) {
                    if self.memory[at] != 0 || mistake != Mistake::ZeroLeftToParent || kind.full {
                        self.image[at] = Some(self.memory[at]);
                    }
                }
                for at in 0..PAGES {
                    let found = self.image[at].unwrap_or(self.base[at]);
                    if found != self.memory[at] {
                        let at_t0 = self.memory[at];
                        return Err(format!("page {at} is {found} in the image and its parents, and {at_t0} at T0"));
                    }
                }
                Phase::Live(kind, pending, there)
            }
            Phase::Live(kind, pending, there) => {
                let all = kind.full && kind.drafts == 0;
                self.dirty.committed(&bitmap(pending), &bitmap(there), all);
                self.base = core::array::from_fn(|at| self.image[at].unwrap_or(self.base[at]));
                self.has_base = true;
                Phase::Idle
            }
            Phase::Idle => return Err("nothing to go on with".into()),
        };
        Ok(())
    }
}

/// States and transitions, or what is wrong and the shortest way there.
fn explore(setup: &Setup, mistake: Mistake) -> Result<(usize, usize), String> {
    let table = table(&[ram(PAGES as u64)]);
    let start = World::new(&table);
    let mut seen = HashSet::from([start.key()]);
    // Where each state came from: the way there is put together when it is needed.
    let mut came: Vec<(usize, Option<Step>)> = vec![(0, None)];
    let mut queue = VecDeque::from([start]);
    let (mut state, mut transitions) = (0, 0);
    while let Some(world) = queue.pop_front() {
        for step in world.steps(setup) {
            let mut next = world.clone();
            transitions += 1;
            if let Err(what) = next.take(setup, &table, mistake, step) {
                let mut path = vec![step];
                let mut at = state;
                while let (before, Some(step)) = came[at] {
                    path.push(step);
                    at = before;
                }
                path.reverse();
                return Err(format!("{}, {mistake:?}: {what}, after {} steps: {path:?}", setup.name, path.len()));
            }
            if seen.insert(next.key()) {
                came.push((state, Some(step)));
                queue.push_back(next);
            }
        }
        state += 1;
    }
    Ok((seen.len(), transitions))
}

const PLAIN: Setup =
    Setup { name: "increments", writes: &[0, 1, 0], device: &[], discards: 0, snapshots: 3, failures: 1 };
const BOTH: Setup =
    Setup { name: "increments, two logs", writes: &[0, 1], device: &[1], discards: 0, snapshots: 2, failures: 1 };
const DISCARD: Setup =
    Setup { name: "increments, discards that nobody tells of", writes: &[1], device: &[], discards: 2, ..BOTH };
const ALL: Setup =
    Setup { name: "increments, all of that", writes: &[0, 1], device: &[0], discards: 1, snapshots: 3, failures: 1 };

#[test]
fn every_image_is_memory_at_its_t0() {
    for setup in [&PLAIN, &BOTH, &DISCARD, &ALL] {
        let (states, transitions) = explore(setup, Mistake::None).unwrap_or_else(|what| panic!("{what}"));
        println!("{:<44} {states:>8} states {transitions:>9} transitions", setup.name);
        assert!(states > 1000, "{}: too small a world", setup.name);
    }
}

#[test]
fn the_exploration_can_fail() {
    use Mistake as M;
    let cases = [
        (M::LogNotReadInPause, &PLAIN),
        (M::LogReadAfterDraft, &PLAIN),
        (M::FailureForgotten, &PLAIN),
        (M::OneLogIgnored, &BOTH),
        (M::ZeroLeftToParent, &DISCARD),
        (M::LooksBeforePause, &DISCARD),
        (M::DraftNotSaved, &DISCARD),
    ];
    for (mistake, setup) in cases {
        let what = explore(setup, mistake).expect_err("it was not caught");
        println!("{what}");
        assert!(what.contains("at T0"), "caught, but as: {what}");
    }
}
