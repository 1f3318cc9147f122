//! Snapshot files: what is in them, whether they are intact, and back into RAM.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use ramshot::core::{MAX_NAME, PageId, Treatment};
use ramshot::file::{FileBlock, PageState};
use ramshot::{Chain, SnapshotFile};

use crate::error::{Error, guard};
use crate::pass::{self, Out, Plain};
use crate::ram::{RAMSHOT_IGNORED, RAMSHOT_IN_PAUSE, RAMSHOT_READ_ONLY, RAMSHOT_TRACKED, Ram};

/// A page that is all zeros.
pub const RAMSHOT_PAGE_ZERO: u32 = 0;
/// A page whose bytes are in the file.
pub const RAMSHOT_PAGE_DATA: u32 = 1;
/// A page of an increment that is as it is in the snapshot below.
pub const RAMSHOT_PAGE_IN_PARENT: u32 = 2;

/// An open snapshot file. May be used by several threads at a time.
#[derive(Debug)]
pub struct File(pub(crate) SnapshotFile);

/// What is in a snapshot. Pages have 4096 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct FileInfo {
    /// Its id.
    pub id: [u8; 16],
    /// Id of the snapshot that it is an increment on; all zero if it is a full one.
    pub parent_id: [u8; 16],
    /// Pages of RAM.
    pub pages: u64,
    /// Of those, with data in this file.
    pub data_pages: u64,
    /// Of those, known to be zero.
    pub zero_pages: u64,
    /// Of those, in the snapshot below.
    pub in_parent_pages: u64,
    /// Apparent size of the file in bytes.
    pub image_bytes: u64,
    /// Length of the device state in bytes.
    pub device_state_len: u64,
    /// RAM blocks, ignored ones included.
    pub blocks: u32,
    /// 1 if it is an increment, else 0.
    pub increment: u32,
}

// SAFETY: integers.
unsafe impl Plain for FileInfo {}

/// A RAM block as the snapshot has it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Block {
    /// The region's name, at most 47 bytes and a zero.
    pub name: [c_char; 48],
    /// Guest-physical address, in bytes.
    pub guest: u64,
    /// Length of the mapping in bytes.
    pub len: u64,
    /// How much of it was in use, in bytes: what the file holds, unless the block is ignored.
    pub used: u64,
    /// Host page size at capture, in bytes. A restore may use another.
    pub page_size: u64,
    /// Its first page: byte first_page * 4096 of the file.
    pub first_page: u64,
    /// RAMSHOT_TRACKED, RAMSHOT_READ_ONLY, RAMSHOT_IN_PAUSE or RAMSHOT_IGNORED.
    pub treatment: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers.
unsafe impl Plain for Block {}

/// What was restored. Pages have 4096 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RestoreReport {
    /// Pages written to guest RAM, each checked.
    pub data_pages: u64,
    /// Pages left as they were, because they are zero.
    pub zero_pages: u64,
}

// SAFETY: integers.
unsafe impl Plain for RestoreReport {}

/// Hears of pages done and their total. Called by the thread that called ramshot_file_verify. Must not longjmp or throw.
pub type VerifyProgress = Option<unsafe extern "C" fn(opaque: *mut c_void, done: u64, total: u64)>;

/// Opens a snapshot and checks everything but the bytes of its pages.
///
/// Returns 0 and a handle in *file, to be freed with ramshot_file_close; or -EINVAL, -EBADMSG (not a complete snapshot, or
/// damaged), -ENOTSUP (of a newer format), -ENOMEM, or the system's error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_open(path: *const c_char, file: *mut *mut File) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(file, "file") }?;
        // SAFETY: the caller's promise.
        let path = unsafe { pass::path(path) }?;
        out.give(File(SnapshotFile::open(path)?));
        Ok(())
    })
}

/// Closes the file; NULL is allowed. What ramshot_file_device_state gave is gone then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_close(file: *mut File) {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { pass::free(file) };
        Ok(())
    });
}

/// What is in the snapshot, in *info; `size` is sizeof *info.
///
/// Returns 0, or -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_info(file: *const File, info: *mut FileInfo, size: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let file = &unsafe { pass::get(file, "file") }?.0;
        pass::check_out(info, size, "info")?;
        let found = FileInfo {
            id: file.id().0,
            parent_id: file.parent().map(|parent| parent.id.0).unwrap_or_default(),
            pages: file.pages(),
            data_pages: file.data_pages(),
            zero_pages: file.zero_pages(),
            in_parent_pages: file.in_parent_pages(),
            image_bytes: file.image_bytes(),
            device_state_len: file.device_state().len() as u64,
            blocks: u32::try_from(file.blocks().len()).unwrap_or(u32::MAX),
            increment: file.parent().is_some().into(),
        };
        // SAFETY: the caller's promise.
        unsafe { pass::write(info, size, found) };
        Ok(())
    })
}

/// RAM block number `index` (from 0, as many as ramshot_file_info says), in *block; `size` is sizeof *block.
///
/// Returns 0, or -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_block(file: *const File, index: u32, block: *mut Block, size: usize) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let file = &unsafe { pass::get(file, "file") }?.0;
        pass::check_out(block, size, "block")?;
        let found = usize::try_from(index).ok().and_then(|index| file.blocks().get(index)).ok_or_else(|| {
            Error::invalid(format!("there is no RAM block {index}: the snapshot has {}", file.blocks().len()))
        })?;
        // SAFETY: the caller's promise.
        unsafe { pass::write(block, size, Block::from(found)) };
        Ok(())
    })
}

