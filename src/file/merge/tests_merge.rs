//! Merging and moving: the content is what the model says before and after, and what goes wrong leaves everything as it was.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use ramshot_core::{BlockTable, PageId, RamBlock};

use super::{MergeError, MergeOptions, flatten, rebase};
use crate::file::chain::tests_oracle::{layers, world};
use crate::file::error::{CreateError, ReadErrorKind};
use crate::file::format::PAGE;
use crate::file::tests_round_trip::Content;
use crate::file::tests_support::{
    Layer, QUICK, block, digests, give, memory, meta, names, on_small_disk, read_all, table, two_blocks, write_chain,
    write_layer,
};
use crate::file::{Chain, FileSink, FileSinkOptions, PageSource, PageState, SnapshotFile};
use crate::sink::ImageSink;

pub(super) const FAST: MergeOptions = MergeOptions { file: QUICK, threads: 2 };

/// Everything in a directory, to see that nothing changes.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

fn check(blocks: &[RamBlock], layers: &[Layer], others: &[Layer], shared: usize, threads: usize) {
    let dir = tempfile::tempdir().unwrap();
    let table = BlockTable::new(blocks).unwrap();
    let options = MergeOptions { file: QUICK, threads };
    let tip = write_chain(dir.path(), &table, layers);
    let flat = memory(layers);
    // Another branch, which has the first snapshots in common.
    let shared = shared % (layers.len() + 1);
    let branch: Vec<Layer> = layers[..shared].iter().chain(others).cloned().collect();
    let mut parent = (shared > 0).then(|| open(dir.path(), shared - 1).tip().as_parent());
    for (number, layer) in others.iter().enumerate() {
        parent = Some(write_layer(&dir.path().join(format!("other-{number}")), &table, layer, parent));
    }
    let other = dir.path().join(format!("other-{}", others.len() - 1));
    let before = contents(dir.path());
    let (chain, branch_chain) = (Chain::open(&tip).unwrap(), Chain::open(&other).unwrap());
    assert!(read_all(&branch_chain) == memory(&branch));

    // One full file.
    let out = tempfile::tempdir().unwrap();
    let whole = out.path().join("flat");
    let mut heard = Vec::new();
    let report = flatten(&chain, &whole, &options, &mut |done, total| heard.push((done, total))).unwrap();
    assert!(heard.iter().all(|(done, total)| done <= total) && heard.last().is_some_and(|(done, total)| done == total));
    assert_eq!((report.copied_pages, report.reused_pages), (chain.data_pages(), 0));
    let file = SnapshotFile::open(&whole).unwrap();
    assert_eq!((file.as_parent(), file.parent()), (report.snapshot, None));
    assert_ne!(file.id(), chain.tip().id());
    assert_eq!(file.blocks(), chain.blocks());
    assert_eq!((file.device_state(), file.statistics()), (chain.device_state(), chain.tip().statistics()));
    assert_eq!((file.data_pages(), file.in_parent_pages()), (chain.data_pages(), 0));
    file.verify(threads, &mut |_, _| {}).unwrap();
    assert!(read_all(&file) == flat);
    assert!(fs::read(&whole).unwrap()[..flat.len()] == flat, "flat RAM is the memory");

    // Onto the other branch, and back from there onto the flat file.
    let moved = dir.path().join("moved");
    let report = rebase(&chain, &branch_chain, &moved, &options, &mut |_, _| {}).unwrap();
    check_moved(&moved, &branch_chain, &chain, &flat);
    assert_eq!(report.snapshot, SnapshotFile::open(&moved).unwrap().as_parent());
    let back = out.path().join("back");
    let report =
        rebase(&Chain::open(&moved).unwrap(), &Chain::open(&whole).unwrap(), &back, &options, &mut |_, _| {}).unwrap();
    check_moved(&back, &Chain::open(&whole).unwrap(), &chain, &flat);
    // It has the same memory as its new parent, so nothing is left of it.
    assert_eq!((report.copied_pages, report.zero_pages), (0, 0));
    assert_eq!(SnapshotFile::open(&back).unwrap().in_parent_pages(), table.pages());

    // The files that were read are as they were.
    fs::remove_file(&moved).unwrap();
    assert!(contents(dir.path()) == before);
    assert_eq!(names(out.path()), ["back", "flat"]);
}

