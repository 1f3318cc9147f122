//! Reading: damaged pages are named, strange files refused, other layouts refused, and the specification's example holds.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use ramshot_core::{BlockTable, HostAddr, OsError, PageId, RamTarget, Treatment};

use super::error::{LayoutMismatch, OpenErrorKind, ReadErrorKind, RestoreError};
use super::format::PAGE;
use super::tests_support::{QUICK, TestRam, block, give, snapshot, some_ram, table, two_blocks};
use super::{FileSink, ParentRef, SnapshotFile, SnapshotId};
use crate::sink::{ImageMeta, ImageSink};

fn poke(path: &Path, offset: u64, byte: u8) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte]).unwrap();
}

#[test]
fn a_damaged_page_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let table = two_blocks(600, 600);
    let mut flat = some_ram(1200, 7);
    flat[4096 * 601] = 0xaa;
    for (page, byte) in [(1, 0), (599, 4095), (601, 17), (1199, 1)] {
        snapshot(&path, &table, &flat);
        let old = flat[page * PAGE + byte];
        poke(&path, (page * PAGE + byte) as u64, old ^ 4);
        let file = SnapshotFile::open(&path).unwrap();
        for threads in [0, 1, 4] {
            let error = file.verify(threads, &mut |_, _| {}).unwrap_err();
            let ReadErrorKind::Checksum { page: found, offset, .. } = &error.kind else { panic!("{error}") };
            assert_eq!((*found, *offset), (PageId(page as u64), (page * PAGE) as u64));
            let name = if page < 600 { "low" } else { "high" };
            assert!(error.to_string().contains(&format!("page {page} (block {name:?}")), "{error}");
            let restored = file.restore_into(&table, &TestRam::new(&table, 0), threads);
            assert!(
                matches!(restored.unwrap_err(), RestoreError::Read(e) if matches!(e.kind, ReadErrorKind::Checksum { .. }))
            );
        }
        file.read_page(PageId(page as u64), &mut [0; PAGE]).unwrap_err();
        file.read_page(PageId(page as u64 - 1), &mut [0; PAGE]).unwrap();
    }
}

#[test]
fn the_lowest_damaged_page_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let flat = some_ram(5000, 7);
    snapshot(&path, &table(5000), &flat);
    for page in [4999, 3001, 1201, 1203, 2101] {
        poke(&path, page * 4096, flat[usize::try_from(page).unwrap() * PAGE] ^ 1);
    }
    let file = SnapshotFile::open(&path).unwrap();
    for threads in [1, 2, 8] {
        let error = file.verify(threads, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error.kind, ReadErrorKind::Checksum { page: PageId(1201), .. }), "{error}");
    }
}

#[test]
fn bytes_in_a_hole_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let flat = some_ram(100, 7);
    snapshot(&path, &table(100), &flat);
    poke(&path, 4096 * 48 + 4095, 1);
    let file = SnapshotFile::open(&path).unwrap();
    let error = file.verify(2, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error.kind, ReadErrorKind::NotZero { page: PageId(48), .. }), "{error}");
    // The state rules: the page reads as zero.
    let mut page = [1; PAGE];
    file.read_page(PageId(48), &mut page).unwrap();
    assert_eq!(page, [0; PAGE]);
}

#[test]
fn a_copy_without_holes_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    snapshot(&path, &table(100), &some_ram(100, 7));
    let copy = dir.path().join("copy");
    fs::write(&copy, fs::read(&path).unwrap()).unwrap();
    SnapshotFile::open(&copy).unwrap().verify(1, &mut |_, _| {}).unwrap();
}

#[test]
fn a_file_that_shrinks_after_it_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    snapshot(&path, &table(100), &some_ram(100, 7));
    let file = SnapshotFile::open(&path).unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(40 * 4096 + 7).unwrap();
    let error = file.verify(1, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error.kind, ReadErrorKind::Shrunk { offset } if offset == 40 * 4096 + 7), "{error}");
}

fn open_error(path: &Path) -> OpenErrorKind {
    let error = SnapshotFile::open(path).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    error.kind
}

