//! Mappings that change under a snapshot: discards, unmapping, moving, and the EAGAIN they bring.
#![allow(clippy::unwrap_used)]

mod common;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Doing, LONG, Memory, PAGE, Reader, SOON, events, is_registered, release, writer};
use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, mmap_anonymous, mremap};
use ramshot_core::{Done, Event, WriteTracker};
use ramshot_linux::{Tracker, TrackerOptions};

#[test]
fn a_discard_is_reported_and_waits_until_it_is_read() {
    for memory in [Memory::anonymous(8 * PAGE), Memory::memfd(8 * PAGE)] {
        let memory = Arc::new(memory);
        (0..8).for_each(|page| memory.write(page * PAGE, 1));
        let tracker = memory.tracker();
        let discarding = Arc::clone(&memory);
        let advice = if memory.file.is_some() { MmapAdvise::MADV_REMOVE } else { MmapAdvise::MADV_DONTNEED };
        let discard = Doing::start(move || discarding.advise(2 * PAGE, 3 * PAGE, advice));
        discard.assert_blocked();
        assert_eq!(memory.read(2 * PAGE), 1, "not yet gone");
        assert_eq!(events(&tracker, LONG), [Event::Discarded(memory.range(2 * PAGE, 3 * PAGE))]);
        assert_eq!(discard.finish(), Ok(()));
        assert_eq!(memory.read(2 * PAGE), 0);
    }
}

#[test]
fn while_a_discard_waits_protecting_gives_up_and_releasing_says_again() {
    let memory = Arc::new(Memory::anonymous(8 * PAGE));
    (0..8).for_each(|page| memory.write(page * PAGE, 1));
    let options = TrackerOptions { patience: Duration::from_millis(50), ..TrackerOptions::default() };
    let tracker = Tracker::open(memory.ram(), &options).unwrap();
    tracker.protect(memory.range(0, 8 * PAGE)).unwrap();
    let write = writer(&memory, 0, 2);
    assert_eq!(events(&tracker, LONG).len(), 1);
    let discarding = Arc::clone(&memory);
    let discard = Doing::start(move || discarding.advise(7 * PAGE, PAGE, MmapAdvise::MADV_DONTNEED));
    discard.assert_blocked();

    assert_eq!(tracker.release(memory.range(0, PAGE)), Ok(Done::Again));
    let started = Instant::now();
    let error = tracker.protect(memory.range(0, PAGE)).unwrap_err();
    assert_eq!((error.errno, error.range), (libc::EAGAIN, Some(memory.range(0, PAGE))));
    assert!(started.elapsed() >= Duration::from_millis(50));
    write.assert_blocked();

    // A release does not put up with it for ever: it ends the registration of that page instead.
    assert_eq!(tracker.release(memory.range(0, PAGE)), Ok(Done::Yes));
    write.finish();
    assert!(!is_registered(memory.address(0), "uw") && is_registered(memory.address(PAGE), "uw"));
    assert_eq!(tracker.release(memory.range(0, PAGE)), Ok(Done::Yes), "stale");
    let write = writer(&memory, PAGE, 2);
    write.assert_blocked();

    // The reader is gone: disarming reads what is left, so nobody stays blocked.
    tracker.disarm().unwrap();
    write.finish();
    discard.finish().unwrap();
    assert!(!is_registered(memory.address(PAGE), "uw"));
}

#[test]
fn what_was_given_up_in_a_storm_can_be_protected_again() {
    let memory = Arc::new(Memory::anonymous(4 * PAGE));
    (0..4).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    let discarding = Arc::clone(&memory);
    let discard = Doing::start(move || discarding.advise(3 * PAGE, PAGE, MmapAdvise::MADV_DONTNEED));
    discard.assert_blocked();
    while tracker.release(memory.range(PAGE, PAGE)).unwrap() == Done::Again {}
    assert_eq!(events(&tracker, LONG).len(), 1);
    discard.finish().unwrap();
    assert!(!is_registered(memory.address(PAGE), "uw"));

    release(&tracker, memory.range(0, 3 * PAGE));
    tracker.protect(memory.range(0, 3 * PAGE)).unwrap();
    assert!(is_registered(memory.address(PAGE), "uw"));
    let write = writer(&memory, PAGE, 2);
    assert_eq!(events(&tracker, LONG).len(), 1);
    release(&tracker, memory.range(0, 3 * PAGE));
    write.finish();
}

