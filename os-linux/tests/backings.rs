//! Every kind of memory: a write to a protected page waits and is reported, a release lets it go on, and what was never
//! touched is not among the populated ranges.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{
    HUGE, HugePages, LONG, Memory, PAGE, events, is_registered, open, populated, ram, release, smaps, writer,
};
use nix::sys::memfd::MFdFlags;
use nix::sys::mman::{MapFlags, MmapAdvise};
use ramshot_core::{Backing, Event, RamSource, WriteTracker};

/// Protects `unit` bytes at `at`, writes there, and sees the whole life of the fault.
fn fault_and_release(memory: Memory, backing: Backing, unit: usize, at: usize) {
    let memory = Arc::new(memory);
    memory.write(at, 1);
    let ram = memory.ram();
    let block = ram.table().blocks()[0];
    assert_eq!(
        (block.backing, block.page_size),
        (backing, if backing == Backing::HugeTlb { HUGE } else { PAGE } as u64)
    );
    let tracker = open(&ram);
    assert!(is_registered(memory.address(0), "uw"));
    let range = memory.range(at / unit * unit, unit);
    tracker.protect(range).unwrap();

    let write = writer(&memory, at, 2);
    let seen = events(&tracker, LONG);
    let [Event::WriteFault { at: address }] = seen[..] else { panic!("{seen:?}") };
    assert!(range.contains(address), "{address} in {range}");
    write.assert_blocked();
    let mut byte = [0];
    ram.read(memory.address(at), &mut byte).unwrap();
    assert_eq!(byte, [1], "reading goes on, and sees what was there before");

    release(&tracker, range);
    write.finish();
    assert_eq!(memory.read(at), 2);
    memory.write(at, 3);
    // Released already: still fine.
    release(&tracker, range);
    drop(tracker);
    assert!(!is_registered(memory.address(0), "uw"));
}

#[test]
fn anonymous() {
    fault_and_release(Memory::anonymous(16 * PAGE), Backing::Anonymous, PAGE, 5 * PAGE + 7);
}

#[test]
fn memfd() {
    fault_and_release(Memory::memfd(16 * PAGE), Backing::Shmem, PAGE, 5 * PAGE + 7);
}

#[test]
fn private_memfd() {
    fault_and_release(Memory::private_memfd(16 * PAGE), Backing::Shmem, PAGE, 5 * PAGE + 7);
}

#[test]
fn shared_anonymous() {
    fault_and_release(Memory::shared_anonymous(16 * PAGE), Backing::Shmem, PAGE, 5 * PAGE + 7);
}

#[test]
fn hugetlb_private() {
    let Some(_pages) = HugePages::reserve(4) else { return };
    fault_and_release(Memory::anonymous_hugetlb(2 * HUGE).unwrap(), Backing::HugeTlb, HUGE, HUGE + 12345);
}

#[test]
fn hugetlb_memfd() {
    let Some(_pages) = HugePages::reserve(4) else { return };
    let memory = Memory::of_memfd(2 * HUGE, MFdFlags::MFD_HUGETLB, MapFlags::MAP_SHARED).unwrap();
    fault_and_release(memory, Backing::HugeTlb, HUGE, HUGE + 12345);
}

#[test]
fn thp_stays_huge_when_released_whole() {
    let memory = Memory::thp(2 * HUGE);
    memory.write(0, 1);
    memory.write(HUGE, 1);
    let huge = smaps(memory.address(0), "AnonHugePages");
    if huge != "4096 kB" {
        eprintln!("SKIPPED: transparent huge pages are off (AnonHugePages {huge})");
        return;
    }
    let address = memory.address(0);
    let memory = Arc::new(memory);
    let tracker = memory.tracker();
    assert_eq!(populated(&tracker, 0), [memory.range(0, 2 * HUGE)]);
    tracker.protect(memory.range(0, 2 * HUGE)).unwrap();
    let write = writer(&memory, HUGE + 5 * PAGE, 2);
    assert_eq!(events(&tracker, LONG).len(), 1);
    release(&tracker, memory.range(HUGE, HUGE));
    write.finish();
    release(&tracker, memory.range(0, HUGE));
    memory.write(0, 2);
    assert_eq!(smaps(address, "AnonHugePages"), "4096 kB");
}

#[test]
fn anonymous_memory_never_touched_is_not_populated_and_does_not_fault() {
    let memory = Arc::new(Memory::anonymous(64 * PAGE));
    memory.write(3 * PAGE, 1);
    memory.write(4 * PAGE, 1);
    assert_eq!(memory.read(10 * PAGE), 0, "reading maps the zero page");
    memory.write(63 * PAGE, 1);
    let tracker = memory.tracker();
    assert_eq!(populated(&tracker, 0), [memory.range(3 * PAGE, 2 * PAGE), memory.range(63 * PAGE, PAGE)]);
    // The kernel takes the absent page along and no fault comes: that is why it must not be pending.
    tracker.protect(memory.range(20 * PAGE, PAGE)).unwrap();
    writer(&memory, 20 * PAGE, 9).finish();
    assert_eq!(events(&tracker, common::SOON), []);
}

#[test]
fn a_discarded_page_is_no_longer_populated() {
    let memory = Memory::anonymous(8 * PAGE);
    (0..8).for_each(|page| memory.write(page * PAGE, 1));
    memory.advise(2 * PAGE, PAGE, MmapAdvise::MADV_DONTNEED).unwrap();
    let tracker = memory.tracker();
    assert_eq!(populated(&tracker, 0), [memory.range(0, 2 * PAGE), memory.range(3 * PAGE, 5 * PAGE)]);
}

