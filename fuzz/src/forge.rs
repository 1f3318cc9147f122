//! Writes snapshot files from `docs/FORMAT.md`, correct ones and others.

use arbitrary::{Arbitrary, Result, Unstructured};
use ramshot::SnapshotFile;
use ramshot::core::{PageId, Treatment};
use ramshot::file::PageState;

use crate::examine::{Disk, Verdict, examine};

const PAGE: u64 = 4096;
const TAIL: usize = 64;
const HEADER: usize = 96;
const ENTRY: usize = 32;

/// The bytes of a small number, at an offset.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(value);
    }
}

fn get64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn get32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Makes the end of `bytes`, which begin at `start` in their file, a tail of all that comes before it.
pub fn repair_tail(bytes: &mut [u8], start: u64) {
    let Some(tail) = bytes.len().checked_sub(TAIL) else { return };
    put(bytes, tail, b"RAMSHOT$\x01\0\0\0\0\0\0\0");
    put(bytes, tail + 16, &start.to_le_bytes());
    put(bytes, tail + 24, &(tail as u64).to_le_bytes());
    put(bytes, tail + 32, &(start + bytes.len() as u64).to_le_bytes());
    if let Some(id) = bytes.get(16..32).map(<[u8]>::to_vec) {
        put(bytes, tail + 40, &id);
    }
    put(bytes, 0, b"RAMSHOT^\x01\0\0\0");
}

