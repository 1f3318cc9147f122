//! A small world: two vCPUs that read, the kernel, a VMM that discards, the server, one or two prefetchers.

use core::hash::{Hash, Hasher};
use std::{format, string::String, vec::Vec};

use crate::tests::FillDefect;
use crate::*;

const BASE: u64 = 0x1000_0000;
/// Most pages of a world.
const PAGES: usize = 4;

/// What is fixed in a world.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) name: &'static str,
    pub(super) pages: u64,
    /// Pages that hold data, one bit each.
    pub(super) data: u64,
    pub(super) per_host: u64,
    pub(super) around: u64,
    pub(super) chunk: u64,
    pub(super) programs: [&'static [u64]; 2],
    pub(super) prefetchers: usize,
    /// The page that the VMM discards.
    pub(super) discard: Option<u64>,
    /// Reads that fail, at most.
    pub(super) errors: u8,
    /// Claims that end before all is put in, at most.
    pub(super) dropped: u8,
    /// Messages that come twice, at most.
    pub(super) twice: u8,
    pub(super) cancel: bool,
    /// Lost pages are poisoned; else who touches one stays blocked.
    pub(super) poison: bool,
    pub(super) defect: Option<FillDefect>,
}

impl Setup {
    pub(super) const PLAIN: Self = Self {
        name: "plain",
        pages: 3,
        data: 0b011,
        per_host: 1,
        around: 1,
        chunk: 2,
        programs: [&[0, 1], &[1, 2]],
        prefetchers: 1,
        discard: None,
        errors: 0,
        dropped: 0,
        twice: 0,
        cancel: false,
        poison: true,
        defect: None,
    };

    fn is_data(&self, page: u64) -> bool {
        self.data >> page & 1 == 1
    }

    /// Whether the host page of `page` has data.
    fn matters(&self, page: u64) -> bool {
        let first = page / self.per_host * self.per_host;
        (first..first + self.per_host).any(|page| self.is_data(page))
    }
}

impl Content for Setup {
    fn extent(&self, first: PageId) -> Option<(Run, bool)> {
        let is = self.is_data(first.0);
        let end = (first.0..self.pages).find(|&page| self.is_data(page) != is).unwrap_or(self.pages);
        (first.0 < self.pages).then(|| (Run::new(first, end - first.0), !is))
    }
}

/// What is at a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Page {
    Absent,
    /// What the image has.
    Image,
    Zero,
    Poison,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Message {
    Fault(u64),
    Discard,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Vmm {
    Ready,
    /// The event is unread: the kernel puts off what is put in.
    Posted,
    /// The event was read: the page can go at any moment.
    Read,
    Done,
}

/// A claim in somebody's hand.
#[derive(Clone, Debug)]
enum Hand {
    Empty,
    Reading(FillClaim),
    /// Read, good or not; put in up to a page.
    Read(FillClaim, bool, u64),
    /// The next page was found wanted, and is not put in yet (a defect).
    About(FillClaim, bool, u64),
}

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Touch(usize),
    Post,
    Zap,
    ReadMessage,
    ServeNext,
    ServerReads { ok: bool },
    ServerPuts,
    Answer,
    Offer,
    Prefetch(usize),
    PrefetchReads(usize, bool),
    Drop,
    Again,
    Cancel,
    GiveUp,
    Finish,
}

impl Step {
    /// Whether it happens sooner or later by itself.
    pub(super) const fn is_certain(self) -> bool {
        !matches!(
            self,
            Self::Post
                | Self::ServerReads { ok: false }
                | Self::PrefetchReads(_, false)
                | Self::Drop
                | Self::Again
                | Self::Cancel
        )
    }
}

#[derive(Clone)]
pub(super) struct World {
    core: Fill<&'static BlockTable, [u64; 2], 2, 4>,
    memory: [Page; PAGES],
    /// Pages whose content the VMM has discarded.
    zapped: u64,
    done: [usize; 2],
    blocked: [bool; 2],
    unread: Vec<Message>,
    vmm: Vmm,
    server: Hand,
    prefetchers: [Hand; 2],
    offers: Vec<Hand>,
    zeros: Vec<HostRange>,
    lost: Vec<HostRange>,
    held: Vec<u64>,
    errors: u8,
    dropped: u8,
    twice: u8,
    cancelled: bool,
    gave_up: bool,
    finished: bool,
}