#[test]
fn only_the_used_part_is_populated_and_the_whole_is_registered() {
    let memory = Memory::anonymous(8 * PAGE);
    (0..8).for_each(|page| memory.write(page * PAGE, 1));
    let mut region = memory.region("ram0", 0);
    region.used = Some(3 * PAGE as u64);
    let tracker = open(&ram(vec![region]));
    assert_eq!(populated(&tracker, 0), [memory.range(0, 3 * PAGE)]);
    assert!(is_registered(memory.address(7 * PAGE), "uw"));
}

// Shared memory: what the file holds counts, in our page table or not, and holes do not.
#[test]
fn memfd_data_absent_from_the_page_table_is_populated() {
    let memory = Memory::memfd(64 * PAGE);
    memory.write(0, 1);
    let file = memory.file.as_ref().unwrap();
    file.write_all_at(&[7], (30 * PAGE) as u64).unwrap();
    let expected = [memory.range(0, PAGE), memory.range(30 * PAGE, PAGE)];
    assert_eq!(populated(&memory.tracker(), 0), expected);

    // Without the file given, through the kernel's link to it (needs privilege), or everything.
    let mut region = memory.region("ram0", 0);
    region.file = None;
    let found = populated(&open(&ram(vec![region])), 0);
    if found == [memory.range(0, 64 * PAGE)] {
        eprintln!("SKIPPED in part: no access to /proc/self/map_files, so all of the memfd counts as populated");
    } else {
        assert_eq!(found, expected);
    }
}

#[test]
fn absent_memfd_pages_with_data_can_be_protected() {
    let memory = Arc::new(Memory::memfd(8 * PAGE));
    memory.file.as_ref().unwrap().write_all_at(&[7], (2 * PAGE) as u64).unwrap();
    let tracker = memory.tracker();
    tracker.protect(memory.range(2 * PAGE, PAGE)).unwrap();
    let write = writer(&memory, 2 * PAGE, 8);
    assert_eq!(events(&tracker, LONG).len(), 1);
    write.assert_blocked();
    assert_eq!(memory.read(2 * PAGE), 7);
    release(&tracker, memory.range(2 * PAGE, PAGE));
    write.finish();
}

#[test]
fn a_memfd_at_an_offset_is_searched_there() {
    let whole = Memory::memfd(64 * PAGE);
    let file = whole.file.as_ref().unwrap();
    file.write_all_at(&[7], (10 * PAGE) as u64).unwrap();
    file.write_all_at(&[7], (33 * PAGE) as u64).unwrap();
    let mut region = whole.region("high", 0);
    region.host = whole.address(32 * PAGE);
    region.len = 16 * PAGE as u64;
    region.file.as_mut().unwrap().offset = 32 * PAGE as u64;
    assert_eq!(populated(&open(&ram(vec![region])), 0), [whole.range(33 * PAGE, PAGE)]);
}

#[test]
fn a_private_memfd_counts_file_and_own_copies() {
    let memory = Memory::private_memfd(64 * PAGE);
    memory.file.as_ref().unwrap().write_all_at(&[7], (40 * PAGE) as u64).unwrap();
    memory.write(5 * PAGE, 1);
    memory.write(41 * PAGE, 1);
    let expected = [memory.range(5 * PAGE, PAGE), memory.range(40 * PAGE, 2 * PAGE)];
    assert_eq!(populated(&memory.tracker(), 0), expected);
}

#[test]
fn hugetlb_is_populated_by_page_if_the_page_table_has_all_of_it() {
    let Some(_pages) = HugePages::reserve(6) else { return };
    let memory = Memory::anonymous_hugetlb(3 * HUGE).unwrap();
    memory.write(HUGE, 1);
    assert_eq!(populated(&memory.tracker(), 0), [memory.range(HUGE, HUGE)]);
    drop(memory);

    let memory = Memory::of_memfd(3 * HUGE, MFdFlags::MFD_HUGETLB, MapFlags::MAP_SHARED).unwrap();
    memory.write(HUGE, 1);
    assert_eq!(populated(&memory.tracker(), 0), [memory.range(HUGE, HUGE)]);
    // A page that came in by another mapping is in the file and not in our table: all of it may be populated then.
    let file = memory.file.as_ref().unwrap();
    let prot = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
    Memory::of_file(file, 3 * HUGE, MapFlags::MAP_SHARED, prot).write(2 * HUGE, 9);
    assert_eq!(populated(&memory.tracker(), 0), [memory.range(0, 3 * HUGE)]);
}

// 1 TiB that nobody touched, but for two pages: neither the kernel nor we may walk it page by page.
#[test]
fn a_huge_sparse_block_costs_what_is_populated() {
    let memory = Memory::anonymous(1 << 40);
    memory.write(123 * PAGE, 1);
    memory.write((1 << 40) - PAGE, 1);
    let tracker = memory.tracker();
    let started = std::time::Instant::now();
    assert_eq!(populated(&tracker, 0), [memory.range(123 * PAGE, PAGE), memory.range((1 << 40) - PAGE, PAGE)]);
    let took = started.elapsed();
    if ramshot_linux::probe().missing().iter().any(|m| m.what == "PAGEMAP_SCAN") {
        eprintln!("SKIPPED: the time limit, as this kernel lacks PAGEMAP_SCAN (took {took:?})");
    } else {
        assert!(took.as_millis() < 100, "{took:?}");
    }
}
