//! Names, locks and commits: what may be written where, by one writer at a time, and nothing lost when it fails.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use ramshot_core::PageId;

use super::error::{CreateError, OpenError, OpenErrorKind};
use super::format::PAGE;
use super::partial::Partial;
use super::tests_support::{QUICK, digests, give, meta, names, on_small_disk, snapshot, some_ram, table};
use super::{FileSink, FileSinkOptions, SnapshotFile};
use crate::sink::{ImageMeta, ImageSink, Piece};

const KEEP: FileSinkOptions = FileSinkOptions { replace: false, sync: true, direct: true };
const REPLACE: FileSinkOptions = FileSinkOptions { replace: true, sync: true, direct: true };

fn create(path: &Path, options: &FileSinkOptions) -> Result<FileSink, CreateError> {
    FileSink::create(path, &table(8), options)
}

fn verified(path: &Path) -> SnapshotFile {
    let file = SnapshotFile::open(path).unwrap();
    file.verify(2, &mut |_, _| {}).unwrap();
    file
}

#[test]
fn committed_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let sink = create(&path, &KEEP).unwrap();
    assert_eq!(names(dir.path()), ["snap.partial"]);
    let id = sink.id();
    give(&sink, &some_ram(8, 1), 0, 8);
    let committed = Box::new(sink).commit(&meta()).unwrap();
    assert_eq!(names(dir.path()), ["snap"]);
    assert_eq!(verified(&path).id(), id);
    assert_eq!(committed.written_bytes, 6 * 4096 + committed.image_bytes - 8 * 4096);

    // Dropped, aborted: the one that is there stays.
    for end in [|sink: FileSink| drop(sink), |sink: FileSink| Box::new(sink).abort()] {
        let sink = create(&path, &REPLACE).unwrap();
        give(&sink, &some_ram(8, 2), 0, 4);
        assert_eq!(names(dir.path()), ["snap", "snap.partial"]);
        end(sink);
        assert_eq!(names(dir.path()), ["snap"]);
        assert_eq!(verified(&path).id(), id);
    }
    let sink = create(&path, &REPLACE).unwrap();
    let next = sink.id();
    assert_ne!(next, id);
    // Open readers of the old one go on reading it.
    let old = verified(&path);
    Box::new(sink).commit(&meta()).unwrap();
    assert_eq!(verified(&path).id(), next);
    old.verify(1, &mut |_, _| {}).unwrap();
}

#[test]
fn targets_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sentence = |error: CreateError| error.to_string();
    for name in ["", "..", "/", "sub/", "sub/.."] {
        let path = if name.is_empty() { Path::new("").to_owned() } else { at(name) };
        let error = create(&path, &REPLACE).unwrap_err();
        let fits = matches!(
            error,
            CreateError::NoName { .. } | CreateError::NotAFile { .. } | CreateError::NoDirectory { .. }
        );
        assert!(fits, "{name:?}: {error}");
    }
    fs::create_dir(at("directory")).unwrap();
    for options in [KEEP, REPLACE] {
        for path in [at("directory"), at("directory/"), dir.path().to_owned()] {
            let error = create(&path, &options).unwrap_err();
            assert!(matches!(error, CreateError::NotAFile { found: "a directory", .. }), "{error}");
        }
        let error = create(&at("missing/snap"), &options).unwrap_err();
        assert!(matches!(error, CreateError::NoDirectory { .. }), "{error}");
        assert!(sentence(error).contains("missing\" is not there"));
    }
    fs::write(at("exists"), b"precious").unwrap();
    let error = create(&at("exists"), &KEEP).unwrap_err();
    assert!(matches!(error, CreateError::Exists { .. }), "{error}");
    let error = create(&at("exists/snap"), &KEEP).unwrap_err();
    assert!(matches!(error, CreateError::NoDirectory { .. }), "{error}");
    fs::create_dir(at("taken.partial")).unwrap();
    let error = create(&at("taken"), &KEEP).unwrap_err();
    assert!(matches!(error, CreateError::Leftover { .. }), "{error}");
    let error = create(&at(&"n".repeat(250)), &KEEP).unwrap_err();
    assert!(matches!(error, CreateError::Io { .. }), "{error}");
    if Path::new("/dev/null").exists() {
        for options in [KEEP, REPLACE] {
            assert!(matches!(create(Path::new("/dev/null"), &options).unwrap_err(), CreateError::NotAFile { .. }));
        }
    }
    assert_eq!(names(dir.path()), ["directory", "exists", "taken.partial"]);
    assert_eq!(fs::read(at("exists")).unwrap(), b"precious");
}

