//! Reading metadata from memory: the example that the specification prints, as it is and with something wrong in it.
//! Small and without a file system, so that Miri can run all of it.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::io;

use ramshot_core::PageId;

use super::PageState;
use super::error::OpenErrorKind;
use super::format::{HEADER_LEN, SECTION_LEN, TAIL_LEN};
use super::parse::{Metadata, Source, parse};

/// Where the trailer of the example starts; before it lies RAM, which nobody reads here.
const TRAILER: u64 = 0x2000;

/// The trailer and tail printed in `docs/FORMAT.md`, behind a hole.
struct Printed(Vec<u8>);

impl Source for Printed {
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let from = offset.checked_sub(TRAILER).and_then(|at| usize::try_from(at).ok());
        let from = from.ok_or(io::ErrorKind::Unsupported)?;
        let to = from.checked_add(into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(self.0.get(from..to).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn printed() -> Vec<u8> {
    let document = include_str!("../../docs/FORMAT.md");
    let rows = document.lines().filter(|line| line.starts_with('2') && line.get(4..6) == Some("  "));
    let numbers = rows.flat_map(|row| row.get(6..53).unwrap().split(' '));
    numbers.map(|number| u8::from_str_radix(number, 16).unwrap()).collect()
}

fn open(bytes: Vec<u8>) -> Result<Metadata, OpenErrorKind> {
    let len = TRAILER + bytes.len() as u64;
    parse(&Printed(bytes), len)
}

/// Interpreted, a sample is enough: it is the same code for every byte.
const STRIDE: usize = if cfg!(miri) { 12 } else { 1 };

/// Recomputes all checksums, each section as long as its entry says if it can be.
fn repair(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (header, entry_len) = (usize::try_from(HEADER_LEN).unwrap(), usize::try_from(SECTION_LEN).unwrap());
    let directory = header + 5 * entry_len;
    for entry in (header..directory).step_by(entry_len) {
        let (offset, len) = (number(bytes, entry + 8), number(bytes, entry + 16));
        let section = offset.checked_sub(TRAILER).and_then(|from| {
            bytes.get(usize::try_from(from).ok()?..usize::try_from(from.checked_add(len)?).ok()?).map(crc32c::crc32c)
        });
        bytes[entry + 24..entry + 28].copy_from_slice(&section.unwrap_or(0).to_le_bytes());
    }
    let tail = bytes.len() - usize::try_from(TAIL_LEN).unwrap();
    let head = crc32c::crc32c(&bytes[..directory]);
    bytes[tail + 56..tail + 60].copy_from_slice(&head.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[tail..tail + 60]);
    bytes[tail + 60..].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn the_printed_example_says_what_the_text_says() {
    let good = printed();
    let meta = open(good.clone()).unwrap();
    assert_eq!(meta.id.to_string(), "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf");
    assert_eq!((meta.file_len, meta.parent), (8656, None));
    let [block] = meta.blocks[..] else { panic!("{:?}", meta.blocks) };
    assert_eq!((block.name.as_str(), block.guest.0, block.pages()), ("ram", 0, 2));
    let states = [0, 1].map(|page| meta.states.state(PageId(page)).0);
    assert_eq!(states, [PageState::Zero, PageState::Data]);
    assert_eq!((meta.crcs.len(), meta.crcs[0].get()), (1, 0xd134_dea2));
    assert_eq!(meta.device_state, b"cpu");
    assert_eq!(meta.statistics, [("pause_us".to_owned(), 350)]);
    let mut repaired = good.clone();
    repair(&mut repaired);
    assert_eq!(repaired, good);
}

#[test]
fn every_byte_of_it_matters() {
    let good = printed();
    for at in (0..good.len()).step_by(STRIDE) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        let text = open(bytes).expect_err("a flipped bit").to_string();
        assert!(text.len() > 20, "byte {at}: {text}");
    }
}

#[test]
fn no_length_but_its_own_opens() {
    let good = printed();
    for len in (0..good.len()).step_by(STRIDE) {
        // Too short for a tail behind the hole, the reader looks into the hole: the source has nothing there.
        assert!(open(good[..len].to_vec()).is_err(), "{len} bytes");
    }
}

#[test]
fn any_number_anywhere_with_good_checksums_is_survived() {
    let good = printed();
    let mut opened = 0;
    for at in (0..good.len() - 8).step_by(4 * STRIDE) {
        for number in [0, 1, 0xffff, 1 << 40, 1 << 60, u64::MAX] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            repair(&mut bytes);
            match open(bytes) {
                // Some numbers may be any: addresses, checksums of pages, device state.
                Ok(meta) => {
                    assert_eq!(meta.states.pages(), 2);
                    opened += 1;
                }
                Err(error) => assert!(error.to_string().len() > 20, "{number:#x} at {at}: {error}"),
            }
        }
    }
    assert!(opened < 200, "{opened} of them open");
}