fn open(dir: &Path, number: usize) -> Chain {
    Chain::open(dir.join(number.to_string())).unwrap()
}

/// `path` is an increment on the tip of `parent` with the content of `child`, and has no page that it need not have.
fn check_moved(path: &Path, parent: &Chain, child: &Chain, flat: &[u8]) {
    let beside: Vec<PathBuf> = parent.files().map(|file| file.path().to_owned()).collect();
    let moved = Chain::open_with(path, &beside).unwrap();
    assert_eq!(moved.tip().parent(), Some(parent.tip().as_parent()));
    assert_eq!(moved.depth(), parent.depth() + 1);
    assert!(read_all(&moved) == flat);
    assert_eq!((moved.device_state(), moved.tip().statistics()), (child.device_state(), child.tip().statistics()));
    moved.verify(2, &mut |_, _| {}).unwrap();
    let theirs = read_all(parent);
    for (page, (ours, theirs)) in flat.chunks(PAGE).zip(theirs.chunks(PAGE)).enumerate() {
        let state = moved.tip().page_state(PageId(page as u64)).unwrap();
        assert!((state == PageState::InParent) == (ours == theirs), "page {page} is {state:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_content_stays_the_same(
        (blocks, layers, others) in world().prop_flat_map(|(blocks, first)| {
            let pages = first[0].len();
            (Just(blocks), Just(first), layers(pages, 1..4))
        }),
        shared in any::<usize>(),
        threads in 1..4usize,
    ) {
        check(&blocks, &layers, &others, shared, threads);
    }
}

/// The usual way: flatten what is old, move the child onto it, remove the old.
#[test]
fn a_child_outlives_its_ancestors() {
    let dir = tempfile::tempdir().unwrap();
    let table = table(600);
    let mut layers = vec![vec![Content::Data(3); 600]];
    for number in 1..5u8 {
        let change =
            |page: usize| if page % 7 == usize::from(number) { Content::Data(number) } else { Content::NeverGiven };
        layers.push((0..600).map(change).collect());
    }
    let tip = write_chain(dir.path(), &table, &layers);
    let old = open(dir.path(), 3);
    flatten(&old, dir.path().join("flat"), &FAST, &mut |_, _| {}).unwrap();
    let (child, flat) = (Chain::open(&tip).unwrap(), Chain::open(dir.path().join("flat")).unwrap());
    // In its own place.
    let report = rebase(&child, &flat, &tip, &FAST, &mut |_, _| {}).unwrap();
    assert_eq!(report.copied_pages, child.tip().data_pages());
    (0..4).for_each(|number| fs::remove_file(dir.path().join(number.to_string())).unwrap());
    let now = Chain::open(&tip).unwrap();
    assert_eq!(now.depth(), 2);
    assert!(read_all(&now) == memory(&layers));
    // And the tip of a chain may be replaced by itself, flattened.
    flatten(&now, &tip, &FAST, &mut |_, _| {}).unwrap();
    assert!(read_all(&SnapshotFile::open(&tip).unwrap()) == memory(&layers));
    assert_eq!(names(dir.path()), ["4", "flat"]);
}

/// Two pages with one checksum: they differ by the polynomial itself.
#[test]
fn pages_that_share_a_checksum_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let table = table(4);
    let mut ours = vec![0x42; 4 * PAGE];
    let parent = dir.path().join("parent");
    let snapshot = |path: &Path, flat: &[u8]| {
        let sink = FileSink::create(path, &table, &QUICK).unwrap();
        give(&sink, flat, 0, 4);
        Box::new(sink).commit(&meta()).unwrap();
    };
    snapshot(&parent, &ours);
    // x^32 first, as the reflected CRC reads its bits.
    let polynomial = 0x1_1edc_6f41u64;
    (0..33)
        .filter(|bit| polynomial >> (32 - bit) & 1 == 1)
        .for_each(|bit| ours[2 * PAGE + 9 + bit / 8] ^= 1 << (bit % 8));
    assert_eq!(digests(&ours)[1], digests(&ours)[2]);
    let child = dir.path().join("child");
    snapshot(&child, &ours);
    let moved = dir.path().join("moved");
    let report =
        rebase(&Chain::open(&child).unwrap(), &Chain::open(&parent).unwrap(), &moved, &FAST, &mut |_, _| {}).unwrap();
    assert_eq!((report.copied_pages, report.compared_pages), (1, 4));
    assert!(read_all(&Chain::open(&moved).unwrap()) == ours);
}

