//! The engine under a scheduler that decides at every lock, wait and wake-up who runs next: small worlds, thousands of
//! interleavings each, random and by PCT. In every one: the image is memory at T0 or there is none, every thread comes
//! to its end (shuttle reports a deadlock), nothing is left in the VM.
//!
//! ```sh
//! RUSTFLAGS="--cfg ramshot_shuttle" cargo test --release -p ramshot --lib shuttle
//! ```
//! `RAMSHOT_EXECUTIONS` says how many a scenario and scheduler (default 5000), `SHUTTLE_RANDOM_SEED` which; a failure
//! prints its schedule, which `shuttle::replay` repeats.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use ramshot_core::{
    Cause, Done, Event, HostAddr, HostRange, OsError, PageId, RamSource, Treatment, WhenFull, WriteTracker,
};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

use super::tests_world::{Scene, World, fill, pages, value};
use super::{Live, Pending};
use crate::sim::{Call, Mishap, Outcome, SimVm, Trouble};
use crate::sync::{Arc, thread};

fn explore(name: &str, scenario: fn()) {
    let executions = std::env::var("RAMSHOT_EXECUTIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(5000);
    let config = || {
        let mut config = Config::new();
        // A writer's batch of jobs lies on its stack.
        config.stack_size = 512 << 10;
        // A livelock, since the longest execution takes a few thousand.
        config.max_steps = MaxSteps::FailAfter(100_000);
        config.silence_warnings = true;
        config
    };
    let start = Instant::now();
    let random = Runner::new(RandomScheduler::new_from_seed(0x7261_6d73, executions), config()).run(scenario);
    let pct = Runner::new(PctScheduler::new_from_seed(0x686f_7421, 4, executions), config()).run(scenario);
    println!("{name}: {random} random and {pct} PCT executions, {:.1} s", start.elapsed().as_secs_f64());
}

macro_rules! scenarios {
    ($($(#[$doc:meta])* $name:ident $body:block)*) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                explore(stringify!($name), || $body);
            }
        )*
    };
}

/// Three pages with content.
fn vm() -> Arc<SimVm> {
    let vm = SimVm::new(3);
    fill(&vm);
    vm
}

/// A pool of `slots` pages, claims of one page.
fn world(vm: &Arc<SimVm>, slots: u16) -> World {
    let mut world = World::new(vm);
    world.slots = slots;
    world.limits.reserve_slots = u64::from(slots > 1);
    (world.limits.scan_pages, world.limits.around_max) = (1, 1);
    world
}

/// Two vCPUs that write where the other writes too, and where the scan is last and first.
fn vcpus(vm: &Arc<SimVm>) -> [thread::JoinHandle<()>; 2] {
    [[2, 1], [0, 2]].map(|order| {
        let vm = Arc::clone(vm);
        thread::spawn(move || order.into_iter().for_each(|page| vm.write(PageId(page), 100 + page)))
    })
}

fn join(vm: &SimVm, vcpus: [thread::JoinHandle<()>; 2]) {
    vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    let memory = vm.memory();
    (0..3).for_each(|page| assert_eq!(value(&memory, page), 100 + page));
}

/// vCPUs run from T0 on, `meanwhile` happens, it is finished. The cause is returned.
fn run((live, scene): (Live, Scene), meanwhile: impl FnOnce(&Live)) -> Option<Cause> {
    let running = vcpus(&scene.vm);
    meanwhile(&live);
    let cause = scene.verdict(live.finish());
    join(&scene.vm, running);
    scene.undisturbed();
    cause
}

/// With this trouble from the start.
fn run_with(trouble: Trouble, slots: u16) -> Option<Cause> {
    let vm = vm();
    let world = world(&vm, slots);
    vm.trouble(trouble.clone());
    world.image.trouble(trouble);
    let (live, scene) = world.try_begin();
    let running = vcpus(&vm);
    let cause = scene.verdict(live.and_then(Live::finish));
    join(&vm, running);
    cause
}

/// Armed ahead of T0 while vCPUs write and `meanwhile` goes on, then paused, begun, and written to again. The cause is
/// returned, or `None` if the image is memory at T0.
fn run_ahead(trouble: Trouble, meanwhile: fn(&SimVm)) -> Option<Cause> {
    let vm = vm();
    let world = world(&vm, 2);
    let image = world.image.clone();
    image.take_room();
    vm.trouble(trouble);
    let prepared = world.prepare();
    let running = vcpus(&vm);
    let other = {
        let vm = Arc::clone(&vm);
        thread::spawn(move || meanwhile(&vm))
    };
    let prepared = prepared.arm_ahead();
    // The pause.
    running.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    other.join().unwrap();
    let scene = Scene { at_t0: vm.memory(), vm, image };
    let live = prepared.and_then(|prepared| prepared.begin(Pending::All, vec![7]));
    let running = [[1, 0], [2, 1]].map(|order| {
        let vm = Arc::clone(&scene.vm);
        thread::spawn(move || order.into_iter().for_each(|page| vm.write(PageId(page), 200 + page)))
    });
    let cause = scene.verdict(live.and_then(Live::finish));
    running.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    let memory = scene.vm.memory();
    (0..3).for_each(|page| assert_eq!(value(&memory, page), 200 + page));
    scene.undisturbed();
    cause
}

fn ends_with(cause: Option<Cause>, expected: Cause) {
    assert!(cause.is_none() || cause == Some(expected), "{cause:?}");
}

scenarios! {
    /// A chain of increments, writers at work during each.
    shuttle_chain_of_increments {
        super::tests_dirty::chain_of_increments();
    }

    /// Drafts while a vCPU writes, then an increment.
    shuttle_precopy {
        super::tests_dirty::precopy_under_writes();
    }

    /// What is known to be dirty is protected ahead while a vCPU writes.
    shuttle_dirty_armed_ahead {
        super::tests_dirty::armed_ahead_under_writes();
    }

    shuttle_finish {
        assert_eq!(run(world(&vm(), 2).begin(), |_| ()), None);
    }

    shuttle_finish_with_two_workers {
        let mut world = world(&vm(), 4);
        world.options.workers = 2;
        assert_eq!(run(world.begin(), |_| ()), None);
    }

    shuttle_finish_with_a_pool_of_one {
        assert_eq!(run(world(&vm(), 1).begin(), |_| ()), None);
    }

    shuttle_cancel {
        ends_with(run(world(&vm(), 2).begin(), Live::cancel), Cause::Cancelled);
    }

    shuttle_cancel_by_another_thread {
        let (live, scene) = world(&vm(), 1).begin();
        let handle = live.handle();
        let canceller = thread::spawn(move || handle.cancel());
        ends_with(run((live, scene), |_| ()), Cause::Cancelled);
        canceller.join().unwrap();
    }

    shuttle_drop {
        let (live, scene) = world(&vm(), 2).begin();
        let running = vcpus(&scene.vm);
        drop(live);
        scene.undisturbed();
        assert_eq!(scene.image.outcome(), Outcome::Aborted);
        join(&scene.vm, running);
    }

    shuttle_drop_prepared {
        let vm = vm();
        drop(world(&vm, 1).prepare());
        assert!(vm.is_clean());
    }

    shuttle_full_pool_cancels {
        let mut world = world(&vm(), 1);
        world.limits.when_full = WhenFull::Cancel;
        ends_with(run(world.begin(), |_| ()), Cause::PoolFull);
    }

    shuttle_sink_fails {
        let trouble = Trouble::default().on(Call::Write, 1..2, Mishap::Error(28));
        ends_with(run_with(trouble, 2), Cause::Sink);
    }

    shuttle_commit_fails {
        assert_eq!(run_with(Trouble::default().on(Call::Commit, 0..1, Mishap::Error(5)), 2), Some(Cause::Sink));
    }

    shuttle_release_again {
        assert_eq!(run_with(Trouble::default().on(Call::Release, 0..4, Mishap::Again), 2), None);
    }

    shuttle_release_again_with_a_pool_of_one {
        assert_eq!(run_with(Trouble::default().on(Call::Release, 0..3, Mishap::Again), 1), None);
    }

    shuttle_release_fails {
        let cause = run_with(Trouble::default().on(Call::Release, 1..2, Mishap::Error(12)), 2);
        assert!(matches!(cause, None | Some(Cause::Release(_))), "{cause:?}");
    }

    shuttle_capture_fails {
        let cause = run_with(Trouble::default().on(Call::Read, 1..2, Mishap::Error(14)), 2);
        assert!(matches!(cause, Some(Cause::Capture(_))), "{cause:?}");
    }

    shuttle_events_fail {
        let vm = vm();
        let (live, scene) = world(&vm, 2).begin();
        vm.trouble(Trouble::default().on(Call::NextEvents, 2..3, Mishap::Error(5)));
        let cause = run((live, scene), |_| ());
        assert!(matches!(cause, None | Some(Cause::Events(_))), "{cause:?}");
    }

    shuttle_capturing_thread_dies {
        assert_eq!(run_with(Trouble::default().on(Call::Read, 1..2, Mishap::Panic), 2), Some(Cause::ThreadDied));
    }

    shuttle_releasing_thread_dies {
        ends_with(run_with(Trouble::default().on(Call::Release, 1..2, Mishap::Panic), 2), Cause::ThreadDied);
    }

    shuttle_writer_dies {
        assert_eq!(run_with(Trouble::default().on(Call::Write, 0..1, Mishap::Panic), 2), Some(Cause::ThreadDied));
    }

    shuttle_fault_thread_dies {
        let vm = vm();
        let (live, scene) = world(&vm, 2).begin();
        vm.trouble(Trouble::default().on(Call::NextEvents, 1..2, Mishap::Panic));
        ends_with(run((live, scene), |_| ()), Cause::ThreadDied);
    }

    shuttle_fault_thread_dies_before_or_in_begin {
        let vm = vm();
        vm.trouble(Trouble::default().on(Call::NextEvents, 0..1, Mishap::Panic));
        let world = world(&vm, 2);
        let image = world.image.clone();
        let result = world.prepare().begin(Pending::All, vec![]).and_then(Live::finish);
        assert_eq!(image.outcome() == Outcome::Committed, result.is_ok());
        assert!(vm.is_clean());
    }

    shuttle_begin_fails_half_way {
        let blocks = [("low", 0), ("high", 8)].map(|(name, at)| SimVm::block(name, at, 2, Treatment::Tracked));
        let vm = SimVm::with_blocks(&blocks).unwrap();
        fill(&vm);
        vm.trouble(Trouble::default().on(Call::Protect, 1..2, Mishap::Error(12)));
        let world = world(&vm, 2);
        let image = world.image.clone();
        assert!(world.prepare().begin(Pending::All, vec![]).is_err());
        assert_eq!(image.outcome(), Outcome::Aborted);
        assert!(vm.is_clean());
    }

    /// Somebody who was not stopped writes while memory is being armed: he waits, or was before T0.
    shuttle_a_writer_while_arming {
        let vm = vm();
        let world = world(&vm, 2);
        let image = world.image.clone();
        let prepared = world.prepare();
        let running = vcpus(&vm);
        let live = prepared.begin(Pending::All, vec![]).unwrap();
        live.finish().unwrap();
        join(&vm, running);
        assert!(vm.is_clean());
        let memory = image.memory().unwrap();
        (0..3).for_each(|page| assert!([page + 1, page + 100].contains(&value(&memory, page))));
    }

    shuttle_armed_ahead {
        assert_eq!(run_ahead(Trouble::default(), |_| ()), None);
    }

    shuttle_armed_ahead_with_trouble {
        let trouble = Trouble::default().on(Call::Release, 0..3, Mishap::Again).events_twice().newest_first();
        assert_eq!(run_ahead(trouble, |_| ()), None);
    }

    /// Discarded before T0, with or without its protection, written again or not: T0 has what is there then.
    shuttle_armed_ahead_and_discarded {
        assert_eq!(run_ahead(Trouble::default(), |vm| vm.discard(pages(vm, 0, 2))), None);
    }

    shuttle_arming_ahead_fails {
        let cause = run_ahead(Trouble::default().on(Call::Protect, 0..1, Mishap::Error(12)), |_| ());
        assert!(matches!(cause, Some(Cause::Arm(_))), "{cause:?}");
    }

    shuttle_a_release_ahead_fails {
        let cause = run_ahead(Trouble::default().on(Call::Release, 0..1, Mishap::Error(5)), |_| ());
        assert!(matches!(cause, None | Some(Cause::Release(_) | Cause::Arm(_))), "{cause:?}");
    }

    shuttle_fault_thread_dies_ahead {
        for nth in [1, 2, 4] {
            let cause = run_ahead(Trouble::default().on(Call::NextEvents, nth..nth + 1, Mishap::Panic), |_| ());
            ends_with(cause, Cause::ThreadDied);
        }
    }

    shuttle_drop_armed_ahead {
        let vm = vm();
        let prepared = world(&vm, 1).prepare();
        let running = vcpus(&vm);
        drop(prepared.arm_ahead().unwrap());
        join(&vm, running);
        assert!(vm.is_clean());
    }

    shuttle_events_twice_and_out_of_order {
        let trouble = Trouble::default().events_twice().newest_first().one_by_one();
        assert_eq!(run_with(trouble.on(Call::NextEvents, 4..8, Mishap::Early), 2), None);
    }

    /// Small gaps are protected along with what is around them: a writer there waits for nothing, and is released for
    /// his own sake. The sink hangs meanwhile, so no disarm comes to the rescue.
    shuttle_writer_in_a_protected_gap {
        let vm = SimVm::new(3);
        [0, 2].into_iter().for_each(|page| vm.write(PageId(page), 1));
        let world = world(&vm, 1);
        vm.trouble(Trouble::default().on(Call::Release, 0..2, Mishap::Again));
        world.image.hold();
        let (live, scene) = world.begin();
        vm.write(PageId(1), 101);
        scene.image.let_go();
        assert_eq!(run((live, scene), |_| ()), None);
        assert!(vm.counts().faults > 0);
    }

    shuttle_before_discard {
        let vm = vm();
        let (live, scene) = world(&vm, 2).begin();
        let (handle, balloon) = (live.handle(), Arc::clone(&vm));
        let balloon = thread::spawn(move || {
            let range = pages(&balloon, 1, 2);
            handle.before_discard(range).unwrap();
            balloon.discard(range);
        });
        let vcpu = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || [2, 0].into_iter().for_each(|page| vm.write(PageId(page), 9)))
        };
        assert_eq!(scene.verdict(live.finish()), None);
        balloon.join().unwrap();
        vcpu.join().unwrap();
        scene.undisturbed();
    }

    shuttle_before_discard_and_cancel {
        let vm = vm();
        let (live, scene) = world(&vm, 1).begin();
        let (handle, range) = (live.handle(), pages(&vm, 0, 3));
        let balloon = thread::spawn(move || handle.before_discard(range));
        ends_with(run((live, scene), Live::cancel), Cause::Cancelled);
        let _ = balloon.join().unwrap();
        assert!(vm.is_clean());
    }

    /// A discard that nobody announced goes on as soon as its event is read: what is captured from then on is zeros.
    shuttle_unannounced_discard {
        let vm = vm();
        let (live, scene) = world(&vm, 2).begin();
        let balloon = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || vm.discard(pages(&vm, 1, 2)))
        };
        let cause = scene.verdict(live.finish());
        assert!(matches!(cause, None | Some(Cause::Discarded(_))), "{cause:?}");
        balloon.join().unwrap();
    }

    shuttle_unmap {
        let vm = vm();
        let (live, scene) = world(&vm, 1).begin();
        let other = {
            let vm = Arc::clone(&vm);
            thread::spawn(move || vm.unmap(pages(&vm, 2, 1)))
        };
        let cause = scene.verdict(live.finish());
        let expected = matches!(
            cause,
            None | Some(Cause::Unmapped(_) | Cause::Release(_) | Cause::Capture(_))
        );
        assert!(expected, "{cause:?}");
        other.join().unwrap();
    }

    /// The next snapshot begins as soon as the kernel lets it; the threads of the one before may still be at work.
    shuttle_next_snapshot_right_after_a_cancel {
        let vm = vm();
        let (first, first_scene) = world(&vm, 2).begin();
        first.cancel();
        while !vm.is_clean() {
            thread::yield_now();
        }
        assert_eq!(run(world(&vm, 2).begin(), |_| ()), None);
        let _ = first.finish();
        assert_ne!(first_scene.image.outcome(), Outcome::Open);
        assert!(vm.is_clean());
    }
}

