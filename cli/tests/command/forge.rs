//! Snapshot files written by the book: docs/FORMAT.md, and no code of the library. For what the public API does not
//! write, increments above all.

use std::fs;
use std::path::Path;

use ramshot::core::RamBlock;

use super::support::PAGE;

/// A page as the file is to have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Page {
    Zero,
    Data(Vec<u8>),
    InParent,
}

impl Page {
    const fn code(&self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Data(_) => 1,
            Self::InParent => 2,
        }
    }
}

fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// Writes a snapshot with this id, on top of this parent (id and trailer checksum); returns its trailer checksum.
pub(crate) fn write(path: &Path, id: u8, parent: Option<(u8, u32)>, blocks: &[RamBlock], pages: &[Page]) -> u32 {
    let mut file: Vec<u8> = Vec::new();
    for page in pages {
        match page {
            Page::Data(data) => file.extend_from_slice(data),
            _ => file.extend_from_slice(&[0; PAGE]),
        }
    }
    let data: Vec<&Vec<u8>> = pages.iter().filter_map(|p| if let Page::Data(d) = p { Some(d) } else { None }).collect();
    let default = if parent.is_some() { 2 } else { 0 };

    let (mut table, mut first) = (Vec::new(), 0u64);
    for block in blocks {
        let name = block.name.as_str();
        let mut padded = name.as_bytes().to_vec();
        padded.resize(48, 0);
        for number in [block.guest.0, block.len, block.used, block.page_size, first] {
            table.extend_from_slice(&number.to_le_bytes());
        }
        table.extend_from_slice(&[0, 0, u8::try_from(name.len()).unwrap(), 0, 0, 0, 0, 0]);
        table.extend_from_slice(&padded);
        first += block.used / 4096;
    }
    assert_eq!(first, pages.len() as u64);
    let mut runs = Vec::new();
    for (number, page) in (0u64..).zip(pages).filter(|(_, page)| page.code() != default) {
        runs.extend_from_slice(&(page.code() << 62 | number).to_le_bytes());
    }
    let crcs: Vec<u8> = data.iter().flat_map(|page| crc32c::crc32c(page).to_le_bytes()).collect();

    let sections: [(&[u8; 4], Vec<u8>); 3] = [(b"BLKS", table), (b"RUNS", runs), (b"CRCS", crcs)];
    let start = (pages.len() * PAGE) as u64;
    let parent_id = [parent.map_or(0, |(id, _)| id); 16];
    let header = bytes(&[
        b"RAMSHOT^",
        &1u32.to_le_bytes(),
        &3u32.to_le_bytes(),
        &[id; 16],
        &parent_id,
        &parent.map_or(0, |(_, checksum)| checksum).to_le_bytes(),
        &4096u32.to_le_bytes(),
        &(pages.len() as u64).to_le_bytes(),
        &(data.len() as u64).to_le_bytes(),
        &[u8::try_from(default).unwrap(), 0, 0, 0, 0, 0, 0, 0],
        &[0; 16],
    ]);
    assert_eq!(header.len(), 96);
    let mut directory = Vec::new();
    let mut body = Vec::new();
    for (tag, content) in &sections {
        let at = start + 96 + 3 * 32 + body.len() as u64;
        directory.extend(bytes(&[
            *tag,
            &1u32.to_le_bytes(),
            &at.to_le_bytes(),
            &(content.len() as u64).to_le_bytes(),
            &crc32c::crc32c(content).to_le_bytes(),
            &[0; 4],
        ]));
        body.extend_from_slice(content);
        body.resize(body.len().next_multiple_of(8), 0);
    }
    let checksum = crc32c::crc32c(&bytes(&[&header, &directory]));
    let trailer = bytes(&[&header, &directory, &body]);
    let mut tail = bytes(&[
        b"RAMSHOT$",
        &1u32.to_le_bytes(),
        &[0; 4],
        &start.to_le_bytes(),
        &(trailer.len() as u64).to_le_bytes(),
        &(start + trailer.len() as u64 + 64).to_le_bytes(),
        &[id; 16],
        &checksum.to_le_bytes(),
    ]);
    tail.extend_from_slice(&crc32c::crc32c(&tail).to_le_bytes());
    file.extend_from_slice(&trailer);
    file.extend_from_slice(&tail);
    fs::write(path, file).unwrap();
    checksum
}

/// Memory as pages.
pub(crate) fn pages(flat: &[u8]) -> Vec<Page> {
    let page = |bytes: &[u8]| if bytes.iter().all(|&byte| byte == 0) { Page::Zero } else { Page::Data(bytes.to_vec()) };
    flat.chunks(PAGE).map(page).collect()
}
