//! `kill -9` of a process that does nothing but flatten, or rebase: the chain is whole, the target is whole or not there, and the
//! next merge goes on and ends with the same content.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::tests_merge::FAST;
use super::{MergeOptions, flatten, rebase};
use crate::file::tests_round_trip::Content;
use crate::file::tests_support::{Layer, memory, read_all, table, write_chain, write_layer};
use crate::file::{Chain, FileSinkOptions, PageSource};

const DIRECTORY: &str = "RAMSHOT_TEST_MERGE_KILL";
const WHAT: &str = "RAMSHOT_TEST_MERGE_WHAT";
const PAGES: usize = 1500;
const KILLS: u64 = 30;

fn merge(dir: &Path, what: &str, options: &MergeOptions) -> super::MergeReport {
    let (child, target) = (Chain::open(dir.join("2")).unwrap(), dir.join("out"));
    match what {
        "flatten" => flatten(&child, &target, options, &mut |_, _| {}).unwrap(),
        // In the place of the snapshot itself, as who wants the space back does it.
        "in place" => flatten(&child, dir.join("2"), options, &mut |_, _| {}).unwrap(),
        _ => rebase(&child, &Chain::open(dir.join("other")).unwrap(), &target, options, &mut |_, _| {}).unwrap(),
    }
}

/// The victim: this test binary, running [`victim`] alone, as long as it lives.
#[test]
#[ignore = "runs until it is killed; started by the tests below"]
fn victim() {
    let Some(dir) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let what = std::env::var(WHAT).unwrap();
    fs::write(dir.join("ready"), b"").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for round in 0u32.. {
        // Without replacing every other time, so that the kill also meets link and unlink.
        let replace = round % 2 == 0 || what == "in place";
        if !replace {
            let _ = fs::remove_file(dir.join("out"));
        }
        merge(&dir, &what, &MergeOptions { file: FileSinkOptions { replace, ..FAST.file }, threads: 1 });
        if Instant::now() > deadline {
            return;
        }
    }
}

fn start(dir: &Path, what: &str) -> Child {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "file::merge::tests_kill::victim", "--ignored"])
        .env(DIRECTORY, dir)
        .env(WHAT, what)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !dir.join("ready").exists() && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

fn layers() -> Vec<Layer> {
    let change = |by: usize| {
        move |page: usize| match page % 11 {
            rest if rest == by => Content::Data(77),
            rest if rest == by + 3 => Content::Zero,
            _ => Content::NeverGiven,
        }
    };
    let base = (0..PAGES).map(|page| if page % 6 == 0 { Content::Zero } else { Content::Data(1) }).collect();
    vec![base, (0..PAGES).map(change(1)).collect(), (0..PAGES).map(change(2)).collect()]
}

fn killed_at_any_moment(what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let layers = layers();
    let flat = memory(&layers);
    write_chain(dir, &table(PAGES as u64), &layers);
    let other: Layer = (0..PAGES).map(|page| Content::Data(u8::try_from(page % 3).unwrap())).collect();
    write_layer(&dir.join("other"), &table(PAGES as u64), &other, None);
    let target = if what == "in place" { dir.join("2") } else { dir.join("out") };
    let partial = dir.join(target.file_name().unwrap()).with_extension("partial");
    let (mut leftovers, mut reused, mut copied) = (0, 0, 0);
    for kill in 0..KILLS {
        let mut child = start(dir, what);
        std::thread::sleep(Duration::from_micros(kill * 7919 % 90_000));
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(dir.join("ready")).unwrap();
        leftovers += u32::from(partial.exists());
        // The chain is valid, and what has the target's name is whole.
        let chain = Chain::open(dir.join("2")).unwrap();
        assert!(read_all(&chain) == flat);
        chain.verify(1, &mut |_, _| {}).unwrap();
        if target.exists() {
            let merged = Chain::open(&target).unwrap();
            merged.verify(1, &mut |_, _| {}).unwrap();
            assert!(read_all(&merged) == flat);
        }
        // The next one goes on, whatever it finds.
        let report = merge(dir, what, &FAST);
        reused += report.reused_pages;
        copied += report.copied_pages;
        assert!(!partial.exists());
        let merged = Chain::open(&target).unwrap();
        merged.verify(1, &mut |_, _| {}).unwrap();
        assert!(read_all(&merged) == flat && merged.device_state() == chain.device_state());
        if what == "in place" {
            // A full file now: a chain again for the next turn.
            write_chain(dir, &table(PAGES as u64), &layers);
        }
    }
    println!("{KILLS} kills of {what}: {leftovers} leftovers, {reused} pages reused, {copied} copied");
    assert!(leftovers > 0, "no kill hit a merge under way");
    assert!(reused > 0, "nothing was ever gone on with");
}

#[test]
fn flatten_killed_at_any_moment() {
    killed_at_any_moment("flatten");
}

#[test]
fn flatten_in_place_killed_at_any_moment() {
    killed_at_any_moment("in place");
}

#[test]
fn rebase_killed_at_any_moment() {
    killed_at_any_moment("rebase");
}
