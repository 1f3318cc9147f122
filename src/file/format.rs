//! The bytes on disk, exactly as `docs/FORMAT.md` specifies them. All numbers are little-endian.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{PageState, ParentRef};

/// The version this code writes, and the only one it reads.
pub(super) const VERSION: u32 = 1;
/// First bytes of the tail.
pub(super) const TAIL_MAGIC: [u8; 8] = *b"RAMSHOT$";
/// First bytes of the trailer.
pub(super) const HEADER_MAGIC: [u8; 8] = *b"RAMSHOT^";
/// Bytes of a page: [`ramshot_core::PAGE_SIZE`] as every other type needs it.
pub(super) const PAGE: usize = 4096;
/// As `u64`; the page size written into the header.
pub(super) const PAGE_BYTES: u64 = ramshot_core::PAGE_SIZE;
/// Sections start at multiples of this, and the trailer's length is one.
pub(super) const ALIGN: u64 = 8;
/// Most sections a file may have.
pub(super) const MAX_SECTIONS: u32 = 64;
/// Most pages a file may have (4 PiB of RAM): what bits 0..40 of a run record can name.
pub(super) const MAX_PAGES: u64 = 1 << 40;
/// Most pages in one run record; a longer run takes several.
pub(super) const MAX_RUN: u64 = 1 << 22;
/// Most blocks a file may have: what a `BlockIndex` can name.
pub(super) const MAX_FILE_BLOCKS: u64 = 1 << 16;
/// Longest key of a statistic in bytes.
pub(super) const MAX_KEY: usize = 255;

/// `Section::flags`: a reader that does not know the section must refuse the file.
pub(super) const MANDATORY: u32 = 1;

/// The last 64 bytes of the file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Tail {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    pub(super) reserved: U32,
    pub(super) trailer_offset: U64,
    pub(super) trailer_len: U64,
    pub(super) file_len: U64,
    pub(super) id: [u8; 16],
    /// CRC-32C of header and section directory: the trailer checksum.
    pub(super) trailer_crc: U32,
    /// CRC-32C of all bytes of the tail before this field.
    pub(super) tail_crc: U32,
}

/// The start of the trailer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    pub(super) sections: U32,
    pub(super) id: [u8; 16],
    pub(super) parent_id: [u8; 16],
    pub(super) parent_crc: U32,
    pub(super) page_size: U32,
    pub(super) pages: U64,
    pub(super) data_pages: U64,
    pub(super) default_state: u8,
    pub(super) reserved: [u8; 7],
    pub(super) flags: U64,
    pub(super) reserved2: U64,
}

/// One entry of the section directory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Section {
    pub(super) tag: [u8; 4],
    pub(super) flags: U32,
    pub(super) offset: U64,
    pub(super) len: U64,
    pub(super) crc: U32,
    pub(super) reserved: U32,
}

/// One record of the block table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct BlockRecord {
    pub(super) guest: U64,
    pub(super) len: U64,
    pub(super) used: U64,
    pub(super) page_size: U64,
    pub(super) first_page: U64,
    pub(super) treatment: u8,
    pub(super) backing: u8,
    pub(super) name_len: u8,
    pub(super) reserved: [u8; 5],
    pub(super) name: [u8; 48],
}

/// First bytes of a [`Mark`].
pub(super) const MARK_MAGIC: [u8; 8] = *b"RAMSHOT~";

/// What a merge puts where the trailer will be as long as it copies pages: which merge this is, so that it can be gone on
/// with after a kill. Never part of a complete file: the trailer's header takes its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Mark {
    pub(super) magic: [u8; 8],
    pub(super) version: U32,
    /// Checksum of the snapshot whose memory the file will hold.
    pub(super) checksum: U32,
    pub(super) id: [u8; 16],
    /// The parent it will have; all zero if none.
    pub(super) parent_id: [u8; 16],
    pub(super) parent_checksum: U32,
    pub(super) reserved: U32,
    pub(super) reserved2: U32,
    /// CRC-32C of all bytes before this field.
    pub(super) crc: U32,
}

impl Mark {
    pub(super) fn new(image: ParentRef, parent: Option<ParentRef>) -> Self {
        let mut mark = Self {
            magic: MARK_MAGIC,
            version: U32::new(VERSION),
            checksum: U32::new(image.checksum),
            id: image.id.0,
            parent_id: parent.map_or([0; 16], |parent| parent.id.0),
            parent_checksum: U32::new(parent.map_or(0, |parent| parent.checksum)),
            reserved: U32::ZERO,
            reserved2: U32::ZERO,
            crc: U32::ZERO,
        };
        mark.crc = U32::new(mark.as_bytes().split_last_chunk::<4>().map_or(0, |(before, _)| crc32c::crc32c(before)));
        mark
    }
}

