//! Where an image goes: a file, or anything else that takes pages in any order and commits at the end.

use ramshot_core::{PageId, Run};

use crate::file::{PageState, ParentRef};

/// What is known of one captured page: zero, or data with its CRC-32C.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageDigest {
    /// All bytes are zero: nothing to store.
    Zero,
    /// Something else; the CRC-32C (Castagnoli) of its 4096 bytes.
    Data(u32),
}

impl PageDigest {
    /// Of one page's bytes.
    #[must_use]
    pub fn of(page: &[u8; 4096]) -> Self {
        // 64 bytes at a time: the compiler makes vector code of it, and a page of data is left at its first line.
        let zero = page.chunks_exact(64).all(|line| line.iter().fold(0, |any, &byte| any | byte) == 0);
        if zero { Self::Zero } else { Self::Data(crc32c::crc32c(page)) }
    }
}

/// Captured bytes of consecutive pages, as they lie in one pool slot.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// First page.
    pub first: PageId,
    /// The bytes: `digests.len()` pages. Aligned to 4096 in memory, so they can be written directly.
    pub bytes: &'a [u8],
    /// One digest a page.
    pub digests: &'a [PageDigest],
}

/// What is committed besides the pages.
#[derive(Clone, Debug, Default)]
pub struct ImageMeta {
    /// The embedder's device state, opaque to us.
    pub device_state: Vec<u8>,
    /// Statistics of the run, as key and number, kept in the trailer.
    pub statistics: Vec<(String, u64)>,
}

/// Receives the pages of one image. Shared by the writer threads.
///
/// # Contract
/// Every page of the layout that is never given to [`write`](Self::write) is what [`omitted`](Self::omitted) says. No page
/// is given twice, unless [`again`](Self::again) was called in between.
/// Exactly one of [`commit`](Self::commit) and [`abort`](Self::abort) ends it; dropping it is aborting.
pub trait ImageSink: Send + Sync {
    /// Takes pages; may block on I/O, is never called between claim and release.
    ///
    /// # Errors
    /// The snapshot ends with the first error.
    fn write(&self, pieces: &[Piece<'_>]) -> Result<(), SinkError>;

    /// How many bytes are best given to [`write`](Self::write) at a time, more or less: many where a call waits for a device,
    /// few where it keeps a processor busy, which a vCPU may be waiting for. Asked once. Default 512 KiB.
    fn write_size(&self) -> u64 {
        512 << 10
    }

    /// The pages of `run` will be written soon, most of them: makes room for them, so that writing them takes less long.
    /// Returns whether that brings anything; if not, nobody asks again. With no pages it is only asked whether it would.
    /// Called before T0, for no page twice. Default: no.
    fn make_room(&self, run: Run) -> bool {
        let _ = run;
        false
    }

    /// What a page is that is never given: zero, or in the parent if this is an increment. Asked once, at the beginning.
    fn omitted(&self) -> PageState {
        PageState::Zero
    }

    /// What was given so far is a draft (pre-copy): from here on any page may be given once more, also a zero one, and what
    /// is given later counts. Called while no write is under way.
    ///
    /// # Errors
    /// This sink takes no drafts.
    fn again(&self) -> Result<(), SinkError> {
        Err(SinkError {
            what: "this image cannot be made by pre-copy: its sink takes no page twice".to_owned(),
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Makes the image durable, then visible. Returns its size in bytes.
    ///
    /// # Errors
    /// If it fails there is no image, and what was there before still is.
    fn commit(self: Box<Self>, meta: &ImageMeta) -> Result<Committed, SinkError>;

    /// Removes everything written.
    fn abort(self: Box<Self>);
}

/// A committed image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Committed {
    /// Apparent size in bytes.
    pub image_bytes: u64,
    /// Bytes that were written (pages and trailer; zero pages cost none).
    pub written_bytes: u64,
    /// How an increment names it; `None` if none can build on it.
    pub snapshot: Option<ParentRef>,
}

/// Why an image could not be written: a sentence, with the cause.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct SinkError {
    /// What failed, on which thing.
    pub what: String,
    /// The system's word for it.
    #[source]
    pub source: std::io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_byte_anywhere_makes_a_page_data() {
        let mut page = [0u8; 4096];
        assert_eq!(PageDigest::of(&page), PageDigest::Zero);
        for at in [0, 1, 63, 64, 2047, 4095] {
            page[at] = 1;
            assert_eq!(PageDigest::of(&page), PageDigest::Data(crc32c::crc32c(&page)), "byte {at}");
            page[at] = 0;
        }
    }
}
