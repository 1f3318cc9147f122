//! Taking over a userfaultfd that somebody else made.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::{Doing, LONG, Memory, PAGE, events, ioctl, is_registered, raw_uffd, release, writer};
use ramshot_core::{Event, WriteTracker};
use ramshot_linux::{Tracker, TrackerOptions};

const WP: u64 = 1 << 0;
const EVENT_REMOVE: u64 = 1 << 3;
const SIGBUS: u64 = 1 << 7;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;

fn refused(fd: OwnedFd, memory: &Memory) -> String {
    let error = Tracker::from_fd(fd, memory.ram(), &TrackerOptions::default()).unwrap_err();
    assert!(!is_registered(memory.address(0), "uw"));
    error.to_string()
}

#[test]
fn an_initialised_descriptor_is_taken_over() {
    let memory = Arc::new(Memory::memfd(4 * PAGE));
    memory.write(0, 1);
    let fd = raw_uffd(Some(WP | WP_HUGETLBFS_SHMEM));
    let tracker = Tracker::from_fd(fd, memory.ram(), &TrackerOptions::default()).unwrap();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 2);
    assert_eq!(events(&tracker, LONG).len(), 1);
    release(&tracker, memory.range(0, PAGE));
    write.finish();
}

#[test]
fn a_blocking_descriptor_is_made_non_blocking() {
    let memory = Memory::anonymous(PAGE);
    let fd = raw_uffd(Some(WP));
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
    let tracker = Tracker::from_fd(fd, memory.ram(), &TrackerOptions::default()).unwrap();
    assert_eq!(events(&tracker, common::SOON), []);
}

#[test]
fn unsuitable_descriptors_are_refused_with_the_reason() {
    let memory = Memory::anonymous(PAGE);
    let text = refused(raw_uffd(None), &memory);
    assert!(text.contains("UFFDIO_API"), "{text}");
    let text = refused(std::fs::File::open("/dev/null").unwrap().into(), &memory);
    assert!(text.contains("fdinfo"), "{text}");
    let text = refused(raw_uffd(Some(WP | SIGBUS)), &memory);
    assert!(text.contains("UFFD_FEATURE_SIGBUS"), "{text}");
    if ramshot_linux::probe().missing().iter().any(|m| m.what.contains("WP_ASYNC")) {
        eprintln!("SKIPPED: a context with WP_ASYNC, which this kernel lacks");
    } else {
        let text = refused(raw_uffd(Some(WP | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC)), &memory);
        assert!(text.contains("UFFD_FEATURE_WP_ASYNC"), "{text}");
    }
}

// Firecracker asks for EVENT_REMOVE and nothing else. What the kernel can do it does all the same.
#[test]
fn a_context_that_asked_for_no_write_faults_reports_them() {
    for memory in [Memory::anonymous(PAGE), Memory::memfd(PAGE)] {
        let memory = Arc::new(memory);
        memory.write(0, 1);
        let tracker = Tracker::from_fd(raw_uffd(Some(EVENT_REMOVE)), memory.ram(), &TrackerOptions::default()).unwrap();
        tracker.protect(memory.range(0, PAGE)).unwrap();
        let write = writer(&memory, 0, 2);
        write.assert_blocked();
        assert_eq!(events(&tracker, LONG), [Event::WriteFault { at: memory.address(0) }]);
        release(&tracker, memory.range(0, PAGE));
        write.finish();
    }
}

