//! Starting, refusing, rolling back, stopping.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Doing, LONG, Memory, PAGE, SOON, events, ioctl, is_registered, open, ram, raw_uffd, release, writer};
use nix::sys::mman::{MapFlags, ProtFlags};
use ramshot_core::{Backing, Event, HostAddr, Treatment, WriteTracker};
use ramshot_linux::{TrackError, Tracker, TrackerOptions, compatible, probe};

const UFFDIO_API_WP: u64 = 1;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 2;

fn register_raw(uffd: &OwnedFd, memory: &Memory, mode: u64) {
    assert_eq!(ioctl(uffd, UFFDIO_REGISTER, &mut [memory.address(0).0, memory.len as u64, mode, 0]), 0);
}

#[test]
fn the_probe_finds_what_these_tests_run_on() {
    let probe = probe();
    println!("{probe}");
    assert!(probe.is_available(), "{probe}");
    assert_eq!(probe.can_track(Backing::Anonymous), Ok(()));
    let refused = probe.can_track(Backing::File).unwrap_err();
    assert!(refused.why.contains("disk file") && refused.remedy.contains("memfd"), "{refused}");
    assert!(probe.can_track(Backing::Foreign).unwrap_err().why.contains("guest_memfd"));
}

#[test]
fn compatibility_is_asked_at_no_cost() {
    let (memory, memfd) = (Memory::anonymous(8 * PAGE), Memory::memfd(8 * PAGE));
    let rom = Memory::anonymous(PAGE);
    let mut rom_region = rom.region("rom", 1 << 30);
    rom_region.treatment = Treatment::ReadOnly;
    let ram = ram(vec![memory.region("a", 0), memfd.region("b", 1 << 20), rom_region]);
    assert!(compatible(&ram).iter().all(|(_, verdict)| verdict.is_ok()));
    assert!(!is_registered(memory.address(0), "uw") && !is_registered(memfd.address(0), "uw"));

    let other = raw_uffd(Some(UFFDIO_API_WP));
    register_raw(&other, &memory, MODE_WP);
    let verdicts = compatible(&ram);
    assert!(verdicts[0].1.as_ref().unwrap_err().why.contains("EBUSY"), "{verdicts:?}");
    assert!(verdicts[1].1.is_ok() && verdicts[2].1.is_ok());
    assert!(is_registered(memory.address(0), "uw"), "the other's registration was taken away");
}

#[test]
fn read_only_and_ignored_blocks_are_not_registered() {
    let memory = [(); 4].map(|()| Memory::anonymous(4 * PAGE));
    let treatments = [Treatment::Tracked, Treatment::ReadOnly, Treatment::InPause, Treatment::Ignored];
    let regions = memory.iter().zip(treatments).enumerate().map(|(at, (memory, treatment))| {
        let mut region = memory.region(&format!("b{at}"), at as u64 * 0x10_0000);
        region.treatment = treatment;
        region
    });
    let ram = ram(regions.collect());
    let tracker = open(&ram);
    let registered = memory.each_ref().map(|memory| is_registered(memory.address(0), "uw"));
    assert_eq!(registered, [true, false, false, false]);
    drop(tracker);
    assert!(memory.iter().all(|memory| !is_registered(memory.address(0), "uw")));
}

