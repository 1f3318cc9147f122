//! Pages that come in late, on a real userfaultfd, for every kind of memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Doing, HUGE, HugePages, LONG, Memory, PAGE, is_registered, raw_uffd};
use nix::sys::memfd::MFdFlags;
use nix::sys::mman::{MapFlags, MmapAdvise};
use ramshot_core::{Event, Filled, HostAddr, HostRange, RamFiller};
use ramshot_linux::{Filler, FillerOptions, TrackError};

fn open(memory: &Memory) -> Filler {
    Filler::open(memory.ram(), &FillerOptions::default()).unwrap()
}

fn events(filler: &Filler, timeout: Duration) -> Vec<Event> {
    let mut events = [Event::MissingFault { at: HostAddr(0) }; 16];
    let timeout = u32::try_from(timeout.as_millis()).unwrap();
    let count = filler.next_events(&mut events, Some(timeout)).unwrap();
    events[..count].to_vec()
}

fn reader(memory: &Arc<Memory>, at: usize) -> Doing<u8> {
    let memory = Arc::clone(memory);
    Doing::start(move || memory.read(at))
}

fn done(bytes: usize) -> Filled {
    Filled { bytes: bytes as u64, ..Filled::default() }
}

/// Data, zeros, a page that is there already, poison, the end.
fn pages_come_in(memory: Memory, page: usize) {
    let memory = Arc::new(memory);
    let filler = open(&memory);
    assert!(is_registered(memory.address(0), "um"));

    let read = reader(&memory, page + 7);
    let seen = events(&filler, LONG);
    assert!(
        matches!(seen[..], [Event::MissingFault { at }] if memory.range(page, page).contains(at)),
        "{seen:?}, not in {}",
        memory.range(page, page)
    );
    read.assert_blocked();
    assert_eq!(filler.fill(memory.address(0), &vec![9; 3 * page]).unwrap(), done(3 * page));
    assert_eq!(read.finish(), 9);

    // What is there is left as it was, on both sides of what is not.
    memory.write(page, 1);
    let filled = filler.fill(memory.address(page), &vec![8; 3 * page]).unwrap();
    assert_eq!(filled, Filled { bytes: 3 * page as u64, present: 2 * page as u64, again: false });
    assert_eq!([memory.read(page), memory.read(2 * page), memory.read(3 * page)], [1, 9, 8]);

    let write = common::writer(&memory, 5 * page, 3);
    assert_eq!(events(&filler, LONG).len(), 1);
    assert_eq!(filler.zero(memory.range(4 * page, 2 * page)).unwrap(), done(2 * page));
    write.finish();
    assert_eq!([memory.read(4 * page), memory.read(5 * page), memory.read(5 * page + 1)], [0, 3, 0]);
    // A stale fault is answered with zeros: they must not land on data.
    assert_eq!(filler.zero(memory.range(0, page)).unwrap().present, page as u64);
    assert_eq!(memory.read(0), 9);

    if filler.can_poison() {
        let len = filler.poison(memory.range(6 * page, page)).unwrap();
        assert_eq!(len, done(page));
        assert_eq!(read_by_kernel(&memory, 6 * page), Err(nix::errno::Errno::EFAULT));
        assert_eq!(filler.poison(memory.range(0, page)).unwrap().present, page as u64);
        assert_eq!(memory.read(0), 9);
    } else {
        eprintln!("SKIPPED: poison, which this kernel lacks (6.6)");
    }

    let read = reader(&memory, 7 * page);
    assert_eq!(events(&filler, LONG).len(), 1);
    filler.finish().unwrap();
    assert_eq!(read.finish(), 0, "what is not in is zero when all is in");
    assert!(!is_registered(memory.address(0), "um"));
    filler.finish().unwrap();
}

/// Has the kernel read a byte, which gets an error where a thread would get SIGBUS.
fn read_by_kernel(memory: &Memory, at: usize) -> nix::Result<usize> {
    let (_read, write) = nix::unistd::pipe().unwrap();
    // SAFETY: the address is of our mapping; write(2) reads one byte there and says EFAULT if it cannot.
    let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&write), memory.pointer(at).cast(), 1) };
    nix::errno::Errno::result(written).map(|count| usize::try_from(count).unwrap())
}

#[test]
fn pages_of_anonymous_memory_come_in() {
    pages_come_in(Memory::anonymous(8 * PAGE), PAGE);
}

#[test]
fn pages_of_a_memfd_come_in() {
    pages_come_in(Memory::memfd(8 * PAGE), PAGE);
    pages_come_in(Memory::shared_anonymous(8 * PAGE), PAGE);
}

#[test]
fn pages_of_a_private_memfd_come_in() {
    pages_come_in(Memory::private_memfd(8 * PAGE), PAGE);
}

#[test]
fn pages_of_memory_for_huge_pages_come_in() {
    pages_come_in(Memory::thp(HUGE), PAGE);
}

#[test]
fn pages_of_hugetlbfs_come_in() {
    let Some(_pages) = HugePages::reserve(8) else { return };
    pages_come_in(Memory::of_memfd(8 * HUGE, MFdFlags::MFD_HUGETLB, MapFlags::MAP_SHARED).unwrap(), HUGE);
}