#[test]
fn a_directory_that_cannot_be_written() {
    // Not even root creates files there.
    let path = Path::new("/proc/snap");
    if !Path::new("/proc/self").exists() {
        return println!("SKIPPED: no /proc here");
    }
    let error = create(path, &KEEP).unwrap_err();
    assert!(matches!(error, CreateError::Io { .. }), "{error}");
    assert!(error.to_string().contains("snap.partial\" cannot be created"), "{error}");
    assert!(error.source().is_some());
}

#[test]
fn links_and_pipes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let run = |program: &str, args: &[&Path]| Command::new(program).args(args).status().is_ok_and(|s| s.success());
    if !run("mkfifo", &[&at("pipe"), &at("snap.partial")]) {
        return println!("SKIPPED: mkfifo does not run here");
    }
    assert!(matches!(create(&at("pipe"), &REPLACE).unwrap_err(), CreateError::NotAFile { .. }));
    let error = create(&at("snap"), &REPLACE).unwrap_err();
    assert!(matches!(error, CreateError::Leftover { .. }), "{error}");
    // A link in the place of the partial file is not followed.
    fs::write(at("precious"), b"precious").unwrap();
    assert!(run("ln", &[Path::new("-sf"), &at("precious"), &at("snap.partial")]));
    assert!(matches!(create(&at("snap"), &REPLACE).unwrap_err(), CreateError::Leftover { .. }));
    assert_eq!(fs::read(at("precious")).unwrap(), b"precious");
    fs::remove_file(at("snap.partial")).unwrap();
    // A link in the place of the target is: what it points to is replaced, and the link stays.
    fs::create_dir(at("elsewhere")).unwrap();
    assert!(run("ln", &[Path::new("-s"), &at("elsewhere/real"), &at("snap")]));
    let error = create(&at("snap"), &REPLACE).unwrap_err();
    assert!(matches!(error, CreateError::NotAFile { found: "a link to nothing", .. }), "{error}");
    snapshot(&at("elsewhere/real"), &table(8), &some_ram(8, 1));
    let sink = create(&at("snap"), &REPLACE).unwrap();
    assert_eq!(names(&at("elsewhere")), ["real", "real.partial"]);
    let id = sink.id();
    Box::new(sink).commit(&meta()).unwrap();
    assert!(fs::symlink_metadata(at("snap")).unwrap().is_symlink());
    assert_eq!(verified(&at("elsewhere/real")).id(), id);
}

#[test]
fn one_writer_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let first = create(&path, &REPLACE).unwrap();
    for _ in 0..3 {
        let error = create(&path, &REPLACE).unwrap_err();
        assert!(matches!(error, CreateError::Busy { .. }), "{error}");
        assert!(error.to_string().contains("another snapshot is being written to"));
    }
    give(&first, &some_ram(8, 1), 0, 8);
    Box::new(first).commit(&meta()).unwrap();
    verified(&path);
    // A writer that was leaked holds its lock as long as the process lives: nobody can tell it from a slow one.
    std::mem::forget(create(&path, &REPLACE).unwrap());
    assert!(matches!(create(&path, &REPLACE).unwrap_err(), CreateError::Busy { .. }));
    verified(&path);
}

