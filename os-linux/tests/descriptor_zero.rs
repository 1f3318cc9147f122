//! Descriptor 0 is a descriptor like any other (QEMU once took it for "none"). A process of its own, since it replaces
//! the standard input.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use common::{LONG, Memory, PAGE, events, raw_uffd, release, writer};
use ramshot_core::WriteTracker;
use ramshot_linux::{Tracker, TrackerOptions};

#[test]
fn a_userfaultfd_with_number_zero_works_and_is_closed_once() {
    let memory = Arc::new(Memory::anonymous(PAGE));
    memory.write(0, 1);
    let uffd = raw_uffd(Some(1));
    // SAFETY: nothing in this process reads its standard input.
    assert_eq!(unsafe { libc::dup2(uffd.as_raw_fd(), 0) }, 0);
    drop(uffd);
    // SAFETY: number 0 is the duplicate just made.
    let zero = unsafe { OwnedFd::from_raw_fd(0) };
    let tracker = Tracker::from_fd(zero, memory.ram(), &TrackerOptions::default()).unwrap();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 2);
    assert_eq!(events(&tracker, LONG).len(), 1);
    release(&tracker, memory.range(0, PAGE));
    write.finish();
    drop(tracker);
    let next = File::open("/dev/null").unwrap();
    assert_eq!(next.as_raw_fd(), 0, "number 0 was not closed");

    // And one that `open` gets: the device takes 0, the context the next; or, without device, the context takes 0.
    drop(next);
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let write = writer(&memory, 0, 3);
    assert_eq!(events(&tracker, LONG).len(), 1);
    tracker.disarm().unwrap();
    write.finish();
}
