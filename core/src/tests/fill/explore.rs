//! Every interleaving of a small world, breadth first, over the real core. Where nothing certain is left to happen nobody may wait,
//! and nothing may go on for ever; a page is never zeros for data, never the image's after its discard.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::{format, println, string::String, vec, vec::Vec};

use super::world::{Setup, Step, World};
use crate::tests::FillDefect;

fn digest(world: &World) -> u128 {
    let half = |seed: u64| {
        let mut hasher = DefaultHasher::new();
        seed.hash(&mut hasher);
        world.key(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}

/// States and transitions, or what is wrong and the shortest way there.
fn explore(setup: &Setup) -> Result<(usize, usize), String> {
    let start = World::new(setup);
    let mut seen = HashMap::from([(digest(&start), 0usize)]);
    let mut came: Vec<(usize, Option<Step>)> = vec![(0, None)];
    let mut worlds = std::collections::VecDeque::from([start]);
    let mut certain: Vec<Vec<usize>> = Vec::new();
    let mut transitions = 0;
    let fail = |came: &[(usize, Option<Step>)], mut at: usize, last: Option<Step>, what: String| {
        let mut path = Vec::from_iter(last);
        while let (before, Some(step)) = came[at] {
            path.push(step);
            at = before;
        }
        path.reverse();
        format!("{}: {what}, after {} steps: {path:?}", setup.name, path.len())
    };
    let mut state = 0;
    while let Some(world) = worlds.pop_front() {
        let mut ways = Vec::new();
        for step in world.steps(setup) {
            let mut next = world.clone();
            next.take(setup, step).map_err(|what| fail(&came, state, Some(step), what))?;
            transitions += 1;
            let target = *seen.entry(digest(&next)).or_insert_with(|| {
                came.push((state, Some(step)));
                worlds.push_back(next);
                came.len() - 1
            });
            if step.is_certain() {
                if target == state {
                    return Err(fail(&came, state, Some(step), "this can go on for ever".into()));
                }
                ways.push(target);
            }
        }
        if ways.is_empty() {
            world.check_final(setup).map_err(|what| fail(&came, state, None, what))?;
        }
        certain.push(ways);
        state += 1;
    }
    match on_a_cycle(&certain) {
        Some(state) => Err(fail(&came, state, None, "this can go on for ever".into())),
        None => Ok((certain.len(), transitions)),
    }
}

fn on_a_cycle(targets: &[Vec<usize>]) -> Option<usize> {
    let mut ways_in = vec![0u32; targets.len()];
    targets.iter().flatten().for_each(|&target| ways_in[target] += 1);
    let mut ready: Vec<usize> = (0..targets.len()).filter(|&state| ways_in[state] == 0).collect();
    while let Some(state) = ready.pop() {
        for &target in &targets[state] {
            ways_in[target] -= 1;
            if ways_in[target] == 0 {
                ready.push(target);
            }
        }
    }
    ways_in.iter().position(|&ways| ways > 0)
}

fn prove(setup: &Setup) {
    match explore(setup) {
        Ok((states, transitions)) => {
            println!("{:<44} {states:>8} states {transitions:>9} transitions", setup.name);
            assert!(states > 20, "{}: too small a world", setup.name);
        }
        Err(what) => panic!("{what}"),
    }
}

const PLAIN: Setup = Setup::PLAIN;
const DISCARD: Setup = Setup { name: "a discard", discard: Some(1), ..PLAIN };

#[test]
fn pages_come_in_whatever_the_order() {
    prove(&PLAIN);
    prove(&Setup { name: "windows of two", around: 2, programs: [&[0, 1], &[1, 0]], ..PLAIN });
    prove(&Setup { name: "two prefetchers", prefetchers: 2, chunk: 1, ..PLAIN });
    prove(&Setup { name: "all data, messages twice", data: 0b111, twice: 2, ..PLAIN });
    prove(&Setup {
        name: "host pages of two",
        pages: 4,
        data: 0b0001,
        per_host: 2,
        programs: [&[0, 3], &[1]],
        ..PLAIN
    });
    prove(&Setup { name: "claims that end early", dropped: 2, ..PLAIN });
}

#[test]
fn a_discarded_page_is_zero_and_nobody_hangs() {
    prove(&DISCARD);
    prove(&Setup { name: "a discard, windows of two", around: 2, twice: 1, ..DISCARD });
    prove(&Setup { name: "a discard, two prefetchers", prefetchers: 2, dropped: 1, ..DISCARD });
    prove(&Setup { name: "a discard, an error", errors: 1, ..DISCARD });
    prove(&Setup { name: "a discard, an error, nothing poisoned", errors: 1, poison: false, ..DISCARD });
    prove(&Setup { name: "a discard of zeros", discard: Some(2), ..DISCARD });
}

#[test]
fn a_page_that_cannot_be_read_is_never_zeros() {
    let error = Setup { name: "errors", errors: 2, programs: [&[0, 1], &[0, 1]], ..PLAIN };
    prove(&error);
    prove(&Setup { name: "errors, nothing poisoned", poison: false, ..error });
    prove(&Setup { name: "an error in host pages of two", pages: 4, data: 0b1101, per_host: 2, errors: 1, ..error });
}

#[test]
fn a_restore_that_is_given_up_feeds_no_zeros() {
    let cancel = Setup { name: "cancelled", cancel: true, ..PLAIN };
    prove(&cancel);
    prove(&Setup { name: "cancelled, nothing poisoned", poison: false, ..cancel });
    prove(&Setup { name: "cancelled, a discard, an error", discard: Some(1), errors: 1, ..cancel });
}

/// Expects that `setup` is right as it is, and wrong with `defect`.
fn catches(defect: FillDefect, setup: Setup, complaint: &str) {
    assert!(explore(&setup).is_ok(), "the world must be right without the defect");
    match explore(&Setup { defect: Some(defect), ..setup }) {
        Ok(_) => panic!("{defect:?} was not caught"),
        Err(what) => {
            println!("{defect:?}: {what}");
            assert!(what.contains(complaint), "{defect:?} was caught, but as: {what}");
        }
    }
}

#[test]
fn the_exploration_can_fail() {
    use FillDefect as D;
    catches(D::DiscardForgotten, DISCARD, "came back from the image");
    catches(D::PutInBlindly, DISCARD, "came back from the image");
    catches(D::PutInLater, DISCARD, "came back from the image");
    catches(D::LostIsZero, Setup { errors: 1, poison: false, ..PLAIN }, "zeros for data");
    catches(D::CompleteTooEarly, PLAIN, "zeros for data");
    catches(D::StaleNotWoken, Setup { errors: 1, poison: false, ..DISCARD }, "waits for ever");
    catches(D::CancelJustEnds, Setup { cancel: true, ..PLAIN }, "zeros for data");
}
