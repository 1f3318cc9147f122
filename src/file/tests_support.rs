//! What the tests of the file share: layouts, memory, and writing a snapshot of it.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use ramshot_core::{
    Backing, BlockName, BlockTable, GuestAddr, HostAddr, OsError, PageId, RamBlock, RamTarget, Treatment,
};

use super::format::PAGE;
use super::{FileSink, FileSinkOptions};
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
