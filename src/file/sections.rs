//! Writing to a file at an offset: everything or an error, and sections of the trailer with their CRC.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice};

use super::format::{ALIGN, PAGE, PAGE_BYTES};
use crate::os::storage;

/// Pieces in one vectored write.
const BATCH: usize = 64;

/// Bytes a section is gathered into before they are written.
const BUFFER: usize = 256 * 1024;

/// Writes all of `slices` at `offset`, whatever the system takes at a time.
pub(super) fn write_all(file: &File, mut slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match storage::write_vectored_at(file, slices, offset) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset = offset.checked_add(written as u64).ok_or(ErrorKind::FileTooLarge)?;
                IoSlice::advance_slices(&mut slices, written);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// [`write_all`] by way of `direct`. Direct I/O takes whole blocks only: where a write is cut short inside one (the disk is
/// full, the file may not grow) it takes part of it, or answers `EINVAL`. What is left then goes to `file`, which is the
/// same one, and whose answer is what is really wrong.
fn write_all_directly(direct: &File, file: &File, mut slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
    let len: usize = slices.iter().map(|slice| slice.len()).sum();
    let written = loop {
        match storage::write_vectored_at(direct, slices, offset) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::InvalidInput => break 0,
            answer => break answer?,
        }
    };
    if written < len {
        log::debug!(target: "ramshot::file", "a direct write at byte {offset} took {written} bytes of {len}");
    }
    IoSlice::advance_slices(&mut slices, written);
    write_all(file, slices, offset + written as u64)
}

/// Where a write failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) source: io::Error,
}

/// Gathers page bytes that lie together in the file into one write.
pub(super) struct Batch<'a> {
    file: &'a File,
    /// The same file, open for direct I/O, if that is how to write.
    direct: Option<&'a File>,
    slices: [IoSlice<'a>; BATCH],
    used: usize,
    /// First byte of the write, and one past its last.
    start: u64,
    end: u64,
}

impl<'a> Batch<'a> {
    pub(super) fn new(file: &'a File, direct: Option<&'a File>) -> Self {
        Self { file, direct, slices: [IoSlice::new(&[]); BATCH], used: 0, start: 0, end: 0 }
    }

    /// Adds whole pages; writes what is gathered first if they do not follow it.
    pub(super) fn add(&mut self, first_page: u64, bytes: &'a [u8]) -> Result<(), Failed> {
        debug_assert!(bytes.len().is_multiple_of(PAGE));
        let at = first_page * PAGE_BYTES;
        if self.used == BATCH || self.used > 0 && at != self.end {
            self.flush()?;
        }
        if self.used == 0 {
            self.start = at;
        }
        if let Some(slice) = self.slices.get_mut(self.used) {
            *slice = IoSlice::new(bytes);
        }
        self.used += 1;
        self.end = at + bytes.len() as u64;
        Ok(())
    }

    /// Writes what is gathered.
    pub(super) fn flush(&mut self) -> Result<(), Failed> {
        let (start, len) = (self.start, self.end - self.start);
        let slices = self.slices.get_mut(..std::mem::take(&mut self.used)).unwrap_or_default();
        if slices.is_empty() {
            return Ok(());
        }
        let written = match self.direct {
            Some(direct) => write_all_directly(direct, self.file, slices, start),
            None => write_all(self.file, slices, start),
        };
        written.map_err(|source| Failed { offset: start, len, source })
    }
}

/// Writes the sections of a trailer one behind the other.
pub(super) struct SectionWriter<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Where the buffer belongs.
    offset: u64,
    /// Of the section being written, as far as its bytes are not in the buffer from `unsummed` on.
    crc: u32,
    unsummed: usize,
    start: u64,
}

/// A section that was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) crc: u32,
}

impl<'a> SectionWriter<'a> {
    /// Starts at `offset`, a multiple of [`ALIGN`].
    pub(super) fn new(file: &'a File, offset: u64) -> Self {
        Self { file, buffer: Vec::with_capacity(BUFFER), offset, crc: 0, unsummed: 0, start: offset }
    }

    pub(super) fn put(&mut self, mut bytes: &[u8]) -> Result<(), Failed> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Ends the section; the next one starts at the next multiple of [`ALIGN`].
    pub(super) fn end(&mut self) -> Result<Written, Failed> {
        self.sum();
        let len = self.here() - self.start;
        let written = Written { offset: self.start, len, crc: self.crc };
        let padding = len.next_multiple_of(ALIGN) - len;
        for _ in 0..padding {
            self.put(&[0])?;
        }
        self.crc = 0;
        self.unsummed = self.buffer.len();
        self.start = self.here();
        Ok(written)
    }

    /// Writes what is left; returns the offset behind the last section.
    pub(super) fn finish(mut self) -> Result<u64, Failed> {
        self.flush()?;
        Ok(self.offset)
    }

    fn here(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }

    /// Sums what was gathered, many small pieces in one go.
    fn sum(&mut self) {
        self.crc = crc32c::crc32c_append(self.crc, self.buffer.get(self.unsummed..).unwrap_or_default());
        self.unsummed = self.buffer.len();
    }

    fn flush(&mut self) -> Result<(), Failed> {
        self.sum();
        let (offset, len) = (self.offset, self.buffer.len() as u64);
        write_all(self.file, &mut [IoSlice::new(&self.buffer)], offset).map_err(|source| Failed {
            offset,
            len,
            source,
        })?;
        self.offset += len;
        self.buffer.clear();
        self.unsummed = 0;
        Ok(())
    }
}
