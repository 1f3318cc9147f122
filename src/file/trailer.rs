//! Writing the trailer and the tail.

use std::fs::File;
use std::io::IoSlice;

use ramshot_core::{Backing, Treatment};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::format::{
    BlockRecord, HEADER_LEN, HEADER_MAGIC, Header, Kind, MAX_KEY, PAGE_BYTES, SECTION_LEN, Section, TAIL_LEN,
    TAIL_MAGIC, Tail, VERSION, pack_run,
};
use super::pages::PageTable;
use super::sections::{Failed, SectionWriter, write_all};
use super::{FileBlock, ParentRef, SnapshotId};
use crate::sink::ImageMeta;

/// Everything the trailer says that is not in the page table.
pub(super) struct Contents<'a> {
    pub(super) id: SnapshotId,
    pub(super) parent: Option<ParentRef>,
    pub(super) blocks: &'a [FileBlock],
    pub(super) meta: &'a ImageMeta,
}

impl Contents<'_> {
    /// Pages of the flat RAM.
    fn pages(&self) -> u64 {
        self.blocks.last().map_or(0, |block| block.run().end().0)
    }
}

/// A statistic that cannot be stored, if there is one: the key's length in bytes is not 1 to [`MAX_KEY`].
pub(super) fn bad_key(meta: &ImageMeta) -> Option<&str> {
    meta.statistics.iter().map(|(key, _)| key.as_str()).find(|key| key.is_empty() || key.len() > MAX_KEY)
}

/// Writes trailer and tail behind the RAM; returns the length of the file and the trailer checksum.
pub(super) fn write(file: &File, contents: &Contents<'_>, pages: &PageTable) -> Result<(u64, u32), Failed> {
    let trailer_offset = contents.pages() * PAGE_BYTES;
    let sections = Kind::ALL.len() as u64;
    let mut out = SectionWriter::new(file, trailer_offset + HEADER_LEN + sections * SECTION_LEN);
    let mut directory = [Section::new_zeroed(); Kind::ALL.len()];
    for (entry, kind) in directory.iter_mut().zip(Kind::ALL) {
        put_section(&mut out, kind, contents, pages)?;
        let written = out.end()?;
        *entry = Section {
            tag: kind.tag(),
            flags: U32::new(kind.flags()),
            offset: U64::new(written.offset),
            len: U64::new(written.len),
            crc: U32::new(written.crc),
            reserved: U32::ZERO,
        };
    }
    let tail_offset = out.finish()?;

    let header = Header {
        magic: HEADER_MAGIC,
        version: U32::new(VERSION),
        sections: U32::new(u32::try_from(sections).unwrap_or(0)),
        id: contents.id.0,
        parent_id: contents.parent.map_or([0; 16], |parent| parent.id.0),
        parent_crc: U32::new(contents.parent.map_or(0, |parent| parent.checksum)),
        page_size: U32::new(u32::try_from(PAGE_BYTES).unwrap_or(0)),
        pages: U64::new(contents.pages()),
        data_pages: U64::new(pages.data_pages()),
        default_state: pages.default_state().code(),
        reserved: [0; 7],
        flags: U64::ZERO,
        reserved2: U64::ZERO,
    };
    let trailer_crc = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), directory.as_bytes());
    let mut tail = Tail {
        magic: TAIL_MAGIC,
        version: U32::new(VERSION),
        reserved: U32::ZERO,
        trailer_offset: U64::new(trailer_offset),
        trailer_len: U64::new(tail_offset - trailer_offset),
        file_len: U64::new(tail_offset + TAIL_LEN),
        id: contents.id.0,
        trailer_crc: U32::new(trailer_crc),
        tail_crc: U32::ZERO,
    };
    tail.tail_crc = U32::new(tail_crc(&tail));

    let head = [header.as_bytes(), directory.as_bytes()];
    write_all(file, &mut head.map(IoSlice::new), trailer_offset).map_err(|source| Failed {
        offset: trailer_offset,
        len: HEADER_LEN + sections * SECTION_LEN,
        source,
    })?;
    write_all(file, &mut [IoSlice::new(tail.as_bytes())], tail_offset).map_err(|source| Failed {
        offset: tail_offset,
        len: TAIL_LEN,
        source,
    })?;
    Ok((tail_offset + TAIL_LEN, trailer_crc))
}

/// The CRC that belongs into a tail: of all bytes before the field itself.
pub(super) fn tail_crc(tail: &Tail) -> u32 {
    tail.as_bytes().split_last_chunk::<4>().map_or(0, |(before, _)| crc32c::crc32c(before))
}

fn put_section(
    out: &mut SectionWriter<'_>,
    kind: Kind,
    contents: &Contents<'_>,
    pages: &PageTable,
) -> Result<(), Failed> {
    match kind {
        Kind::Blocks => put_blocks(out, contents.blocks),
        Kind::States => pages.for_each_run(|r| out.put(&pack_run(r.run.first.0, r.run.pages, r.state).to_le_bytes())),
        Kind::Checksums => pages.for_each_crc(|crc| out.put(&crc.to_le_bytes())),
        Kind::Device => out.put(&contents.meta.device_state),
        Kind::Statistics => contents.meta.statistics.iter().try_for_each(|(key, value)| {
            out.put(&[u8::try_from(key.len()).unwrap_or(0)])?;
            out.put(key.as_bytes())?;
            out.put(&value.to_le_bytes())
        }),
    }
}

fn put_blocks(out: &mut SectionWriter<'_>, blocks: &[FileBlock]) -> Result<(), Failed> {
    for block in blocks {
        let name = block.name.as_str().as_bytes();
        let mut record = BlockRecord {
            guest: U64::new(block.guest.0),
            len: U64::new(block.len),
            used: U64::new(block.used),
            page_size: U64::new(block.page_size),
            first_page: U64::new(block.first_page.0),
            treatment: treatment_code(block.treatment),
            backing: backing_code(block.backing),
            name_len: u8::try_from(name.len()).unwrap_or(0),
            reserved: [0; 5],
            name: [0; 48],
        };
        record.name.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
        out.put(record.as_bytes())?;
    }
    Ok(())
}

pub(super) const fn treatment_code(treatment: Treatment) -> u8 {
    match treatment {
        Treatment::Tracked => 0,
        Treatment::ReadOnly => 1,
        Treatment::InPause => 2,
        Treatment::Ignored => 3,
    }
}

pub(super) const fn backing_code(backing: Backing) -> u8 {
    match backing {
        Backing::Anonymous => 0,
        Backing::Shmem => 1,
        Backing::HugeTlb => 2,
        Backing::File => 3,
        Backing::Foreign => 4,
    }
}
