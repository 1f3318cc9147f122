//! Chains that are none: each way has its own error, and a sentence that names the files.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use ramshot_core::{BlockTable, Treatment};

use super::{Chain, ChainError};
use crate::file::error::{OpenErrorKind, ReadErrorKind, RestoreError};
use crate::file::tests_round_trip::Content;
use crate::file::tests_support::{
    Layer, QUICK, TestRam, block, memory, meta, read_all, table, two_blocks, write_chain, write_layer,
};
use crate::file::{FileSink, ParentRef, SnapshotFile, SnapshotId};
use crate::sink::ImageSink;

/// Three snapshots of eight pages: `0`, `1`, `2`.
fn three(dir: &Path) -> (PathBuf, Vec<Layer>) {
    let mut layers = vec![vec![Content::Data(1); 8]];
    for number in 1..3 {
        let mut layer = vec![Content::NeverGiven; 8];
        layer[number] = Content::Data(77);
        layer[number + 2] = Content::Zero;
        layers.push(layer);
    }
    (write_chain(dir, &table(8), &layers), layers)
}

fn refused(path: &Path) -> ChainError {
    let error = Chain::open(path).unwrap_err();
    assert!(error.to_string().len() > 40, "{error}");
    error
}

fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn flip(path: &Path, offset: u64) {
    let byte = fs::read(path).unwrap()[usize::try_from(offset).unwrap()];
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte ^ 0x20]).unwrap();
}

#[test]
fn parents_are_found_beside_the_child() {
    let dir = tempfile::tempdir().unwrap();
    let (path, layers) = three(dir.path());
    // Names tell nothing, and what else lies there is skipped.
    fs::rename(dir.path().join("0"), dir.path().join("zz")).unwrap();
    fs::rename(dir.path().join("1"), dir.path().join("a.ramshot")).unwrap();
    fs::write(dir.path().join("empty"), b"").unwrap();
    fs::write(dir.path().join("text"), b"nothing to see").unwrap();
    fs::write(dir.path().join("raw"), vec![0x41; 20 * 4096]).unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    let _ = Command::new("mkfifo").arg(dir.path().join("pipe")).status();
    assert_eq!(read_all(&Chain::open(&path).unwrap()), memory(&layers));
    // Without a directory in front of the name, and through a link from elsewhere.
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link");
    let linked = Command::new("ln").arg("-s").arg(&path).arg(&link).status().is_ok_and(|status| status.success());
    if linked {
        assert_eq!(Chain::open(&link).unwrap().depth(), 3);
    } else {
        println!("SKIPPED: a link to the snapshot, ln does not run here");
    }
    // One full snapshot is a chain.
    let full = Chain::open(dir.path().join("zz")).unwrap();
    assert_eq!((full.depth(), read_all(&full)), (1, memory(&layers[..1])));
}

#[test]
fn given_parents_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let away = tempfile::tempdir().unwrap();
    let (path, layers) = three(dir.path());
    let (zero, one) = (away.path().join("x"), away.path().join("y"));
    fs::rename(dir.path().join("0"), &zero).unwrap();
    fs::rename(dir.path().join("1"), &one).unwrap();
    assert!(matches!(refused(&path), ChainError::Missing { .. }));
    let chain = Chain::open_with(&path, &[&zero, &one]).unwrap();
    assert_eq!(read_all(&chain), memory(&layers));
    // The other one lies beside the one that names it.
    assert_eq!(Chain::open_with(&path, &[&one]).unwrap().depth(), 3);
    // Given first, even if there is one beside the child.
    fs::copy(&one, dir.path().join("1")).unwrap();
    let chain = Chain::open_with(&path, &[&zero, &one]).unwrap();
    assert!(chain.files().skip(1).all(|file| file.path().starts_with(away.path())));
    // What was given and is no snapshot is the caller's mistake.
    fs::write(away.path().join("none"), b"nothing").unwrap();
    let error = Chain::open_with(&path, &[away.path().join("none")]).unwrap_err();
    assert!(matches!(&error, ChainError::Open(e) if matches!(e.kind, OpenErrorKind::NoTail { .. })), "{error}");
    let error = Chain::open_with(&path, &[away.path().join("missing")]).unwrap_err();
    assert!(matches!(&error, ChainError::Open(e) if matches!(e.kind, OpenErrorKind::Io { .. })), "{error}");
}

