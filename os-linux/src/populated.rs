//! Which pages may hold something other than zeros: from the page table (`PAGEMAP_SCAN`, or `/proc/self/pagemap` entry
//! by entry) and from memory files (`SEEK_DATA`). What it costs follows what is populated, not the nominal size.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use ramshot_core::{HostAddr, HostRange, OsError, Residency};

use crate::backing::{Content, FileAt, Piece, base_page_size};
use crate::maps::intersection;
use crate::owner::Owner;
use crate::uapi::{self, PageRegion, PmScanArg};

/// Receives ranges.
pub(crate) type Each<'a> = &'a mut dyn FnMut(HostRange);

/// Calls `each` for what may be populated of the part of `pieces` inside `within`, ascending, as multiples of
/// `page_size`, adjoining ranges merged. `all` is every piece of guest RAM: pages of one file can be spread over blocks.
pub(crate) fn populated(
    table: &PageTable,
    pieces: &[Piece],
    all: &[Vec<Piece>],
    within: HostRange,
    page_size: u64,
    each: Each<'_>,
) -> Result<(), OsError> {
    let mut merged = Merged { pending: None, page_size, each };
    for piece in pieces {
        let Some(range) = intersection(piece.range, within) else { continue };
        let mut push = |range| merged.push(range);
        match &piece.content {
            Content::PageTable => table.present(range, &mut push)?,
            Content::File(file) => table.present_or_data(&at(file, piece, range), range, &mut push)?,
            Content::HugeFile(file) if table.has_all_of(file, piece, all)? => table.present(range, &mut push)?,
            Content::HugeFile(_) | Content::Unknown => push(range),
        }
    }
    merged.finish();
    Ok(())
}

/// `file` at the start of `range`, a part of `piece`.
fn at(file: &FileAt, piece: &Piece, range: HostRange) -> FileAt {
    FileAt { file: file.file.clone(), offset: file.offset.saturating_add(range.start.0 - piece.range.start.0) }
}

/// Joins adjoining and overlapping ranges, widened to whole host pages.
struct Merged<'a> {
    pending: Option<HostRange>,
    page_size: u64,
    each: Each<'a>,
}

impl Merged<'_> {
    fn push(&mut self, range: HostRange) {
        let start = range.start.0 & !(self.page_size - 1);
        let end = range.end().0.div_ceil(self.page_size).saturating_mul(self.page_size);
        match &mut self.pending {
            Some(pending) if start <= pending.end().0 => {
                pending.len = pending.len.max(end - pending.start.0);
            }
            pending => {
                if let Some(done) = pending.replace(HostRange::new(HostAddr(start), end - start)) {
                    (self.each)(done);
                }
            }
        }
    }

    fn finish(self) {
        if let Some(done) = self.pending {
            (self.each)(done);
        }
    }
}

/// The page table of a process, as `/proc/PID/pagemap` shows it.
#[derive(Debug)]
pub(crate) struct PageTable {
    /// `None`: cannot be opened; then everything counts as populated.
    file: Option<File>,
    /// Whether the kernel has PAGEMAP_SCAN (6.7).
    pub(crate) scan: Result<(), Errno>,
}

impl PageTable {
    /// Opens it. Needed before a sandbox closes `/proc`.
    pub(crate) fn open(owner: &Owner) -> Self {
        let (file, scan) = match File::open(owner.proc("pagemap")) {
            Ok(file) => {
                // An empty range: the kernel checks the arguments and has nothing to walk.
                let scan = scan(&file, HostRange::new(HostAddr(0), 0), &mut |_| {});
                (Some(file), scan)
            }
            Err(error) => {
                log::warn!(
                    target: "ramshot::track",
                    "cannot open {} ({error}): all memory counts as populated and is protected", owner.proc_name("pagemap")
                );
                (None, Err(Errno::from_raw(error.raw_os_error().unwrap_or(0))))
            }
        };
        Self { file, scan }
    }

