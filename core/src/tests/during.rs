//! A snapshot of a VM whose pages are still coming in, every interleaving: both cores as they are, one kernel, vCPUs that
//! write, a discard, and the threads between them. The image is memory at T0, or there is none; no page comes in with the
//! wrong content; nobody waits for ever; nothing stays protected.

use core::hash::{Hash, Hasher};
use std::{
    collections::{HashSet, VecDeque},
    format, println,
    string::String,
    vec,
    vec::Vec,
};

use super::rig::{SINGLE, core_of, ram, table};
use crate::*;

const PAGES: usize = 2;

/// Deliberate mistakes of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    None,
    /// What comes in is not protected.
    ComesInOpen,
    /// What is missing does not count as there.
    MissingForgotten,
    /// What is there is looked up before what is missing.
    LooksTheOtherWayRound,
    /// The server keeps discards for itself.
    DiscardKept,
    /// A capture counts before discards were heard.
    LossesUnheard,
    /// The switch is thrown after protecting.
    SwitchedOnLate,
    /// It is thrown back after lifting.
    SwitchedOffLate,
}

struct Setup {
    name: &'static str,
    /// Pages that the image has data for.
    data: [bool; PAGES],
    writes: [&'static [usize]; 2],
    discard: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Content {
    Image,
    Zero,
    Written,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Message {
    Missing(usize),
    Write(usize),
    Discard(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Discarder {
    Waiting,
    Posted,
    Read,
    Done,
}

/// How far the snapshot is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Before,
    /// vCPUs stand. First look, second look, the switch, the protecting of each page.
    Looking,
    Switching,
    Protecting(usize),
    Live,
    /// The switch is thrown back, then everything is lifted.
    Ending,
    Lifting,
    Over,
}

/// A worker of the engine, one that scans or the one that serves faults.
#[derive(Clone, Hash, PartialEq, Eq)]
enum Hand {
    Empty,
    /// Brings the page in.
    Claimed(Claim),
    /// Touched a page that is not there.
    Blocked(Claim, usize),
    Copied(Claim, Content),
    Captured(CapturedRun, Content),
}

type Engine = Snapshot<std::sync::Arc<BlockTable>, Vec<u64>, 4, 4>;

#[derive(Clone)]
struct World<'t> {
    fill: Fill<&'t BlockTable, Vec<u64>, 4, 4>,
    claim: Option<FillClaim>,
    zeros: Vec<usize>,
    engine: Option<Engine>,
    phase: Phase,
    found: [bool; PAGES],
    /// What comes in comes in protected.
    switched: bool,
    memory: [Option<(Content, bool)>; PAGES],
    discarded: [bool; PAGES],
    t0: [Content; PAGES],
    /// A discard whose event was read before T0, and which goes on after it: zeros are as right as what was there.
    underway: Option<usize>,
    image: [Option<Content>; PAGES],
    unread: Vec<Message>,
    inbox: Vec<Message>,
    hands: [Hand; 2],
    vcpus: [(usize, Option<Message>); 2],
    discarder: Discarder,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize),
    Post,
    Zap,
    Read,
    Serve,
    PutIn,
    PutZeros,
    Snapshot,
    TakeIn,
    Engine(usize),
}

struct Image([bool; PAGES]);

impl crate::Content for Image {
    fn extent(&self, first: PageId) -> Option<(Run, bool)> {
        self.0.get(number(first)).map(|data| (Run::new(first, 1), !data))
    }
}

fn number(page: PageId) -> usize {
    usize::try_from(page.0).unwrap()
}

fn page(number: usize) -> Run {
    Run::new(PageId(number as u64), 1)
}

impl<'t> World<'t> {
    fn new(table: &'t BlockTable, setup: &Setup) -> Self {
        let map = || PageBitmap::new(vec![0; 2], PAGES as u64, true).unwrap();
        Self {
            fill: Fill::new(table, map(), map(), SINGLE).unwrap(),
            claim: None,
            zeros: Vec::new(),
            engine: None,
            phase: Phase::Before,
            found: [false; PAGES],
            switched: false,
            memory: [None; PAGES],
            discarded: [false; PAGES],
            t0: [Content::Zero; PAGES],
            underway: None,
            image: [None; PAGES],
            unread: Vec::new(),
            inbox: Vec::new(),
            hands: [Hand::Empty, Hand::Empty],
            vcpus: [(0, None); 2],
            discarder: if setup.discard.is_some() { Discarder::Waiting } else { Discarder::Done },
        }
    }

    fn key(&self) -> u128 {
        let half = |seed: u8| {
            let mut hasher = std::hash::DefaultHasher::new();
            seed.hash(&mut hasher);
            self.fill.key(&mut hasher);
            self.engine.iter().for_each(|engine| engine.key(&mut hasher));
            self.claim.as_ref().map(|claim| claim.run().first).hash(&mut hasher);
            (&self.zeros, self.phase, self.found, self.switched, self.memory, self.discarded).hash(&mut hasher);
            (self.t0, self.underway, self.image, &self.unread, &self.inbox, &self.hands, self.vcpus, self.discarder)
                .hash(&mut hasher);
            u128::from(hasher.finish())
        };
        half(1) << 64 | half(2)
    }

    fn at(&self, page_number: usize) -> HostRange {
        self.fill.table().host_range(page(page_number)).unwrap()
    }

    fn standing(&self) -> bool {
        matches!(self.phase, Phase::Looking | Phase::Switching | Phase::Protecting(_))
    }

    fn attached(&self) -> bool {
        !matches!(self.phase, Phase::Before | Phase::Over)
    }

    fn wake(&mut self, at: usize) {
        for vcpu in &mut self.vcpus {
            if matches!(vcpu.1, Some(Message::Missing(page) | Message::Write(page)) if page == at) {
                vcpu.1 = None;
            }
        }
        for hand in &mut self.hands {
            if let Hand::Blocked(claim, page) = hand
                && *page == at
            {
                *hand = Hand::Claimed(claim.clone());
            }
        }
    }

    fn put(&mut self, mistake: Mistake, at: usize, content: Content) -> Result<(), String> {
        if content == Content::Image && self.discarded[at] {
            return Err(format!("page {at} came back after it was discarded"));
        }
        let protected = self.switched && mistake != Mistake::ComesInOpen;
        self.memory[at].get_or_insert((content, protected));
        self.wake(at);
        Ok(())
    }

    fn steps(&self, setup: &Setup) -> Vec<Step> {
        let mut steps = Vec::new();
        for (vcpu, (done, blocked)) in self.vcpus.iter().enumerate() {
            if !self.standing() && blocked.is_none() && *done < setup.writes[vcpu].len() {
                steps.push(Step::Write(vcpu));
            }
        }
        match self.discarder {
            Discarder::Waiting if !self.standing() => steps.push(Step::Post),
            Discarder::Read => steps.push(Step::Zap),
            _ => {}
        }
        if self.claim.is_some() {
            steps.push(Step::PutIn);
        } else {
            steps.extend((!self.unread.is_empty()).then_some(Step::Read));
            steps.extend(self.fill.has_faults().then_some(Step::Serve));
            steps.extend((!self.zeros.is_empty()).then_some(Step::PutZeros));
        }
        match (&self.engine, self.phase) {
            (Some(engine), Phase::Live) => {
                let idle = self.hands.iter().all(|hand| *hand == Hand::Empty);
                if idle && (engine.is_captured() || engine.cause().is_some()) {
                    steps.push(Step::Snapshot);
                }
                steps.extend((!self.inbox.is_empty()).then_some(Step::TakeIn));
                steps.extend([Step::Engine(0), Step::Engine(1)]);
            }
            (_, Phase::Over) => {}
            _ => steps.push(Step::Snapshot),
        }
        steps
    }

    fn take(&mut self, setup: &Setup, mistake: Mistake, step: Step) -> Result<(), String> {
        match step {
            Step::Write(vcpu) => {
                let at = setup.writes[vcpu][self.vcpus[vcpu].0];
                let message = match self.memory[at] {
                    Some((_, false)) => {
                        self.memory[at] = Some((Content::Written, false));
                        self.vcpus[vcpu].0 += 1;
                        return Ok(());
                    }
                    Some((_, true)) => Message::Write(at),
                    None => Message::Missing(at),
                };
                self.vcpus[vcpu].1 = Some(message);
                self.unread.push(message);
            }
            Step::Post => {
                self.unread.push(Message::Discard(setup.discard.unwrap()));
                self.discarder = Discarder::Posted;
            }
            Step::Zap => {
                self.memory[setup.discard.unwrap()] = None;
                self.discarded[setup.discard.unwrap()] = true;
                self.discarder = Discarder::Done;
            }
            Step::Read => self.read(mistake),
            Step::Serve => match self.fill.next_fault(&Image(setup.data)) {
                NextFill::Fill(claim) => self.claim = Some(claim),
                NextFill::Zero(range) => self.zeros.push(self.page_at(range)),
                other => return Err(format!("{other:?}")),
            },
            Step::PutIn => {
                let claim = self.claim.take().unwrap();
                // Wanted is asked right before the kernel is.
                if let Some(run) = self.fill.wanted(&claim, claim.run().first) {
                    let content = if claim.holds() == Holds::Zero { Content::Zero } else { Content::Image };
                    self.put(mistake, number(run.first), content)?;
                    self.fill.put_in(&claim, run);
                }
                self.fill.end(claim);
            }
            Step::PutZeros => {
                let at = self.zeros.remove(0);
                self.put(mistake, at, Content::Zero)?;
            }
            Step::Snapshot => self.snapshot(setup, mistake)?,
            Step::TakeIn => match self.inbox.remove(0) {
                Message::Write(at) => {
                    let start = self.at(at).start;
                    if let FaultOutcome::Stale(_) = self.engine.as_mut().unwrap().handle_fault(start) {
                        self.release(at);
                    }
                }
                Message::Discard(at) => self.lost(at),
                Message::Missing(_) => return Err("a missing page is none of the engine's business".into()),
            },
            Step::Engine(hand) => self.work(setup, mistake, hand)?,
        }
        Ok(())
    }

    fn page_at(&self, range: HostRange) -> usize {
        number(self.fill.table().page_at(range.start).unwrap())
    }

    fn release(&mut self, at: usize) {
        if let Some((content, _)) = self.memory[at] {
            self.memory[at] = Some((content, false));
        }
        self.wake(at);
    }

    fn lost(&mut self, at: usize) {
        let range = self.at(at);
        self.engine.iter_mut().for_each(|engine| {
            engine.handle_discarded(range);
        });
    }

    /// The server reads a message, and hands on what is not, or not only, for it.
    fn read(&mut self, mistake: Mistake) {
        let message = self.unread.remove(0);
        let (Message::Missing(at) | Message::Write(at) | Message::Discard(at)) = message;
        let hands_on = match message {
            Message::Missing(_) => false,
            Message::Write(_) => true,
            Message::Discard(_) => mistake != Mistake::DiscardKept,
        };
        if hands_on && self.attached() {
            self.inbox.push(message);
        }
        let range = self.at(at);
        match message {
            Message::Missing(_) => {
                if let FillFault::Zero(_) = self.fill.handle_fault(range.start) {
                    self.zeros.push(at);
                }
            }
            Message::Write(_) => {}
            Message::Discard(_) => {
                let mut zeros = Vec::new();
                self.fill.handle_discarded(range, |range| zeros.push(range));
                for range in zeros {
                    self.zeros.push(self.page_at(range));
                }
                self.discarder = Discarder::Read;
            }
        }
    }

    /// The next step of `begin`, and of the end.
    fn snapshot(&mut self, setup: &Setup, mistake: Mistake) -> Result<(), String> {
        let missing = |world: &Self, at: usize| {
            let next = world.fill.next_missing(PageId(at as u64), &Image(setup.data));
            mistake != Mistake::MissingForgotten && next.is_some_and(|run| number(run.first) == at)
        };
        let other_way = mistake == Mistake::LooksTheOtherWayRound;
        self.phase = match self.phase {
            Phase::Before => {
                self.found =
                    core::array::from_fn(|at| if other_way { self.memory[at].is_some() } else { missing(self, at) });
                Phase::Looking
            }
            Phase::Looking => {
                for at in 0..PAGES {
                    self.found[at] |= if other_way { missing(self, at) } else { self.memory[at].is_some() };
                }
                Phase::Switching
            }
            Phase::Switching => {
                self.switched = mistake != Mistake::SwitchedOnLate;
                Phase::Protecting(0)
            }
            Phase::Protecting(at) if at < PAGES => {
                if let (true, Some((content, _))) = (self.found[at], self.memory[at]) {
                    self.memory[at] = Some((content, true));
                }
                Phase::Protecting(at + 1)
            }
            Phase::Protecting(_) => {
                self.switched = true;
                for at in 0..PAGES {
                    self.t0[at] = match self.memory[at] {
                        Some((content, _)) => content,
                        None if self.discarded[at] || !setup.data[at] => Content::Zero,
                        None => Content::Image,
                    };
                }
                self.underway = setup.discard.filter(|_| self.discarder == Discarder::Read);
                let runs: Vec<Run> = (0..PAGES).filter(|at| self.found[*at]).map(page).collect();
                self.engine = Some(core_of(&[ram(PAGES as u64)], &runs, 2, SINGLE).unwrap());
                // What was heard of since the first look.
                for message in core::mem::take(&mut self.inbox) {
                    match message {
                        Message::Discard(at) => self.lost(at),
                        other => self.inbox.push(other),
                    }
                }
                Phase::Live
            }
            Phase::Live => {
                self.switched = self.switched && mistake == Mistake::SwitchedOffLate;
                Phase::Ending
            }
            Phase::Ending => {
                (0..PAGES).for_each(|at| self.release(at));
                Phase::Lifting
            }
            Phase::Lifting => {
                self.switched = false;
                self.inbox.clear();
                Phase::Over
            }
            Phase::Over => return Err("over twice".into()),
        };
        Ok(())
    }

    fn work(&mut self, setup: &Setup, mistake: Mistake, which: usize) -> Result<(), String> {
        let who = if which == 0 { Worker::Faults } else { Worker::Scan };
        let hand = core::mem::replace(&mut self.hands[which], Hand::Empty);
        let engine = self.engine.as_mut().unwrap();
        self.hands[which] = match hand {
            Hand::Empty => match engine.next_claim(who) {
                Next::Claim(claim) => Hand::Claimed(claim),
                _ => Hand::Empty,
            },
            Hand::Claimed(claim) => {
                let at = number(claim.run().first);
                let run = self.fill.next_missing(claim.run().first, &Image(setup.data));
                if run.is_some_and(|run| number(run.first) == at) {
                    // Asks the server and waits.
                    let start = self.at(at).start;
                    let _ = self.fill.handle_fault(start);
                    Hand::Claimed(claim)
                } else if let Some((content, _)) = self.memory[at] {
                    Hand::Copied(claim, content)
                } else {
                    self.unread.push(Message::Missing(at));
                    Hand::Blocked(claim, at)
                }
            }
            Hand::Blocked(claim, at) => Hand::Blocked(claim, at),
            Hand::Copied(claim, content) => {
                if mistake != Mistake::LossesUnheard {
                    for message in core::mem::take(&mut self.inbox) {
                        match message {
                            Message::Discard(at) => self.lost(at),
                            other => self.inbox.push(other),
                        }
                    }
                }
                Hand::Captured(self.engine.as_mut().unwrap().captured(claim), content)
            }
            Hand::Captured(run, content) => {
                let at = number(run.run().first);
                self.image[at] = Some(content);
                self.release(at);
                let engine = self.engine.as_mut().unwrap();
                let released = engine.released(run);
                engine.written(released);
                Hand::Empty
            }
        };
        Ok(())
    }

    /// Nothing more happens.
    fn check_final(&self, setup: &Setup) -> Result<(), String> {
        let waits = self.vcpus.iter().zip(setup.writes).position(|((done, _), writes)| *done < writes.len());
        if let Some(vcpu) = waits {
            return Err(format!("vCPU {vcpu} waits for ever: {:?}", self.vcpus[vcpu].1));
        }
        if self.phase != Phase::Over {
            return Err(format!("the snapshot hangs in {:?}", self.phase));
        }
        if let Some(at) = self.memory.iter().position(|page| page.is_some_and(|(_, protected)| protected)) {
            return Err(format!("page {at} is protected for ever"));
        }
        if self.engine.as_ref().is_some_and(|engine| engine.cause().is_none()) {
            for at in 0..PAGES {
                let found = self.image[at].unwrap_or(Content::Zero);
                let zeros_will_do = self.underway == Some(at) && found == Content::Zero;
                if found != self.t0[at] && !zeros_will_do {
                    return Err(format!("page {at} is {found:?} in the image, and was {:?} at T0", self.t0[at]));
                }
            }
        }
        Ok(())
    }
}

/// States, transitions and images, or what is wrong and the shortest way there.
fn explore(setup: &Setup, mistake: Mistake) -> Result<(usize, usize, usize), String> {
    let table = table(&[ram(PAGES as u64)]);
    let start = World::new(&table, setup);
    let mut seen = HashSet::from([start.key()]);
    let mut queue = VecDeque::from([(start, Vec::new())]);
    let (mut transitions, mut images) = (0, 0);
    while let Some((world, path)) = queue.pop_front() {
        let fail = |what: String, last: Option<Step>| {
            let path: Vec<Step> = path.iter().copied().chain(last).collect();
            format!("{}, {mistake:?}: {what}, after {} steps: {path:?}", setup.name, path.len())
        };
        let mut last = true;
        for step in world.steps(setup) {
            let mut next = world.clone();
            next.take(setup, mistake, step).map_err(|what| fail(what, Some(step)))?;
            transitions += 1;
            let key = next.key();
            // A step that changes nothing is no way on.
            last &= key == world.key();
            if seen.insert(key) {
                queue.push_back((next, path.iter().copied().chain([step]).collect()));
            }
        }
        if last {
            world.check_final(setup).map_err(|what| fail(what, None))?;
            images += usize::from(world.engine.is_some_and(|engine| engine.cause().is_none()));
        }
    }
    Ok((seen.len(), transitions, images))
}

const PLAIN: Setup = Setup { name: "during a restore", data: [true, true], writes: [&[0], &[1]], discard: None };
const ZERO: Setup =
    Setup { name: "during a restore, a zero page", data: [true, false], writes: [&[1, 0], &[1]], ..PLAIN };
const DISCARD: Setup = Setup { name: "during a restore, a discard", writes: [&[0], &[]], discard: Some(0), ..PLAIN };
const AFTER: Setup = Setup { name: "during a restore, the other is discarded", discard: Some(1), ..DISCARD };

#[test]
fn the_image_is_memory_at_t0_whatever_was_in() {
    for setup in [&PLAIN, &ZERO, &DISCARD, &AFTER] {
        let (states, transitions, images) = explore(setup, Mistake::None).unwrap_or_else(|what| panic!("{what}"));
        println!("{:<44} {states:>8} states {transitions:>9} transitions {images:>5} images", setup.name);
        assert!(images > 0, "{}: there is never an image", setup.name);
    }
}

#[test]
fn the_exploration_can_fail() {
    use Mistake as M;
    let cases = [
        (M::ComesInOpen, &PLAIN, "at T0"),
        (M::MissingForgotten, &PLAIN, "at T0"),
        (M::LooksTheOtherWayRound, &PLAIN, "at T0"),
        (M::DiscardKept, &DISCARD, "at T0"),
        (M::LossesUnheard, &DISCARD, "at T0"),
        (M::SwitchedOnLate, &PLAIN, "at T0"),
        (M::SwitchedOffLate, &ZERO, "for ever"),
    ];
    for (mistake, setup, complaint) in cases {
        let what = explore(setup, mistake).expect_err("it was not caught");
        println!("{what}");
        assert!(what.contains(complaint), "caught, but as: {what}");
    }
}
