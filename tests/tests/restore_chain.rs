//! Chains of increments in real memory, given back in every way: eager, mapped, lazy.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ramshot::core::PageId;
use ramshot::file::{FileSink, FileSinkOptions, MapReport, PageSource, RestoreError};
use ramshot::sink::{ImageMeta, PageDigest, Piece};
use ramshot::{Chain, GuestRam, ImageSink, LazyOptions, MapTarget, SnapshotFile, flatten, lazy};
use ramshot_tests::{Backing, Memory};

const PAGE: usize = 4096;
const FAST: FileSinkOptions = FileSinkOptions { replace: false, sync: false, direct: false };

/// What a page of each snapshot holds: `None`, it is not in it; 0, zeros.
type Pages<'a> = &'a dyn Fn(u64, u64) -> Option<u8>;

/// Writes a chain of `files` snapshots of `bytes` of RAM into `dir`; returns the last one's path.
fn write_chain(dir: &Path, bytes: u64, files: u64, content: Pages<'_>) -> PathBuf {
    let memory = Memory::new(bytes, Backing::Anon).unwrap();
    let ram = GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap();
    let path = |number: u64| dir.join(format!("{number}.ramshot"));
    for number in 0..files {
        let sink = match number.checked_sub(1) {
            None => FileSink::create(&path(0), ram.table(), &FAST).unwrap(),
            Some(parent) => {
                let parent = SnapshotFile::open(path(parent)).unwrap().as_parent();
                FileSink::create_child(&path(number), ram.table(), &FAST, parent).unwrap()
            }
        };
        for page in 0..bytes / PAGE as u64 {
            if let Some(byte) = content(number, page) {
                let bytes = [byte; PAGE];
                let digests = [PageDigest::of(&bytes)];
                sink.write(&[Piece { first: PageId(page), bytes: &bytes, digests: &digests }]).unwrap();
            }
        }
        let meta = ImageMeta { device_state: vec![u8::try_from(number % 256).unwrap()], statistics: Vec::new() };
        Box::new(sink).commit(&meta).unwrap();
    }
    path(files - 1)
}

/// What a page of the last of `files` snapshots holds.
fn expected(files: u64, page: u64, content: Pages<'_>) -> u8 {
    (0..files).rev().find_map(|number| content(number, page)).unwrap_or(0)
}

#[track_caller]
fn check(memory: &Memory, files: u64, content: Pages<'_>, how: &str) {
    let regions = memory.read_all().unwrap();
    for (page, bytes) in (0..).zip(regions.concat().chunks(PAGE)) {
        let byte = expected(files, page, content);
        assert!(bytes.iter().all(|found| *found == byte), "{how}: page {page} is {} and not {byte}", bytes[0]);
    }
}

fn fresh(bytes: u64, backing: Backing) -> (Arc<Memory>, Arc<GuestRam>) {
    let memory = Memory::new(bytes, backing).unwrap();
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
    (memory, ram)
}

fn map(chain: &Chain, ram: Arc<GuestRam>) -> MapReport {
    // SAFETY: `Memory` unmaps by address, and nobody uses it yet.
    chain.map_into(&unsafe { MapTarget::new(ram) }).unwrap()
}

/// Runs of a few pages; all states in all combinations.
fn mixed(number: u64, page: u64) -> Option<u8> {
    let state = (page / 3).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(u32::try_from(number % 61).unwrap()) >> 60;
    match (number, state) {
        (0, 0..5) => Some(0),
        (0, _) => Some(u8::try_from(page % 100 + 1).unwrap()),
        (_, 0) => Some(0),
        (_, 1..3) => Some(u8::try_from((page + number) % 100 + 101).unwrap()),
        _ => None,
    }
}