#[test]
fn a_missing_parent() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    let base = SnapshotFile::open(dir.path().join("0")).unwrap().as_parent();
    fs::remove_file(dir.path().join("0")).unwrap();
    let error = refused(&path);
    let ChainError::Missing { child, parent, looked } = &error else { panic!("{error}") };
    assert_eq!((child, *parent), (&dir.path().join("1"), base));
    assert_eq!((looked.given, looked.snapshots, looked.others), (0, 2, 0));
    assert!(error.to_string().contains(&base.id.to_string()));
    assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{error}");
    // Another snapshot in its place is not it.
    write_layer(&dir.path().join("0"), &table(8), &vec![Content::Data(1); 8], None);
    assert!(matches!(refused(&path), ChainError::Missing { .. }));
    // Given files count, and are named as such.
    let error = Chain::open_with(&path, &[dir.path().join("0")]).unwrap_err();
    assert!(matches!(&error, ChainError::Missing { looked, .. } if looked.given == 1), "{error}");
    // A file still being written is not looked at.
    fs::copy(&path, dir.path().join("other.partial")).unwrap();
    let error = refused(&path);
    assert!(matches!(&error, ChainError::Missing { looked, .. } if looked.snapshots == 3), "{error}");
}

#[test]
fn a_modified_parent() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    let parent = SnapshotFile::open(dir.path().join("1")).unwrap();
    let stated = parent.checksum();
    // The same id, other content, consistent in itself: taken again, or forged.
    let id = parent.id();
    let sink = FileSink::create_as(&dir.path().join("1"), &table(8), &QUICK, parent.parent(), Some(id)).unwrap();
    Box::new(sink).commit(&meta()).unwrap();
    let error = refused(&path);
    let ChainError::Modified { child, path: found_at, id: found_id, stated: s, found } = &error else {
        panic!("{error}")
    };
    assert_eq!((child, found_at), (&path, &dir.path().join("1")));
    assert_eq!((*found_id, *s), (id, stated));
    assert_ne!(*found, stated);
    assert!(error.to_string().contains(&format!("{stated:#010x}")), "{error}");
}

#[test]
fn a_truncated_parent() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    let parent = dir.path().join("1");
    let whole = fs::read(&parent).unwrap();
    for cut in 1..whole.len() {
        let near_the_header = (whole.len() - cut).abs_diff(8 * 4096 + 96) < 20;
        if cut > 70 && cut % 613 != 0 && !near_the_header {
            continue;
        }
        let len = whole.len() - cut;
        fs::write(&parent, &whole[..len]).unwrap();
        match refused(&path) {
            // The header tells which snapshot it was.
            error @ ChainError::Parent { .. } => {
                assert!(len >= 8 * 4096 + 96);
                let text = text(&error);
                assert!(text.contains("truncated") && text.contains(parent.to_str().unwrap()), "{text}");
            }
            // Nothing tells; but the file is mentioned.
            error @ ChainError::Missing { .. } => {
                assert!(len < 8 * 4096 + 96);
                assert!(error.to_string().contains(&format!("{parent:?} for one")), "{error}");
            }
            other => panic!("{len} bytes: {other}"),
        }
        let error = Chain::open_with(&path, &[&parent]).unwrap_err();
        assert!(text(&error).contains("truncated"), "{}", text(&error));
    }
    // A whole copy elsewhere in the directory is as good.
    fs::write(dir.path().join("copy"), &whole).unwrap();
    assert_eq!(Chain::open(&path).unwrap().depth(), 3);
}

#[test]
fn a_parent_with_a_flipped_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    let parent = dir.path().join("1");
    let whole = fs::read(&parent).unwrap();
    // Behind the RAM: whatever it hits, the chain does not open.
    for offset in (8 * 4096..whole.len() as u64).step_by(3) {
        flip(&parent, offset);
        let error = refused(&path);
        assert!(matches!(error, ChainError::Parent { .. } | ChainError::Missing { .. }), "byte {offset}: {error}");
        fs::write(&parent, &whole).unwrap();
    }
    // In the RAM: it opens, and the page is refused when it is read.
    flip(&parent, 4096 + 100);
    let chain = Chain::open(&path).unwrap();
    let error = chain.restore_into(&table(8), &TestRam::new(&table(8), 0), 2).unwrap_err();
    let RestoreError::Read(error) = error else { panic!("{error}") };
    assert_eq!(error.path, parent);
    assert!(matches!(error.kind, ReadErrorKind::Checksum { .. }), "{error}");
    chain.verify(1, &mut |_, _| {}).unwrap_err();
}

