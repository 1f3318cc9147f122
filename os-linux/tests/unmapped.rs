//! A whole block that is unmapped under a snapshot. A process of its own: in one with other trackers the place could be
//! mapped and registered anew by one of those, and `UFFDIO_WRITEPROTECT` does not ask whose registration it finds.
#![allow(clippy::unwrap_used)]

mod common;

use std::ptr::NonNull;

use common::{Doing, LONG, Memory, PAGE, events};
use nix::sys::mman::munmap;
use ramshot_core::{Event, WriteTracker};

#[test]
fn unmapping_a_block_is_reported_and_disarming_copes() {
    let memory = Memory::anonymous(4 * PAGE);
    memory.write(0, 1);
    let tracker = memory.tracker();
    tracker.protect(memory.range(0, PAGE)).unwrap();
    let (start, range) = (memory.start.addr(), memory.range(0, 4 * PAGE));
    std::mem::forget(memory);
    let unmap = Doing::start(move || {
        // SAFETY: the mapping of this test, which nobody touches any more.
        unsafe { munmap(NonNull::with_exposed_provenance(start), 4 * PAGE) }
    });
    unmap.assert_blocked();
    assert_eq!(events(&tracker, LONG), [Event::Unmapped(range)]);
    unmap.finish().unwrap();
    assert_eq!(tracker.protect(range).unwrap_err().errno, libc::ENOENT);
    tracker.disarm().unwrap();
}
