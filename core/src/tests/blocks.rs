//! The block table: every layout it refuses, and translation at every edge.

use std::{format, string::ToString, vec, vec::Vec};

use crate::*;

fn name(name: &str) -> BlockName {
    BlockName::new(name).unwrap()
}

fn block(called: &str, guest: u64, host: u64, pages: u64) -> RamBlock {
    RamBlock {
        name: name(called),
        guest: GuestAddr(guest),
        host: HostAddr(host),
        len: pages * PAGE_SIZE,
        used: pages * PAGE_SIZE,
        page_size: PAGE_SIZE,
        backing: Backing::Anonymous,
        treatment: Treatment::Tracked,
    }
}

fn low() -> RamBlock {
    block("low", 0, 0x10_0000, 4)
}

fn refused(blocks: &[RamBlock]) -> LayoutError {
    BlockTable::new(blocks).unwrap_err()
}

#[test]
fn no_block_or_only_ignored_ones() {
    assert_eq!(refused(&[]), LayoutError::NoBlocks);
    assert_eq!(refused(&[RamBlock { treatment: Treatment::Ignored, ..low() }]), LayoutError::NoBlocks);
}

#[test]
fn too_many_blocks() {
    let many = |count: u64| -> Vec<RamBlock> {
        (0..count).map(|i| block(&format!("b{i}"), i << 20, 0x100_0000 + (i << 20), 1)).collect()
    };
    let most = u64::try_from(MAX_BLOCKS).unwrap();
    assert_eq!(BlockTable::new(&many(most)).unwrap().blocks().len(), MAX_BLOCKS);
    assert_eq!(refused(&many(most + 1)), LayoutError::TooManyBlocks { given: MAX_BLOCKS + 1 });
}

#[test]
fn empty_blocks() {
    let empty = LayoutError::Empty { block: name("low") };
    assert_eq!(refused(&[RamBlock { len: 0, used: 0, ..low() }]), empty);
    assert_eq!(refused(&[RamBlock { used: 0, ..low() }]), empty);
}

#[test]
fn page_sizes_that_are_none() {
    for page_size in [0, 1, 2048, 3 * 4096] {
        let error = LayoutError::PageSize { block: name("low"), page_size };
        assert_eq!(refused(&[RamBlock { page_size, ..low() }]), error);
    }
}

#[test]
fn unaligned_addresses_and_lengths_name_the_value() {
    let unaligned = |value, to| LayoutError::Unaligned { block: name("low"), value, to };
    assert_eq!(refused(&[RamBlock { host: HostAddr(0x10_0800), ..low() }]), unaligned(0x10_0800, PAGE_SIZE));
    assert_eq!(refused(&[RamBlock { guest: GuestAddr(0x801), ..low() }]), unaligned(0x801, PAGE_SIZE));
    assert_eq!(refused(&[RamBlock { len: 0x4001, ..low() }]), unaligned(0x4001, PAGE_SIZE));
    assert_eq!(refused(&[RamBlock { used: 0x3fff, ..low() }]), unaligned(0x3fff, PAGE_SIZE));
    // Aligned to 4 KiB, but not to the host page. The guest address need not be.
    let huge = RamBlock { page_size: 0x4000, guest: GuestAddr(0x1000), ..low() };
    assert!(BlockTable::new(&[huge]).is_ok());
    assert_eq!(refused(&[RamBlock { host: HostAddr(0x10_1000), ..huge }]), unaligned(0x10_1000, 0x4000));
    assert_eq!(refused(&[RamBlock { used: 0x1000, ..huge }]), unaligned(0x1000, 0x4000));
    assert_eq!(refused(&[RamBlock { len: 0x6000, ..huge }]), unaligned(0x6000, 0x4000));
}

#[test]
fn used_beyond_length() {
    let error = LayoutError::UsedBeyondLength { block: name("low"), used: 0x5000, len: 0x4000 };
    assert_eq!(refused(&[RamBlock { used: 0x5000, ..low() }]), error);
}

