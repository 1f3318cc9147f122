//! Every interleaving of a small world, breadth first, over the real core.
//!
//! Two kinds of steps: those that happen sooner or later by themselves, and fate (errors, a cancel, spurious EAGAIN and
//! wake-ups). All of them are explored. Nothing may depend on fate, so where no certain step is left everything must
//! have come to its end; and the certain steps form no cycle, so that every run gets there.

mod check;
mod defects;
mod step;
mod trace;
mod world;
mod worlds;

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    print, println,
    string::String,
    time::Instant,
    vec,
    vec::Vec,
};

use step::Step;
use world::{Setup, World};

/// What one exploration saw.
#[derive(Clone, Copy, Default)]
struct Figures {
    worlds: usize,
    states: usize,
    transitions: usize,
    images: usize,
    ends: usize,
    longest: usize,
    /// One bit for each of [`world::Seen`].
    seen: u32,
}

/// Something that must not be, and the shortest way to it.
struct Violation {
    what: String,
    trace: Vec<String>,
}

/// 128 bits of the projection of a state. A collision among 10^7 states has a chance of about 10^-25.
#[derive(Clone, Default)]
struct Digest(u128);

impl Digest {
    fn mix(&mut self, value: u128) {
        const ODD: u128 = 0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835;
        let product = (self.0 ^ value).wrapping_add(ODD).wrapping_mul(ODD);
        self.0 = product ^ (product >> 67) ^ (product << 29);
    }
}

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(16) {
            let mut word = [0; 16];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u128::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.mix(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.mix(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value.into());
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u128);
    }

    fn finish(&self) -> u64 {
        let folded = self.0 ^ (self.0 >> 64);
        u64::try_from(folded & u128::from(u64::MAX)).unwrap()
    }
}

/// The digests are hashes already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, bytes: &[u8]) {
        let (head, _) = bytes.split_first_chunk::<8>().unwrap();
        self.0 = u64::from_le_bytes(*head);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The states seen, how each was reached first, and where the certain steps lead.
struct Graph {
    seen: HashMap<u128, u32, BuildHasherDefault<AsItIs>>,
    reached_by: Vec<(u32, Step)>,
    depth: Vec<u16>,
    /// Targets of the certain steps of state `i`: `targets[from[i]..from[i + 1]]`.
    targets: Vec<u32>,
    from: Vec<usize>,
}

impl Graph {
    fn digest<const F: usize, const C: usize>(world: &World<F, C>) -> u128 {
        let mut digest = Digest::default();
        world.key(&mut digest);
        digest.0
    }

    fn path(&self, mut state: usize) -> Vec<Step> {
        let mut steps = Vec::new();
        while state != 0 {
            let (before, step) = self.reached_by[state];
            steps.push(step);
            state = usize::try_from(before).unwrap();
        }
        steps.reverse();
        steps
    }

    /// A state that lies on a cycle of certain steps, or leads only into one.
    fn cycle(&self) -> Option<usize> {
        let states = self.reached_by.len();
        let index = |target: &u32| usize::try_from(*target).unwrap();
        let mut ways_in = vec![0u32; states];
        self.targets.iter().for_each(|target| ways_in[index(target)] += 1);
        let mut ready: Vec<usize> = (0..states).filter(|&state| ways_in[state] == 0).collect();
        let mut left = states;
        while let Some(state) = ready.pop() {
            left -= 1;
            for target in self.targets[self.from[state]..self.from[state + 1]].iter().map(index) {
                ways_in[target] -= 1;
                if ways_in[target] == 0 {
                    ready.push(target);
                }
            }
        }
        (left > 0).then(|| ways_in.iter().position(|&ways| ways > 0)).flatten()
    }
}

/// Explores all of `setup` with a core of these capacities.
fn explore<const F: usize, const C: usize>(setup: &Setup) -> Result<Figures, Violation> {
    let start = World::<F, C>::new(setup);
    let mut figures = Figures { worlds: 1, ..Figures::default() };
    let mut graph = Graph {
        seen: HashMap::from_iter([(Graph::digest(&start), 0)]),
        reached_by: vec![(0, Step::Cancel)],
        depth: vec![0],
        targets: Vec::new(),
        from: vec![0],
    };
    let fail = |graph: &Graph, state: usize, last: Option<Step>, what: String| {
        let mut steps = graph.path(state);
        steps.extend(last);
        Violation { what, trace: trace::tell::<F, C>(setup, &steps) }
    };
    start.check(setup).map_err(|what| fail(&graph, 0, None, what))?;
    let mut frontier = VecDeque::from([start]);
    let mut steps = Vec::new();
    let mut state = 0;
    while let Some(world) = frontier.pop_front() {
        let this = u32::try_from(state).unwrap();
        world.steps(setup, &mut steps);
        world.check_steps(setup, &steps).map_err(|what| fail(&graph, state, None, what))?;
        for &step in &steps {
            let mut next = world.clone();
            next.take(setup, step).map_err(|what| fail(&graph, state, Some(step), what))?;
            figures.transitions += 1;
            figures.seen |= core::mem::take(&mut next.seen);
            let target = match graph.seen.entry(Graph::digest(&next)) {
                std::collections::hash_map::Entry::Occupied(known) => *known.get(),
                std::collections::hash_map::Entry::Vacant(new) => {
                    let index = u32::try_from(graph.reached_by.len()).unwrap();
                    new.insert(index);
                    graph.reached_by.push((this, step));
                    graph.depth.push(graph.depth[state] + 1);
                    next.check(setup).map_err(|what| fail(&graph, state, Some(step), what))?;
                    frontier.push_back(next);
                    index
                }
            };
            if target != this && step.is_certain(world.is_posted()) {
                graph.targets.push(target);
            }
        }
        graph.from.push(graph.targets.len());
        if graph.from[state] == graph.from[state + 1] {
            world.check_final(setup).map_err(|what| fail(&graph, state, None, what))?;
            figures.ends += 1;
            figures.images += usize::from(world.committed);
        }
        state += 1;
    }
    if let Some(state) = graph.cycle() {
        return Err(fail(&graph, state, None, "this can go on for ever".into()));
    }
    figures.states = graph.reached_by.len();
    figures.longest = graph.depth.last().copied().unwrap_or_default().into();
    Ok(figures)
}

/// Explores, prints the figures, and fails with the trace if something is wrong.
fn prove<const F: usize, const C: usize>(setup: &Setup) -> Figures {
    let started = Instant::now();
    match explore::<F, C>(setup) {
        Ok(figures) => {
            let Figures { states, transitions, images, ends, longest, .. } = figures;
            println!(
                "{:<44} {states:>8} states {transitions:>9} transitions, depth {longest:>3}, {ends:>5} ends, {images:>4} \
                 with an image, {:>5.1} s",
                setup.name,
                started.elapsed().as_secs_f64()
            );
            assert!(images > 0 && ends > 0, "{}: no run of this world ends with an image", setup.name);
            figures
        }
        Err(violation) => {
            report(setup, &violation);
            panic!("{}: {}", setup.name, violation.what);
        }
    }
}

fn report(setup: &Setup, violation: &Violation) {
    print!("{}: {}\n  after {} steps:\n", setup.name, violation.what, violation.trace.len());
    violation.trace.iter().enumerate().for_each(|(i, line)| println!("  {:>3}. {line}", i + 1));
}