#[test]
fn a_second_context_on_the_same_memory_is_refused() {
    let memory = Memory::anonymous(4 * PAGE);
    let ram = memory.ram();
    let first = open(&ram);
    let error = Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap_err();
    assert!(matches!(error, TrackError::Block(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("EBUSY") && text.contains("\"ram0\"") && text.contains("from_fd"), "{text}");
    assert!(is_registered(memory.address(0), "uw"), "the refusal took the first one's registration away");
    drop(first);
    open(&ram);
}

#[test]
fn a_disk_file_is_refused_with_the_reason() {
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(4 * PAGE as u64).unwrap();
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    for flags in [MapFlags::MAP_PRIVATE, MapFlags::MAP_SHARED] {
        let memory = Memory::of_file(&file, 4 * PAGE, flags, prot);
        let ram = memory.ram();
        if ram.table().blocks()[0].backing == Backing::Shmem {
            eprintln!("SKIPPED: {} is a tmpfs, no disk file to be had there", directory.display());
            return;
        }
        assert_eq!(ram.table().blocks()[0].backing, Backing::File);
        let error = Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap_err().to_string();
        assert!(error.contains("disk file") && error.contains("memfd"), "{error}");
        assert_eq!(compatible(&ram)[0].1.as_ref().unwrap_err().to_string(), error);
    }
}

#[test]
fn failing_half_way_leaves_nothing_registered() {
    let memory = [(); 3].map(|()| Memory::anonymous(4 * PAGE));
    let other = raw_uffd(Some(UFFDIO_API_WP));
    register_raw(&other, &memory[2], MODE_WP);
    let regions = memory.iter().enumerate().map(|(at, m)| m.region(&format!("b{at}"), at as u64 * 0x10_0000));
    let ram = ram(regions.collect());
    let error = Tracker::open(ram, &TrackerOptions::default()).unwrap_err().to_string();
    assert!(error.contains("\"b2\"") && error.contains("EBUSY"), "{error}");
    let registered = memory.each_ref().map(|memory| is_registered(memory.address(0), "uw"));
    assert_eq!(registered, [false, false, true], "ours gone, the other's still there");
}

#[test]
fn disarming_wakes_writers_and_may_be_repeated() {
    let memory = Arc::new(Memory::anonymous(8 * PAGE));
    (0..8).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, 8 * PAGE)).unwrap();
    let writers: Vec<_> = (0..4).map(|page| writer(&memory, page * PAGE, 2)).collect();
    writers.iter().for_each(Doing::assert_blocked);
    tracker.disarm().unwrap();
    writers.into_iter().for_each(Doing::finish);
    assert!(!is_registered(memory.address(0), "uw"));
    memory.write(7 * PAGE, 2);
    tracker.disarm().unwrap();
    // Late calls of other threads: nothing to release, and protecting is over.
    release(&tracker, memory.range(0, PAGE));
    let error = tracker.protect(memory.range(0, PAGE)).unwrap_err();
    assert_eq!(error.errno, libc::ECANCELED);
}

#[test]
fn dropping_wakes_writers_and_lets_the_memory_go() {
    let memory = Arc::new(Memory::memfd(4 * PAGE));
    memory.write(0, 1);
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 2);
    write.assert_blocked();
    drop(tracker);
    write.finish();
    // Unmapping sends no event any more that nobody would read.
    Doing::start(move || drop(memory)).finish();
}

#[test]
fn an_interrupt_ends_the_running_or_the_next_wait() {
    let memory = Memory::anonymous(PAGE);
    let tracker = Arc::new(memory.tracker());
    let waiting = Arc::clone(&tracker);
    let wait = Doing::start(move || waiting.next_events(&mut [Event::WriteFault { at: HostAddr(0) }], None));
    wait.assert_blocked();
    tracker.interrupt();
    assert_eq!(wait.finish(), Ok(0));

    tracker.interrupt();
    tracker.interrupt();
    let mut none = [Event::WriteFault { at: HostAddr(0) }; 4];
    assert_eq!(tracker.next_events(&mut none, None), Ok(0));
    let started = Instant::now();
    assert_eq!(tracker.next_events(&mut none, Some(30)), Ok(0), "taken once, not twice");
    assert!(started.elapsed() >= Duration::from_millis(30));
    assert_eq!(tracker.next_events(&mut none, Some(0)), Ok(0));
}

#[test]
fn many_faults_come_in_batches_of_what_fits() {
    let memory = Arc::new(Memory::anonymous(8 * PAGE));
    (0..8).for_each(|page| memory.write(page * PAGE, 1));
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, 8 * PAGE)).unwrap();
    let writers: Vec<_> = (0..8).map(|page| writer(&memory, page * PAGE, 2)).collect();
    writers.iter().for_each(Doing::assert_blocked);
    let mut three = [Event::Unmapped(memory.range(0, PAGE)); 3];
    let mut pages = Vec::new();
    for expected in [3, 3, 2] {
        assert_eq!(tracker.next_events(&mut three, Some(1000)), Ok(expected));
        pages.extend(three[..expected].iter().map(|event| match event {
            Event::WriteFault { at } => (at.0 - memory.address(0).0) / PAGE as u64,
            other => panic!("{other:?}"),
        }));
    }
    pages.sort_unstable();
    assert_eq!(pages, (0..8).collect::<Vec<_>>());
    release(&tracker, memory.range(0, 8 * PAGE));
    writers.into_iter().for_each(Doing::finish);
}

// The kernel writes into guest RAM too: vhost, read(2), KVM's clock. It waits like a vCPU.
#[test]
fn a_read_into_a_protected_page_waits_for_its_release() {
    let memory = Arc::new(Memory::anonymous(2 * PAGE));
    memory.write(0, 1);
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let (mut from, mut to) = std::io::pipe().unwrap();
    to.write_all(b"x").unwrap();
    let target = Arc::clone(&memory);
    let reading = Doing::start(move || {
        // SAFETY: one byte inside the mapping, into which nobody holds a reference.
        from.read(unsafe { std::slice::from_raw_parts_mut(target.pointer(0), 1) }).unwrap()
    });
    assert_eq!(events(&tracker, LONG).len(), 1);
    reading.assert_blocked();
    assert_eq!(memory.read(0), 1);
    release(&tracker, memory.range(0, PAGE));
    assert_eq!(reading.finish(), 1);
    assert_eq!(memory.read(0), b'x');
}