#[test]
fn a_chain_is_given_back_in_every_way_and_backing() {
    const BYTES: u64 = 8 << 20;
    for files in [1, 2, 10, 100] {
        let dir = tempfile::tempdir().unwrap();
        let chain = Arc::new(Chain::open(write_chain(dir.path(), BYTES, files, &mixed)).unwrap());
        assert_eq!(chain.depth() as u64, files);
        for backing in [Backing::Anon, Backing::Thp, Backing::Memfd] {
            let (memory, ram) = fresh(BYTES, backing);
            let report = chain.restore_into(ram.table(), ram.as_ref(), 2).unwrap();
            assert_eq!(report.data_pages, chain.data_pages());
            check(&memory, files, &mixed, &format!("eager, {files}, {backing}"));

            let (memory, ram) = fresh(BYTES, backing);
            let restore = lazy(Arc::clone(&chain) as Arc<dyn PageSource>, &ram, &LazyOptions::default()).unwrap();
            check(&memory, files, &mixed, &format!("lazy, {files}, {backing}"));
            assert!(restore.finish().unwrap().progress.complete);
            check(&memory, files, &mixed, &format!("lazy, {files}, {backing}, all in"));

            if backing != Backing::Memfd {
                let (memory, ram) = fresh(BYTES, backing);
                let report = map(&chain, ram);
                assert_eq!((report.mapped_bytes, report.read_bytes), (BYTES, 0));
                check(&memory, files, &mixed, &format!("mapped, {files}, {backing}"));
            }
        }
        let flat = dir.path().join("flat.ramshot");
        flatten(&chain, &flat, &ramshot::file::MergeOptions::default(), &mut |_, _| {}).unwrap();
        let (memory, ram) = fresh(BYTES, Backing::Anon);
        SnapshotFile::open(&flat).unwrap().restore_into(ram.table(), ram.as_ref(), 1).unwrap();
        check(&memory, files, &mixed, &format!("flattened, {files}"));
    }
}

/// Every other page is the increment's: more pieces than can be mapped.
#[test]
fn a_scattered_chain_is_mapped_as_far_as_it_goes_and_the_rest_read() {
    const BYTES: u64 = 160 << 20;
    let content = |number: u64, page: u64| match (number, page % 4) {
        (0, 3) => Some(0),
        (0, _) => Some(u8::try_from(page % 250 + 1).unwrap()),
        (_, 0) => Some(0),
        (_, 2) => Some(251),
        _ => None,
    };
    let dir = tempfile::tempdir().unwrap();
    let chain = Chain::open(write_chain(dir.path(), BYTES, 2, &content)).unwrap();
    let (memory, ram) = fresh(BYTES, Backing::Anon);
    let report = map(&chain, ram);
    let scattered = BYTES / PAGE as u64 / 2;
    assert_eq!((report.pieces, report.read_bytes), (16 << 10, (scattered - (16 << 10)) * PAGE as u64));
    check(&memory, 2, &content, "mapped and read");
    // What is written there is the VM's own.
    memory.write(0, &[5; 8]).unwrap();
    assert!(chain.verify(2, &mut |_, _| {}).is_ok());
}

#[test]
fn an_increment_alone_is_not_given_back_and_says_how() {
    const BYTES: u64 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = write_chain(dir.path(), BYTES, 2, &mixed);
    let file = SnapshotFile::open(path).unwrap();
    let (memory, ram) = fresh(BYTES, Backing::Anon);
    let errors = [
        file.restore_into(ram.table(), ram.as_ref(), 1).unwrap_err().to_string(),
        // SAFETY: as above.
        file.map_into(&unsafe { MapTarget::new(Arc::clone(&ram)) }).unwrap_err().to_string(),
    ];
    for error in errors {
        assert!(error.contains("Chain::open"), "{error}");
    }
    assert!(memory.read_all().unwrap().concat().iter().all(|byte| *byte == 0), "something was touched");
}

/// A page of an ancestor is damaged: eager refuses, lazy gives no zeros for it, a page that is read for a mapping is checked.
#[test]
fn a_damaged_ancestor_is_met_by_name() {
    const BYTES: u64 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = write_chain(dir.path(), BYTES, 3, &mixed);
    let page = (0..2048).find(|page| mixed(0, *page) > Some(0) && (1..3).all(|n| mixed(n, *page).is_none())).unwrap();
    let root = dir.path().join("0.ramshot");
    let mut bytes = std::fs::read(&root).unwrap();
    bytes[usize::try_from(page).unwrap() * PAGE + 9] ^= 4;
    std::fs::write(&root, bytes).unwrap();
    let chain = Chain::open(path).unwrap();
    let (_memory, ram) = fresh(BYTES, Backing::Anon);
    let error = chain.restore_into(ram.table(), ram.as_ref(), 1).unwrap_err();
    assert!(matches!(error, RestoreError::Read(_)) && error.to_string().contains("0.ramshot"), "{error}");
    let (_memory, ram) = fresh(BYTES, Backing::Anon);
    let failed = lazy(Arc::new(chain), &ram, &LazyOptions::default()).unwrap().finish().unwrap_err().to_string();
    assert!(failed.contains("0.ramshot"), "{failed}");
}