// ---- that all this can fail

/// A tracker and a memory that break the rules for the engine.
struct Broken {
    vm: Arc<SimVm>,
    tracker: Arc<dyn WriteTracker>,
    /// Interruptions get lost: a wake-up that somebody waits for never comes.
    deaf: bool,
}

impl RamSource for Broken {
    /// Releases before it captures.
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        let _ = self.tracker.release(HostRange::new(from, into.len() as u64))?;
        self.vm.read(from, into)
    }
}

impl WriteTracker for Broken {
    fn populated(&self, within: HostRange, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        self.tracker.populated(within, each)
    }

    fn protect(&self, range: HostRange) -> Result<(), OsError> {
        self.tracker.protect(range)
    }

    fn release(&self, range: HostRange) -> Result<Done, OsError> {
        self.tracker.release(range)
    }

    fn next_events(&self, events: &mut [Event], timeout_ms: Option<u32>) -> Result<usize, OsError> {
        self.tracker.next_events(events, timeout_ms)
    }

    fn interrupt(&self) {
        if !self.deaf {
            self.tracker.interrupt();
        }
    }

    fn disarm(&self) -> Result<(), OsError> {
        self.tracker.disarm()
    }
}

#[test]
#[should_panic(expected = "the image is not memory at T0")]
fn shuttle_catches_a_release_before_the_capture() {
    explore("release before capture", || {
        let vm = vm();
        let mut world = world(&vm, 2);
        let tracker = Arc::clone(&world.tracker);
        world.ram = Arc::new(Broken { vm: Arc::clone(&vm), tracker, deaf: false });
        run(world.begin(), |_| ());
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn shuttle_catches_a_lost_wake_up() {
    explore("lost wake-up", || {
        let vm = vm();
        let mut world = world(&vm, 2);
        let tracker = Arc::clone(&world.tracker);
        world.tracker = Arc::new(Broken { vm: Arc::clone(&vm), tracker, deaf: true });
        run(world.begin(), |_| ());
    });
}