/// A full snapshot of 600 pages and an increment, in a directory.
pub(super) fn pair(dir: &Path) -> (PathBuf, Vec<Layer>) {
    let change = |page: usize| match page % 5 {
        0 => Content::Data(9),
        1 => Content::Zero,
        _ => Content::NeverGiven,
    };
    let layers = vec![vec![Content::Data(3); 600], (0..600).map(change).collect()];
    (write_chain(dir, &table(600), &layers), layers)
}

/// A damaged page anywhere in what is read: an error that names it, nothing new, nothing replaced.
#[test]
fn damage_is_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let other = dir.path().join("other");
    write_layer(&other, &table(600), &memory_layer(&layers), None);
    let target = dir.path().join("out");
    write_layer(&target, &table(600), &vec![Content::Zero; 600], None);
    // Page 2 is read from the full snapshot, page 5 from the increment; the other one is read to compare.
    for (name, page) in [("0", 2), ("1", 5), ("other", 2)] {
        let path = dir.path().join(name);
        let whole = fs::read(&path).unwrap();
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(page * 4096 + 1)).unwrap();
        file.write_all(&[!whole[usize::try_from(page).unwrap() * PAGE + 1]]).unwrap();
        let before = contents(dir.path());
        let (child, parent) = (Chain::open(&tip).unwrap(), Chain::open(&other).unwrap());
        let mut errors = vec![rebase(&child, &parent, &target, &FAST, &mut |_, _| {}).unwrap_err()];
        if name != "other" {
            errors.push(flatten(&child, &target, &FAST, &mut |_, _| {}).unwrap_err());
        }
        for error in errors {
            let MergeError::Read(error) = error else { panic!("{error}") };
            assert_eq!(error.path, path);
            assert!(matches!(error.kind, ReadErrorKind::Checksum { page: PageId(p), .. } if p == page), "{error}");
        }
        assert!(contents(dir.path()) == before, "nothing has changed");
        fs::write(&path, whole).unwrap();
    }
}

/// The pages of a memory as one layer of data pages (with the seeds of [`pair`]).
fn memory_layer(layers: &[Layer]) -> Layer {
    let top = |page: usize| layers.iter().rev().map(|layer| layer[page]).find(|c| *c != Content::NeverGiven);
    (0..layers[0].len()).map(|page| top(page).unwrap()).collect()
}