/// The device state as it was given to ramshot_begin: its address, and its length in *len (NULL is allowed). Valid until the
/// file is closed. NULL if there is none, or `file` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_device_state(file: *const File, len: *mut u64) -> *const c_void {
    // SAFETY: the caller's promise.
    let state = unsafe { file.as_ref() }.map_or(&[][..], |file| file.0.device_state());
    // SAFETY: the caller's promise.
    unsafe { pass::write(len, size_of::<u64>(), state.len() as u64) };
    if state.is_empty() { ptr::null() } else { state.as_ptr().cast() }
}

/// Reads page number `page` (its place in the file is page * 4096) into the 4096 bytes at `into`, and checks it. *state (NULL
/// is allowed) becomes RAMSHOT_PAGE_DATA, _ZERO, or _IN_PARENT: `into` is left as it was then, and the parent must be asked.
///
/// Returns 0, -EINVAL, -EBADMSG (damaged), or the system's error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_read_page(
    file: *const File,
    page: u64,
    into: *mut c_void,
    state: *mut u32,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let file = &unsafe { pass::get(file, "file") }?.0;
        pass::check_out(into, 4096, "into")?;
        let mut bytes = [0; 4096];
        let found = file.read_page(PageId(page), &mut bytes)?;
        if found != PageState::InParent {
            // SAFETY: 4096 bytes are writable: the caller's promise.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), into.cast(), bytes.len()) };
        }
        let number = match found {
            PageState::Zero => RAMSHOT_PAGE_ZERO,
            PageState::Data => RAMSHOT_PAGE_DATA,
            PageState::InParent => RAMSHOT_PAGE_IN_PARENT,
        };
        // SAFETY: the caller's promise.
        unsafe { pass::write(state, size_of::<u32>(), number) };
        Ok(())
    })
}

/// Reads the whole snapshot and checks every page, on `threads` threads (1 to 256; 0 is taken for 1). `progress` hears how
/// far it is, unless it is NULL; `opaque` is passed to it.
///
/// Returns 0; -EBADMSG: ramshot_last_error names the first page that is wrong; -EINVAL; or the system's error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_verify(
    file: *const File,
    threads: u32,
    progress: VerifyProgress,
    opaque: *mut c_void,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let file = &unsafe { pass::get(file, "file") }?.0;
        file.verify(count(threads)?, &mut |done, total| {
            if let Some(progress) = progress {
                // SAFETY: the caller's function with the caller's argument.
                unsafe { progress(opaque, done, total) };
            }
        })?;
        Ok(())
    })
}

/// Fills `ram` from a snapshot, on `threads` threads (1 to 256; 0 is taken for 1), reading straight into it and checking
/// every page there. The regions must be those of the snapshot by name, guest address and length in use. They must be
/// fresh: zero pages are not written. No vCPU may run yet. `report` may be NULL; `size` is sizeof *report. The parents of an
/// increment are looked for beside it, by id and checksum.
///
/// Returns 0; -EINVAL (another RAM layout), -ENODATA (a parent is not there) or -ESTALE (another file has taken this one's
/// place, or a parent's), and nothing was touched; -EBADMSG (damaged), -EACCES (a region is not writable) or the system's error, and what is in the
/// regions is undefined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_file_restore(
    file: *const File,
    ram: *const Ram,
    threads: u32,
    report: *mut RestoreReport,
    size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let file = &unsafe { pass::get(file, "file") }?.0;
        // SAFETY: the caller's promise.
        let ram = &unsafe { pass::get(ram, "ram") }?.0;
        if !report.is_null() {
            pass::check_size(size, "report")?;
        }
        let threads = count(threads)?;
        let done = match file.parent() {
            None => file.restore_into(ram.table(), &**ram, threads)?,
            Some(_) => {
                let chain = Chain::open(file.path())?;
                if chain.tip().as_parent() != file.as_parent() {
                    let what = format!("{:?} is another snapshot than when it was opened: open it again", file.path());
                    return Err(Error::new(libc::ESTALE, what));
                }
                chain.restore_into(ram.table(), &**ram, threads)?
            }
        };
        let done = RestoreReport { data_pages: done.data_pages, zero_pages: done.zero_pages };
        // SAFETY: the caller's promise.
        unsafe { pass::write(report, size, done) };
        Ok(())
    })
}

fn count(threads: u32) -> Result<usize, Error> {
    let in_range = usize::try_from(threads).ok().filter(|threads| *threads <= 256);
    in_range
        .map(|threads| threads.max(1))
        .ok_or_else(|| Error::invalid(format!("threads is {threads}; it must be between 1 and 256")))
}

impl From<&FileBlock> for Block {
    fn from(block: &FileBlock) -> Self {
        let mut name = [0; MAX_NAME + 1];
        for (to, from) in name.iter_mut().zip(block.name.as_str().bytes().take(MAX_NAME)) {
            *to = c_char::from_ne_bytes([from]);
        }
        Self {
            name,
            guest: block.guest.0,
            len: block.len,
            used: block.used,
            page_size: block.page_size,
            first_page: block.first_page.0,
            treatment: match block.treatment {
                Treatment::Tracked => RAMSHOT_TRACKED,
                Treatment::ReadOnly => RAMSHOT_READ_ONLY,
                Treatment::InPause => RAMSHOT_IN_PAUSE,
                Treatment::Ignored => RAMSHOT_IGNORED,
            },
            reserved: 0,
        }
    }
}