#[test]
fn a_storm_of_discards_and_moves_loses_no_fault_and_breaks_nothing() {
    const PAGES: usize = 64;
    let memory = Arc::new(Memory::anonymous(PAGES * PAGE));
    let moving = Memory::anonymous(4 * PAGE);
    let ram = common::ram(vec![memory.region("ram0", 0), moving.region("ram1", 1 << 30)]);
    (0..PAGES).for_each(|page| memory.write(page * PAGE, 0));
    let tracker = Arc::new(common::open(&ram));
    let reader = Reader::start(&tracker, true);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, discarding) = (Arc::clone(&stop), Arc::clone(&memory));
    let storm = Doing::start(move || {
        let mut count = 0u32;
        while !stopped.load(Ordering::Acquire) {
            discarding.advise((PAGES - 8) * PAGE, 8 * PAGE, MmapAdvise::MADV_DONTNEED).unwrap();
            discarding.write((PAGES - 8) * PAGE, 1);
            count += 1;
        }
        count
    });
    let (mut longest_protect, mut longest_write) = (Duration::ZERO, Duration::ZERO);
    for round in 1..=30u8 {
        for page in 0..16 {
            let started = Instant::now();
            tracker.protect(memory.range(page * PAGE, PAGE)).unwrap();
            longest_protect = longest_protect.max(started.elapsed());
            let started = Instant::now();
            writer(&memory, page * PAGE, round).finish();
            longest_write = longest_write.max(started.elapsed());
            assert_eq!(memory.read(page * PAGE), round);
        }
    }
    stop.store(true, Ordering::Release);
    let discards = storm.finish();
    tracker.disarm().unwrap();
    let seen = reader.stop();
    let faults = seen.iter().filter(|event| matches!(event, Event::WriteFault { .. })).count();
    println!("{discards} discards, {faults} faults; longest: protect {longest_protect:?}, write {longest_write:?}");
    assert!(faults >= 30 * 16 && discards > 100, "{faults} faults, {discards} discards");
    assert!(!is_registered(memory.address(0), "uw"));
}

#[test]
fn disarming_in_a_storm_without_a_reader_ends() {
    let memory = Arc::new(Memory::anonymous(64 * PAGE));
    (0..64).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, 64 * PAGE)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let storms: Vec<_> = (0..3)
        .map(|at| {
            let (memory, stop) = (Arc::clone(&memory), Arc::clone(&stop));
            Doing::start(move || {
                while !stop.load(Ordering::Acquire) {
                    memory.advise(at * 4 * PAGE, PAGE, MmapAdvise::MADV_DONTNEED).unwrap();
                }
            })
        })
        .collect();
    storms.iter().for_each(Doing::assert_blocked);
    tracker.disarm().unwrap();
    assert!(!is_registered(memory.address(0), "uw"));
    stop.store(true, Ordering::Release);
    storms.into_iter().for_each(Doing::finish);
}

#[test]
fn a_hole_mapped_over_is_reported_and_the_rest_is_disarmed() {
    let memory = Arc::new(Memory::anonymous(12 * PAGE));
    (0..12).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, 12 * PAGE)).unwrap();
    let over = Arc::clone(&memory);
    let replace = Doing::start(move || {
        let at = NonZeroUsize::new(over.pointer(4 * PAGE).addr());
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
        // SAFETY: replaces a part of this test's mapping, into which nobody holds a reference.
        unsafe { mmap_anonymous(at, NonZeroUsize::new(4 * PAGE).unwrap(), ProtFlags::PROT_READ, flags) }.map(drop)
    });
    replace.assert_blocked();
    assert_eq!(events(&tracker, LONG), [Event::Unmapped(memory.range(4 * PAGE, 4 * PAGE))]);
    replace.finish().unwrap();
    let writers: Vec<_> = [0, 11].map(|page| writer(&memory, page * PAGE, 2)).into();
    writers.iter().for_each(Doing::assert_blocked);
    tracker.disarm().unwrap();
    writers.into_iter().for_each(Doing::finish);
    assert!(!is_registered(memory.address(0), "uw") && !is_registered(memory.address(11 * PAGE), "uw"));
}

#[test]
fn a_block_moved_away_is_reported_and_disarmed_where_it_went() {
    let memory = Memory::anonymous(4 * PAGE);
    (0..4).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, 4 * PAGE)).unwrap();
    let target = Memory::anonymous(4 * PAGE);
    let (from, to) = (memory.start, target.start);
    let (from_range, target) = (memory.range(0, 4 * PAGE), Arc::new(target));
    std::mem::forget(memory);
    let (from, to) = (from.addr(), to.addr());
    let moving = Doing::start(move || {
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        let at = std::ptr::NonNull::with_exposed_provenance;
        // SAFETY: both are mappings of this test, into which nobody holds a reference; the old one is not used again.
        unsafe { mremap(at(from), 4 * PAGE, 4 * PAGE, flags, Some(at(to))) }.map(drop)
    });
    moving.assert_blocked();
    // Two messages: the move, and that the old place is unmapped.
    assert_eq!(events(&tracker, LONG), [Event::Unmapped(from_range)]);
    assert_eq!(events(&tracker, LONG), [Event::Unmapped(from_range)]);
    moving.finish().unwrap();
    // The registration went along, and so did the protection.
    assert!(is_registered(target.address(0), "uw"));
    let write = writer(&target, PAGE, 2);
    write.assert_blocked();
    tracker.disarm().unwrap();
    write.finish();
    assert!(!is_registered(target.address(0), "uw"));
}

#[test]
fn a_child_process_is_not_tracked() {
    let memory = Arc::new(Memory::anonymous(2 * PAGE));
    memory.write(0, 1);
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    // SAFETY: the child only writes one byte of its own copy and exits; it takes no lock and allocates nothing.
    let child = unsafe { libc::fork() };
    if child == 0 {
        memory.write(0, 9);
        // SAFETY: ends the child at once, without destructors.
        unsafe { libc::_exit(i32::from(memory.read(0))) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 9);
    assert_eq!(events(&tracker, SOON), []);
    assert_eq!(memory.read(0), 1);
    release(&tracker, memory.range(0, PAGE));
}