#[test]
fn targets_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let other = dir.path().join("other");
    let base = SnapshotFile::open(dir.path().join("0")).unwrap().as_parent();
    write_layer(&other, &table(600), &vec![Content::NeverGiven; 600], Some(base));
    let (child, parent) = (Chain::open(&tip).unwrap(), Chain::open(&other).unwrap());
    let before = contents(dir.path());
    // What the source or the result builds on, by whichever name.
    let error = flatten(&child, dir.path().join("0"), &FAST, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::Needed { snapshot, .. } if snapshot == base.id), "{error}");
    for needed in [other.clone(), dir.path().join("./0"), dir.path().join("0")] {
        let error = rebase(&child, &parent, &needed, &FAST, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, MergeError::Needed { .. }), "{error}");
        assert!(error.to_string().contains("another name"), "{error}");
    }
    let keep = MergeOptions { file: FileSinkOptions { replace: false, ..QUICK }, threads: 1 };
    let error = flatten(&child, &tip, &keep, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::Create(CreateError::Exists { .. })), "{error}");
    let error = flatten(&child, dir.path().join("missing/out"), &FAST, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::Create(CreateError::NoDirectory { .. })), "{error}");
    // Other RAM.
    write_layer(&dir.path().join("strange"), &two_blocks(300, 300), &vec![Content::Zero; 600], None);
    let strange = Chain::open(dir.path().join("strange")).unwrap();
    let error = rebase(&child, &strange, dir.path().join("out"), &FAST, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::Layout { .. }), "{error}");
    assert!(error.to_string().contains(" against "), "{error}");
    fs::remove_file(dir.path().join("strange")).unwrap();
    assert!(contents(dir.path()) == before);
    // Onto its own parent, and onto itself: the same memory.
    let own = open(dir.path(), 0);
    let report = rebase(&child, &own, dir.path().join("out"), &FAST, &mut |_, _| {}).unwrap();
    assert_eq!(report.copied_pages, child.tip().data_pages());
    let report = rebase(&child, &child, dir.path().join("out"), &FAST, &mut |_, _| {}).unwrap();
    assert_eq!((report.copied_pages, report.zero_pages, report.compared_pages), (0, 0, 0));
    assert!(read_all(&Chain::open(dir.path().join("out")).unwrap()) == memory(&layers));
}

#[test]
fn a_full_disk() {
    on_small_disk("size=5M", |dir| {
        let (tip, layers) = pair(dir);
        let chain = Chain::open(&tip).unwrap();
        let other = dir.join("other");
        write_layer(&other, &table(600), &vec![Content::Zero; 600], None);
        fs::write(dir.join("ballast"), vec![1; 1 << 20]).unwrap();
        let before = contents(dir);
        let parent = Chain::open(&other).unwrap();
        for error in [
            flatten(&chain, dir.join("out"), &FAST, &mut |_, _| {}).unwrap_err(),
            // In place: what is there stays.
            flatten(&chain, &tip, &FAST, &mut |_, _| {}).unwrap_err(),
            rebase(&chain, &parent, dir.join("out"), &FAST, &mut |_, _| {}).unwrap_err(),
            rebase(&chain, &parent, &tip, &FAST, &mut |_, _| {}).unwrap_err(),
        ] {
            let MergeError::Write(error) = error else { panic!("{error}") };
            assert_eq!(error.source.kind(), std::io::ErrorKind::StorageFull, "{error}");
            assert!(error.to_string().contains(".partial"), "{error}");
            assert!(contents(dir) == before, "nothing is left behind");
        }
        assert!(read_all(&Chain::open(&tip).unwrap()) == memory(&layers));
        // With room again it goes on; on what a child that is just starting holds, see the test of the sink.
        fs::remove_file(dir.join("ballast")).unwrap();
        let patience = std::time::Instant::now();
        while let Err(error) = flatten(&chain, dir.join("out"), &FAST, &mut |_, _| {}) {
            assert!(patience.elapsed().as_secs() < 60, "{error}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(read_all(&SnapshotFile::open(dir.join("out")).unwrap()) == memory(&layers));
    });
}

/// More blocks than a VM of today can have, as the format allows.
#[test]
fn blocks_are_taken_over_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut blocks: Vec<RamBlock> = (0..60).map(|n| block(&format!("b{n}"), n << 32, 1 + n % 3)).collect();
    blocks[1].page_size = 4096;
    blocks[1].len = blocks[1].used + (1 << 20);
    blocks[2].treatment = ramshot_core::Treatment::Ignored;
    blocks[3].treatment = ramshot_core::Treatment::InPause;
    blocks[4].backing = ramshot_core::Backing::HugeTlb;
    let table = BlockTable::new(&blocks).unwrap();
    let layer = vec![Content::Data(1); usize::try_from(table.pages()).unwrap()];
    let tip = write_chain(dir.path(), &table, &[layer]);
    let chain = Chain::open(&tip).unwrap();
    flatten(&chain, dir.path().join("out"), &FAST, &mut |_, _| {}).unwrap();
    let file = SnapshotFile::open(dir.path().join("out")).unwrap();
    assert_eq!(file.blocks(), chain.blocks());
    assert_eq!(file.blocks().len(), 60);
}