const _: () = {
    assert!(size_of::<Mark>() == 64);
    assert!(offset_of!(Mark, id) == 16);
    assert!(offset_of!(Mark, parent_id) == 32);
    assert!(offset_of!(Mark, crc) == 60);
    // The header, which is written behind the sections, takes its place.
    assert!(size_of::<Mark>() <= size_of::<Header>());
    assert!(size_of::<Tail>() == 64);
    assert!(offset_of!(Tail, trailer_offset) == 16);
    assert!(offset_of!(Tail, file_len) == 32);
    assert!(offset_of!(Tail, id) == 40);
    assert!(offset_of!(Tail, trailer_crc) == 56);
    assert!(offset_of!(Tail, tail_crc) == 60);
    assert!(size_of::<Header>() == 96);
    assert!(offset_of!(Header, id) == 16);
    assert!(offset_of!(Header, parent_id) == 32);
    assert!(offset_of!(Header, parent_crc) == 48);
    assert!(offset_of!(Header, page_size) == 52);
    assert!(offset_of!(Header, pages) == 56);
    assert!(offset_of!(Header, data_pages) == 64);
    assert!(offset_of!(Header, default_state) == 72);
    assert!(offset_of!(Header, flags) == 80);
    assert!(size_of::<Section>() == 32);
    assert!(offset_of!(Section, offset) == 8);
    assert!(offset_of!(Section, crc) == 24);
    assert!(size_of::<BlockRecord>() == 96);
    assert!(offset_of!(BlockRecord, first_page) == 32);
    assert!(offset_of!(BlockRecord, treatment) == 40);
    assert!(offset_of!(BlockRecord, name) == 48);
    assert!(ramshot_core::MAX_NAME < 48);
    assert!(ramshot_core::MAX_BLOCKS as u64 <= MAX_FILE_BLOCKS);
    assert!(PAGE as u64 == PAGE_BYTES);
};

/// Bytes of the tail.
pub(super) const TAIL_LEN: u64 = size_of::<Tail>() as u64;
/// Bytes of the trailer header.
pub(super) const HEADER_LEN: u64 = size_of::<Header>() as u64;
/// Bytes of a directory entry.
pub(super) const SECTION_LEN: u64 = size_of::<Section>() as u64;
/// Bytes of a block record.
pub(super) const BLOCK_LEN: u64 = size_of::<BlockRecord>() as u64;
/// Bytes of the mark of a merge.
pub(super) const MARK_LEN: u64 = size_of::<Mark>() as u64;

/// The sections of version 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Blocks,
    States,
    Checksums,
    Device,
    Statistics,
}

impl Kind {
    /// In the order in which they are written.
    pub(super) const ALL: [Self; 5] = [Self::Blocks, Self::States, Self::Checksums, Self::Device, Self::Statistics];

    pub(super) const fn tag(self) -> [u8; 4] {
        match self {
            Self::Blocks => *b"BLKS",
            Self::States => *b"RUNS",
            Self::Checksums => *b"CRCS",
            Self::Device => *b"DEVS",
            Self::Statistics => *b"STAT",
        }
    }

    pub(super) const fn flags(self) -> u32 {
        match self {
            Self::Statistics => 0,
            _ => MANDATORY,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Blocks => "block table",
            Self::States => "page states",
            Self::Checksums => "page checksums",
            Self::Device => "device state",
            Self::Statistics => "statistics",
        }
    }

    pub(super) fn from_tag(tag: [u8; 4]) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.tag() == tag)
    }
}

impl PageState {
    /// As two bits of a run record, and as the header's default.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Data => 1,
            Self::InParent => 2,
        }
    }

    pub(super) const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Zero),
            1 => Some(Self::Data),
            2 => Some(Self::InParent),
            _ => None,
        }
    }
}

/// A run record: bits 0..40 first page, 40..62 pages - 1, 62..64 state.
///
/// `first` is less than [`MAX_PAGES`] and `pages` is 1 to [`MAX_RUN`].
pub(super) const fn pack_run(first: u64, pages: u64, state: PageState) -> u64 {
    first | (pages - 1) << 40 | (state.code() as u64) << 62
}

/// First page, pages and state code of a run record.
pub(super) const fn unpack_run(record: u64) -> (u64, u64, u8) {
    (record & (MAX_PAGES - 1), (record >> 40 & (MAX_RUN - 1)) + 1, record.to_le_bytes()[7] >> 6)
}

/// The next multiple of [`ALIGN`], or `None` past the end of the number range.
pub(super) const fn aligned(offset: u64) -> Option<u64> {
    offset.checked_next_multiple_of(ALIGN)
}
