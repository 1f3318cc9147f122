//! Guest RAM that becomes a private mapping of a file.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use common::{Memory, PAGE};
use ramshot_core::BlockIndex;
use ramshot_linux::{MapTarget, Tracker, TrackerOptions};

fn target(memory: &Memory) -> MapTarget {
    // SAFETY: the memory is the test's own, and unmapped by address.
    unsafe { MapTarget::new(memory.ram()) }
}

fn file(len: usize) -> File {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.write_all_at(&vec![7; len], 0).unwrap();
    file
}

#[test]
fn the_file_is_there_at_once_and_stays_as_it_is() {
    let memory = Memory::anonymous(4 * PAGE);
    memory.write(0, 1);
    let mut file = file(8 * PAGE);
    target(&memory).map(BlockIndex(0), (0, 4 * PAGE as u64), &file, 2 * PAGE as u64).unwrap();
    assert_eq!([memory.read(0), memory.read(4 * PAGE - 1)], [7, 7]);
    memory.write(PAGE, 9);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert!(memory.read(PAGE) == 9 && bytes.iter().all(|&byte| byte == 7));
    // Described anew, it says why there can be no live snapshot of it; described as it was, too.
    let error = Tracker::open(memory.ram(), &TrackerOptions::default()).unwrap_err().to_string();
    assert!(error.contains("disk file"), "{error}");
}

#[test]
fn memory_that_others_share_is_refused_with_the_reason() {
    for memory in [Memory::memfd(PAGE), Memory::shared_anonymous(PAGE), Memory::private_memfd(PAGE)] {
        let target = target(&memory);
        let refused = target.check(BlockIndex(0), 0).unwrap_err();
        assert!(refused.why.contains("Shmem") && refused.remedy.contains("lazily"), "{refused}");
        assert!(target.map(BlockIndex(0), (0, PAGE as u64), &file(PAGE), 0).is_err());
    }
    let memory = Memory::anonymous(PAGE);
    let target = target(&memory);
    assert!(target.check(BlockIndex(0), 7).unwrap_err().why.contains("whole pages"));
    assert!(target.check(BlockIndex(1), 0).is_err());
    assert!(target.map(BlockIndex(1), (0, PAGE as u64), &file(PAGE), 0).is_err());
}

#[test]
fn a_part_is_mapped_and_the_rest_stays() {
    let memory = Memory::anonymous(4 * PAGE);
    memory.write(0, 1);
    let (target, page) = (target(&memory), PAGE as u64);
    let file = file(4 * PAGE);
    target.map(BlockIndex(0), (2 * page, page), &file, page).unwrap();
    assert_eq!([0, PAGE, 2 * PAGE, 3 * PAGE].map(|at| memory.read(at)), [1, 0, 7, 0]);
    for part in [(4 * page, page), (3 * page, 2 * page), (u64::MAX - 4095, page), (1, page), (0, 1), (0, 0)] {
        let error = target.map(BlockIndex(0), part, &file, 0).unwrap_err();
        assert_eq!(error.errno, libc::EINVAL, "{part:?}: {error}");
    }
    assert_eq!(MapTarget::page_size(), page);
}
