//! The order in which pages were touched, kept in a small file beside the image: a hint, never more. What it says wrong costs
//! time; a file that is damaged, of another version or another size of RAM is left alone, with a line in the log.
//!
//! ```text
//!  0  magic "RAMSHOT>"   8  version, 4 bytes   12  CRC-32C of all that follows, 4 bytes
//! 16  pages of the image, 8 bytes   24  runs, each 8 bytes: bits 0..40 first page, 40..62 pages - 1
//! ```
//! All numbers are little-endian.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ramshot_core::{PageBitmap, PageId, Run};

const MAGIC: &[u8; 8] = b"RAMSHOT>";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const FIRST_BITS: u32 = 40;
const MOST_PAGES: u64 = 1 << 22;
/// More than this is no hint: 8 million runs.
const MOST_BYTES: u64 = 64 << 20;

/// Where the order of `image` is kept: `NAME.order` beside it.
#[must_use]
pub fn order_path(image: impl AsRef<Path>) -> PathBuf {
    let mut name = image.as_ref().as_os_str().to_owned();
    name.push(".order");
    PathBuf::from(name)
}

/// The order in `path`, for an image of `pages` pages; `None` if there is none of use.
pub(super) fn load(path: &Path, pages: u64) -> Option<Arc<[Run]>> {
    let bytes = match read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            log::warn!(target: "ramshot::restore", "order {path:?} is not used: {error}");
            return None;
        }
    };
    match parse(&bytes, pages) {
        Ok(runs) => Some(runs),
        Err(why) => {
            log::warn!(target: "ramshot::restore", "order {path:?} is not used: {why}");
            None
        }
    }
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > MOST_BYTES {
        let what = format!("no regular file of at most {MOST_BYTES} bytes");
        return Err(std::io::Error::new(ErrorKind::InvalidData, what));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    u64::from_le_bytes(word.copied().unwrap_or_default())
}

fn parse(bytes: &[u8], pages: u64) -> Result<Arc<[Run]>, String> {
    if bytes.len() < HEADER || !bytes.starts_with(MAGIC) {
        return Err(format!("{} bytes that do not begin as an order does", bytes.len()));
    }
    let half = |at: usize| bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).copied().unwrap_or_default();
    let (version, stated) = (u32::from_le_bytes(half(8)), u32::from_le_bytes(half(12)));
    if version != VERSION {
        return Err(format!("version {version}, not {VERSION}"));
    }
    let found = crc32c::crc32c(bytes.get(16..).unwrap_or_default());
    if found != stated {
        return Err(format!("damaged: CRC-32C {found:#010x}, {stated:#010x} was written"));
    }
    if word(bytes, 16) != pages {
        return Err(format!("of an image of {} pages, this one has {pages}", word(bytes, 16)));
    }
    let records = bytes.get(HEADER..).unwrap_or_default();
    if !records.len().is_multiple_of(8) {
        return Err(format!("{} bytes of runs", records.len()));
    }
    let run = |record: &[u8]| {
        let record = word(record, 0);
        let run = Run::new(PageId(record & ((1 << FIRST_BITS) - 1)), (record >> FIRST_BITS & (MOST_PAGES - 1)) + 1);
        if run.end().0 <= pages { Ok(run) } else { Err(format!("{run} of {pages}")) }
    };
    records.chunks_exact(8).map(run).collect()
}

/// Writes the order for the next time, if there is anything new: what came first the last time comes first again, then what
/// was touched beyond it.
pub(crate) fn save(path: &Path, pages: u64, before: &[Run], touched: &[Run]) {
    let Some(runs) = merge(pages, before, touched) else { return };
    if let Err(error) = write(path, &encode(pages, &runs)) {
        log::warn!(target: "ramshot::restore", "order {path:?} is not written: {error}");
    }
}

fn merge(pages: u64, before: &[Run], touched: &[Run]) -> Option<Vec<Run>> {
    let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(pages)).ok()?;
    let mut known = PageBitmap::new(vec![0u64; words], pages, true)?;
    before.iter().for_each(|&run| known.insert(run));
    let mut runs = before.to_vec();
    for &run in touched {
        let count = known.count();
        known.insert(run);
        if known.count() > count {
            // As a whole: reading what is in costs nothing, and it stays one read.
            let mut first = run.first.0;
            while first < run.end().0 {
                let pages = (run.end().0 - first).min(MOST_PAGES);
                runs.push(Run::new(PageId(first), pages));
                first += pages;
            }
        }
    }
    let most = usize::try_from((MOST_BYTES - HEADER as u64) / 8).unwrap_or(usize::MAX);
    runs.truncate(most);
    (runs.len() > before.len()).then_some(runs)
}

fn encode(pages: u64, runs: &[Run]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + runs.len() * 8);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&pages.to_le_bytes());
    for run in runs {
        bytes.extend_from_slice(&(run.first.0 | (run.pages - 1) << FIRST_BITS).to_le_bytes());
    }
    let crc = crc32c::crc32c(bytes.get(16..).unwrap_or_default());
    if let Some(place) = bytes.get_mut(12..16) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

/// Under another name first: who reads it meanwhile reads the old one.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> Run {
        Run::new(PageId(first), pages)
    }

    #[test]
    fn what_is_new_comes_behind_what_was_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = order_path(dir.path().join("vm.ramshot"));
        assert!(path.ends_with("vm.ramshot.order"));
        assert!(load(&path, 100).is_none());
        save(&path, 100, &[], &[run(50, 10), run(0, 4), run(52, 4)]);
        let first = load(&path, 100).unwrap();
        assert_eq!(&first[..], [run(50, 10), run(0, 4)], "what is known already is not said twice");
        save(&path, 100, &first, &[run(51, 2)]);
        assert_eq!(load(&path, 100).unwrap(), first);
        save(&path, 100, &first, &[run(58, 4)]);
        assert_eq!(&load(&path, 100).unwrap()[..], [run(50, 10), run(0, 4), run(58, 4)]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_damaged_or_foreign_order_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("order");
        save(&path, 100, &[], &[run(50, 10), run(0, 100)]);
        let good = fs::read(&path).unwrap();
        assert!(load(&path, 101).is_none(), "of another size");
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(parse(&bytes, 100).is_err(), "byte {at}");
            assert!(parse(&good[..at], 100).is_err(), "{at} bytes");
        }
        // Right by its checksum, and wrong.
        assert!(parse(&encode(100, &[run(99, 2)]), 100).is_err());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(load(&path, 100).is_none());
    }
}