#[test]
fn files_that_are_no_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert!(matches!(open_error(&at("missing")), OpenErrorKind::Io { .. }));
    assert!(matches!(open_error(dir.path()), OpenErrorKind::NotAFile { found: "a directory" }));
    for len in [0, 1, 63, 64, 4096, 12345] {
        fs::write(at("other"), vec![0x41; len]).unwrap();
        let error = open_error(&at("other"));
        assert!(matches!(error, OpenErrorKind::NoTail { len: found } if found == len as u64));
        assert!(error.to_string().contains(&format!("is {len} bytes and has no ramshot tail")));
    }
    fs::write(at("raw"), some_ram(64, 1)).unwrap();
    assert!(matches!(open_error(&at("raw")), OpenErrorKind::NoTail { .. }));
    // As far as a file can be made long here: nothing is read, nothing allocated.
    let huge = File::create(at("huge")).unwrap();
    if (40..63).rev().any(|bits| huge.set_len(1 << bits).is_ok()) {
        assert!(matches!(open_error(&at("huge")), OpenErrorKind::NoTail { .. }));
    }
    if Path::new("/dev/zero").exists() {
        assert!(matches!(open_error(Path::new("/dev/zero")), OpenErrorKind::NotAFile { .. }));
    }
    match Command::new("mkfifo").arg(at("fifo")).status() {
        Ok(status) if status.success() => {
            assert!(matches!(open_error(&at("fifo")), OpenErrorKind::NotAFile { .. }));
        }
        _ => println!("SKIPPED: no pipe, mkfifo does not run here"),
    }
}

#[test]
fn layouts_that_do_not_match() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    snapshot(&path, &two_blocks(8, 4), &some_ram(12, 1));
    let file = SnapshotFile::open(&path).unwrap();
    let (low, high) = (block("low", 0, 8), block("high", 0x1_0000_0000, 4));
    let mismatch = |blocks: &[_]| {
        let table = BlockTable::new(blocks).unwrap();
        let ram = TestRam::new(&table, 0x33);
        let error = file.check_layout(&table).unwrap_err();
        let restored = file.restore_into(&table, &ram, 2).unwrap_err();
        assert!(matches!(&restored, RestoreError::Layout { mismatch, .. } if *mismatch == error), "{restored}");
        assert!(restored.to_string().contains(&error.to_string()));
        for block in table.blocks() {
            assert!(ram.bytes(block.name).iter().all(|&byte| byte == 0x33), "RAM was touched");
        }
        error
    };
    assert_eq!(mismatch(&[low]), LayoutMismatch::Missing { block: high.name });
    let mut ignored = high;
    ignored.treatment = Treatment::Ignored;
    assert_eq!(mismatch(&[low, ignored]), LayoutMismatch::Missing { block: high.name });
    let extra = block("rom", 0x2_0000_0000, 1);
    assert_eq!(mismatch(&[extra, high, low]), LayoutMismatch::Unknown { block: extra.name });
    let mut moved = high;
    moved.guest.0 += 4096;
    let expected = LayoutMismatch::GuestAddress { block: high.name, snapshot: high.guest, vm: moved.guest };
    assert_eq!(mismatch(&[low, moved]), expected);
    assert!(expected.to_string().contains("0x100000000 in the snapshot and at 0x100001000 in this VM"));
    let larger = block("low", 0, 9);
    let expected = LayoutMismatch::UsedLength { block: low.name, snapshot: 0x8000, vm: 0x9000 };
    assert_eq!(mismatch(&[larger, high]), expected);

    // What may differ: order, host address, length of the mapping, host page size, treatment, and ignored blocks.
    let mut other = high;
    (other.host, other.len, other.page_size) = (HostAddr(0x4000_0000), 0x8000, 0x4000);
    other.treatment = Treatment::InPause;
    let mut aside = block("aside", 0x3_0000_0000, 1);
    aside.treatment = Treatment::Ignored;
    file.check_layout(&BlockTable::new(&[aside, other, low]).unwrap()).unwrap();
}

#[test]
fn an_increment_does_not_restore_without_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let table = table(12);
    let parent = ParentRef { id: SnapshotId([3; 16]), checksum: 5 };
    let sink = FileSink::create_as(&path, &table, &QUICK, Some(parent), None).unwrap();
    give(&sink, &some_ram(12, 1), 4, 3);
    Box::new(sink).commit(&ImageMeta::default()).unwrap();
    let file = SnapshotFile::open(&path).unwrap();
    let ram = TestRam::new(&table, 0x33);
    let error = file.restore_into(&table, &ram, 1).unwrap_err();
    assert!(matches!(error, RestoreError::NeedsParent { pages: 9, parent: id, .. } if id == parent.id), "{error}");
    assert!(ram.bytes(table.blocks()[0].name).iter().all(|&byte| byte == 0x33));
}