fn page_of(at: HostAddr) -> u64 {
    (at.0 - BASE) / PAGE_SIZE
}

impl World {
    pub(super) fn new(setup: &Setup) -> Self {
        let block = RamBlock {
            name: BlockName::new("ram").unwrap(),
            guest: GuestAddr(0),
            host: HostAddr(BASE),
            len: setup.pages * PAGE_SIZE,
            used: setup.pages * PAGE_SIZE,
            page_size: setup.per_host * PAGE_SIZE,
            backing: Backing::Anonymous,
            treatment: Treatment::Tracked,
        };
        let table = std::boxed::Box::leak(std::boxed::Box::new(BlockTable::new(&[block]).unwrap()));
        let map = || PageBitmap::new([0; 2], setup.pages, true).unwrap();
        let limits =
            Limits { scan_pages: setup.chunk, around_min: setup.around, around_max: setup.around, ..Limits::default() };
        let mut core = Fill::new(&*table, map(), map(), limits).unwrap();
        if let Some(defect) = setup.defect {
            core.break_with(defect);
        }
        Self {
            core,
            memory: [Page::Absent; PAGES],
            zapped: 0,
            done: [0; 2],
            blocked: [false; 2],
            unread: Vec::new(),
            vmm: if setup.discard.is_some() { Vmm::Ready } else { Vmm::Done },
            server: Hand::Empty,
            prefetchers: [const { Hand::Empty }; 2],
            offers: Vec::new(),
            zeros: Vec::new(),
            lost: Vec::new(),
            held: Vec::new(),
            errors: setup.errors,
            dropped: setup.dropped,
            twice: setup.twice,
            cancelled: false,
            gave_up: false,
            finished: false,
        }
    }

    pub(super) fn key(&self, hasher: &mut impl Hasher) {
        self.core.key(hasher);
        (self.memory, self.zapped, self.done, self.blocked, &self.unread, self.vmm).hash(hasher);
        let hand = |hand: &Hand| match hand {
            Hand::Empty => (0, 0, 0, false, 0, false),
            Hand::Reading(c) => (1, c.run().first.0, c.run().pages, false, 0, c.origin() == FillOrigin::Fault),
            Hand::Read(c, ok, at) => (2, c.run().first.0, c.run().pages, *ok, *at, c.origin() == FillOrigin::Fault),
            Hand::About(c, ok, at) => (3, c.run().first.0, c.run().pages, *ok, *at, c.origin() == FillOrigin::Fault),
        };
        (hand(&self.server), hand(&self.prefetchers[0]), hand(&self.prefetchers[1])).hash(hasher);
        self.offers.iter().for_each(|offer| hand(offer).hash(hasher));
        (&self.zeros, &self.lost, &self.held, self.errors, self.dropped, self.twice).hash(hasher);
        (self.cancelled, self.gave_up, self.finished, self.offers.len()).hash(hasher);
    }

    fn changing(&self) -> bool {
        self.vmm == Vmm::Posted
    }

    fn target(&self, setup: &Setup, vcpu: usize) -> Option<u64> {
        setup.programs[vcpu].get(self.done[vcpu]).copied()
    }