#[test]
fn protecting_what_is_not_registered_is_an_error_that_names_it() {
    let (memory, other) = (Memory::anonymous(PAGE), Memory::anonymous(PAGE));
    let tracker = memory.tracker();
    let range = other.range(0, PAGE);
    let error = tracker.protect(range).unwrap_err();
    assert_eq!((error.op, error.errno, error.range), ("UFFDIO_WRITEPROTECT", libc::ENOENT, Some(range)));
    assert_eq!(tracker.release(range).unwrap_err().errno, libc::ENOENT);
    assert_eq!(tracker.protect(memory.range(1, PAGE)).unwrap_err().errno, libc::EINVAL, "unaligned");
}

#[test]
fn an_error_of_the_descriptor_is_reported() {
    let memory = Memory::anonymous(PAGE);
    let uffd = raw_uffd(Some(UFFDIO_API_WP));
    let number = uffd.as_raw_fd();
    let spare = uffd.try_clone().unwrap();
    let tracker = Tracker::from_fd(uffd, memory.ram(), &TrackerOptions::default()).unwrap();
    // Somebody closes or replaces the descriptor under us: here by one that is always readable and at its end.
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: both are open descriptors of this test; the tracker's is put back below.
    assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), number) }, number);
    let error = tracker.next_events(&mut [Event::WriteFault { at: HostAddr(0) }], Some(1000)).unwrap_err();
    assert_eq!((error.op, error.errno), ("read userfaultfd", libc::EPIPE));
    assert!(tracker.protect(memory.range(0, PAGE)).is_err());
    assert!(tracker.disarm().is_err(), "an error while stopping is reported too");
    // SAFETY: as above.
    assert_eq!(unsafe { libc::dup2(spare.as_raw_fd(), number) }, number);
    tracker.disarm().unwrap();
    assert!(!is_registered(memory.address(0), "uw"), "what could not be stopped is stopped by the next attempt");
}

#[test]
fn blocks_of_several_mappings_work_as_one() {
    let memory = Arc::new(Memory::anonymous(12 * PAGE));
    (0..12).for_each(|page| memory.write(page * PAGE, 1));
    // Advice on a part splits the mapping in three.
    memory.advise(4 * PAGE, 4 * PAGE, nix::sys::mman::MmapAdvise::MADV_DONTDUMP).unwrap();
    let tracker = memory.tracker();
    assert_eq!(common::populated(&tracker, 0), [memory.range(0, 12 * PAGE)]);
    tracker.protect(memory.range(0, 12 * PAGE)).unwrap();
    let writers: Vec<_> = [0, 5, 11].map(|page| writer(&memory, page * PAGE, 2)).into();
    writers.iter().for_each(Doing::assert_blocked);
    assert_eq!(events(&tracker, SOON).len(), 3);
    release(&tracker, memory.range(0, 12 * PAGE));
    writers.into_iter().for_each(Doing::finish);
}

// In steps of 64 MiB at multiples of that, from an address that is none; and nothing stays protected for the next one.
#[test]
fn a_large_block_is_disarmed_in_steps_and_leaves_no_trace() {
    const LEN: usize = 200 << 20;
    for memory in [Memory::anonymous(LEN), Memory::thp(LEN), Memory::memfd(LEN)] {
        let memory = Arc::new(memory);
        let touched = [0, (64 << 20) - PAGE, 64 << 20, 100 << 20, LEN - PAGE];
        touched.iter().for_each(|&at| memory.write(at, 1));
        let tracker = memory.tracker();
        tracker.protect(memory.range(0, LEN)).unwrap();
        let writers: Vec<_> = touched.iter().map(|&at| writer(&memory, at, 2)).collect();
        writers.iter().for_each(Doing::assert_blocked);
        tracker.disarm().unwrap();
        writers.into_iter().for_each(Doing::finish);
        drop(tracker);
        assert!(touched.iter().all(|&at| !is_registered(memory.address(at), "uw")));
        // A stale protection would show as a fault under the next registration.
        let tracker = memory.tracker();
        touched.iter().for_each(|&at| writer(&memory, at + 1, 3).finish());
        assert_eq!(events(&tracker, Duration::ZERO), []);
    }
}