#[test]
fn ends_beyond_the_address_space() {
    let error = LayoutError::Wraps { block: name("low") };
    assert_eq!(refused(&[RamBlock { host: HostAddr(0u64.wrapping_sub(0x4000)), ..low() }]), error);
    assert_eq!(refused(&[RamBlock { guest: GuestAddr(0u64.wrapping_sub(0x1000)), ..low() }]), error);
    assert!(BlockTable::new(&[RamBlock { host: HostAddr(0u64.wrapping_sub(0x5000)), ..low() }]).is_ok());
}

#[test]
fn overlaps_in_either_address_space() {
    let error = LayoutError::Overlap { block: name("low"), other: name("high") };
    assert_eq!(refused(&[low(), block("high", 0x10_0000, 0x10_3000, 4)]), error);
    assert_eq!(refused(&[low(), block("high", 0x3000, 0x20_0000, 4)]), error);
    // The unused tail counts: it is registered too.
    let tail = RamBlock { used: 0x1000, ..low() };
    assert_eq!(refused(&[tail, block("high", 0x10_0000, 0x10_1000, 1)]), error);
    // One inside the other, in reverse order.
    assert_eq!(
        refused(&[block("high", 0x1000, 0x10_1000, 1), low()]),
        LayoutError::Overlap { block: name("high"), other: name("low") }
    );
    // Back to back is fine.
    assert!(BlockTable::new(&[low(), block("high", 0x4000, 0x10_4000, 4)]).is_ok());
}

#[test]
fn one_name_twice() {
    assert_eq!(refused(&[low(), block("low", 0x10_0000, 0x20_0000, 1)]), LayoutError::SameName { block: name("low") });
}

#[test]
fn names_that_are_none() {
    assert_eq!(BlockName::new(""), None);
    assert_eq!(BlockName::new(&"x".repeat(MAX_NAME + 1)), None);
    let longest = "ü".repeat(MAX_NAME / 2) + "x";
    assert_eq!(name(&longest).as_str(), longest);
    assert_eq!(name("pc.ram").to_string(), "pc.ram");
}

#[test]
fn a_bitmap_that_is_too_small() {
    let table = BlockTable::new(&[low()]).unwrap();
    let pending = PageBitmap::new(vec![0; 2], 3, true).unwrap();
    let error = Snapshot::<_, _, 4, 4>::new(&table, pending, 4, vec![0; 2], Limits::default()).unwrap_err();
    assert_eq!(error, SetupError::Layout(LayoutError::BitmapTooSmall { bits: 3, pages: 4 }));
    assert_eq!(error.to_string(), "the bitmap lent has 3 bits, the RAM layout has 4 pages");
}

#[test]
fn every_error_is_a_sentence_that_names_the_thing_and_the_value() {
    let errors = [
        (refused(&[RamBlock { len: 0, used: 0, ..low() }]), "RAM block \"low\" is empty"),
        (
            refused(&[RamBlock { page_size: 5000, ..low() }]),
            "RAM block \"low\": page size 5000 is not a power of two of at least 4096",
        ),
        (
            refused(&[RamBlock { host: HostAddr(0x10_0800), ..low() }]),
            "RAM block \"low\": 0x100800 is not a multiple of 0x1000",
        ),
        (
            refused(&[RamBlock { used: 0x5000, ..low() }]),
            "RAM block \"low\": used length 0x5000 is more than its length 0x4000",
        ),
        (refused(&[low(), block("high", 0x3000, 0x20_0000, 4)]), "RAM blocks \"low\" and \"high\" overlap"),
    ];
    for (error, sentence) in errors {
        assert_eq!(error.to_string(), sentence);
    }
}