    pub(super) fn steps(&self, setup: &Setup) -> Vec<Step> {
        let mut steps = Vec::new();
        for vcpu in 0..2 {
            if self.target(setup, vcpu).is_some() && !self.blocked[vcpu] {
                steps.push(Step::Touch(vcpu));
            }
        }
        match self.vmm {
            Vmm::Ready if !self.finished => steps.push(Step::Post),
            Vmm::Read => steps.push(Step::Zap),
            _ => {}
        }
        if self.finished {
            return steps;
        }
        if self.cancelled && !self.gave_up && matches!(self.server, Hand::Empty) && !self.changing() {
            steps.push(Step::GiveUp);
        }
        if setup.cancel && !self.cancelled {
            steps.push(Step::Cancel);
        }
        let waits = self.changing();
        match &self.server {
            Hand::Empty => {
                if !self.unread.is_empty() || !self.held.is_empty() && !self.core.has_faults() {
                    steps.push(Step::ReadMessage);
                }
                if self.core.has_faults() && !self.core.is_ended() {
                    steps.push(Step::ServeNext);
                }
                if !self.offers.is_empty() && !waits && !self.cancelled {
                    steps.push(Step::Offer);
                    if self.dropped > 0 {
                        steps.push(Step::Drop);
                    }
                }
                if (!self.zeros.is_empty() || !self.lost.is_empty()) && !waits {
                    steps.push(Step::Answer);
                }
                if self.may_finish(setup) {
                    steps.push(Step::Finish);
                }
            }
            Hand::Reading(_) => {
                steps.push(Step::ServerReads { ok: true });
                if self.errors > 0 {
                    steps.push(Step::ServerReads { ok: false });
                }
            }
            Hand::Read(..) if waits => steps.push(Step::ReadMessage),
            Hand::Read(..) => steps.push(Step::ServerPuts),
            Hand::About(..) => {
                steps.push(Step::ServerPuts);
                if !self.unread.is_empty() {
                    steps.push(Step::ReadMessage);
                }
            }
        }
        for i in 0..setup.prefetchers {
            match &self.prefetchers[i] {
                Hand::Empty if !self.cancelled => {
                    let mut probe = self.core.clone();
                    if matches!(probe.next_prefetch(self.all(setup), setup), NextFill::Fill(_))
                        || probe.is_complete() != self.core.is_complete()
                    {
                        steps.push(Step::Prefetch(i));
                    }
                }
                Hand::Reading(_) => {
                    steps.push(Step::PrefetchReads(i, true));
                    if self.errors > 0 {
                        steps.push(Step::PrefetchReads(i, false));
                    }
                }
                _ => {}
            }
        }
        if self.twice > 0 && !self.unread.is_empty() {
            steps.push(Step::Again);
        }
        steps
    }

    fn all(&self, setup: &Setup) -> Run {
        Run::new(PageId(0), setup.pages)
    }

    fn may_finish(&self, setup: &Setup) -> bool {
        let over = if self.core.is_ended() { self.gave_up } else { self.core.is_complete() && self.offers.is_empty() };
        let over = over || setup.defect == Some(FillDefect::CompleteTooEarly) && self.core.is_complete();
        let stays = !setup.poison && self.core.lost_pages() > 0;
        over && !stays
            && self.zeros.is_empty()
            && self.lost.is_empty()
            && self.held.is_empty()
            && (!self.core.has_faults() || self.core.is_ended())
    }

