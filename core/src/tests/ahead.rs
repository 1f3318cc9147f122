//! Arming ahead of T0, every interleaving: one thread protects what it has found, vCPUs write, the fault thread lets them
//! through, the VMM discards, and T0 comes. Then every page that holds something must be there and protected; of an increment,
//! or after drafts, every page that was written.

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

const PAGES: usize = 4;

/// Deliberate mistakes of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    None,
    /// A page is released first and noted as open afterwards.
    OpenNotedLate,
    /// T0 does not wait for a release under way.
    T0DoesNotWait,
    /// What is protected again counts as open no more while a release is under way.
    ProtectingDoesNotWait,
    /// What was never there is taken for protected, like what is protected once more around it.
    AgainTakesAll,
    /// What was written and is not there is protected ahead like the rest.
    AbsentTakenForKnown,
    /// A discard's event is read, and core does not hear of it.
    DiscardIgnored,
}

struct Setup {
    name: &'static str,
    /// Pages that hold something at the beginning.
    there: &'static [usize],
    /// What each vCPU writes, in order.
    writes: [&'static [usize]; 2],
    discard: Option<(usize, usize)>,
    around: u64,
    /// Pages that are not there can be protected (Linux 6.4).
    unpopulated: bool,
    /// Pages that are opened together, whether they are there or not.
    granule: u64,
    /// Only what is written belongs to the snapshot: this, as is known before arming, and what follows.
    dirty: Option<&'static [usize]>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Armer {
    /// Looks at the next page.
    Looking(usize, Pass),
    /// Next: core hears of what was found, as soon as nobody releases.
    Found(Pass),
    /// The same of an increment: it is there, and most of it is not to be protected.
    Seen(Pass),
    /// Next: protects this page, if it was found.
    Protecting(usize, Pass),
    /// Next: what is open from this page on counts as open no more, as soon as nobody releases.
    Opened(PageId),
    /// Next: protects these pages once more.
    Again(u64, u64),
    Done,
}

/// Memory is protected twice: some of it first, to see where the guest writes.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Pass {
    all: bool,
    found: [bool; PAGES],
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Server {
    Idle,
    /// Next: releases these pages.
    Releasing(u64, u64),
    /// Broken: has released, next: core hears of the fault.
    Late(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Discarder {
    Waiting,
    Posted,
    /// The event was read; the memory goes next.
    Read,
    Done,
}

#[derive(Clone)]
struct World<'t> {
    ahead: ArmAhead<&'t BlockTable, Vec<u64>>,
    there: [bool; PAGES],
    protected: [bool; PAGES],
    armer: Armer,
    server: Server,
    discarder: Discarder,
    /// How far each vCPU is, and whether it is blocked.
    vcpus: [(usize, bool); 2],
    unread: Vec<usize>,
    /// What the dirty log says.
    written: [bool; PAGES],
    /// What is protected ahead of an increment: what was written before, and is there.
    known: [bool; PAGES],
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Arm,
    Write(usize),
    Read(usize),
    Serve,
    Post,
    ReadDiscard,
    Zap,
}

fn page(number: usize) -> Run {
    Run::new(PageId(number as u64), 1)
}

fn bitmap(pages: [bool; PAGES]) -> PageBitmap<Vec<u64>> {
    let mut bitmap = PageBitmap::new(vec![0; 2], PAGES as u64, true).unwrap();
    (0..PAGES).filter(|&at| pages[at]).for_each(|at| bitmap.insert(page(at)));
    bitmap
}

fn number(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl World<'_> {
    fn key(&self) -> u64 {
        #[allow(deprecated)]
        let mut hasher = core::hash::SipHasher::new();
        self.ahead.key(&mut hasher);
        (self.there, self.protected, self.vcpus, &self.unread, self.written, self.known).hash(&mut hasher);
        (&self.armer, &self.server, self.discarder).hash(&mut hasher);
        hasher.finish()
    }

    fn steps(&self, setup: &Setup, mistake: Mistake) -> Vec<Step> {
        let mut steps = Vec::new();
        match self.armer {
            Armer::Done => {}
            Armer::Found(_) | Armer::Opened(_) if self.is_releasing() && mistake != Mistake::ProtectingDoesNotWait => {}
            _ => steps.push(Step::Arm),
        }
        for (vcpu, &(done, blocked)) in self.vcpus.iter().enumerate() {
            if !blocked && done < setup.writes[vcpu].len() {
                steps.push(Step::Write(vcpu));
            }
        }
        match self.server {
            Server::Idle => {
                steps.extend((0..self.unread.len()).map(Step::Read));
                steps.extend((self.discarder == Discarder::Posted).then_some(Step::ReadDiscard));
            }
            _ => steps.push(Step::Serve),
        }
        match self.discarder {
            Discarder::Waiting if setup.discard.is_some() => steps.push(Step::Post),
            Discarder::Read => steps.push(Step::Zap),
            _ => {}
        }
        steps
    }

    const fn is_releasing(&self) -> bool {
        matches!(self.server, Server::Releasing(..))
    }

    fn range(&self, number: usize) -> HostRange {
        self.ahead.table().host_range(page(number)).unwrap()
    }

    fn take(&mut self, setup: &Setup, mistake: Mistake, step: Step) {
        match step {
            Step::Arm => self.arm(setup, mistake),
            Step::Write(vcpu) => {
                let target = setup.writes[vcpu][self.vcpus[vcpu].0];
                if self.protected[target] {
                    self.vcpus[vcpu].1 = true;
                    self.unread.push(target);
                } else {
                    (self.there[target], self.written[target]) = (true, true);
                    self.vcpus[vcpu].0 += 1;
                }
            }
            Step::Read(index) => {
                let at = self.unread.remove(index);
                if mistake == Mistake::OpenNotedLate {
                    self.release(setup, at as u64, 1);
                    self.server = Server::Late(at);
                    return;
                }
                let opened = self.ahead.handle_fault(self.range(at).start).unwrap();
                let first = self.ahead.table().page_at(opened.start).unwrap();
                self.server = Server::Releasing(first.0, opened.len / PAGE_SIZE);
            }
            Step::Serve => match self.server {
                Server::Releasing(first, count) => {
                    self.release(setup, first, count);
                    self.server = Server::Idle;
                }
                Server::Late(at) => {
                    let _ = self.ahead.handle_fault(self.range(at).start);
                    self.server = Server::Idle;
                }
                Server::Idle => {}
            },
            Step::Post => self.discarder = Discarder::Posted,
            Step::ReadDiscard => {
                let (first, count) = setup.discard.unwrap();
                let start = self.range(first).start;
                if mistake != Mistake::DiscardIgnored {
                    self.ahead.handle_discarded(HostRange::new(start, count as u64 * PAGE_SIZE));
                    self.written[first..first + count].fill(true);
                }
                self.discarder = Discarder::Read;
            }
            Step::Zap => {
                let (first, count) = setup.discard.unwrap();
                for page in first..first + count {
                    (self.there[page], self.protected[page]) = (false, false);
                }
                self.discarder = Discarder::Done;
            }
        }
    }

    fn protect(&mut self, setup: &Setup, at: usize) {
        self.protected[at] |= setup.unpopulated || self.there[at];
    }

    fn arm(&mut self, setup: &Setup, mistake: Mistake) {
        self.armer = match self.armer.clone() {
            Armer::Looking(at, mut pass) if at < PAGES => {
                pass.found[at] = self.there[at] && (pass.all || at % 2 == 0);
                Armer::Looking(at + 1, pass)
            }
            Armer::Looking(_, pass) if setup.dirty.is_some() => Armer::Seen(pass),
            Armer::Looking(_, pass) => Armer::Found(pass),
            Armer::Seen(pass) => {
                (0..PAGES).filter(|&at| pass.found[at]).for_each(|at| self.ahead.seen(self.range(at)));
                self.known = core::array::from_fn(|at| self.written[at] && pass.found[at]);
                if mistake == Mistake::AbsentTakenForKnown {
                    self.known = self.written;
                }
                Armer::Opened(PageId(0))
            }
            Armer::Found(pass) => {
                for at in (0..PAGES).filter(|&at| pass.found[at]) {
                    self.ahead.protecting(self.range(at));
                }
                Armer::Protecting(0, pass)
            }
            Armer::Protecting(at, pass) if at < PAGES => {
                if pass.found[at] {
                    self.protect(setup, at);
                }
                Armer::Protecting(at + 1, pass)
            }
            Armer::Protecting(_, Pass { all: false, .. }) => {
                Armer::Looking(0, Pass { all: true, found: [false; PAGES] })
            }
            Armer::Protecting(..) => Armer::Opened(PageId(0)),
            Armer::Opened(from) => {
                let known = bitmap(self.known);
                let of = if setup.dirty.is_some() { &known } else { self.ahead.there() };
                let next = match mistake {
                    Mistake::AgainTakesAll => self.ahead.next_written(from),
                    _ => self.ahead.next_unprotected(of, from),
                };
                next.map_or(Armer::Done, |run| {
                    self.ahead.protecting(self.ahead.table().host_range(run).unwrap());
                    Armer::Again(run.first.0, run.pages)
                })
            }
            Armer::Again(first, count) => {
                (number(first)..number(first + count)).for_each(|at| self.protect(setup, at));
                Armer::Opened(PageId(first + count))
            }
            Armer::Done => Armer::Done,
        };
    }

    fn release(&mut self, setup: &Setup, first: u64, count: u64) {
        let pages = number(first)..number(first + count);
        self.protected[pages.clone()].fill(false);
        for (vcpu, (done, blocked)) in self.vcpus.iter_mut().enumerate() {
            if *blocked && pages.contains(&setup.writes[vcpu][*done]) {
                *blocked = false;
            }
        }
    }

    /// Whether T0 can be now: the vCPUs are stopped (a blocked one is: KVM_RUN is interrupted), no other writer and no
    /// discard is under way, arming ahead has returned, and nobody is inside a release.
    fn can_begin(&self, mistake: Mistake) -> bool {
        let quiet = matches!(self.server, Server::Idle) || mistake == Mistake::T0DoesNotWait;
        let late = matches!(self.server, Server::Late(_));
        let discards = matches!(self.discarder, Discarder::Posted | Discarder::Read);
        self.armer == Armer::Done && (quiet || late) && !discards
    }

    /// T0, and what is wrong afterwards.
    fn begin(mut self, setup: &Setup) -> Result<(), String> {
        let block = self.ahead.table().block_run(BlockIndex(0));
        let mut from = PageId(0);
        let mut found = Vec::new();
        while let Some(run) = self.ahead.next_absent(from, block) {
            found.extend((number(run.first.0)..number(run.end().0)).filter(|&at| self.there[at]));
            from = run.end();
        }
        found.into_iter().for_each(|at| self.ahead.found(self.range(at)));
        let written = bitmap(self.written);
        let of = if setup.dirty.is_some() { &written } else { self.ahead.there() };
        let mut from = PageId(0);
        while let Some(run) = self.ahead.next_unprotected(of, from) {
            (number(run.first.0)..number(run.end().0)).for_each(|at| self.protected[at] = true);
            from = run.end();
        }
        // A release that T0 did not wait for.
        if let Server::Releasing(first, count) = self.server {
            self.release(setup, first, count);
        }
        let all = setup.dirty.is_none();
        let (there, protected, written) = (self.there, self.protected, self.written);
        let (known, _) = self.ahead.into_there();
        for at in 0..PAGES {
            if there[at] && !known.contains(PageId(at as u64)) {
                return Err(format!("page {at} holds something and is not there"));
            }
            if known.contains(PageId(at as u64)) && !there[at] {
                return Err(format!("page {at} is there and holds nothing"));
            }
            if (all && there[at] || !all && written[at]) && !protected[at] {
                return Err(format!("page {at} belongs to the snapshot and is not protected"));
            }
        }
        Ok(())
    }
}

/// Goes through every interleaving, T0 at every moment at which it can be. Returns states and transitions, or the
/// shortest way to something wrong.
fn explore(setup: &Setup, mistake: Mistake) -> Result<(usize, usize), (String, Vec<Step>)> {
    let mut table = table(&[ram(PAGES as u64)]);
    table.set_granule(BlockIndex(0), setup.granule * PAGE_SIZE);
    let none = || bitmap([false; PAGES]);
    let set = |pages: &[usize]| core::array::from_fn(|at| pages.contains(&at));
    let first = World {
        ahead: ArmAhead::new(&table, [none(), none(), none(), none()], setup.around).unwrap(),
        there: set(setup.there),
        protected: [false; PAGES],
        // An increment looks at everything at once.
        armer: Armer::Looking(0, Pass { all: setup.dirty.is_some(), found: [false; PAGES] }),
        server: Server::Idle,
        discarder: Discarder::Waiting,
        vcpus: [(0, false); 2],
        unread: Vec::new(),
        written: set(setup.dirty.unwrap_or(&[])),
        known: [false; PAGES],
    };
    let (mut seen, mut transitions) = (HashSet::from([first.key()]), 0);
    let mut queue = VecDeque::from([(first, Vec::new())]);
    while let Some((world, trace)) = queue.pop_front() {
        if world.can_begin(mistake) {
            world.clone().begin(setup).map_err(|why| (why, trace.clone()))?;
        }
        for step in world.steps(setup, mistake) {
            let mut next = world.clone();
            next.take(setup, mistake, step);
            transitions += 1;
            if seen.insert(next.key()) {
                let trace = trace.iter().copied().chain([step]).collect();
                queue.push_back((next, trace));
            }
        }
    }
    Ok((seen.len(), transitions))
}

const WORLDS: [Setup; 9] = [
    Setup {
        name: "two vCPUs",
        there: &[0, 1, 3],
        writes: [&[0, 2, 1], &[3, 0]],
        discard: None,
        around: 1,
        unpopulated: true,
        granule: 1,
        dirty: None,
    },
    Setup {
        name: "neighbourhoods",
        there: &[0, 1, 2],
        writes: [&[1, 3], &[2, 0, 3]],
        discard: None,
        around: 2,
        unpopulated: true,
        granule: 1,
        dirty: None,
    },
    Setup {
        name: "a discard",
        there: &[0, 1, 2],
        writes: [&[0, 1, 0], &[2]],
        discard: Some((0, 2)),
        around: 1,
        unpopulated: true,
        granule: 1,
        dirty: None,
    },
    Setup {
        name: "both",
        there: &[0, 1, 2, 3],
        writes: [&[1, 0, 1], &[3, 2]],
        discard: Some((1, 2)),
        around: 2,
        unpopulated: true,
        granule: 1,
        dirty: None,
    },
    Setup {
        name: "before Linux 6.4",
        there: &[0, 2, 3],
        writes: [&[0, 1], &[3, 1]],
        discard: None,
        around: 2,
        unpopulated: false,
        granule: 2,
        dirty: None,
    },
    Setup {
        name: "the same, a discard",
        there: &[0, 1, 2],
        writes: [&[1, 3, 0], &[2]],
        discard: Some((0, 2)),
        around: 4,
        unpopulated: false,
        granule: 2,
        dirty: None,
    },
    Setup {
        name: "an increment",
        there: &[0, 1, 2],
        writes: [&[0, 1, 0], &[2, 3]],
        discard: None,
        around: 2,
        unpopulated: true,
        granule: 1,
        dirty: Some(&[0, 2]),
    },
    Setup {
        name: "an increment, a discard",
        there: &[0, 1, 2, 3],
        writes: [&[1, 0], &[2, 1]],
        discard: Some((1, 2)),
        around: 4,
        unpopulated: true,
        granule: 1,
        dirty: Some(&[0, 1, 3]),
    },
    Setup {
        name: "an increment before Linux 6.4",
        there: &[0, 2],
        writes: [&[3, 0, 1], &[2, 0]],
        discard: None,
        around: 4,
        unpopulated: false,
        granule: 1,
        dirty: Some(&[0, 2, 3]),
    },
];

#[test]
fn explore_arming_ahead() {
    for setup in &WORLDS {
        match explore(setup, Mistake::None) {
            Ok((states, transitions)) => {
                println!("arming ahead, {}: {states} states, {transitions} transitions", setup.name);
                assert!(states > 500, "{}: {states} states", setup.name);
            }
            Err((why, trace)) => panic!("{}: {why} after {trace:?}", setup.name),
        }
    }
}

#[test]
fn explore_arming_ahead_catches_mistakes() {
    let mistakes = [
        Mistake::OpenNotedLate,
        Mistake::T0DoesNotWait,
        Mistake::ProtectingDoesNotWait,
        Mistake::AgainTakesAll,
        Mistake::AbsentTakenForKnown,
        Mistake::DiscardIgnored,
    ];
    for mistake in mistakes {
        let caught = WORLDS.iter().find_map(|setup| explore(setup, mistake).err().map(|found| (setup.name, found)));
        match caught {
            Some((world, (why, trace))) => println!("{mistake:?}: {why}, in {world:?} after {trace:?}"),
            None => panic!("{mistake:?} is not caught"),
        }
    }
}
