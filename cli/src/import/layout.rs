//! Which part of a memory file is where in guest-physical memory: from flags or from JSON.

use std::fs;
use std::path::Path;

use ramshot::core::{
    Backing, BlockIndex, BlockName, BlockTable, GuestAddr, HostAddr, PAGE_SIZE, PageId, RamBlock, Treatment,
};
use serde::Deserialize;

use crate::outcome::Failure;
use crate::size;

/// A RAM block as it is described.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Region {
    name: Option<String>,
    guest: u64,
    len: u64,
    offset: Option<u64>,
}

/// Where a block comes from and goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placed {
    /// In the memory file.
    pub(super) offset: u64,
    /// In the snapshot.
    pub(super) first: PageId,
    pub(super) bytes: u64,
}

/// A checked layout.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) table: BlockTable,
    pub(super) pieces: Vec<Placed>,
}

impl Layout {
    pub(super) fn new(regions: &[Region]) -> Result<Self, Failure> {
        let (mut blocks, mut placed, mut next) = (Vec::new(), Vec::new(), 0);
        for (number, region) in regions.iter().enumerate() {
            let name = region.name.clone().unwrap_or_else(|| format!("ram{number}"));
            let block = block(&name, region)?;
            let offset = region.offset.unwrap_or(next);
            next = offset.checked_add(region.len).ok_or_else(|| {
                Failure::says(format!("region {name:?} at byte {offset:#x} of the file ends beyond 64 bits"))
            })?;
            if !offset.is_multiple_of(PAGE_SIZE) {
                return Err(Failure::says(format!(
                    "region {name:?} starts at byte {offset:#x} of the file, which is no multiple of 4096"
                )));
            }
            blocks.push(block);
            placed.push((offset, region.len));
        }
        let table = BlockTable::new(&blocks)
            .map_err(|error| Failure::says(format!("the regions are no RAM layout: {error}")))?;
        let place = |(index, (offset, bytes)): (u16, (u64, u64))| Placed {
            offset,
            first: table.block_run(BlockIndex(index)).first,
            bytes,
        };
        let pieces = (0..).zip(placed).map(place).collect();
        Ok(Self { table, pieces })
    }

    /// Where the last region ends in the memory file.
    pub(super) fn end(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.offset + piece.bytes).max().unwrap_or(0)
    }
}

fn block(name: &str, region: &Region) -> Result<RamBlock, Failure> {
    let named = BlockName::new(name);
    let name = named.ok_or_else(|| Failure::says(format!("region name {name:?} must have 1 to 47 bytes")))?;
    Ok(RamBlock {
        name,
        guest: GuestAddr(region.guest),
        // There is no mapping. Guest addresses do not overlap either.
        host: HostAddr(region.guest),
        len: region.len,
        used: region.len,
        page_size: PAGE_SIZE,
        backing: Backing::File,
        treatment: Treatment::Tracked,
    })
}

/// `[NAME=]ADDRESS+LENGTH[@OFFSET]`.
pub(super) fn parse_region(text: &str) -> Result<Region, String> {
    let (name, rest) = match text.rsplit_once('=') {
        Some((name, rest)) => (Some(name.to_owned()), rest),
        None => (None, text),
    };
    let (range, offset) = match rest.split_once('@') {
        Some((range, offset)) => (range, Some(size::parse(offset)?)),
        None => (rest, None),
    };
    let (guest, len) = range.split_once('+').ok_or("a region is ADDRESS+LENGTH, for example 0x100000000+1G")?;
    Ok(Region { name, guest: size::parse(guest)?, len: size::parse(len)?, offset })
}

/// A file with a list of regions, or an object that has one as `blocks`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Described {
    List(Vec<Entry>),
    Object { blocks: Vec<Entry> },
}

#[derive(Deserialize)]
struct Entry {
    name: Option<String>,
    guest_address: Number,
    used: Number,
    offset: Option<Number>,
    /// What a snapshot leaves out is in no memory file.
    #[serde(default)]
    treatment: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(u64),
    Text(String),
}

impl Number {
    fn value(self) -> Result<u64, String> {
        match self {
            Self::Plain(value) => Ok(value),
            Self::Text(text) => size::parse(&text),
        }
    }
}

/// Reads the layout in a JSON file.
pub(super) fn read(path: &Path) -> Result<Vec<Region>, Failure> {
    let text = fs::read(path).map_err(|source| Failure::io(format!("cannot read layout {path:?}"), source))?;
    let invalid = |why: String| Failure::says(format!("layout {path:?} is not valid: {why}"));
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let described = serde_json::from_value(value).map_err(|_| {
        invalid(
            "a list of regions is expected (or an object with one as \"blocks\"), each with \"guest_address\" and \"used\", \
             which are numbers or strings such as \"0x1000\" or \"3G\""
                .to_owned(),
        )
    })?;
    let (Described::List(entries) | Described::Object { blocks: entries }) = described;
    let region = |entry: Entry| {
        Ok(Region {
            name: entry.name,
            guest: entry.guest_address.value()?,
            len: entry.used.value()?,
            offset: entry.offset.map(Number::value).transpose()?,
        })
    };
    let in_image = |entry: &Entry| entry.treatment.as_deref() != Some("ignored");
    entries.into_iter().filter(in_image).map(region).collect::<Result<_, String>>().map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: Option<&str>, guest: u64, len: u64, offset: Option<u64>) -> Region {
        Region { name: name.map(str::to_owned), guest, len, offset }
    }

    #[test]
    fn regions_are_read() {
        assert_eq!(parse_region("0+3G"), Ok(region(None, 0, 3 << 30, None)));
        assert_eq!(parse_region("0x100000000+1G@3G"), Ok(region(None, 1 << 32, 1 << 30, Some(3 << 30))));
        assert_eq!(parse_region("a=b=4G+4K"), Ok(region(Some("a=b"), 4 << 30, 4096, None)));
        for text in ["", "0", "0+", "+1G", "0-1G", "0+1G@", "=", "x+y"] {
            assert!(parse_region(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_layout_is_refused() {
        let refused = |regions: &[Region]| Layout::new(regions).is_err();
        assert!(refused(&[]));
        assert!(refused(&[region(None, 0, 4095, None)]), "half a page");
        assert!(refused(&[region(None, 12, 4096, None)]), "address not aligned");
        assert!(refused(&[region(None, 0, 8192, None), region(None, 4096, 8192, None)]), "overlap");
        assert!(refused(&[region(Some("a"), 0, 4096, None), region(Some("a"), 8192, 4096, None)]), "same name");
        assert!(refused(&[region(None, 0, 4096, Some(u64::MAX))]), "end of the file offset");
        assert!(refused(&[region(None, u64::MAX - 4095, 8192, None)]), "end of the address space");
        assert!(refused(&[region(Some(&"n".repeat(48)), 0, 4096, None)]), "name");
        assert!(refused(&[region(None, 0, 4096, Some(100))]), "offset not aligned");
        assert!(!refused(&[region(None, 0, 4096, None), region(None, 8192, 4096, None)]));
    }
}