    pub(super) fn take(&mut self, setup: &Setup, step: Step) -> Result<(), String> {
        match step {
            Step::Touch(vcpu) => return self.touch(setup, vcpu),
            Step::Post => {
                self.vmm = Vmm::Posted;
                self.unread.push(Message::Discard);
            }
            Step::Zap => {
                self.vmm = Vmm::Done;
                let page = setup.discard.unwrap();
                self.memory[usize::try_from(page).unwrap()] = Page::Absent;
                self.zapped |= 1 << page;
            }
            Step::Again => {
                self.twice -= 1;
                let first = self.unread[0];
                if first != Message::Discard {
                    self.unread.push(first);
                }
            }
            Step::ReadMessage => self.read_message(setup),
            Step::ServeNext => match self.core.next_fault(setup) {
                NextFill::Fill(claim) => self.server = Hand::Reading(claim),
                NextFill::Zero(range) => self.zero(setup, range),
                NextFill::Lost(range) => self.lost.push(range),
                NextFill::Idle => {}
                other => return Err(format!("next_fault: {other:?}")),
            },
            Step::ServerReads { ok } => {
                self.errors -= u8::from(!ok);
                let Hand::Reading(claim) = core::mem::replace(&mut self.server, Hand::Empty) else { unreachable!() };
                let at = claim.run().first.0;
                self.server = Hand::Read(claim, ok, at);
            }
            Step::ServerPuts => {
                let hand = core::mem::replace(&mut self.server, Hand::Empty);
                self.server = self.put(setup, hand)?;
            }
            Step::Offer => {
                let hand = self.offers.remove(0);
                let rest = self.put(setup, hand)?;
                if matches!(rest, Hand::About(..)) {
                    // The server holds it between its two steps.
                    self.server = rest;
                } else if !matches!(rest, Hand::Empty) {
                    self.offers.insert(0, rest);
                }
            }
            Step::Drop => {
                self.dropped -= 1;
                let Hand::Read(claim, ..) = self.offers.remove(0) else { unreachable!() };
                self.core.end(claim);
            }
            Step::Answer => self.answer(setup)?,
            Step::Prefetch(i) => {
                if let NextFill::Fill(claim) = self.core.next_prefetch(self.all(setup), setup) {
                    self.prefetchers[i] = Hand::Reading(claim);
                }
            }
            Step::PrefetchReads(i, ok) => {
                self.errors -= u8::from(!ok);
                let hand = core::mem::replace(&mut self.prefetchers[i], Hand::Empty);
                let Hand::Reading(claim) = hand else { unreachable!() };
                let at = claim.run().first.0;
                self.offers.push(Hand::Read(claim, ok, at));
            }
            Step::Cancel => {
                self.cancelled = true;
                self.core.cancel();
            }
            Step::GiveUp => {
                self.gave_up = true;
                let just_ends = setup.defect == Some(FillDefect::CancelJustEnds);
                while let (false, Some(run)) = (just_ends, self.core.next_missing(PageId(0), setup)) {
                    self.core.give_up(run);
                    self.lost.push(self.core.range_of(run));
                }
            }
            Step::Finish => {
                self.finished = true;
                self.blocked = [false; 2];
                // Nobody waits for an event of a context that is gone.
                if self.vmm == Vmm::Posted {
                    self.vmm = Vmm::Read;
                }
                self.unread.clear();
            }
        }
        Ok(())
    }

    fn touch(&mut self, setup: &Setup, vcpu: usize) -> Result<(), String> {
        let page = self.target(setup, vcpu).unwrap();
        let index = usize::try_from(page).unwrap();
        let zapped = self.zapped >> page & 1 == 1;
        match self.memory[index] {
            Page::Absent if self.finished => {
                if setup.is_data(page) && !zapped && !self.discarding(setup, page) {
                    return Err(format!("zeros for data: vCPU {vcpu} reads page {page} after the end"));
                }
                self.memory[index] = Page::Zero;
            }
            Page::Absent => {
                self.blocked[vcpu] = true;
                self.unread.push(Message::Fault(page));
                return Ok(());
            }
            Page::Image if zapped => return Err(format!("page {page} came back from the image after its discard")),
            Page::Zero if setup.is_data(page) && !zapped && !self.discarding(setup, page) => {
                return Err(format!("zeros for data: vCPU {vcpu} reads page {page}"));
            }
            Page::Image | Page::Zero | Page::Poison => {}
        }
        if self.memory[index] == Page::Poison && setup.errors == 0 && !self.cancelled {
            return Err(format!("page {page} is poisoned, and nothing failed"));
        }
        self.done[vcpu] += 1;
        Ok(())
    }

    /// Its discard is under way: it may be zero a moment early.
    fn discarding(&self, setup: &Setup, page: u64) -> bool {
        setup.discard == Some(page) && self.vmm == Vmm::Read
    }

    fn wake(&mut self, setup: &Setup, run: Run) {
        for vcpu in 0..2 {
            if self.target(setup, vcpu).is_some_and(|page| run.contains(PageId(page))) {
                self.blocked[vcpu] = false;
            }
        }
    }

    fn zero(&mut self, setup: &Setup, range: HostRange) {
        if setup.defect != Some(FillDefect::StaleNotWoken) {
            self.zeros.push(range);
        }
    }

