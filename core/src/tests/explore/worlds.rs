//! The worlds. Each turns a few knobs of the plain one; together they cover every decision of the core.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
    vec::Vec,
};

use super::world::{DiscardPlan, Part, Seen, Setup, tracked};
use super::{Figures, prove};
use crate::*;

/// A world, and the capacities of its core.
pub(super) type Entry = (fn(&Setup) -> Figures, Setup);

const PLAIN: Setup = Setup::PLAIN;
const ONE: Limits = PLAIN.limits;
/// Two pages a slot, and a window of two pages.
const PAIRS: Limits = Limits { slot_pages: 2, scan_pages: 2, around_min: 2, around_max: 2, ..ONE };
/// The window of a fault grows from one page to two; the scan would like two, and may have one.
const GROWING: Limits = Limits { around_max: 2, scan_pages: 2, ..ONE };
const CANCEL: Limits = Limits { when_full: WhenFull::Cancel, ..ONE };
const HUGE: Part = Part { pages: 2, page_size: 2 * PAGE_SIZE, treatment: Treatment::Tracked };
const ROM: Part = Part { pages: 1, page_size: PAGE_SIZE, treatment: Treatment::ReadOnly };
const FLASH: Part = Part { pages: 1, page_size: PAGE_SIZE, treatment: Treatment::InPause };
const SHARED: Part = Part { pages: 1, page_size: PAGE_SIZE, treatment: Treatment::Ignored };
/// In the first block's tail (if it has one page), in the second and third block, nowhere.
const ODD: &[u64] = &[0x1000, 0x10_0000, 0x1f_0000];

const fn discard(page: u64, pages: u64, announced: bool) -> Option<DiscardPlan> {
    Some(DiscardPlan { run: Run::new(PageId(page), pages), announced })
}