#[test]
fn a_race_of_writers_has_whole_winners() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let flat = some_ram(8, 1);
    let won = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..200 {
                    match create(&path, &QUICK) {
                        Ok(sink) => {
                            give(&sink, &flat, 0, 8);
                            if round % 3 == 0 {
                                drop(sink);
                            } else {
                                Box::new(sink).commit(&meta()).unwrap();
                                won.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            }
                        }
                        Err(error) => assert!(matches!(error, CreateError::Busy { .. }), "{error}"),
                    }
                    match SnapshotFile::open(&path) {
                        Ok(file) => drop(file.verify(1, &mut |_, _| {}).unwrap()),
                        // Nobody has committed yet.
                        Err(OpenError { kind: OpenErrorKind::Io { source, .. }, .. })
                            if source.kind() == ErrorKind::NotFound => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(won.into_inner() > 0);
    assert_eq!(names(dir.path()), ["snap"]);
}

#[test]
fn stale_leftovers_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let partial = dir.path().join("snap.partial");
    fs::write(&partial, vec![0xee; 100_000]).unwrap();
    let sink = create(&path, &KEEP).unwrap();
    give(&sink, &some_ram(8, 1), 0, 8);
    Box::new(sink).commit(&meta()).unwrap();
    assert_eq!(names(dir.path()), ["snap"]);
    let id = verified(&path).id();

    // Killed between link and unlink: the leftover is the committed snapshot, by another name.
    if fs::hard_link(&path, &partial).is_err() {
        return println!("SKIPPED: no hard links here");
    }
    let sink = create(&path, &REPLACE).unwrap();
    give(&sink, &some_ram(8, 9), 0, 8);
    assert_eq!(verified(&path).id(), id);
    drop(sink);
    assert_eq!(verified(&path).id(), id);
    assert_eq!(names(dir.path()), ["snap"]);
}

#[test]
fn a_target_that_appears_meanwhile_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let sink = create(&path, &KEEP).unwrap();
    give(&sink, &some_ram(8, 1), 0, 8);
    fs::write(&path, b"precious").unwrap();
    let error = Box::new(sink).commit(&meta()).unwrap_err();
    assert!(error.to_string().contains("has appeared meanwhile"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(names(dir.path()), ["snap"]);
}

#[test]
fn without_hard_links() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let mut partial = Partial::create(&path, false, &mut |_| false).unwrap();
    partial.publish_by_placeholder().unwrap();
    drop(partial);
    assert_eq!(names(dir.path()), ["snap"]);
    fs::write(&path, b"precious").unwrap();
    let other = dir.path().join("other");
    let mut partial = Partial::create(&other, false, &mut |_| false).unwrap();
    fs::write(&other, b"precious").unwrap();
    partial.publish_by_placeholder().unwrap_err();
    drop(partial);
    assert_eq!(names(dir.path()), ["other", "snap"]);
    assert_eq!(fs::read(&other).unwrap(), b"precious");
}

#[test]
fn a_commit_that_fails_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    // The target became a directory.
    let sink = create(&path, &REPLACE).unwrap();
    fs::create_dir_all(path.join("full")).unwrap();
    let error = Box::new(sink).commit(&meta()).unwrap_err();
    assert!(error.to_string().contains("cannot be renamed into place"), "{error}");
    assert_eq!(names(dir.path()), ["snap"]);
    fs::remove_dir_all(&path).unwrap();

    snapshot(&path, &table(8), &some_ram(8, 1));
    let id = verified(&path).id();
    // The partial file was moved away, or another one put in its place.
    let sink = create(&path, &REPLACE).unwrap();
    fs::rename(dir.path().join("snap.partial"), dir.path().join("aside")).unwrap();
    fs::write(dir.path().join("snap.partial"), b"another's").unwrap();
    Box::new(sink).commit(&meta()).unwrap_err();
    assert_eq!(verified(&path).id(), id);
    assert_eq!(fs::read(dir.path().join("snap.partial")).unwrap(), b"another's");
    fs::remove_file(dir.path().join("snap.partial")).unwrap();
    fs::remove_file(dir.path().join("aside")).unwrap();

    for key in [String::new(), "k".repeat(256)] {
        let sink = create(&path, &REPLACE).unwrap();
        let bad = ImageMeta { statistics: vec![(key, 1)], ..meta() };
        Box::new(sink).commit(&bad).unwrap_err();
    }
    assert_eq!(verified(&path).id(), id);
    assert_eq!(names(dir.path()), ["snap"]);
}