    fn read_message(&mut self, setup: &Setup) {
        let fault = |world: &mut Self, page: u64| match world.core.handle_fault(HostAddr(BASE + page * PAGE_SIZE)) {
            FillFault::Queued | FillFault::Waits => {}
            FillFault::Zero(range) => world.zero(setup, range),
            FillFault::Lost(range) => world.lost.push(range),
            FillFault::QueueFull => world.held.push(page),
            FillFault::NotOurs => unreachable!(),
        };
        for page in core::mem::take(&mut self.held) {
            fault(self, page);
        }
        if self.unread.is_empty() {
            return;
        }
        match self.unread.remove(0) {
            Message::Fault(page) => fault(self, page),
            Message::Discard => {
                let page = setup.discard.unwrap();
                self.core.handle_discarded(HostRange::new(HostAddr(BASE + page * PAGE_SIZE), PAGE_SIZE));
                self.vmm = Vmm::Read;
            }
        }
    }

    /// Puts in the next host page that is wanted.
    fn put(&mut self, setup: &Setup, hand: Hand) -> Result<Hand, String> {
        let (claim, ok, at, about) = match hand {
            Hand::Read(claim, ok, at) => (claim, ok, at, false),
            Hand::About(claim, ok, at) => (claim, ok, at, true),
            other => return Ok(other),
        };
        let first = if about {
            PageId(at)
        } else {
            let Some(wanted) = self.core.wanted(&claim, PageId(at)) else {
                self.core.end(claim);
                return Ok(Hand::Empty);
            };
            if setup.defect == Some(FillDefect::PutInLater) {
                return Ok(Hand::About(claim, ok, wanted.first.0));
            }
            wanted.first
        };
        let run = Run::new(first, setup.per_host);
        if !run.first.0.is_multiple_of(setup.per_host) || run.end() > claim.run().end() {
            return Err(format!("{run} of {} is no whole host page", claim.run()));
        }
        let range = self.core.range_of(run);
        if ok || claim.holds() == Holds::Zero {
            self.fill(run, if claim.holds() == Holds::Zero { Page::Zero } else { Page::Image });
            self.core.put_in(&claim, run);
            self.wake(setup, run);
        } else {
            self.core.lose(&claim, run);
            self.lost.push(range);
        }
        Ok(Hand::Read(claim, ok, run.end().0))
    }

    /// Where nothing is.
    fn fill(&mut self, run: Run, with: Page) {
        for page in run.first.0..run.end().0 {
            let place = &mut self.memory[usize::try_from(page).unwrap()];
            if *place == Page::Absent {
                *place = with;
            }
        }
    }

    fn answer(&mut self, setup: &Setup) -> Result<(), String> {
        let run = |range: HostRange| Run::new(PageId(page_of(range.start)), range.len / PAGE_SIZE);
        for range in core::mem::take(&mut self.zeros) {
            let absent = |page: u64| self.memory[usize::try_from(page).unwrap()] == Page::Absent;
            let run = run(range);
            let bad = |&page: &u64| absent(page) && setup.matters(page) && setup.discard != Some(page);
            if let Some(page) = (run.first.0..run.end().0).find(bad) {
                return Err(format!("zeros for data: put into page {page}"));
            }
            self.fill(run, Page::Zero);
            self.wake(setup, run);
        }
        for range in core::mem::take(&mut self.lost) {
            if setup.poison {
                self.fill(run(range), Page::Poison);
                self.wake(setup, run(range));
            }
        }
        Ok(())
    }

    /// Nothing is left to happen.
    pub(super) fn check_final(&self, setup: &Setup) -> Result<(), String> {
        for vcpu in 0..2 {
            let Some(page) = self.target(setup, vcpu) else { continue };
            let first = page / setup.per_host * setup.per_host;
            let lost = (first..first + setup.per_host).any(|page| self.core.is_lost(PageId(page)));
            let lost = !setup.poison && (lost || self.cancelled);
            if !(lost && self.memory[usize::try_from(page).unwrap()] == Page::Absent) {
                return Err(format!("vCPU {vcpu} waits for ever for page {page}"));
            }
        }
        let stays = !setup.poison && self.core.lost_pages() > 0;
        if !self.finished && !stays {
            return Err("the restore is never over".into());
        }
        if matches!(self.vmm, Vmm::Posted | Vmm::Read) {
            return Err("the VMM's discard hangs".into());
        }
        Ok(())
    }
}
