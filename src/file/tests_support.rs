//! What the tests of the file share: layouts, memory, and writing a snapshot of it.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use ramshot_core::{
    Backing, BlockName, BlockTable, GuestAddr, HostAddr, OsError, PageId, RamBlock, RamTarget, Treatment,
};

use super::format::PAGE;
use super::tests_round_trip::Content;
use super::{FileSink, FileSinkOptions, PageSource, PageState, ParentRef};
use crate::sink::{Committed, ImageMeta, ImageSink, PageDigest, Piece};

pub(super) fn block(name: &str, guest: u64, pages: u64) -> RamBlock {
    RamBlock {
        name: BlockName::new(name).unwrap(),
        guest: GuestAddr(guest),
        host: HostAddr(0x7000_0000_0000 + guest),
        len: pages * 4096,
        used: pages * 4096,
        page_size: 4096,
        backing: Backing::Anonymous,
        treatment: Treatment::Tracked,
    }
}

/// Two blocks of `low` and `high` pages.
pub(super) fn two_blocks(low: u64, high: u64) -> BlockTable {
    BlockTable::new(&[block("low", 0, low), block("high", 0x1_0000_0000, high)]).unwrap()
}

pub(super) fn table(pages: u64) -> BlockTable {
    BlockTable::new(&[block("ram", 0, pages)]).unwrap()
}

pub(super) fn digest(page: &[u8]) -> PageDigest {
    if page.iter().all(|&byte| byte == 0) { PageDigest::Zero } else { PageDigest::Data(crc32c::crc32c(page)) }
}

pub(super) fn digests(bytes: &[u8]) -> Vec<PageDigest> {
    bytes.chunks(PAGE).map(digest).collect()
}

/// Page `page` filled so that every page differs from every other.
pub(super) fn fill(flat: &mut [u8], page: usize, seed: u8) {
    for (i, byte) in flat[page * PAGE..(page + 1) * PAGE].iter_mut().enumerate() {
        *byte = seed ^ u8::try_from(page & 0x7f).unwrap() ^ u8::try_from(i % 251).unwrap();
    }
}

/// Flat RAM of `pages` pages; of each four, the first is zero.
pub(super) fn some_ram(pages: usize, seed: u8) -> Vec<u8> {
    let mut flat = vec![0; pages * PAGE];
    (0..pages).filter(|page| page % 4 != 0).for_each(|page| fill(&mut flat, page, seed));
    flat
}

pub(super) fn give(sink: &dyn ImageSink, flat: &[u8], first: u64, pages: usize) {
    let from = usize::try_from(first).unwrap() * PAGE;
    let bytes = &flat[from..from + pages * PAGE];
    sink.write(&[Piece { first: PageId(first), bytes, digests: &digests(bytes) }]).unwrap();
}

pub(super) fn meta() -> ImageMeta {
    ImageMeta {
        device_state: b"device state!".to_vec(),
        statistics: vec![("pause_us".to_owned(), 1234), ("faults".to_owned(), u64::MAX)],
    }
}

/// Options that replace and, for speed, do not sync.
pub(super) const QUICK: FileSinkOptions = FileSinkOptions { replace: true, sync: false, direct: true };

/// A committed snapshot of `flat`.
pub(super) fn snapshot(path: &Path, table: &BlockTable, flat: &[u8]) -> Committed {
    let sink = FileSink::create(path, table, &QUICK).unwrap();
    give(&sink, flat, 0, flat.len() / PAGE);
    Box::new(sink).commit(&meta()).unwrap()
}

/// Guest RAM for a restore: each block's bytes behind a lock.
pub(super) struct TestRam {
    table: BlockTable,
    blocks: HashMap<BlockName, Mutex<Vec<u8>>>,
}

