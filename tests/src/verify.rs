//! The file, and what is restored from it, against a copy of guest RAM taken at T0 by other means.

use std::error::Error;

use ramshot::SnapshotFile;
use ramshot::core::{PAGE_SIZE, PageId};
use ramshot::file::PageState;

/// What the comparison showed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differ from T0.
    pub mismatched: u64,
    /// Pages that are all zeros in the image.
    pub zero: u64,
    /// The first page that differs.
    pub first_mismatch: Option<PageId>,
}

const PAGE: usize = 4096;

/// Every page of `file` against `t0`, the regions of guest RAM in order.
///
/// # Errors
/// The file has another number of pages, or one cannot be read (its checksum does not fit, for example).
pub fn against_file(file: &SnapshotFile, t0: &[Vec<u8>]) -> Result<Verified, Box<dyn Error>> {
    against_chain(std::slice::from_ref(file), t0)
}

/// The same of a snapshot and its ancestors, the oldest first.
///
/// # Errors
/// As there; a page that no file has.
pub fn against_chain(files: &[SnapshotFile], t0: &[Vec<u8>]) -> Result<Verified, Box<dyn Error>> {
    let mut verified = Verified::default();
    let mut page = 0;
    let mut bytes = [0; PAGE];
    for expected in t0.iter().flat_map(|region| region.chunks_exact(PAGE)) {
        page_of_chain(files, PageId(page), &mut bytes)?;
        verified.zero += u64::from(bytes.iter().all(|&byte| byte == 0));
        verified.compare(PageId(page), &bytes, expected);
        page += 1;
    }
    match files.iter().find(|file| file.pages() != page) {
        Some(file) => Err(format!("{:?} has {} pages, guest RAM {page}", file.path(), file.pages()).into()),
        None => Ok(verified),
    }
}

/// Reads a page from the last file that has it.
///
/// # Errors
/// It cannot be read, or no file has it.
pub fn page_of_chain(files: &[SnapshotFile], page: PageId, into: &mut [u8; PAGE]) -> Result<(), Box<dyn Error>> {
    for file in files.iter().rev() {
        if file.read_page(page, into)? != PageState::InParent {
            return Ok(());
        }
    }
    Err(format!("{page} is in the parent of every file").into())
}

/// The flat RAM of the file, read by a program that knows nothing of the format: its first bytes are the memory.
///
/// # Errors
/// The file cannot be read, or is too short.
pub fn flat(path: &std::path::Path, t0: &[Vec<u8>]) -> Result<bool, std::io::Error> {
    use std::io::Read;
    let mut file = std::fs::File::open(path)?;
    let mut bytes = vec![0; 1 << 20];
    for region in t0 {
        for expected in region.chunks(bytes.len()) {
            let Some(got) = bytes.get_mut(..expected.len()) else { return Ok(false) };
            file.read_exact(got)?;
            if got != expected {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Restored memory against `t0`.
#[must_use]
pub fn against_memory(restored: &[Vec<u8>], t0: &[Vec<u8>]) -> Verified {
    let mut verified = Verified::default();
    let pages = restored.iter().zip(t0).flat_map(|(r, t)| r.chunks_exact(PAGE).zip(t.chunks_exact(PAGE)));
    for (page, (got, expected)) in (0..).map(PageId).zip(pages) {
        verified.compare(page, got, expected);
    }
    verified
}

impl Verified {
    fn compare(&mut self, page: PageId, got: &[u8], expected: &[u8]) {
        self.pages += 1;
        if got != expected {
            self.mismatched += 1;
            self.first_mismatch.get_or_insert(page);
        }
    }
}

const _: () = assert!(PAGE as u64 == PAGE_SIZE);