/// A block with an unused tail, an ignored one, one with 8 KiB pages: pages 0-3, none, 4-7.
fn three() -> BlockTable {
    BlockTable::new(&[
        RamBlock { len: 0x6000, ..low() },
        RamBlock { treatment: Treatment::Ignored, ..block("shared", 0x10_0000, 0x20_0000, 2) },
        RamBlock { page_size: 0x2000, ..block("high", 0x20_0000, 0x30_0000, 4) },
    ])
    .unwrap()
}

#[test]
fn ignored_blocks_and_unused_tails_take_no_pages() {
    let table = three();
    assert_eq!(table.pages(), 8);
    assert_eq!(table.block_run(BlockIndex(0)), Run::new(PageId(0), 4));
    assert_eq!(table.block_run(BlockIndex(1)).pages, 0);
    assert_eq!(table.block_run(BlockIndex(2)), Run::new(PageId(4), 4));
    assert_eq!(table.block_run(BlockIndex(3)).pages, 0);
    assert_eq!(table.block_of(PageId(3)), Some(BlockIndex(0)));
    assert_eq!(table.block_of(PageId(4)), Some(BlockIndex(2)));
    assert_eq!(table.block_of(PageId(8)), None);
}

#[test]
fn host_addresses_at_every_edge() {
    let table = three();
    let at = |host| (table.block_at(HostAddr(host)).map(|b| b.0), table.page_at(HostAddr(host)).map(|p| p.0));
    assert_eq!(at(0x0f_ffff), (None, None));
    assert_eq!(at(0x10_0000), (Some(0), Some(0)));
    assert_eq!(at(0x10_3fff), (Some(0), Some(3)));
    assert_eq!(at(0x10_4000), (Some(0), None), "unused tail");
    assert_eq!(at(0x10_5fff), (Some(0), None));
    assert_eq!(at(0x10_6000), (None, None));
    assert_eq!(at(0x20_0000), (Some(1), None), "ignored");
    assert_eq!(at(0x30_3000), (Some(2), Some(7)));
    assert_eq!(at(u64::MAX), (None, None));
}

#[test]
fn guest_addresses_at_every_edge() {
    let table = three();
    let at = |guest| table.page_at_guest(GuestAddr(guest)).map(|p| p.0);
    assert_eq!([at(0), at(0x3fff), at(0x4000), at(0x10_0000)], [Some(0), Some(3), None, None]);
    assert_eq!(
        [at(0x1f_ffff), at(0x20_0000), at(0x20_3fff), at(0x20_4000), at(u64::MAX)],
        [None, Some(4), Some(7), None, None]
    );
}

#[test]
fn a_run_has_a_host_range_only_inside_one_block() {
    let table = three();
    let of = |first, pages| table.host_range(Run::new(PageId(first), pages));
    assert_eq!(of(1, 3), Some(HostRange::new(HostAddr(0x10_1000), 0x3000)));
    assert_eq!(of(4, 4), Some(HostRange::new(HostAddr(0x30_0000), 0x4000)));
    assert_eq!(of(3, 2), None, "from one block into the next");
    assert_eq!(of(7, 2), None, "past the last page");
    assert_eq!(of(8, 1), None);
    assert_eq!(of(0, u64::MAX), None);
}

#[test]
fn a_range_is_cut_into_the_runs_it_touches() {
    let table = three();
    let of = |start, len| -> Vec<(u64, u64)> {
        table.runs_in(HostRange::new(HostAddr(start), len)).map(|run| (run.first.0, run.pages)).collect()
    };
    assert_eq!(of(0x10_0fff, 2), [(0, 2)], "a page touched with one byte counts");
    assert_eq!(of(0x10_3000, 0x2000), [(3, 1)], "the tail is cut off");
    assert_eq!(of(0x10_4000, 0x1000), []);
    assert_eq!(of(0x20_0000, 0x1000), [], "ignored");
    assert_eq!(of(0, u64::MAX), [(0, 4), (4, 4)], "block by block");
    assert_eq!(of(0x30_0000, 0), []);
    assert_eq!(of(u64::MAX, u64::MAX), []);
}
