//! A userfaultfd that is not of the process it is said to be of. A process of its own: it forks, and a child keeps what other tests
//! close.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Memory, PAGE, is_registered};
use ramshot_core::{GuestAddr, RamSource, Treatment};
use ramshot_linux::{GuestRam, Handoff, RamError, Region, TrackError, Tracker, TrackerOptions};

fn region(memory: &Memory) -> Region {
    Region {
        name: "ram0".to_owned(),
        guest: GuestAddr(0),
        host: memory.address(0),
        len: memory.len as u64,
        used: None,
        treatment: Treatment::Tracked,
        file: None,
    }
}

#[test]
fn a_descriptor_of_another_process_than_it_says_is_found_out() {
    let memory = Memory::anonymous(4 * PAGE);
    memory.write(0, 1);
    // It has the same memory at the same addresses; and is not the one that the descriptor is about.
    // SAFETY: the child waits to be killed and does nothing else.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: waits.
            unsafe { libc::pause() };
        }
    }
    let open = |pid: u32| {
        let mut handoff = Handoff::of_this_process(vec![region(&memory)], false).unwrap();
        handoff.pid = pid;
        GuestRam::from_handoff(handoff).map(Arc::new)
    };
    let ram = open(u32::try_from(child).unwrap()).unwrap();
    let error = Tracker::open(ram, &TrackerOptions::default()).unwrap_err();
    assert!(matches!(&error, TrackError::Unsuitable(m) if m.why.contains("another one")), "{error}");
    assert!(!is_registered(memory.address(0), "uw"));

    // Dead, it is nobody's memory.
    let ram = open(u32::try_from(child).unwrap()).unwrap();
    // SAFETY: the child made above.
    assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0);
    let mut status = 0;
    // SAFETY: as above.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(ram.read(memory.address(0), &mut [0; 8]).unwrap_err().errno, libc::ESRCH);
    let error = open(u32::try_from(child).unwrap()).unwrap_err();
    assert!(matches!(error, RamError::Process { .. }) && error.to_string().contains("it has ended"), "{error}");
    for nobody in [0, u32::MAX] {
        assert!(open(nobody).is_err());
    }
    // No userfaultfd.
    let mut handoff = Handoff::of_this_process(vec![region(&memory)], false).unwrap();
    handoff.userfaultfd = std::fs::File::open("/dev/null").unwrap().into();
    assert!(GuestRam::from_handoff(handoff).unwrap_err().to_string().contains("fdinfo"));
}
