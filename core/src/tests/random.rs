//! Thousands of random events over layouts too large to explore, judged by what the image must be: memory at T0.

use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::rig::{Core, Script, core, part, ram};
use crate::*;

/// Reproducible chance (xorshift64*).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) % limit
    }

    fn pick(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }
}

/// A run somewhere on its way; the numbers are the versions of its pages that were read so far.
enum Flight {
    Claimed(Claim, Vec<u64>),
    Captured(CapturedRun, Vec<u64>),
    Lifted(CapturedRun, Vec<u64>),
    Job(ReleasedRun, Vec<u64>),
}

struct Guest {
    core: Core,
    chance: Chance,
    /// Writes to each page since T0.
    versions: Vec<u64>,
    protected: Vec<bool>,
    /// Pages whose writers are blocked.
    blocked: Vec<u64>,
    unread: Vec<u64>,
    flights: Vec<Flight>,
    image: Vec<Option<u64>>,
    slots: u64,
    limits: Limits,
}

fn index(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl Guest {
    fn new(parts: &[RamBlock], slots: u16, limits: Limits, seed: u64) -> Self {
        let core = core(parts, slots, limits).unwrap();
        let pages = core.table().pages();
        let table = core.table();
        let tracked = |page| {
            let block = table.block_of(PageId(page)).and_then(|b| table.block(b)).unwrap();
            block.treatment == Treatment::Tracked
        };
        Self {
            chance: Chance(seed | 1),
            versions: vec![0; index(pages)],
            protected: (0..pages).map(tracked).collect(),
            blocked: Vec::new(),
            unread: Vec::new(),
            flights: Vec::new(),
            image: vec![None; index(pages)],
            slots: slots.into(),
            limits,
            core,
        }
    }

    fn event(&mut self) {
        let pages = self.core.table().pages();
        match self.chance.below(10) {
            0 | 1 => {
                let page = self.chance.below(pages);
                self.write(page);
            }
            2 if !self.unread.is_empty() => {
                let at = self.chance.pick(self.unread.len());
                // Now and then a message comes twice.
                let page = if self.chance.below(8) == 0 { self.unread[at] } else { self.unread.swap_remove(at) };
                match self.core.fault(page) {
                    FaultOutcome::Queued | FaultOutcome::Waits => {}
                    FaultOutcome::Stale(range) => self.lift(range),
                    FaultOutcome::QueueFull => self.unread.push(page),
                    FaultOutcome::NotOurs => panic!("page {page} is ours"),
                }
            }
            3 => {
                let page = PageId(self.chance.below(pages));
                let _ = self.core.handle_request(page);
            }
            4 => {
                let run = Run::new(PageId(self.chance.below(pages)), 1 + self.chance.below(40));
                match self.core.claim_for_discard(run) {
                    Discard::Claim(claim) => self.flights.push(Flight::Claimed(claim, Vec::new())),
                    Discard::Wait => {}
                    Discard::Clear => {
                        (run.first.0..run.end().0.min(pages)).for_each(|page| self.versions[index(page)] += 1)
                    }
                }
            }
            5 | 6 => self.claim(),
            _ if !self.flights.is_empty() => {
                let at = self.chance.pick(self.flights.len());
                self.advance(at);
            }
            _ => {}
        }
    }

    /// A write by a vCPU. Only tracked memory is written.
    fn write(&mut self, page: u64) {
        let block = self.core.table().block_of(PageId(page)).and_then(|b| self.core.table().block(b)).unwrap();
        if block.treatment != Treatment::Tracked {
            return;
        }
        if self.protected[index(page)] {
            self.blocked.push(page);
            self.unread.push(page);
        } else {
            self.versions[index(page)] += 1;
        }
    }

    fn claim(&mut self) {
        let who = [Worker::Faults, Worker::Scan, Worker::Pause][self.chance.pick(3)];
        let before = self.core.slots_in_use();
        if let Next::Claim(claim) = self.core.next_claim(who) {
            let block = self.core.table().block_of(claim.run().first).and_then(|b| self.core.table().block(b)).unwrap();
            assert_eq!(block.treatment == Treatment::InPause, who == Worker::Pause);
            assert_eq!(claim.run().pages % block.pages_per_host_page(), 0);
            assert_eq!(claim.range().start.0 % block.page_size, 0);
            assert_eq!(claim.slots().len() as u64, claim.run().pages.div_ceil(self.limits.slot_pages));
            let reserve = self.limits.reserve_slots.min(self.slots - self.slots.div_ceil(4));
            let whole_pool = before == 0 && claim.run().pages == block.pages_per_host_page();
            assert!(claim.origin() != Origin::Scan || self.core.slots_in_use() + reserve <= self.slots || whole_pool);
            self.flights.push(Flight::Claimed(claim, Vec::new()));
        }
    }

    /// One step of one run: copy a few pages, capture, unprotect, release, write.
    fn advance(&mut self, at: usize) {
        let next = match self.flights.swap_remove(at) {
            Flight::Claimed(claim, mut read) if (read.len() as u64) < claim.run().pages => {
                let page = claim.run().first.0 + read.len() as u64;
                let some = (page..claim.run().end().0).take(1 + self.chance.pick(64));
                read.extend(some.map(|page| self.versions[index(page)]));
                Flight::Claimed(claim, read)
            }
            Flight::Claimed(claim, read) => Flight::Captured(self.core.captured(claim), read),
            Flight::Captured(run, read) => {
                if run.is_protected() {
                    self.lift(run.range());
                }
                Flight::Lifted(run, read)
            }
            Flight::Lifted(run, read) => Flight::Job(self.core.released(run), read),
            Flight::Job(job, read) => {
                for (page, version) in (job.run().first.0..).zip(read) {
                    assert_eq!(self.image[index(page)].replace(version), None, "page {page} is saved twice");
                }
                self.core.written(job);
                return;
            }
        };
        self.flights.push(next);
    }

    fn lift(&mut self, range: HostRange) {
        let runs: Vec<Run> = self.core.table().runs_in(range).collect();
        let inside = |page: u64| runs.iter().any(|run| run.contains(PageId(page)));
        runs.iter().for_each(|run| self.protected[index(run.first.0)..index(run.end().0)].fill(false));
        self.blocked.retain(|&page| !inside(page));
    }

    /// Claims, slots and pages add up.
    fn check(&self) {
        let mut slots = vec![false; index(self.slots)];
        let (mut in_flight, mut claimed) = (0, 0);
        for flight in &self.flights {
            let (run, of_it, is_claimed) = match flight {
                Flight::Claimed(claim, _) => (claim.run(), claim.slots(), 1),
                Flight::Captured(run, _) | Flight::Lifted(run, _) => (run.run(), run.slots(), 1),
                Flight::Job(job, _) => (job.run(), job.slots(), 0),
            };
            in_flight += run.pages;
            claimed += is_claimed;
            of_it.iter().for_each(|slot| assert!(!std::mem::replace(&mut slots[usize::from(slot.0)], true)));
        }
        let saved = self.image.iter().flatten().count() as u64;
        assert_eq!(slots.iter().filter(|&&taken| taken).count() as u64, self.core.slots_in_use());
        assert_eq!(self.core.claimed_runs().count(), claimed);
        assert_eq!(self.core.pending() + in_flight + saved, self.core.table().pages());
        for (page, &blocked) in (0u64..).zip(&self.protected) {
            assert!(!blocked || self.image[index(page)].is_none(), "page {page} is saved and still protected");
        }
    }

    /// No more writes: everything comes to its end by itself.
    fn finish(mut self) {
        let mut rounds = 0;
        while !self.core.is_written() {
            rounds += 1;
            assert!(rounds < 100_000, "it does not end: {} pages pending", self.core.pending());
            self.claim();
            while let Some(page) = self.unread.pop() {
                match self.core.fault(page) {
                    FaultOutcome::Stale(range) => self.lift(range),
                    FaultOutcome::QueueFull => {
                        self.unread.push(page);
                        break;
                    }
                    _ => {}
                }
            }
            (0..self.flights.len().min(1)).for_each(|at| self.advance(at));
        }
        self.check();
        assert!(self.blocked.is_empty(), "blocked for ever: {:?}", self.blocked);
        assert!(!self.protected.contains(&true));
        assert!(self.image.iter().all(|version| *version == Some(0)), "the image is not memory at T0");
        let counts = self.core.counts();
        assert_eq!((counts.total, counts.released), (self.core.table().pages(), self.core.table().pages()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_long_life_ends_with_memory_at_t0(
        seed in any::<u64>(),
        slots in 8u16..100,
        slot_pages in 1u64..20,
        reserve_slots in 0u64..20,
        (scan_pages, around_min, around_max) in (1u64..70, 1u64..40, 1u64..70),
    ) {
        let limits =
            Limits { slot_pages, reserve_slots, scan_pages, around_min, around_max, when_full: WhenFull::Stall };
        let parts = [
            ram(700),
            part(64, 8 * PAGE_SIZE, Treatment::Tracked),
            part(9, PAGE_SIZE, Treatment::ReadOnly),
            part(5, PAGE_SIZE, Treatment::Ignored),
            part(16, PAGE_SIZE, Treatment::InPause),
            part(96, 2 * PAGE_SIZE, Treatment::Tracked),
            ram(3),
        ];
        let mut guest = Guest::new(&parts, slots, limits, seed);
        for i in 0..6000 {
            guest.event();
            if i % 50 == 0 {
                guest.check();
            }
        }
        prop_assert_eq!(guest.core.cause(), None);
        guest.finish();
    }
}
