//! Going on with what a killed merge left, or not: only what is provably of the same merge and whole is used.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use ramshot_core::PageId;

use super::tests_merge::{FAST, pair};
use super::{MergeError, flatten, rebase};
use crate::file::error::CreateError;
use crate::file::format::{Mark, PAGE};
use crate::file::tests_round_trip::Content;
use crate::file::tests_support::{QUICK, digests, give, memory, names, read_all, table, write_layer};
use crate::file::{Chain, FileSink, PageSource, SnapshotFile};
use crate::sink::{ImageSink, Piece};

/// What a killed flatten of `chain` into `target` leaves that has copied `pages`; `forge` may change its bytes.
fn leave(chain: &Chain, target: &Path, pages: std::ops::Range<usize>, forge: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mark = Mark::new(chain.tip().as_parent(), None);
    let sink = FileSink::create_merge(target, chain.blocks(), &QUICK, None, &mark, false).unwrap();
    let flat = read_all(chain);
    for page in pages {
        let bytes = &flat[page * PAGE..(page + 1) * PAGE];
        sink.write(&[Piece { first: PageId(page as u64), bytes, digests: &digests(bytes) }]).unwrap();
    }
    let partial = target.with_extension("partial");
    let mut bytes = fs::read(&partial).unwrap();
    drop(sink);
    assert!(!partial.exists());
    forge(&mut bytes);
    // As the sink creates it: nobody else's.
    drop(crate::os::storage::create_private(&partial).unwrap());
    fs::write(&partial, bytes).unwrap();
    partial
}

fn data_pages(flat: &[u8], pages: std::ops::Range<usize>) -> u64 {
    pages.filter(|page| flat[page * PAGE..(page + 1) * PAGE].iter().any(|&byte| byte != 0)).count() as u64
}

#[test]
fn what_a_killed_merge_has_copied_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let (chain, flat, target) = (Chain::open(&tip).unwrap(), memory(&layers), dir.path().join("out"));
    let done = data_pages(&flat, 0..400);
    let all = data_pages(&flat, 0..600);
    type Forge = fn(&mut Vec<u8>);
    let cases: [(&str, u64, Forge); 8] = [
        ("as it was", done, |_| {}),
        ("a page is damaged", done - 1, |bytes| bytes[200 * PAGE + 17] ^= 1),
        ("a page is gone", done - 1, |bytes| bytes[202 * PAGE..203 * PAGE].fill(0)),
        ("a place is not zero that must be", 0, |bytes| bytes[201 * PAGE] = 1),
        ("the last place, too", 0, |bytes| bytes[596 * PAGE] = 1),
        ("another merge", 0, |bytes| bytes[600 * PAGE + 20] ^= 1),
        ("cut off", 0, |bytes| bytes.truncate(599 * PAGE)),
        ("more behind it", 0, |bytes| bytes.push(0)),
    ];
    for (what, reused, forge) in cases {
        leave(&chain, &target, 0..400, forge);
        let report = flatten(&chain, &target, &FAST, &mut |_, _| {}).unwrap();
        assert_eq!((report.reused_pages, report.copied_pages), (reused, all - reused), "{what}");
        let file = SnapshotFile::open(&target).unwrap();
        file.verify(2, &mut |_, _| {}).unwrap();
        assert!(read_all(&file) == flat, "{what}");
        assert_eq!(names(dir.path()), ["0", "1", "out"]);
        fs::remove_file(&target).unwrap();
    }
}

/// Killed when the trailer was written and the file not renamed yet: complete, and nobody's.
#[test]
fn a_complete_leftover_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let (chain, target) = (Chain::open(&tip).unwrap(), dir.path().join("out"));
    flatten(&chain, &target, &FAST, &mut |_, _| {}).unwrap();
    fs::rename(&target, target.with_extension("partial")).unwrap();
    let report = flatten(&chain, &target, &FAST, &mut |_, _| {}).unwrap();
    assert_eq!((report.reused_pages, report.copied_pages), (0, chain.data_pages()));
    assert!(read_all(&SnapshotFile::open(&target).unwrap()) == memory(&layers));
    assert_eq!(names(dir.path()), ["0", "1", "out"]);
}

#[test]
fn only_our_own_leftovers_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let (chain, target) = (Chain::open(&tip).unwrap(), dir.path().join("out"));
    let run = |program: &str, args: &[&str], path: &Path| {
        assert!(Command::new(program).args(args).arg(path).status().unwrap().success(), "{program}");
    };
    let fresh = |why: &str| {
        let report = flatten(&chain, &target, &FAST, &mut |_, _| {}).unwrap();
        assert_eq!(report.reused_pages, 0, "{why}");
        assert!(read_all(&SnapshotFile::open(&target).unwrap()) == memory(&layers));
        fs::remove_file(&target).unwrap();
    };
    run("chmod", &["660"], &leave(&chain, &target, 0..99, |_| {}));
    fresh("others may write to it");
    let partial = leave(&chain, &target, 0..99, |_| {});
    fs::hard_link(&partial, dir.path().join("second")).unwrap();
    let second = fs::read(dir.path().join("second")).unwrap();
    fresh("it has another name");
    assert!(fs::read(dir.path().join("second")).unwrap() == second, "which nobody has touched");
    if Command::new("chown").arg("12345").arg(leave(&chain, &target, 0..99, |_| {})).status().unwrap().success() {
        fresh("it is another user's");
    } else {
        fs::remove_file(target.with_extension("partial")).unwrap();
        println!("SKIPPED: a leftover of another user (needs root)");
    }
    // Somebody is at it.
    let partial = leave(&chain, &target, 0..99, |_| {});
    let held = OpenOptions::new().write(true).open(&partial).unwrap();
    held.lock().unwrap();
    let error = flatten(&chain, &target, &FAST, &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, MergeError::Create(CreateError::Busy { .. })), "{error}");
    assert!(partial.exists());
}

#[test]
fn a_rebase_goes_on_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let (tip, layers) = pair(dir.path());
    let other = dir.path().join("other");
    write_layer(&other, &table(600), &vec![Content::Data(200); 600], None);
    let (child, parent) = (Chain::open(&tip).unwrap(), Chain::open(&other).unwrap());
    let (target, flat) = (dir.path().join("out"), memory(&layers));
    for stray in [false, true] {
        let mark = Mark::new(child.tip().as_parent(), Some(parent.tip().as_parent()));
        let of = Some(parent.tip().as_parent());
        let sink = FileSink::create_merge(&target, child.blocks(), &QUICK, of, &mark, false).unwrap();
        (2..50).filter(|page| page % 5 != 1).for_each(|page| give(&sink, &flat, page, 1));
        let partial = target.with_extension("partial");
        let mut bytes = fs::read(&partial).unwrap();
        drop(sink);
        if stray {
            bytes[51 * PAGE + 5] = 1; // Zero in the child, data in the parent.
        }
        drop(crate::os::storage::create_private(&partial).unwrap());
        fs::write(&partial, bytes).unwrap();
        let report = rebase(&child, &parent, &target, &FAST, &mut |_, _| {}).unwrap();
        assert_eq!(report.reused_pages, if stray { 0 } else { 39 });
        assert!(read_all(&Chain::open(&target).unwrap()) == flat);
        Chain::open(&target).unwrap().verify(1, &mut |_, _| {}).unwrap();
        fs::remove_file(&target).unwrap();
    }
}