    /// What of `range` is resident, and how it is mapped; nothing if the kernel cannot tell (before 6.7).
    pub(crate) fn residency(&self, range: HostRange) -> Residency {
        let mut found = Residency::default();
        let (Some(file), Ok(())) = (&self.file, self.scan) else { return found };
        let scanned = scan_categories(file, range, uapi::PAGE_IS_HUGE, &mut |region| {
            let bytes = region.end.saturating_sub(region.start);
            found.resident = found.resident.saturating_add(bytes);
            if region.categories & uapi::PAGE_IS_HUGE != 0 {
                found.huge = found.huge.saturating_add(bytes);
            }
        });
        if scanned.is_ok() { found } else { Residency::default() }
    }

    fn present(&self, range: HostRange, each: Each<'_>) -> Result<(), OsError> {
        let Some(file) = &self.file else {
            each(range);
            return Ok(());
        };
        if self.scan.is_ok() {
            scan(file, range, each).map_err(|errno| OsError::new("PAGEMAP_SCAN", errno as i32).on(range))
        } else {
            read_entries(file, range, each)
        }
    }

    /// What is in the page table, and where that has nothing, what is in the file: `range` starts there at
    /// `file.offset`. (The page table first: walking it is several times faster than SEEK_HOLE.)
    fn present_or_data(&self, file: &FileAt, range: HostRange, each: Each<'_>) -> Result<(), OsError> {
        let mut seek = Seek::new(&file.file);
        let mut at = range.start;
        let mut result = Ok(());
        let mut gap = |at: HostAddr, end: HostAddr, each: Each<'_>| {
            let gap = HostRange::new(at, end.0.saturating_sub(at.0));
            seek.data(file.offset.saturating_add(at.0 - range.start.0), gap, each)
        };
        self.present(range, &mut |present| {
            if result.is_ok() {
                result = gap(at, present.start, each);
                each(present);
                at = present.end();
            }
        })?;
        result.and_then(|()| gap(at, range.end(), each))
    }

    /// Whether our page tables have every page that the hugetlbfs file has, so that what is absent here is a hole there.
    fn has_all_of(&self, file: &FileAt, piece: &Piece, all: &[Vec<Piece>]) -> Result<bool, OsError> {
        if self.file.is_none() {
            return Ok(false);
        }
        let meta = file.file.metadata().map_err(|e| OsError::new("fstat", e.raw_os_error().unwrap_or(0)))?;
        let mut present = 0u64;
        for other in all.iter().flatten().filter(|other| other.file_id == piece.file_id) {
            self.present(other.range, &mut |range| present = present.saturating_add(range.len))?;
        }
        // st_blocks counts the pages of the file in units of 512 bytes.
        Ok(present == meta.blocks().saturating_mul(512))
    }
}

/// Results of one PAGEMAP_SCAN: 12 KiB on the stack.
const REGIONS: usize = 512;

/// PAGEMAP_SCAN: what is present or swapped out and not the zero page.
fn scan(file: &File, range: HostRange, each: Each<'_>) -> Result<(), Errno> {
    scan_categories(file, range, 0, &mut |region| {
        each(HostRange::new(HostAddr(region.start), region.end.saturating_sub(region.start)));
    })
}

