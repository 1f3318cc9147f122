//! `kill -9` of a process that does nothing but take snapshots: what is under the name is always whole.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::tests_support::{give, meta, some_ram, table};
use super::{FileSink, FileSinkOptions, SnapshotFile};
use crate::sink::ImageSink;

const TARGET: &str = "RAMSHOT_TEST_KILL_TARGET";
const PAGES: usize = 300;
const KILLS: u64 = 40;

/// The victim: this test binary, running [`victim`] alone, as long as it lives.
#[test]
#[ignore = "runs until it is killed; started by the test below"]
fn victim() {
    let Some(target) = std::env::var_os(TARGET).map(PathBuf::from) else { return };
    let flat = some_ram(PAGES, 1);
    fs::write(target.with_extension("ready"), b"").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for round in 0u32.. {
        // Without replacing every other time, so that the kill also meets link and unlink.
        let replace = round % 2 == 0;
        if !replace {
            let _ = fs::remove_file(&target);
        }
        let sink =
            FileSink::create(&target, &table(PAGES as u64), &FileSinkOptions { replace, sync: false, direct: true })
                .unwrap();
        (0..PAGES).step_by(50).for_each(|first| give(&sink, &flat, first as u64, 50));
        Box::new(sink).commit(&meta()).unwrap();
        if Instant::now() > deadline {
            return;
        }
    }
}

#[test]
fn killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("snap");
    let ready = target.with_extension("ready");
    let (mut whole, mut partials) = (0, 0);
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "file::tests_kill::victim", "--ignored"])
            .env(TARGET, &target)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !ready.exists() && started.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(kill * 7919 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(&ready).unwrap();
        partials += u32::from(dir.path().join("snap.partial").exists());
        if target.exists() {
            let file = SnapshotFile::open(&target).unwrap();
            file.verify(2, &mut |_, _| {}).unwrap();
            whole += 1;
        }
        // What opens under the partial name was complete as well; and it is in nobody's way.
        if let Ok(file) = SnapshotFile::open(dir.path().join("snap.partial")) {
            file.verify(1, &mut |_, _| {}).unwrap();
        }
        let before = SnapshotFile::open(&target).ok().map(|file| file.id());
        let next = FileSink::create(&target, &table(8), &FileSinkOptions { replace: true, sync: false, direct: true })
            .unwrap();
        drop(next);
        assert!(!dir.path().join("snap.partial").exists());
        assert_eq!(SnapshotFile::open(&target).ok().map(|file| file.id()), before);
    }
    println!("{KILLS} kills: {whole} whole snapshots, {partials} leftovers, no torn one");
    assert!(partials > 0, "no kill hit a snapshot under way");
}
