//! The metadata of a file under attack: flipped, cut, extended, and forged with good checksums. Never a panic, never an
//! open file, always a sentence.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::io;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::error::OpenErrorKind;
use super::format::{
    BlockRecord, HEADER_LEN, Header, MANDATORY, PAGE_BYTES, SECTION_LEN, Section, TAIL_LEN, Tail, pack_run,
};
use super::parse::{Metadata, Source, parse};
use super::tests_support::{QUICK, give, meta, some_ram, two_blocks};
use super::trailer::tail_crc;
use super::{FileSink, PageState, SnapshotId};
use crate::sink::ImageSink;

impl Source for Vec<u8> {
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let to = from.checked_add(into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(self.get(from..to).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn open(bytes: &Vec<u8>) -> Result<Metadata, OpenErrorKind> {
    parse(bytes, bytes.len() as u64)
}

/// A snapshot of 6 + 3 pages, as bytes.
fn good() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snap");
    let sink = FileSink::create_as(&path, &two_blocks(6, 3), &QUICK, None, Some(SnapshotId([0x5a; 16]))).unwrap();
    give(&sink, &some_ram(9, 1), 0, 9);
    Box::new(sink).commit(&meta()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    open(&bytes).unwrap();
    bytes
}

const RAM: usize = 9 * 4096;

/// The error, after a look at its sentence.
fn refused(bytes: &Vec<u8>, why: &str) -> OpenErrorKind {
    let error = open(bytes).expect_err(why);
    let text = error.to_string();
    assert!(text.len() > 20, "{why}: {text}");
    error
}

#[test]
fn every_flipped_byte_of_trailer_and_tail_is_an_error() {
    let bytes = good();
    let mut flips = 0;
    for at in RAM..bytes.len() {
        for mask in [1, 2, 4, 8, 16, 32, 64, 128, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= mask;
            refused(&bad, &format!("byte {at} ^ {mask:#x}"));
            flips += 1;
        }
    }
    println!("{flips} flips in {} bytes, none opened", bytes.len() - RAM);
}

#[test]
fn a_flip_is_blamed_on_its_section() {
    let bytes = good();
    let forge = Forge::of(&bytes);
    for (section, _) in &forge.sections {
        let mut bad = bytes.clone();
        bad[usize::try_from(section.offset.get()).unwrap()] ^= 0x10;
        let error = refused(&bad, "flip");
        let OpenErrorKind::Damaged { offset, stated, found, .. } = error else { panic!("{error:?}") };
        assert_eq!((offset, stated), (section.offset.get(), section.crc.get()));
        assert_ne!(stated, found);
    }
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = good();
    let near = |len: usize| {
        let sampled = len.is_multiple_of(61) || !(3..=4093).contains(&(len % 4096));
        sampled || !(200..=RAM - 200).contains(&len)
    };
    for len in (0..bytes.len()).filter(|&len| near(len)) {
        let error = refused(&bytes[..len].to_vec(), &format!("cut to {len}"));
        assert!(matches!(error, OpenErrorKind::NoTail { len: found } if found == len as u64), "{len}: {error:?}");
    }
}

#[test]
fn bytes_cut_out_of_the_middle_are_missed() {
    let bytes = good();
    for n in [1, 4096, RAM] {
        let mut bad = bytes.clone();
        bad.drain(..n);
        assert!(matches!(refused(&bad, "cut"), OpenErrorKind::Length { .. }));
    }
}

#[test]
fn appended_bytes_are_named() {
    let bytes = good();
    for n in [1, 7, 63, 64, 65, 4096, 60_000] {
        let mut bad = bytes.clone();
        bad.resize(bytes.len() + n, b'x');
        let error = refused(&bad, "appended");
        assert!(matches!(error, OpenErrorKind::Appended { end, .. } if end == bytes.len() as u64), "{error:?}");
    }
    let mut twice = bytes.clone();
    twice.extend_from_slice(&bytes);
    assert!(matches!(refused(&twice, "two files in one"), OpenErrorKind::Length { .. }));
}

/// A file taken apart, to be put together with other content and good checksums.
struct Forge {
    ram: Vec<u8>,
    header: Header,
    sections: Vec<(Section, Vec<u8>)>,
    tail: Tail,
}

impl Forge {
    fn of(bytes: &[u8]) -> Self {
        let at =
            |offset: u64, len: u64| &bytes[usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()];
        let tail = Tail::read_from_bytes(at(bytes.len() as u64 - TAIL_LEN, TAIL_LEN)).unwrap();
        let trailer = tail.trailer_offset.get();
        let header = Header::read_from_bytes(at(trailer, HEADER_LEN)).unwrap();
        let entry = |i: u64| {
            let section = Section::read_from_bytes(at(trailer + HEADER_LEN + i * SECTION_LEN, SECTION_LEN)).unwrap();
            (section, at(section.offset.get(), section.len.get()).to_vec())
        };
        let sections = (0..u64::from(header.sections.get())).map(entry).collect();
        Self { ram: at(0, trailer).to_vec(), header, sections, tail }
    }

    fn section(&mut self, tag: &[u8; 4]) -> &mut Vec<u8> {
        &mut self.sections.iter_mut().find(|(section, _)| section.tag == *tag).unwrap().1
    }

    fn without(&mut self, tag: &[u8; 4]) {
        self.sections.retain(|(section, _)| section.tag != *tag);
    }

    fn add(&mut self, tag: [u8; 4], flags: u32, content: &[u8]) {
        let mut section = self.sections[0].0;
        section.tag = tag;
        section.flags = U32::new(flags);
        self.sections.push((section, content.to_vec()));
    }

    /// Puts it together; `forge` may change what was derived, just before the checksums are computed.
    fn build_with(mut self, forge: impl FnOnce(&mut Header, &mut [(Section, Vec<u8>)], &mut Tail)) -> Vec<u8> {
        let trailer = self.ram.len() as u64;
        let mut next = trailer + HEADER_LEN + self.sections.len() as u64 * SECTION_LEN;
        for (section, content) in &mut self.sections {
            section.offset = U64::new(next);
            section.len = U64::new(content.len() as u64);
            section.crc = U32::new(crc32c::crc32c(content));
            next = (next + content.len() as u64).next_multiple_of(8);
        }
        self.header.sections = U32::new(u32::try_from(self.sections.len()).unwrap());
        self.tail.trailer_offset = U64::new(trailer);
        self.tail.trailer_len = U64::new(next - trailer);
        self.tail.file_len = U64::new(next + TAIL_LEN);
        forge(&mut self.header, &mut self.sections, &mut self.tail);

        let mut head = self.header.as_bytes().to_vec();
        self.sections.iter().for_each(|(section, _)| head.extend_from_slice(section.as_bytes()));
        self.tail.trailer_crc = U32::new(crc32c::crc32c(&head));
        self.tail.tail_crc = U32::new(tail_crc(&self.tail));
        let mut bytes = self.ram;
        bytes.extend_from_slice(&head);
        for (_, content) in &self.sections {
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend_from_slice(self.tail.as_bytes());
        bytes
    }

    fn build(self) -> Vec<u8> {
        self.build_with(|_, _, _| {})
    }
}

#[test]
fn the_forge_is_faithful() {
    let bytes = good();
    assert_eq!(Forge::of(&bytes).build(), bytes);
}

const EXTREMES: [u64; 22] = [
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    4095,
    4096,
    0xffff,
    1 << 20,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    (1 << 40) - 1,
    1 << 40,
    1 << 52,
    1 << 60,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX,
];

#[test]
fn extreme_numbers_with_good_checksums_are_refused() {
    let bytes = good();
    let mut forged = 0;
    let mut check = |what: &str, value: u64, bad: Vec<u8>| {
        if bad != bytes {
            refused(&bad, &format!("{what} = {value:#x}"));
            forged += 1;
        }
    };
    for value in EXTREMES {
        let small = u32::try_from(value & 0xffff_ffff).unwrap();
        type Change = fn(&mut Header, &mut [(Section, Vec<u8>)], &mut Tail, u64, u32);
        let changes: [(&str, Change); 14] = [
            ("tail.version", |_, _, t, _, v| t.version = U32::new(v)),
            ("tail.reserved", |_, _, t, _, v| t.reserved = U32::new(v)),
            ("tail.trailer_offset", |_, _, t, v, _| t.trailer_offset = U64::new(v)),
            ("tail.trailer_len", |_, _, t, v, _| t.trailer_len = U64::new(v)),
            ("tail.file_len", |_, _, t, v, _| t.file_len = U64::new(v)),
            ("header.version", |h, _, _, _, v| h.version = U32::new(v)),
            ("header.sections", |h, _, _, _, v| h.sections = U32::new(v)),
            ("header.parent_crc", |h, _, _, _, v| h.parent_crc = U32::new(v)),
            ("header.page_size", |h, _, _, _, v| h.page_size = U32::new(v)),
            ("header.pages", |h, _, _, v, _| h.pages = U64::new(v)),
            ("header.data_pages", |h, _, _, v, _| h.data_pages = U64::new(v)),
            ("header.default_state", |h, _, _, v, _| h.default_state = v.to_le_bytes()[0]),
            ("header.flags", |h, _, _, v, _| h.flags = U64::new(v)),
            ("header.reserved2", |h, _, _, v, _| h.reserved2 = U64::new(v)),
        ];
        for (what, change) in changes {
            check(what, value, Forge::of(&bytes).build_with(|h, s, t| change(h, s, t, value, small)));
        }
        for i in 0..Forge::of(&bytes).sections.len() {
            check("offset", value, Forge::of(&bytes).build_with(|_, s, _| s[i].0.offset = U64::new(value)));
            check("len", value, Forge::of(&bytes).build_with(|_, s, _| s[i].0.len = U64::new(value)));
            let flags = if value == u64::from(s_flags(&bytes, i)) || value <= 1 { 2 } else { small | 2 };
            check("flags", value, Forge::of(&bytes).build_with(|_, s, _| s[i].0.flags = U32::new(flags)));
            check("crc", value, Forge::of(&bytes).build_with(|_, s, _| s[i].0.crc = U32::new(small)));
        }
        // The block table: guest addresses alone may be anything that is aligned and does not overlap.
        for field in 0..5 {
            let mut forge = Forge::of(&bytes);
            let content = forge.section(b"BLKS");
            content[96 + field * 8..96 + field * 8 + 8].copy_from_slice(&value.to_le_bytes());
            let bad = forge.build();
            let guest_or_len = field < 2 && value.is_multiple_of(4096);
            match open(&bad) {
                Ok(meta) => assert!(guest_or_len || bad == bytes, "field {field} = {value:#x}: {:?}", meta.blocks),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
    }
    println!("{forged} forged files, none opened");
}

fn s_flags(bytes: &[u8], i: usize) -> u32 {
    Forge::of(bytes).sections[i].0.flags.get()
}

/// Consistent lies: everything agrees, and the file is far too small for it.
#[test]
fn a_trailer_that_claims_2_to_the_60_pages() {
    let bytes = good();
    for pages in [1 << 28, 1 << 40, 1 << 52, 1 << 60] {
        let mut forge = Forge::of(&bytes);
        let mut record = BlockRecord::read_from_bytes(&forge.section(b"BLKS")[..96]).unwrap();
        record.len = U64::new(pages << 12);
        record.used = record.len;
        *forge.section(b"BLKS") = record.as_bytes().to_vec();
        let bad = forge.build_with(|header, _, tail| {
            header.pages = U64::new(pages);
            header.data_pages = U64::new(pages);
            tail.trailer_offset = U64::new(pages.wrapping_mul(PAGE_BYTES));
        });
        refused(&bad, "2^60 pages");
        let mut forge = Forge::of(&bytes);
        *forge.section(b"RUNS") = pack_run((1 << 40) - 1, 1 << 22, PageState::Data).to_le_bytes().to_vec();
        refused(&forge.build_with(|header, _, _| header.data_pages = U64::new(1 << 22)), "runs beyond the end");
    }
}

#[test]
fn page_states_must_make_sense() {
    let bytes = good();
    let run = |first, pages, state| pack_run(first, pages, state).to_le_bytes();
    let with = |records: &[[u8; 8]]| {
        let mut forge = Forge::of(&bytes);
        *forge.section(b"RUNS") = records.concat();
        forge.build()
    };
    let data = PageState::Data;
    // As written: 1..4, 5..8 have data.
    let fine = [run(1, 3, data), run(5, 3, data)];
    open(&with(&fine)).unwrap();
    open(&with(&[run(1, 1, data), run(2, 2, data), run(5, 3, data)])).unwrap();
    let bad: [(&str, Vec<[u8; 8]>); 9] = [
        ("order", vec![fine[1], fine[0]]),
        ("overlap", vec![run(1, 3, data), run(3, 3, data)]),
        ("twice", vec![fine[0], fine[0]]),
        ("too few", vec![fine[0]]),
        ("too many", vec![run(0, 9, data)]),
        ("default state", vec![fine[0], run(4, 1, PageState::Zero), fine[1]]),
        ("no parent", vec![fine[0], run(4, 1, PageState::InParent), fine[1]]),
        ("beyond the end", vec![fine[0], run(7, 3, data)]),
        ("unknown state", vec![fine[0], fine[1], (3u64 << 62 | 8).to_le_bytes()]),
    ];
    for (what, records) in bad {
        assert!(matches!(refused(&with(&records), what), OpenErrorKind::Invalid { .. }), "{what}");
    }
    let mut odd = Forge::of(&bytes);
    odd.section(b"RUNS").push(0);
    refused(&odd.build(), "a record and a byte");
}

#[test]
fn blocks_must_make_sense() {
    let bytes = good();
    type Change = fn(&mut BlockRecord);
    let bad: [(&str, Change); 12] = [
        ("empty name", |b| b.name_len = 0),
        ("long name", |b| b.name_len = 48),
        ("longer name", |b| b.name_len = 255),
        ("dirt behind the name", |b| b.name[47] = 1),
        ("not UTF-8", |b| b.name[0] = 0xff),
        ("the other's name", |b| b.name[..4].copy_from_slice(b"low\0")),
        ("treatment", |b| b.treatment = 4),
        ("backing", |b| b.backing = 5),
        ("ignored", |b| b.treatment = 3),
        ("reserved", |b| b.reserved[4] = 1),
        ("overlap", |b| b.guest = U64::new(0x5000)),
        ("page size", |b| b.page_size = U64::new(0x2000)),
    ];
    for (what, change) in bad {
        let mut forge = Forge::of(&bytes);
        let content = forge.section(b"BLKS");
        let mut record = BlockRecord::read_from_bytes(&content[96..]).unwrap();
        change(&mut record);
        if what == "the other's name" {
            record.name_len = 3;
        }
        content[96..].copy_from_slice(record.as_bytes());
        assert!(matches!(refused(&forge.build(), what), OpenErrorKind::Invalid { .. }), "{what}");
    }
}

#[test]
fn another_version_is_named() {
    let bytes = good();
    for version in [0, 2, 77] {
        let bad = Forge::of(&bytes).build_with(|header, _, tail| {
            header.version = U32::new(version);
            tail.version = header.version;
        });
        let error = refused(&bad, "version");
        assert!(matches!(error, OpenErrorKind::Version { found, known: 1 } if found == version));
        assert!(error.to_string().contains(&format!("version {version}")));
    }
}

#[test]
fn sections_of_the_future() {
    let bytes = good();
    let mut optional = Forge::of(&bytes);
    optional.add(*b"NEW ", 0, b"something that one may skip");
    let optional = optional.build();
    let meta = open(&optional).unwrap();
    assert_eq!(meta.device_state, super::tests_support::meta().device_state);
    // Skipped, but not if it is damaged.
    let mut damaged = optional.clone();
    let at = damaged.len() - 64 - 20;
    damaged[at] ^= 1;
    assert!(matches!(refused(&damaged, "damaged"), OpenErrorKind::Damaged { .. }));

    let mut mandatory = Forge::of(&bytes);
    mandatory.add(*b"NEW!", MANDATORY, b"");
    let error = refused(&mandatory.build(), "mandatory");
    assert!(matches!(error, OpenErrorKind::UnknownSection { ref tag, .. } if tag == "NEW!"), "{error:?}");

    let mut twice = Forge::of(&bytes);
    twice.add(*b"STAT", 0, b"");
    refused(&twice.build(), "twice");
    for tag in [b"BLKS", b"RUNS", b"CRCS"] {
        let mut without = Forge::of(&bytes);
        without.without(tag);
        refused(&without.build(), "without");
    }
    for tag in [b"DEVS", b"STAT"] {
        let mut without = Forge::of(&bytes);
        without.without(tag);
        open(&without.build()).unwrap();
    }
}

#[test]
fn statistics_must_make_sense() {
    let bytes = good();
    for bad in [&b"\x05ab"[..], b"\x00\0\0\0\0\0\0\0\0", b"\x02ab1234567", b"\x01\xff12345678", b"\xff"] {
        let mut forge = Forge::of(&bytes);
        *forge.section(b"STAT") = bad.to_vec();
        assert!(matches!(refused(&forge.build(), "statistics"), OpenErrorKind::Invalid { .. }));
    }
}

#[test]
fn identity_must_make_sense() {
    let bytes = good();
    let other = Forge::of(&bytes).build_with(|header, _, _| header.id = [1; 16]);
    refused(&other, "two ids");
    let none = Forge::of(&bytes).build_with(|header, _, tail| {
        header.id = [0; 16];
        tail.id = [0; 16];
    });
    refused(&none, "no id");
    let own = Forge::of(&bytes).build_with(|header, _, _| header.parent_id = header.id);
    refused(&own, "its own parent");
    let orphan = Forge::of(&bytes).build_with(|header, _, _| header.default_state = 2);
    refused(&orphan, "in no parent");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]
    /// Random bytes behind a good tail, and random changes with the checksums made good again.
    #[test]
    fn noise_never_panics(noise in proptest::collection::vec((0..2000usize, 0..=255u8), 1..12)) {
        let bytes = good_cached();
        let mut forge = Forge::of(bytes);
        let mut all: Vec<u8> = forge.header.as_bytes().to_vec();
        for (at, value) in &noise {
            let n = all.len();
            match at % 3 {
                0 => all[at % n] = *value,
                _ => {
                    let i = at % forge.sections.len();
                    let content = &mut forge.sections[i].1;
                    if !content.is_empty() {
                        let n = content.len();
                        content[at % n] = *value;
                    }
                }
            }
        }
        forge.header = Header::read_from_bytes(&all).unwrap();
        if let Ok(meta) = open(&forge.build()) {
            // It opens: then it must be usable.
            proptest::prop_assert_eq!(meta.states.runs_from(ramshot_core::PageId(0)).map(|r| r.run.pages).sum::<u64>(), 9);
        }
    }
}

fn good_cached() -> &'static Vec<u8> {
    static GOOD: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    GOOD.get_or_init(good)
}