/// Forged ids: `a` on `b` on `c` on `a`.
#[test]
fn a_cycle() {
    let ids = [1, 2, 3].map(|byte| SnapshotId([byte; 16]));
    for len in 2..=3 {
        let dir = tempfile::tempdir().unwrap();
        let mut parent = ParentRef { id: ids[0], checksum: 5 };
        for number in (0..len).rev() {
            let path = dir.path().join(number.to_string());
            let sink = FileSink::create_as(&path, &table(8), &QUICK, Some(parent), Some(ids[number])).unwrap();
            parent = Box::new(sink).commit(&meta()).unwrap().snapshot.unwrap();
        }
        let error = refused(&dir.path().join("0"));
        let ChainError::Cycle { child, id } = &error else { panic!("{error}") };
        assert_eq!((child, *id), (&dir.path().join((len - 1).to_string()), ids[0]));
    }
}

#[test]
fn another_ram_layout() {
    let dir = tempfile::tempdir().unwrap();
    let base_table = two_blocks(4, 4);
    let base = write_layer(&dir.path().join("base"), &base_table, &vec![Content::Data(1); 8], None);
    let mut swapped = base_table.blocks().to_vec();
    swapped.reverse();
    let mut moved = base_table.blocks().to_vec();
    moved[1].guest.0 += 4096;
    let mut more = base_table.blocks().to_vec();
    more.push(block("more", 0x2_0000_0000, 1));
    let others = [two_blocks(4, 5), two_blocks(5, 3), table(8), BlockTable::new(&swapped).unwrap()];
    let others = others.into_iter().chain([BlockTable::new(&moved).unwrap(), BlockTable::new(&more).unwrap()]);
    for (number, other) in others.enumerate() {
        let path = dir.path().join(format!("child-{number}"));
        let layer = vec![Content::NeverGiven; usize::try_from(other.pages()).unwrap()];
        write_layer(&path, &other, &layer, Some(base));
        let error = refused(&path);
        assert!(matches!(&error, ChainError::Layout { child, .. } if *child == path), "{error}");
        assert!(error.to_string().contains(" against "), "{error}");
    }
    // Ignored blocks, host pages and backing make no difference.
    let mut same = base_table.blocks().to_vec();
    let mut ignored = block("shared", 0x2_0000_0000, 3);
    ignored.treatment = Treatment::Ignored;
    same.insert(1, ignored);
    same[0].treatment = Treatment::ReadOnly;
    let path = dir.path().join("child");
    write_layer(&path, &BlockTable::new(&same).unwrap(), &vec![Content::NeverGiven; 8], Some(base));
    assert_eq!(read_all(&Chain::open(&path).unwrap()), memory(&[vec![Content::Data(1); 8]]));
}

#[test]
fn more_snapshots_than_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    let error = Chain::open_up_to(&path, &[], 2).unwrap_err();
    assert!(matches!(error, ChainError::TooDeep { limit: 2, .. }), "{error}");
    assert!(error.to_string().contains("more than 2"), "{error}");
    assert_eq!(Chain::open_up_to(&path, &[], 3).unwrap().depth(), 3);
}

#[test]
fn the_snapshot_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = three(dir.path());
    assert!(matches!(refused(&dir.path().join("none")), ChainError::Open(_)));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    assert!(matches!(refused(&path), ChainError::Open(e) if matches!(e.kind, OpenErrorKind::NoTail { .. })));
}

/// A chain that is open stays so when its files lose their names; one that is cut off is an error, never zeros.
#[test]
fn files_that_go_away_under_an_open_chain() {
    let dir = tempfile::tempdir().unwrap();
    let (path, layers) = three(dir.path());
    let chain = Chain::open(&path).unwrap();
    (0..3).for_each(|number| fs::remove_file(dir.path().join(number.to_string())).unwrap());
    assert_eq!(read_all(&chain), memory(&layers));

    let (path, _) = three(dir.path());
    let chain = Chain::open(&path).unwrap();
    OpenOptions::new().write(true).open(dir.path().join("0")).unwrap().set_len(5 * 4096).unwrap();
    let error = chain.restore_into(&table(8), &TestRam::new(&table(8), 0), 1).unwrap_err();
    assert!(matches!(&error, RestoreError::Read(e) if matches!(e.kind, ReadErrorKind::Shrunk { .. })), "{error}");
}