#[test]
fn pages_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let flat = some_ram(9, 1);
    let all = digests(&flat);
    let piece = |first, bytes, digests| Piece { first: PageId(first), bytes: &flat[..bytes], digests: &all[..digests] };
    let bad = [piece(0, PAGE, 2), piece(0, 5, 1), piece(0, 9 * PAGE, 9), piece(8, PAGE, 1), piece(u64::MAX, PAGE, 1)];
    for piece in bad {
        let sink = create(&path, &KEEP).unwrap();
        let error = sink.write(&[piece]).unwrap_err();
        assert_eq!(error.source.kind(), std::io::ErrorKind::InvalidInput, "{error}");
        // After a failed write there is no way to a committed file.
        Box::new(sink).commit(&meta()).unwrap_err();
        assert!(names(dir.path()).is_empty());
    }
    let sink = create(&path, &KEEP).unwrap();
    sink.write(&[]).unwrap();
    sink.write(&[piece(3, 0, 0)]).unwrap();
    give(&sink, &flat, 0, 4);
    let error = sink.write(&[piece(3, 2 * PAGE, 2)]).unwrap_err();
    assert!(error.source.to_string().contains("page 3 was given twice"), "{}", error.source);
}

/// A guest's memory is for the file's owner alone, from the first byte on; a file that is replaced has been opened up by hand.
#[test]
fn who_may_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let mode = |path: &Path| {
        let output = Command::new("stat").args(["-c", "%a"]).arg(path).output().ok()?;
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    let sink = create(&path, &KEEP).unwrap();
    let Some(partial) = mode(&dir.path().join("snap.partial")) else {
        return println!("SKIPPED: stat does not run here");
    };
    assert_eq!(partial, "600");
    Box::new(sink).commit(&meta()).unwrap();
    assert_eq!(mode(&path).unwrap(), "600");
    assert!(Command::new("chmod").arg("640").arg(&path).status().unwrap().success());
    snapshot(&path, &table(8), &some_ram(8, 2));
    assert_eq!(mode(&path).unwrap(), "640");
}

#[test]
fn ids_differ() {
    let ids: std::collections::HashSet<_> = (0..1000).map(|_| super::SnapshotId::random()).collect();
    assert_eq!(ids.len(), 1000);
}

/// A file system of one megabyte, full.
#[test]
fn a_full_disk() {
    on_small_disk("size=1M", full_disk);
}

fn full_disk(dir: &Path) {
    let path = dir.join("snap");
    snapshot(&path, &table(8), &some_ram(8, 1));
    let id = verified(&path).id();
    // Pages: more than a megabyte of them.
    let flat = some_ram(500, 3);
    let sink = FileSink::create(&path, &table(500), &REPLACE).unwrap();
    let write = |first: usize| {
        let bytes = &flat[first * PAGE..(first + 20) * PAGE];
        sink.write(&[Piece { first: PageId(first as u64), bytes, digests: &digests(bytes) }])
    };
    let error = (0..500).step_by(20).find_map(|first| write(first).err()).expect("the disk is full");
    assert_eq!(error.source.kind(), std::io::ErrorKind::StorageFull, "{error}");
    assert!(error.to_string().contains("snap.partial"), "{error}");
    Box::new(sink).commit(&meta()).unwrap_err();
    assert_eq!((names(dir), verified(&path).id()), (vec!["snap".to_owned()], id));

    // The trailer: device state that does not fit.
    let sink = create(&path, &REPLACE).unwrap();
    let state = ImageMeta { device_state: vec![1; 2 << 20], ..meta() };
    let error = Box::new(sink).commit(&state).unwrap_err();
    assert_eq!(error.source.kind(), std::io::ErrorKind::StorageFull, "{error}");
    assert_eq!((names(dir), verified(&path).id()), (vec!["snap".to_owned()], id));
    // And with room again it goes on. (A removed file keeps its space as long as a child process that another test is just
    // starting still has its descriptor.)
    let room = dir.join("room");
    let patience = std::time::Instant::now();
    while fs::write(&room, vec![1; 256 << 10]).is_err() {
        assert!(patience.elapsed().as_secs() < 60, "the space of removed files does not come back");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    fs::remove_file(&room).unwrap();
    snapshot(&path, &table(8), &some_ram(8, 2));
    assert_ne!(verified(&path).id(), id);
}