/// The same, told apart by the categories of `told`.
fn scan_categories(file: &File, range: HostRange, told: u64, each: &mut dyn FnMut(&PageRegion)) -> Result<(), Errno> {
    let mut regions = [PageRegion::default(); REGIONS];
    let mut start = range.start.0;
    loop {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start,
            end: range.end().0,
            vec: (&raw mut regions).expose_provenance() as u64,
            vec_len: REGIONS as u64,
            category_inverted: uapi::PAGE_IS_PFNZERO,
            category_mask: uapi::PAGE_IS_PFNZERO,
            category_anyof_mask: uapi::PAGE_IS_PRESENT | uapi::PAGE_IS_SWAPPED,
            return_mask: told,
            ..PmScanArg::default()
        };
        // SAFETY: `file` is open and `arg` a live `pm_scan_arg`; its `vec` points to `vec_len` regions that live on
        // this stack frame and are touched by nobody else during the call. No flag is set that changes memory.
        let found = unsafe { uapi::ioctl_pagemap_scan(file.as_raw_fd(), &raw mut arg) }?;
        for region in regions.iter().take(usize::try_from(found).unwrap_or(0)) {
            each(region);
        }
        // The kernel stops early when the list is full, and must not stop where it began.
        if arg.walk_end >= range.end().0 || arg.walk_end <= start {
            return Ok(());
        }
        start = arg.walk_end;
    }
}

/// What PAGEMAP_SCAN finds, before 6.7: 8 bytes a page are read, absent or not. The zero page counts as present, as
/// only a privileged reader could tell.
fn read_entries(file: &File, range: HostRange, each: Each<'_>) -> Result<(), OsError> {
    const ENTRY: usize = 8;
    let page_size = base_page_size();
    let mut buffer = vec![0u8; 64 << 10];
    let (mut at, end) = (range.start.0 / page_size, range.end().0.div_ceil(page_size));
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(usize::MAX).saturating_mul(ENTRY).min(buffer.len());
        let failed = |errno| OsError::new("read /proc/self/pagemap", errno).on(range);
        let got = match file.read_at(buffer.get_mut(..want).unwrap_or_default(), at.saturating_mul(ENTRY as u64)) {
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error.raw_os_error().unwrap_or(0))),
        };
        let entries = buffer.get(..got).unwrap_or_default().chunks_exact(ENTRY);
        if entries.len() == 0 {
            return Err(failed(libc::EIO));
        }
        for entry in entries {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
            if entry & (uapi::PAGEMAP_PRESENT | uapi::PAGEMAP_SWAPPED) != 0 {
                each(HostRange::new(HostAddr(at * page_size), page_size));
            }
            at += 1;
        }
    }
    Ok(())
}

/// Looks for data in a memory file, at ascending offsets. What one search has found out is not searched again: SEEK_HOLE
/// walks over all the data up to the next hole, however far.
struct Seek<'a> {
    file: &'a File,
    /// Up to `data` there is a hole from here.
    from: u64,
    data: Range<u64>,
}

