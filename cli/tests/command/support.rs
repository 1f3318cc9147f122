//! Running the command, and snapshots to run it on.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ramshot::SnapshotFile;
use ramshot::core::{Backing, BlockName, BlockTable, GuestAddr, HostAddr, PageId, RamBlock, Treatment};
use ramshot::file::{FileSink, FileSinkOptions};
use ramshot::sink::{ImageMeta, ImageSink, PageDigest, Piece};

pub(crate) const PAGE: usize = 4096;

/// The command, with these arguments, in this directory.
pub(crate) fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramshot"));
    command.current_dir(dir).args(args);
    command
}

/// What it said and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        // No code: killed by a signal, which no input may do.
        Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

pub(crate) fn run(dir: &Path, args: &[&str]) -> Ran {
    let ran = Ran::from(command(dir, args).output().unwrap());
    assert!(!ran.err.contains("panicked"), "{args:?}: {ran:?}");
    ran
}

/// It works, and says nothing on standard error: progress is for terminals.
pub(crate) fn yes(dir: &Path, args: &[&str]) -> String {
    let ran = run(dir, args);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{args:?}: {ran:?}");
    ran.out
}

/// It ends with `code`, and the sentence has all these words in it.
pub(crate) fn fails(dir: &Path, code: i32, words: &[&str], args: &[&str]) {
    let ran = run(dir, args);
    assert_eq!(ran.code, code, "{args:?}: {ran:?}");
    for word in words {
        assert!(ran.err.contains(word), "{args:?} does not say {word:?}: {ran:?}");
    }
}

pub(crate) fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

pub(crate) fn block(name: &str, guest: u64, pages: usize) -> RamBlock {
    let len = (pages * PAGE) as u64;
    RamBlock {
        name: BlockName::new(name).unwrap(),
        guest: GuestAddr(guest),
        host: HostAddr(0x7000_0000_0000 + guest),
        len,
        used: len,
        page_size: 4096,
        backing: Backing::Anonymous,
        treatment: Treatment::Tracked,
    }
}

/// A snapshot of `flat`, the memory of these blocks one behind the other.
pub(crate) fn snapshot(path: &Path, blocks: &[RamBlock], flat: &[u8]) {
    let table = BlockTable::new(blocks).unwrap();
    assert_eq!(table.pages(), (flat.len() / PAGE) as u64);
    let options = FileSinkOptions { replace: true, sync: false, direct: false };
    let sink = FileSink::create(path, &table, &options).unwrap();
    let digests: Vec<_> = flat.as_chunks::<PAGE>().0.iter().map(PageDigest::of).collect();
    sink.write(&[Piece { first: PageId(0), bytes: flat, digests: &digests }]).unwrap();
    let meta =
        ImageMeta { device_state: b"device state".to_vec(), statistics: vec![("write_faults".to_owned(), 4321)] };
    Box::new(sink).commit(&meta).unwrap();
}

/// An increment on `parent` as the library writes it: these pages, one each, all others in the parent.
pub(crate) fn increment(path: &Path, blocks: &[RamBlock], parent: &Path, pages: &[(u64, &[u8])]) {
    let parent = SnapshotFile::open(parent).unwrap().as_parent();
    let options = FileSinkOptions { replace: true, sync: false, direct: false };
    let sink = FileSink::create_child(path, &BlockTable::new(blocks).unwrap(), &options, parent).unwrap();
    for (page, bytes) in pages {
        let digest = PageDigest::of(bytes.as_chunks::<PAGE>().0.first().unwrap());
        sink.write(&[Piece { first: PageId(*page), bytes, digests: &[digest] }]).unwrap();
    }
    Box::new(sink).commit(&ImageMeta::default()).unwrap();
}

/// Memory of `pages` pages, no two alike; every fourth is zero.
pub(crate) fn memory(pages: usize, seed: u8) -> Vec<u8> {
    let mut flat = vec![0; pages * PAGE];
    for (number, page) in flat.chunks_mut(PAGE).enumerate().filter(|(number, _)| number % 4 != 0) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = u8::try_from((number * 7 + at) % 251).unwrap() ^ seed;
        }
        page[..8].copy_from_slice(&(number as u64).to_le_bytes());
    }
    flat
}

/// A directory with `snap`: 40 pages at 0 and 24 at 4 GiB.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) flat: Vec<u8>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flat = memory(64, 0x55);
        snapshot(&dir.path().join("snap"), &two_blocks(), &flat);
        Self { dir, flat }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Names in the directory, for what must not be left behind.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

pub(crate) fn two_blocks() -> [RamBlock; 2] {
    [block("low", 0, 40), block("high", 1 << 32, 24)]
}

/// Changes one bit.
pub(crate) fn flip(path: &Path, offset: u64) {
    let mut file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte[0] ^ 4]).unwrap();
}

/// Cuts bytes off.
pub(crate) fn truncate(path: &Path, by: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - by).unwrap();
}

/// Whether a program is there.
pub(crate) fn installed(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        skipped(&format!("{program} is not installed"));
    }
    there
}

/// Says that (a part of) a test was skipped. Not by `eprintln`, which the test harness captures: this is seen in every run.
pub(crate) fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED, a test of the ramshot command: {why} ***");
}