#[test]
fn ram_that_cannot_be_filled() {
    struct NoRam;
    impl RamTarget for NoRam {
        fn with_mut(&self, _: HostAddr, _: usize, _: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
            Err(OsError::new("mmap", 12))
        }
    }
    struct Lazy;
    impl RamTarget for Lazy {
        fn with_mut(&self, _: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
            fill(&mut vec![0; len - 1]);
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    snapshot(&path, &table(12), &some_ram(12, 1));
    let file = SnapshotFile::open(&path).unwrap();
    for ram in [&NoRam as &dyn RamTarget, &Lazy] {
        assert!(matches!(file.restore_into(&table(12), ram, 2).unwrap_err(), RestoreError::Ram { .. }));
    }
}

#[test]
fn reads_out_of_range() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    snapshot(&path, &table(12), &some_ram(12, 1));
    let file = SnapshotFile::open(&path).unwrap();
    for page in [12, 13, 1 << 40, u64::MAX] {
        let error = file.read_page(PageId(page), &mut [0; PAGE]).unwrap_err();
        assert!(matches!(error.kind, ReadErrorKind::OutOfRange { pages: 12, .. }));
        let error = file.read_run(PageId(page), &mut [0; 2 * PAGE]).unwrap_err();
        assert!(matches!(error.kind, ReadErrorKind::OutOfRange { pages: 12, .. }));
    }
    assert!(matches!(file.read_run(PageId(1), &mut [0; 5]).unwrap_err().kind, ReadErrorKind::Buffer { len: 5 }));
    let error = file.read_run(PageId(3), &mut [0; 2 * PAGE]).unwrap_err();
    assert!(matches!(error.kind, ReadErrorKind::NoData { page: PageId(4), .. }), "{error}");
}

/// The example that `docs/FORMAT.md` prints is what is written, byte for byte.
#[test]
fn the_example_of_the_specification() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let id = SnapshotId(std::array::from_fn(|i| 0xa0 + u8::try_from(i).unwrap()));
    let sink = FileSink::create_as(&path, &table(2), &QUICK, None, Some(id)).unwrap();
    let mut flat = vec![0; 2 * PAGE];
    flat[PAGE..].fill(0x11);
    give(&sink, &flat, 0, 2);
    let meta = ImageMeta { device_state: b"cpu".to_vec(), statistics: vec![("pause_us".to_owned(), 350)] };
    Box::new(sink).commit(&meta).unwrap();
    let written: Vec<String> = fs::read(&path).unwrap()[2 * PAGE..]
        .chunks(16)
        .zip((0x2000..).step_by(16))
        .map(|(bytes, at)| {
            format!("{at:04x}  {}", bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" "))
        })
        .collect();
    let document = include_str!("../../docs/FORMAT.md");
    let printed: Vec<&str> = document
        .lines()
        .map(str::trim_end)
        .filter(|line| line.starts_with("2") && line.get(4..6) == Some("  "))
        .map(|line| line.split("  |").next().unwrap_or(line).trim_end())
        .collect();
    assert_eq!(printed, written, "the document should say:\n{}", written.join("\n"));
}

#[test]
fn checksums_and_states_of_single_pages_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let flat = some_ram(40, 3);
    snapshot(&path, &two_blocks(20, 20), &flat);
    let file = SnapshotFile::open(&path).unwrap();
    for (page, bytes) in (0..).zip(flat.chunks(PAGE)) {
        let expected = (page % 4 != 0).then(|| crc32c::crc32c(bytes));
        assert_eq!(file.page_checksum(PageId(page)), expected, "page {page}");
        let run = file.state_runs_from(PageId(page)).next().unwrap().run;
        assert!(run.contains(PageId(page)), "page {page}: {run:?}");
    }
    assert_eq!(file.page_checksum(PageId(40)), None);
    assert!(file.state_runs_from(PageId(40)).next().is_none());
}

#[test]
fn stored_data_is_found_behind_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    File::create(&path).unwrap();
    poke(&path, 8 << 20, 1);
    let file = File::open(&path).unwrap();
    let found = super::next_data(&file, 0).unwrap().unwrap();
    assert!(found <= 8 << 20, "{found}");
    assert_eq!(super::next_data(&file, 8 << 20).unwrap(), Some(8 << 20));
}