/// Recomputes every checksum of a trailer and tail that can be found in `bytes`, which begin at `start` in their file.
pub fn repair_checksums(bytes: &mut [u8], start: u64) {
    let here = |offset: u64| offset.checked_sub(start).and_then(|at| usize::try_from(at).ok());
    let Some(tail) = bytes.len().checked_sub(TAIL) else { return };
    let Some(trailer) = get64(bytes, tail + 16).and_then(here).filter(|&at| at < tail) else { return };
    let sections = get32(bytes, trailer + 12).unwrap_or(0).min(64) as usize;
    for entry in (0..sections).map(|i| trailer + HEADER + i * ENTRY) {
        let crc = get64(bytes, entry + 8).zip(get64(bytes, entry + 16)).and_then(|(offset, len)| {
            let from = here(offset)?;
            Some(crc32c::crc32c(bytes.get(from..from.checked_add(usize::try_from(len).ok()?)?)?))
        });
        if let Some(crc) = crc {
            put(bytes, entry + 24, &crc.to_le_bytes());
        }
    }
    if let Some(head) = bytes.get(trailer..trailer + HEADER + sections * ENTRY) {
        let crc = crc32c::crc32c(head);
        put(bytes, tail + 56, &crc.to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes[tail..tail + 60]);
    put(bytes, tail + 60, &crc.to_le_bytes());
}

#[derive(Debug)]
struct Block {
    name: String,
    guest: u64,
    used: u64,
    len: u64,
    page_size: u64,
    treatment: u8,
    backing: u8,
}

#[derive(Debug)]
struct Section {
    tag: [u8; 4],
    flags: u32,
    bytes: Vec<u8>,
}

/// Something that is done to a correct file.
#[derive(Arbitrary, Debug)]
enum Change {
    /// A number in the block table, the page states, ...
    Number {
        section: u8,
        at: u16,
        value: Value,
    },
    /// A byte there.
    Byte {
        section: u8,
        at: u16,
        xor: u8,
    },
    /// A number in the header, after it was filled in.
    Header {
        at: u8,
        value: Value,
    },
    /// One in the section directory, after it was filled in.
    Directory {
        at: u16,
        value: Value,
    },
    /// One in the tail, after it was filled in.
    Tail {
        at: u8,
        value: Value,
    },
    /// A record of 1, 4, 8 or 96 bytes less.
    Remove {
        section: u8,
        at: u16,
        size: u8,
    },
    /// Or there twice.
    Repeat {
        section: u8,
        at: u16,
        size: u8,
        times: u8,
    },
    /// A section less, more, elsewhere.
    WithoutSection(u8),
    Section {
        tag: [u8; 4],
        flags: u8,
        bytes: [u8; 12],
    },
    Swap(u8, u8),
    /// A byte of a page, whatever its state.
    Page {
        page: u16,
        at: u16,
        xor: u8,
    },
    /// A byte of trailer or tail, once all is written: the checksums are not recomputed.
    Flip {
        at: u16,
        xor: u8,
    },
    /// The file ends earlier, or later.
    Cut(u16),
    Append(u8),
}

/// A number to put somewhere.
#[derive(Arbitrary, Debug)]
enum Value {
    Power(u8),
    BeforePower(u8),
    More(u8),
    Less(u8),
    Any(u64),
    Pages,
    FileLength,
}

/// A snapshot and what is done to it.
#[derive(Debug)]
pub struct Plan {
    id: [u8; 16],
    parent: Option<([u8; 16], u32)>,
    blocks: Vec<Block>,
    states: Vec<PageState>,
    /// Longest run that one record says.
    record_pages: u64,
    seed: u8,
    device: Vec<u8>,
    statistics: Vec<(String, u64)>,
    changes: Vec<Change>,
}

impl Plan {
    pub fn from_bytes(data: &[u8]) -> Result<Self> {
        let mut from = Unstructured::new(data);
        let u = &mut from;
        let mut id: [u8; 16] = u.arbitrary()?;
        id[15] |= 1;
        let parent =
            u.arbitrary::<bool>()?.then(|| u.arbitrary()).transpose()?.map(|(mut parent, crc): ([u8; 16], _)| {
                // Neither zero nor its own.
                parent[15] = 2;
                (parent, crc)
            });
        let mut guest = 0;
        let mut blocks = Vec::new();
        for i in 0..u.int_in_range(1..=4)? {
            let page_size = PAGE << u.choose(&[0, 0, 0, 1, 2])?;
            let used = page_size * u.int_in_range(1..=5)?;
            let len = used + page_size * u.int_in_range(0..=2)?;
            let gap = PAGE * u.int_in_range(0..=255)?;
            let long = "x".repeat(u.int_in_range(0..=40)?);
            // The first one counts, so that there is a page.
            let treatment = u.int_in_range(0..=if i == 0 { 2 } else { 3 })?;
            let backing = u.int_in_range(0..=4)?;
            let name = format!("ram{i}é{long}");
            blocks.push(Block { name, guest: guest + gap, used, len, page_size, treatment, backing });
            guest += gap + len;
        }
        if u.ratio(1, 4)? {
            blocks.reverse();
            if blocks[0].treatment == 3 {
                blocks[0].treatment = 0;
            }
        }
        let pages: u64 = blocks.iter().map(Block::pages).sum();
        let default = if parent.is_some() { PageState::InParent } else { PageState::Zero };
        let mut states = Vec::new();
        while (states.len() as u64) < pages {
            let state = match u.int_in_range(0..=3)? {
                0 => PageState::Zero,
                1 | 2 => PageState::Data,
                _ => default,
            };
            let left = usize::try_from(pages).expect("a few") - states.len();
            let run: usize = u.int_in_range(1..=8)?;
            states.extend(std::iter::repeat_n(state, run.min(left)));
        }
        let device = u.arbitrary::<[u8; 20]>()?[..u.int_in_range(0..=20)?].to_vec();
        let statistics = (0..u.int_in_range(0..=3)?)
            .map(|_| Ok(("k".repeat(1 + usize::from(u.arbitrary::<u8>()?) % 255), u.arbitrary()?)))
            .collect::<Result<Vec<(String, u64)>>>()?;
        let (record_pages, seed) = (*u.choose(&[1, 2, 1 << 22])?, u.arbitrary()?);
        let mut changes = Vec::new();
        for _ in 0..u.int_in_range(0..=5)? {
            changes.push(u.arbitrary()?);
        }
        Ok(Self { id, parent, blocks, states, record_pages, seed, device, statistics, changes })
    }

    /// Writes it, opens it, and compares what is found with what was written.
    pub fn check(&self) {
        let mut disk = Disk::new();
        let trailer = self.write(&mut disk);
        let (verdict, file) = examine(&disk, trailer);
        let in_flat_ram = |change: &Change| matches!(change, Change::Page { .. });
        if self.changes.iter().all(in_flat_ram) {
            let file = file.expect("a correct trailer");
            self.compare(&file);
            // Two changes may cancel each other out.
            if self.changes.is_empty() {
                assert_eq!(verdict, Verdict::Good);
            } else if self.changes.len() == 1 {
                let real = matches!(self.changes[0], Change::Page { xor, .. } if xor != 0);
                assert_eq!(verdict == Verdict::Damaged, real);
            }
        } else if let [Change::Flip { xor, .. }] = self.changes[..] {
            assert_eq!(verdict == Verdict::Refused, xor != 0, "one byte, and the checksums stayed");
        } else if let [Change::Cut(by)] = self.changes[..] {
            assert_eq!(verdict == Verdict::Refused, by != 0);
        } else if let [Change::Append(by)] = self.changes[..] {
            assert_eq!(verdict == Verdict::Refused, by != 0);
        }
    }

    fn pages(&self) -> u64 {
        self.states.len() as u64
    }

    fn default(&self) -> PageState {
        if self.parent.is_some() { PageState::InParent } else { PageState::Zero }
    }

    fn page_bytes(&self, page: usize) -> [u8; 4096] {
        let mut bytes = [self.seed | 1; 4096];
        put(&mut bytes, 8, &(page as u64).to_le_bytes());
        bytes
    }

    fn compare(&self, file: &SnapshotFile) {
        assert_eq!(file.id().0, self.id);
        assert_eq!(file.parent().map(|parent| (parent.id.0, parent.checksum)), self.parent);
        assert_eq!(file.device_state(), self.device);
        assert_eq!(file.statistics(), self.statistics);
        assert_eq!(file.default_state(), self.default());
        assert_eq!(file.pages(), self.pages());
        assert_eq!(file.blocks().len(), self.blocks.len());
        for (found, block) in file.blocks().iter().zip(&self.blocks) {
            let treatments = [Treatment::Tracked, Treatment::ReadOnly, Treatment::InPause, Treatment::Ignored];
            assert_eq!(found.name.as_str(), block.name);
            assert_eq!(
                (found.guest.0, found.used, found.len, found.page_size),
                (block.guest, block.used, block.len, block.page_size)
            );
            assert_eq!(found.treatment, treatments[usize::from(block.treatment)]);
            assert_eq!(found.pages(), block.pages());
        }
        let mut bytes = [0; 4096];
        for (page, &state) in self.states.iter().enumerate() {
            assert_eq!(file.page_state(PageId(page as u64)), Some(state), "page {page}");
            if self.changes.is_empty() && state == PageState::Data {
                let _ = file.read_page(PageId(page as u64), &mut bytes).expect("it is there");
                assert_eq!(bytes, self.page_bytes(page), "page {page}");
            }
        }
    }

    /// Puts it on `disk`; returns how long trailer and tail are.
    fn write(&self, disk: &mut Disk) -> u64 {
        let start = self.pages() * PAGE;
        let bytes = self.trailer();
        let cut: u64 = self.changes.iter().map(|c| if let Change::Cut(by) = c { u64::from(*by) } else { 0 }).sum();
        let more: u64 = self.changes.iter().map(|c| if let Change::Append(by) = c { u64::from(*by) } else { 0 }).sum();
        let len = start + bytes.len() as u64;
        disk.begin(len);
        disk.put(start, &bytes);
        for (page, _) in self.states.iter().enumerate().filter(|(_, state)| **state == PageState::Data) {
            disk.put(page as u64 * PAGE, &self.page_bytes(page));
        }
        for change in &self.changes {
            if let Change::Page { page, at, xor } = *change {
                let page = u64::from(page) % self.pages();
                let (index, offset) = (usize::try_from(page).expect("a few"), u64::from(at) % PAGE);
                let data = self.states[index] == PageState::Data;
                let before = if data { self.page_bytes(index)[usize::from(at) % 4096] } else { 0 };
                disk.put(page * PAGE + offset, &[before ^ xor]);
            }
        }
        if cut + more > 0 {
            disk.resize(len.saturating_sub(cut) + more);
        }
        // What was cut off was never read, what was appended is zeros.
        bytes.len() as u64 + more
    }

    fn sections(&self) -> Vec<Section> {
        let mut blocks = Vec::new();
        let mut first_page = 0;
        for block in &self.blocks {
            let mut record = [0; 96];
            let numbers = [block.guest, block.len, block.used, block.page_size, first_page];
            (0..)
                .step_by(8)
                .zip(numbers)
                .for_each(|(at, number): (usize, u64)| put(&mut record, at, &number.to_le_bytes()));
            record[40..43].copy_from_slice(&[
                block.treatment,
                block.backing,
                u8::try_from(block.name.len()).expect("short"),
            ]);
            put(&mut record, 48, block.name.as_bytes());
            blocks.extend(record);
            first_page += block.pages();
        }
        let mut runs: Vec<(u64, u64, PageState)> = Vec::new();
        for (page, &state) in (0..).zip(&self.states) {
            match runs.last_mut() {
                Some((first, pages, of)) if *of == state && *first + *pages == page && *pages < self.record_pages => {
                    *pages += 1
                }
                _ => runs.push((page, 1, state)),
            }
        }
        let runs = runs.iter().filter(|(.., state)| *state != self.default());
        let records = runs.flat_map(|&(first, pages, state)| {
            let code = match state {
                PageState::Zero => 0,
                PageState::Data => 1u64,
                PageState::InParent => 2,
            };
            (first | (pages - 1) << 40 | code << 62).to_le_bytes()
        });
        let data = self.states.iter().enumerate().filter(|(_, state)| **state == PageState::Data);
        let crcs = data.flat_map(|(page, _)| crc32c::crc32c(&self.page_bytes(page)).to_le_bytes());
        let statistics = self.statistics.iter().flat_map(|(key, value)| {
            let mut entry = vec![u8::try_from(key.len()).expect("at most 255")];
            entry.extend(key.as_bytes());
            entry.extend(value.to_le_bytes());
            entry
        });
        let section = |tag: &[u8; 4], flags, bytes| Section { tag: *tag, flags, bytes };
        vec![
            section(b"BLKS", 1, blocks),
            section(b"RUNS", 1, records.collect()),
            section(b"CRCS", 1, crcs.collect()),
            section(b"DEVS", 1, self.device.clone()),
            section(b"STAT", 0, statistics.collect()),
        ]
    }

    /// Trailer and tail, changes included.
    fn trailer(&self) -> Vec<u8> {
        let start = self.pages() * PAGE;
        let mut sections = self.sections();
        for change in &self.changes {
            self.change_sections(change, &mut sections);
        }
        let data_pages = self.states.iter().filter(|state| **state == PageState::Data).count() as u64;
        let mut bytes = vec![0; HEADER + sections.len() * ENTRY];
        put(&mut bytes, 0, b"RAMSHOT^\x01\0\0\0");
        put(&mut bytes, 12, &u32::try_from(sections.len()).expect("a few").to_le_bytes());
        put(&mut bytes, 16, &self.id);
        if let Some((id, checksum)) = self.parent {
            put(&mut bytes, 32, &id);
            put(&mut bytes, 48, &checksum.to_le_bytes());
        }
        put(&mut bytes, 52, &4096u32.to_le_bytes());
        put(&mut bytes, 56, &self.pages().to_le_bytes());
        put(&mut bytes, 64, &data_pages.to_le_bytes());
        bytes[72] = if self.parent.is_some() { 2 } else { 0 };
        for (i, section) in sections.iter().enumerate() {
            let entry = HEADER + i * ENTRY;
            let offset = start + bytes.len() as u64;
            put(&mut bytes, entry, &section.tag);
            put(&mut bytes, entry + 4, &section.flags.to_le_bytes());
            put(&mut bytes, entry + 8, &offset.to_le_bytes());
            put(&mut bytes, entry + 16, &(section.bytes.len() as u64).to_le_bytes());
            bytes.extend(&section.bytes);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let tail = bytes.len();
        bytes.resize(tail + TAIL, 0);
        put(&mut bytes, tail, b"RAMSHOT$\x01\0\0\0");
        put(&mut bytes, tail + 16, &start.to_le_bytes());
        put(&mut bytes, tail + 24, &(tail as u64).to_le_bytes());
        put(&mut bytes, tail + 32, &(start + (tail + TAIL) as u64).to_le_bytes());
        put(&mut bytes, tail + 40, &self.id);
        for change in &self.changes {
            let (at, value) = match change {
                Change::Header { at, value } => (usize::from(*at) % HEADER, value),
                Change::Directory { at, value } => {
                    (HEADER + usize::from(*at) % (sections.len() * ENTRY).max(1) / 4 * 4, value)
                }
                Change::Tail { at, value } => (tail + usize::from(*at) % 60, value),
                _ => continue,
            };
            self.change_number(&mut bytes, at, value);
        }
        repair_checksums(&mut bytes, start);
        for change in &self.changes {
            if let Change::Flip { at, xor } = *change {
                let at = usize::from(at) % bytes.len();
                bytes[at] ^= xor;
            }
        }
        bytes
    }

    fn change_sections(&self, change: &Change, sections: &mut Vec<Section>) {
        let count = sections.len().max(1);
        let record = |size: u8| [1, 4, 8, 96][usize::from(size) % 4];
        match *change {
            Change::Number { section, at, ref value } => {
                if let Some(Section { bytes, .. }) = sections.get_mut(usize::from(section) % count) {
                    let at = usize::from(at) % (bytes.len() / 8).max(1) * 8;
                    self.change_number(bytes, at, value);
                }
            }
            Change::Byte { section, at, xor } => {
                if let Some(Section { bytes, .. }) = sections.get_mut(usize::from(section) % count) {
                    let at = usize::from(at) % bytes.len().max(1);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= xor;
                    }
                }
            }
            Change::Remove { section, at, size } => {
                if let Some(Section { bytes, .. }) = sections.get_mut(usize::from(section) % count) {
                    let size = record(size).min(bytes.len());
                    let at = usize::from(at) % (bytes.len() / size.max(1)).max(1) * size;
                    bytes.drain(at..at + size);
                }
            }
            Change::Repeat { section, at, size, times } => {
                if let Some(Section { bytes, .. }) = sections.get_mut(usize::from(section) % count) {
                    let size = record(size).min(bytes.len());
                    let at = usize::from(at) % (bytes.len() / size.max(1)).max(1) * size;
                    let again = bytes[at..at + size].repeat(usize::from(times));
                    bytes.splice(at..at, again);
                }
            }
            Change::WithoutSection(section) => {
                if !sections.is_empty() {
                    sections.remove(usize::from(section) % count);
                }
            }
            Change::Section { tag, flags, bytes } => {
                let len = usize::from(flags >> 4).min(bytes.len());
                sections.push(Section { tag, flags: u32::from(flags & 3), bytes: bytes[..len].to_vec() });
            }
            Change::Swap(a, b) => {
                if !sections.is_empty() {
                    sections.swap(usize::from(a) % count, usize::from(b) % count);
                }
            }
            _ => {}
        }
    }

    fn change_number(&self, bytes: &mut [u8], at: usize, value: &Value) {
        let Some(before) = get64(bytes, at) else {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = !*byte;
            }
            return;
        };
        let after = match *value {
            Value::Power(bit) => 1 << (bit % 64),
            Value::BeforePower(bit) => u64::MAX >> (bit % 64),
            Value::More(by) => before.wrapping_add(by.into()),
            Value::Less(by) => before.wrapping_sub(by.into()),
            Value::Any(value) => value,
            Value::Pages => self.pages(),
            Value::FileLength => self.pages() * PAGE + bytes.len() as u64,
        };
        put(bytes, at, &after.to_le_bytes());
    }
}

impl Block {
    fn pages(&self) -> u64 {
        if self.treatment == 3 { 0 } else { self.used / PAGE }
    }
}