// A VM that is still being restored lazily: its missing pages stay registered, and their faults come with ours.
#[test]
fn missing_pages_of_a_lazy_restore_stay_registered() {
    let memory = Arc::new(Memory::anonymous(4 * PAGE));
    memory.write(0, 1);
    let restore = raw_uffd(Some(WP));
    let whole = [memory.address(0).0, 4 * PAGE as u64];
    assert_eq!(ioctl(&restore, 0xc020_aa00, &mut [whole[0], whole[1], 1, 0]), 0);
    let tracker = Tracker::from_fd(restore.try_clone().unwrap(), memory.ram(), &TrackerOptions::default()).unwrap();
    assert!(is_registered(memory.address(0), "um") && is_registered(memory.address(0), "uw"));

    let read = Arc::clone(&memory);
    let read = Doing::start(move || read.read(2 * PAGE));
    let seen = events(&tracker, LONG);
    assert!(matches!(seen[..], [Event::MissingFault { at }] if memory.range(2 * PAGE, PAGE).contains(at)), "{seen:?}");
    assert_eq!(ioctl(&restore, 0xc020_aa04, &mut [memory.address(2 * PAGE).0, PAGE as u64, 0, 0]), 0);
    assert_eq!(read.finish(), 0);

    tracker.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 2);
    assert!(matches!(events(&tracker, LONG)[..], [Event::WriteFault { .. }]));
    drop(tracker);
    write.finish();
    assert!(is_registered(memory.address(0), "um"), "the restore's registration was taken away");
    memory.write(0, 3);

    // A second snapshot can follow on the same context.
    let again = Tracker::from_fd(restore.try_clone().unwrap(), memory.ram(), &TrackerOptions::default()).unwrap();
    again.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 4);
    assert!(matches!(events(&again, LONG)[..], [Event::WriteFault { .. }]));
    drop(again);
    write.finish();

    // And it still works for the restore.
    let reader = Arc::clone(&memory);
    let read = Doing::start(move || reader.read(3 * PAGE));
    read.assert_blocked();
    assert_eq!(ioctl(&restore, 0xc020_aa04, &mut [memory.address(3 * PAGE).0, PAGE as u64, 0, 0]), 0);
    assert_eq!(read.finish(), 0);
}

/// The same with the `userfaultfd` crate: what it opens we take over, and both see the same of the same memory.
#[cfg(feature = "userfaultfd")]
mod crate_userfaultfd {
    use userfaultfd::{FaultKind, FeatureFlags, RegisterMode, UffdBuilder};

    use super::*;

    fn build() -> userfaultfd::Uffd {
        let wanted = FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(WP_HUGETLBFS_SHMEM);
        UffdBuilder::new().close_on_exec(true).non_blocking(true).require_features(wanted).create().unwrap()
    }

    #[test]
    fn a_uffd_is_taken_over() {
        let memory = Arc::new(Memory::memfd(4 * PAGE));
        memory.write(0, 1);
        let tracker = Tracker::from_uffd(build(), memory.ram(), &TrackerOptions::default()).unwrap();
        tracker.protect(memory.range(0, PAGE)).unwrap();
        let write = writer(&memory, 0, 2);
        assert!(matches!(events(&tracker, LONG)[..], [Event::WriteFault { .. }]));
        release(&tracker, memory.range(0, PAGE));
        write.finish();
        drop(tracker);
        assert!(!is_registered(memory.address(0), "uw"));
    }

    // One context, shared: the crate protects and we see the fault; we protect and the crate does.
    #[test]
    fn both_behave_the_same() {
        use std::os::fd::{AsRawFd, BorrowedFd};
        let memory = Arc::new(Memory::anonymous(2 * PAGE));
        memory.write(0, 1);
        memory.write(PAGE, 1);
        let uffd = build();
        uffd.register_with_mode(memory.pointer(0).cast(), 2 * PAGE, RegisterMode::WRITE_PROTECT).unwrap();
        // SAFETY: `uffd` is open to the end of the test.
        let fd = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }.try_clone_to_owned().unwrap();
        let tracker = Tracker::from_fd(fd, memory.ram(), &TrackerOptions::default()).unwrap();

        uffd.write_protect(memory.pointer(0).cast(), PAGE).unwrap();
        let write = writer(&memory, 5, 2);
        let seen = events(&tracker, LONG);
        assert!(matches!(seen[..], [Event::WriteFault { at }] if memory.range(0, PAGE).contains(at)), "{seen:?}");
        release(&tracker, memory.range(0, PAGE));
        write.finish();

        tracker.protect(memory.range(PAGE, PAGE)).unwrap();
        let write = writer(&memory, PAGE + 5, 2);
        write.assert_blocked();
        let Some(userfaultfd::Event::Pagefault { kind, addr, .. }) = uffd.read_event().unwrap() else {
            panic!("no fault");
        };
        assert_eq!(kind, FaultKind::WriteProtected);
        assert_eq!(addr.addr() / PAGE, memory.pointer(PAGE).addr() / PAGE);
        uffd.remove_write_protection(memory.pointer(PAGE).cast(), PAGE, true).unwrap();
        write.finish();
    }
}