pub(super) const DEFAULT: &[Entry] = &[
    (prove::<2, 3>, PLAIN),
    (prove::<2, 3>, Setup { name: "three pages", parts: &[tracked(3)], programs: [&[0, 1, 0], &[2, 1]], ..PLAIN }),
    (
        prove::<2, 3>,
        Setup {
            name: "three pages, pool of one slot",
            parts: &[tracked(3)],
            programs: [&[0, 1, 0], &[1, 2]],
            slots: 1,
            ..PLAIN
        },
    ),
    (prove::<1, 3>, Setup { name: "fault queue of one", parts: &[tracked(3)], programs: [&[2, 0], &[1, 2]], ..PLAIN }),
    (prove::<2, 1>, Setup { name: "one claim at a time", parts: &[tracked(3)], programs: [&[2, 0], &[1, 2]], ..PLAIN }),
    (
        prove::<2, 3>,
        Setup {
            name: "two blocks, EAGAIN, spurious wake-ups",
            parts: &[tracked(1), tracked(1)],
            spurious: 1,
            again: 2,
            ..PLAIN
        },
    ),
    (prove::<2, 3>, Setup { name: "messages twice, one slot", slots: 1, spurious: 2, ..PLAIN }),
    (
        prove::<2, 3>,
        Setup {
            name: "pairs: torn copies",
            parts: &[tracked(3)],
            programs: [&[1, 0, 2], &[2, 1]],
            limits: PAIRS,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup { name: "growing window", parts: &[tracked(3)], programs: [&[1, 0], &[2, 1]], limits: GROWING, ..PLAIN },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "2-page host page, needs the whole pool",
            parts: &[HUGE, tracked(1)],
            programs: [&[1, 0, 2], &[2, 0]],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "2-page host page, one slot holds it",
            parts: &[tracked(1), HUGE],
            programs: [&[1, 2], &[2, 0]],
            limits: PAIRS,
            spurious: 1,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "2-page host page, asked for, pool half full",
            parts: &[tracked(2), HUGE],
            programs: [&[1], &[3]],
            requests: &[2],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup { name: "captured in the pause", parts: &[FLASH, tracked(2)], programs: [&[0, 1, 0], &[2, 1]], ..PLAIN },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "captured in the pause, one slot",
            parts: &[tracked(1), FLASH, FLASH],
            programs: [&[2, 0], &[1, 0]],
            slots: 1,
            odd: &[0x10_0000],
            requests: &[1],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "read-only and ignored, odd addresses",
            parts: &[tracked(1), ROM, SHARED, tracked(1)],
            programs: [&[0, 2], &[2, 0]],
            odd: ODD,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "full pool cancels",
            parts: &[tracked(3)],
            programs: [&[0, 1, 2], &[2, 1]],
            limits: CANCEL,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "full pool cancels, 2-page host page",
            parts: &[HUGE, tracked(1)],
            programs: [&[1, 2], &[2]],
            limits: CANCEL,
            requests: &[0],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup { name: "requests", parts: &[tracked(3)], programs: [&[0, 1], &[1]], requests: &[2, 1, 2], ..PLAIN },
    ),
    (
        prove::<1, 2>,
        Setup {
            name: "requests, queues of one",
            parts: &[tracked(3)],
            programs: [&[0, 1], &[]],
            requests: &[2, 1, 0],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup { name: "discard, announced", discard: discard(0, 1, true), programs: [&[0, 1, 0], &[1]], ..PLAIN },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "discard of two pages, announced, one slot",
            discard: discard(0, 2, true),
            programs: [&[0, 1], &[]],
            slots: 1,
            again: 1,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "discard of a 2-page host page, announced",
            parts: &[HUGE, tracked(1)],
            discard: discard(0, 2, true),
            programs: [&[1], &[2, 0]],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup { name: "discard, unannounced", discard: discard(1, 1, false), programs: [&[0, 1], &[1]], ..PLAIN },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "discard, unannounced, one slot, EAGAIN",
            discard: discard(0, 1, false),
            programs: [&[0, 1], &[]],
            slots: 1,
            again: 1,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "only what is dirty, of three blocks",
            parts: &[tracked(2), HUGE, tracked(1)],
            members: 0b0_1110,
            gaps: 0b1_0001,
            programs: [&[0, 1, 4], &[3, 4]],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "hot pages first, two pages a granule",
            parts: &[tracked(4)],
            granule: 2,
            hot: 0b0100,
            programs: [&[2, 0], &[3]],
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "a granule larger than the pool, hot flash",
            parts: &[FLASH, tracked(3)],
            granule: 4,
            hot: 0b0101,
            programs: [&[0, 2], &[3]],
            discard: discard(1, 1, false),
            ..PLAIN
        },
    ),
];

pub(super) const LARGE: &[Entry] = &[
    (
        prove::<2, 3>,
        Setup { name: "L four pages", parts: &[tracked(4)], programs: [&[0, 1, 0, 3], &[2, 1, 3]], ..PLAIN },
    ),
    (
        prove::<2, 4>,
        Setup { name: "L three slots", parts: &[tracked(3)], programs: [&[0, 1, 0], &[2, 1]], slots: 3, ..PLAIN },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "L pairs of two blocks, spurious, EAGAIN",
            parts: &[tracked(3), tracked(1)],
            programs: [&[1, 3, 0], &[2, 1]],
            limits: PAIRS,
            spurious: 1,
            again: 1,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "L discard, requests, growing window",
            parts: &[tracked(3)],
            programs: [&[1, 0, 2], &[2, 1]],
            limits: GROWING,
            discard: discard(1, 2, true),
            requests: &[2, 0],
            again: 1,
            ..PLAIN
        },
    ),
    (
        prove::<2, 3>,
        Setup {
            name: "L two 2-page host pages, discard unannounced",
            parts: &[HUGE, HUGE],
            programs: [&[1, 2, 0], &[3, 1]],
            limits: PAIRS,
            discard: discard(2, 2, false),
            spurious: 1,
            ..PLAIN
        },
    ),
];

/// Two threads take world after world from the list. Returns which answers of the core were seen.
fn prove_all(worlds: &'static [Entry]) -> u32 {
    let started = Instant::now();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut sum = Figures::default();
        while let Some((prove, setup)) = worlds.get(next.fetch_add(1, Ordering::Relaxed)) {
            let one = prove(setup);
            sum.worlds += one.worlds;
            sum.states += one.states;
            sum.transitions += one.transitions;
            sum.seen |= one.seen;
        }
        sum
    };
    let sums: Vec<Figures> = thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.map(|thread| thread.join().unwrap()).into_iter().collect()
    });
    let total = |of: fn(&Figures) -> usize| sums.iter().map(of).sum::<usize>();
    std::println!(
        "explored: {} worlds, {} states, {} transitions, {:.1} s",
        total(|sum| sum.worlds),
        total(|sum| sum.states),
        total(|sum| sum.transitions),
        started.elapsed().as_secs_f64()
    );
    sums.iter().fold(0, |seen, sum| seen | sum.seen)
}

#[test]
fn every_state_of_every_world_is_right() {
    let seen = prove_all(DEFAULT);
    let missing = (0..=Seen::LAST as u32).filter(|bit| seen >> bit & 1 == 0).collect::<Vec<_>>();
    assert!(missing.is_empty(), "some answers of the core were never seen: numbers {missing:?} of `Seen`");
}

#[test]
fn every_state_of_the_large_worlds_is_right() {
    if std::env::var_os("RAMSHOT_EXPLORE").is_none_or(|which| which != "large") {
        std::println!("SKIPPED: the large worlds; RAMSHOT_EXPLORE=large explores them");
        return;
    }
    let _ = prove_all(LARGE);
}