impl TestRam {
    pub(super) fn new(table: &BlockTable, content: u8) -> Self {
        let bytes = |block: &RamBlock| Mutex::new(vec![content; usize::try_from(block.used).unwrap()]);
        Self { table: table.clone(), blocks: table.blocks().iter().map(|b| (b.name, bytes(b))).collect() }
    }

    pub(super) fn bytes(&self, name: BlockName) -> Vec<u8> {
        self.blocks[&name].lock().unwrap().clone()
    }
}

impl RamTarget for TestRam {
    fn with_mut(&self, at: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
        let fault = OsError::new("with_mut", 14);
        let block = self.table.block_at(at).and_then(|index| self.table.block(index)).ok_or(fault)?;
        let offset = usize::try_from(at.0 - block.host.0).unwrap();
        let mut bytes = self.blocks[&block.name].lock().unwrap();
        fill(bytes.get_mut(offset..offset + len).ok_or(fault)?);
        Ok(())
    }
}

/// One snapshot of a chain, page by page: not given, zero (all bytes 0), or filled with a seed.
pub(super) type Layer = Vec<Content>;

/// The memory after `layers`, the oldest first, by a model that knows nothing of files.
pub(super) fn memory(layers: &[Layer]) -> Vec<u8> {
    let mut flat = vec![0; layers[0].len() * PAGE];
    for layer in layers {
        for (page, content) in layer.iter().enumerate() {
            match content {
                Content::NeverGiven => {}
                Content::Zero => flat[page * PAGE..(page + 1) * PAGE].fill(0),
                Content::Data(seed) => fill(&mut flat, page, *seed),
            }
        }
    }
    flat
}

/// Writes one snapshot, on `parent` if there is one; page by page, so that a page the layer does not give stays in the parent.
pub(super) fn write_layer(path: &Path, table: &BlockTable, layer: &Layer, parent: Option<ParentRef>) -> ParentRef {
    let sink = FileSink::create_as(path, table, &QUICK, parent, None).unwrap();
    let flat = memory(std::slice::from_ref(layer));
    for (page, content) in layer.iter().enumerate() {
        if *content != Content::NeverGiven {
            give(&sink, &flat, page as u64, 1);
        }
    }
    let meta = ImageMeta { device_state: format!("device {path:?}").into_bytes(), ..meta() };
    Box::new(sink).commit(&meta).unwrap().snapshot.unwrap()
}

/// Writes a chain into `dir`: `0`, `1` and so on. Returns the path of the last.
pub(super) fn write_chain(dir: &Path, table: &BlockTable, layers: &[Layer]) -> PathBuf {
    let mut parent = None;
    for (number, layer) in layers.iter().enumerate() {
        parent = Some(write_layer(&dir.join(number.to_string()), table, layer, parent));
    }
    dir.join((layers.len() - 1).to_string())
}

/// All of an image, as [`PageSource`] has it.
pub(super) fn read_all(source: &dyn PageSource) -> Vec<u8> {
    let mut flat = vec![0; usize::try_from(source.pages()).unwrap() * PAGE];
    let mut page = PageId(0);
    while page.0 < source.pages() {
        let extent = source.extent(page).unwrap();
        assert_eq!(extent.run.first, page);
        let from = usize::try_from(page.0).unwrap() * PAGE;
        if extent.state == PageState::Data {
            let len = usize::try_from(extent.run.bytes()).unwrap();
            source.read_run(page, &mut flat[from..from + len]).unwrap();
        }
        page = extent.run.end();
    }
    assert_eq!(source.extent(page), None);
    flat
}

/// Names in a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Calls `test` with a file system of its own of `size` (as mount(8) takes it), or says that it cannot be had.
pub(super) fn on_small_disk(size: &str, test: impl FnOnce(&Path) + std::panic::UnwindSafe) {
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", size, "ramshot-test"]).arg(dir.path()).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        return println!("SKIPPED: a tmpfs cannot be mounted here (needs root)");
    }
    let outcome = std::panic::catch_unwind(|| test(dir.path()));
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    outcome.unwrap();
}