#[test]
fn memory_that_is_not_fresh_is_refused_and_left_alone() {
    for memory in [Memory::anonymous(4 * PAGE), Memory::memfd(4 * PAGE)] {
        memory.write(2 * PAGE, 5);
        let error = Filler::open(memory.ram(), &FillerOptions::default()).unwrap_err().to_string();
        assert!(error.contains("holds something already") && error.contains("fresh"), "{error}");
        assert!(!is_registered(memory.address(0), "um"));
        assert_eq!([memory.read(0), memory.read(2 * PAGE)], [0, 5]);
    }
    // In the file, and in nobody's page table.
    let memory = Memory::memfd(4 * PAGE);
    std::os::unix::fs::FileExt::write_all_at(memory.file.as_ref().unwrap(), b"x", PAGE as u64).unwrap();
    let error = Filler::open(memory.ram(), &FillerOptions::default()).unwrap_err().to_string();
    assert!(error.contains("holds something already"), "{error}");
}

#[test]
fn a_file_and_a_registered_block_are_refused() {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(PAGE as u64).unwrap();
    let prot = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
    let mapped = Memory::of_file(&file, PAGE, MapFlags::MAP_PRIVATE, prot);
    let error = Filler::open(mapped.ram(), &FillerOptions::default()).unwrap_err();
    assert!(matches!(&error, TrackError::Block(m) if m.remedy.contains("restore_into")), "{error}");

    let memory = Memory::anonymous(PAGE);
    let other = raw_uffd(Some(1));
    let mut register = [memory.address(0).0, PAGE as u64, 1, 0];
    assert_eq!(common::ioctl(&other, 0xc020_aa00, &mut register), 0);
    let error = Filler::open(memory.ram(), &FillerOptions::default()).unwrap_err().to_string();
    assert!(error.contains("EBUSY") && error.contains("another userfaultfd"), "{error}");
    assert!(is_registered(memory.address(0), "um"), "the other one's registration stays");
}

// A discard goes on when its event is read; until then pages are put off. What was put in before it is gone, and comes as a
// fault again.
#[test]
fn a_discard_is_reported_and_its_pages_fault_again() {
    for memory in [Memory::anonymous(4 * PAGE), Memory::memfd(4 * PAGE)] {
        let advice = if memory.file.is_some() { MmapAdvise::MADV_REMOVE } else { MmapAdvise::MADV_DONTNEED };
        let memory = Arc::new(memory);
        let filler = open(&memory);
        filler.fill(memory.address(0), &[7; 4 * PAGE]).unwrap();
        let discarded = Arc::clone(&memory);
        let discard = Doing::start(move || discarded.advise(PAGE, PAGE, advice).unwrap());
        discard.assert_blocked();
        assert!(filler.zero(memory.range(PAGE, PAGE)).unwrap().again, "put off until the event is read");
        assert_eq!(events(&filler, LONG), [Event::Discarded(memory.range(PAGE, PAGE))]);
        discard.finish();
        let read = reader(&memory, PAGE);
        assert!(matches!(events(&filler, LONG)[..], [Event::MissingFault { .. }]));
        assert_eq!(filler.zero(memory.range(PAGE, PAGE)).unwrap(), done(PAGE));
        assert_eq!(read.finish(), 0);
        assert_eq!(memory.read(2 * PAGE), 7);
        filler.finish().unwrap();
    }
}

#[test]
fn what_is_unmapped_is_passed_over() {
    let memory = Arc::new(Memory::anonymous(8 * PAGE));
    let filler = open(&memory);
    let (start, unmapped) = (memory.address(2 * PAGE), Arc::clone(&memory));
    let unmap = Doing::start(move || {
        let at = std::ptr::NonNull::new(unmapped.pointer(2 * PAGE)).unwrap().cast();
        // SAFETY: a part of our mapping; nobody uses it any more.
        unsafe { nix::sys::mman::munmap(at, PAGE).unwrap() };
    });
    assert_eq!(events(&filler, LONG), [Event::Unmapped(HostRange::new(start, PAGE as u64))]);
    unmap.finish();
    assert_eq!(filler.fill(memory.address(0), &[7; 6 * PAGE]).unwrap(), done(6 * PAGE));
    assert_eq!([memory.read(PAGE), memory.read(3 * PAGE)], [7, 7]);
    filler.finish().unwrap();
    assert!(!is_registered(memory.address(0), "um") && !is_registered(memory.address(4 * PAGE), "um"));
}

// Several mappings in one block: what the kernel does not take at once is filled all the same.
#[test]
fn a_block_of_several_mappings_is_filled() {
    let memory = Arc::new(Memory::anonymous(8 * PAGE));
    memory.advise(2 * PAGE, 2 * PAGE, MmapAdvise::MADV_DONTDUMP).unwrap();
    let filler = open(&memory);
    assert_eq!(filler.fill(memory.address(PAGE), &[7; 4 * PAGE]).unwrap(), done(4 * PAGE));
    assert_eq!(filler.zero(memory.range(0, 8 * PAGE)).unwrap().present, 4 * PAGE as u64);
    filler.finish().unwrap();
    assert_eq!([memory.read(0), memory.read(PAGE), memory.read(4 * PAGE), memory.read(5 * PAGE)], [0, 7, 7, 0]);
}

// Never zeros: a filler that goes away before the end leaves who waits blocked. (The thread stays for the life of the test
// process, and so does its memory.)
#[test]
fn dropped_before_the_end_it_feeds_nobody_zeros() {
    let memory = Arc::new(Memory::anonymous(PAGE));
    std::mem::forget(Arc::clone(&memory));
    let filler = open(&memory);
    let read = reader(&memory, 0);
    assert_eq!(events(&filler, LONG).len(), 1);
    drop(filler);
    read.assert_blocked();
    assert!(is_registered(memory.address(0), "um"));
}