impl<'a> Seek<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, from: 0, data: 0..0 }
    }

    /// The first run of data that ends after `at`, cut to start there; empty at the end if there is none.
    fn next(&mut self, at: u64) -> Result<Range<u64>, OsError> {
        if at < self.from || at >= self.data.end {
            self.data = match self.seek(at, Whence::SeekData)? {
                Some(start) => start..self.seek(start, Whence::SeekHole)?.unwrap_or(start),
                None => u64::MAX..u64::MAX,
            };
            self.from = at;
            if self.data.is_empty() && self.data.start != u64::MAX {
                return Err(OsError::new("lseek SEEK_HOLE", libc::EIO));
            }
        }
        Ok(self.data.start.max(at)..self.data.end)
    }

    /// `None`: not up to the end of the file.
    fn seek(&self, from: u64, whence: Whence) -> Result<Option<u64>, OsError> {
        let seek = |from| u64::try_from(lseek(self.file, from, whence)?).map_err(|_| Errno::EOVERFLOW);
        match i64::try_from(from).map_err(|_| Errno::EOVERFLOW).and_then(seek) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(OsError::new("lseek SEEK_DATA", errno as i32)),
        }
    }

    /// The data of the part of the file that starts at `offset` and is mapped at `range`.
    fn data(&mut self, offset: u64, range: HostRange, each: Each<'_>) -> Result<(), OsError> {
        let end = offset.saturating_add(range.len);
        let mut at = offset;
        while at < end {
            let data = self.next(at).map_err(|error| error.on(range))?;
            if data.start >= end {
                break;
            }
            at = data.end.min(end);
            each(HostRange::new(HostAddr(range.start.0 + (data.start - offset)), at - data.start));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(page_size: u64, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        let mut each = |r: HostRange| out.push((r.start.0, r.end().0));
        let mut merged = Merged { pending: None, page_size, each: &mut each };
        ranges.iter().for_each(|&(start, end)| merged.push(HostRange::new(HostAddr(start), end - start)));
        merged.finish();
        out
    }

    #[test]
    fn data_is_sought_once_and_found_from_anywhere() {
        let file = File::from(nix::sys::memfd::memfd_create(c"seek", nix::sys::memfd::MFdFlags::empty()).unwrap());
        let page = base_page_size();
        file.set_len(20 * page).unwrap();
        for at in [2, 3, 4, 9] {
            file.write_all_at(&[1], at * page).unwrap();
        }
        let mut seek = Seek::new(&file);
        let mut next = |at: u64| {
            let data = seek.next(at * page).unwrap();
            (data.start / page, data.end / page)
        };
        assert_eq!([0, 1, 2, 3, 4].map(&mut next), [(2, 5), (2, 5), (2, 5), (3, 5), (4, 5)]);
        assert_eq!([5, 9].map(&mut next), [(9, 10); 2]);
        let none = u64::MAX / page;
        assert_eq!([10, 19].map(&mut next), [(none, none); 2]);
        assert_eq!(next(1), (2, 5), "back to the start");
        // Cut to a part of the file, as it is mapped.
        let mut found = Vec::new();
        let range = HostRange::new(HostAddr(100 * page), 7 * page);
        seek.data(3 * page, range, &mut |r| found.push((r.start.0 / page, r.len / page))).unwrap();
        assert_eq!(found, [(100, 2), (106, 1)]);
    }

    #[test]
    fn ranges_are_widened_and_merged() {
        assert_eq!(
            merged(0x1000, &[(0x1000, 0x2000), (0x2000, 0x2800), (0x4000, 0x5000)]),
            [(0x1000, 0x3000), (0x4000, 0x5000)]
        );
        assert_eq!(merged(0x20_0000, &[(0x1000, 0x2000), (0x1f_f000, 0x20_1000)]), [(0, 0x40_0000)]);
        assert_eq!(merged(0x1000, &[(0x1000, 0x9000), (0x2000, 0x3000)]), [(0x1000, 0x9000)]);
        assert_eq!(merged(0x1000, &[]), []);
    }

    // Entry by entry must find what the scan finds (and may find the zero page too). Here: a fresh boxed slice, of
    // which every third page is written.
    #[test]
    fn both_ways_through_the_page_table_agree() {
        let page = usize::try_from(base_page_size()).unwrap();
        let mut memory = vec![0u8; page * 2001];
        for at in (0..2000).step_by(3) {
            memory[at * page + page - 1] = 1;
        }
        let start = memory.as_ptr().addr() as u64 & !(page as u64 - 1);
        let range = HostRange::new(HostAddr(start), page as u64 * 2000);
        let table = PageTable::open(&Owner::Us);
        let Some(file) = &table.file else { panic!("/proc/self/pagemap: {:?}", table.scan) };
        let collect = |f: &dyn Fn(Each<'_>)| {
            let mut found = Vec::new();
            let mut merged =
                Merged { pending: None, page_size: page as u64, each: &mut |r| found.push((r.start.0, r.end().0)) };
            f(&mut |r| merged.push(r));
            merged.finish();
            found
        };
        let read = collect(&|each| read_entries(file, range, each).unwrap());
        assert!(read.len() >= 600, "{} runs", read.len());
        if let Err(errno) = table.scan {
            eprintln!("SKIPPED: comparison with PAGEMAP_SCAN, which this kernel lacks ({errno})");
            return;
        }
        // More runs than one call of the scan returns.
        assert_eq!(collect(&|each| scan(file, range, each).unwrap()), read);
    }
}
