//! File access at offsets, the way a snapshot file is written: no shared file position, many threads at once.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;
use nix::unistd::{Whence, lseek};

/// Most slices the kernel takes in one call (`UIO_MAXIOV`); what is beyond is left for the caller's next call.
const MAX_SLICES: usize = 1024;

fn offset(at: u64) -> io::Result<i64> {
    i64::try_from(at)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("file offset {at:#x} is too large")))
}

/// Creates the file at `path`, which must not exist, open for reading and writing and for nobody but its owner (mode 0600,
/// less what the umask takes): it will hold a guest's memory, with all its secrets.
///
/// # Errors
/// What open(2) answered, [`AlreadyExists`](io::ErrorKind::AlreadyExists) above all.
pub fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Whether nobody else can have a say in what is in `file`: it belongs to this process's user, no other may write to it, and
/// it has one name.
///
/// # Errors
/// What stat(2) answered.
pub fn ours_alone(file: &File) -> io::Result<bool> {
    let stat = file.metadata()?;
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    let me = unsafe { libc::geteuid() };
    Ok(stat.uid() == me && stat.mode() & 0o022 == 0 && stat.nlink() == 1)
}

/// Reads into `into` from byte `at`; returns how many bytes, 0 at the end of the file.
///
/// # Errors
/// What pread(2) answered.
pub fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    file.read_at(into, at)
}

/// Writes `slices` one after the other from byte `at`; returns how many bytes were written, which may be fewer than
/// given.
///
/// # Errors
/// What pwritev(2) answered.
pub fn write_vectored_at(file: &File, slices: &[IoSlice<'_>], at: u64) -> io::Result<usize> {
    let slices = slices.get(..MAX_SLICES).unwrap_or(slices);
    Ok(pwritev(file, slices, offset(at)?)?)
}

/// Reserves disk space for `len` bytes from byte `at`, so that later writes there neither fail for lack of space nor
/// allocate. The file's size and content stay as they are.
///
/// # Errors
/// [`Unsupported`](io::ErrorKind::Unsupported) if the file system cannot (the file works without); otherwise what
/// fallocate(2) answered, [`StorageFull`](io::ErrorKind::StorageFull) above all.
pub fn allocate(file: &File, at: u64, len: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset(at)?, offset(len)?) {
        Ok(()) => Ok(()),
        Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {
            Err(io::Error::new(io::ErrorKind::Unsupported, "the file system cannot allocate space ahead"))
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Gives up the disk space of `len` bytes from byte `at`: a hole, which reads as zeros.
///
/// # Errors
/// What fallocate(2) answered.
pub fn give_back(file: &File, at: u64, len: u64) -> io::Result<()> {
    let hole = FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_PUNCH_HOLE;
    Ok(fallocate(file, hole, offset(at)?, offset(len)?)?)
}

/// `file`, which lies at `path`, opened once more so that pages written go to the device without a copy in the page cache:
/// the processor has less to do, and no throttling of dirty pages can reach anybody. `None` where that cannot be had,
/// or brings nothing (a file system in memory).
///
/// What is written to it must start at a multiple of 4096 bytes in the file and in memory, and be a multiple of it long.
///
/// Needs Linux 6.1, which says whether a file can (`STATX_DIOALIGN`).
#[must_use]
pub fn direct(file: &File, path: &Path) -> Option<File> {
    const PAGE: u32 = 4096;
    let empty = c"";
    let mut stat = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: `file` is open, `empty` is a C string, `stat` is a live `statx` that the kernel fills.
    let asked = unsafe { libc::statx(file.as_raw_fd(), empty.as_ptr(), libc::AT_EMPTY_PATH, mask, stat.as_mut_ptr()) };
    // SAFETY: all its fields are integers, for which zeros are a value, whatever the kernel has filled.
    let stat = unsafe { stat.assume_init() };
    let fits = |align: u32| align > 0 && PAGE.is_multiple_of(align);
    if asked != 0 || stat.stx_mask & mask == 0 || !fits(stat.stx_dio_mem_align) || !fits(stat.stx_dio_offset_align) {
        return None;
    }
    let direct = File::options().write(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path).ok()?;
    // Not if somebody has put another file there meanwhile.
    same_file(file, path).is_ok_and(|same| same).then_some(direct)
}

/// Makes what happened to the names in a directory (create, rename) durable.
///
/// # Errors
/// What open(2) or fsync(2) answered.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Whether `path` still names `file`: another process may have renamed or removed it meanwhile.
///
/// # Errors
/// What stat(2) answered; [`Unsupported`](io::ErrorKind::Unsupported) where files have no identity to compare.
pub fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    let (opened, named) = (file.metadata()?, std::fs::symlink_metadata(path)?);
    Ok(opened.dev() == named.dev() && opened.ino() == named.ino())
}

/// Where the next stored data begins at or after byte `at`; `None` if only a hole follows. A file system that knows no
/// holes answers `at`.
///
/// # Errors
/// What lseek(2) answered.
pub fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match lseek(file, offset(at)?, Whence::SeekData) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(nix::errno::Errno::EINVAL) => Ok(Some(at)),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_slices_are_read_back_and_allocation_keeps_the_size() {
        let file = tempfile::tempfile().unwrap();
        let written = write_vectored_at(&file, &[IoSlice::new(b"live "), IoSlice::new(b"snapshot")], 4096).unwrap();
        assert_eq!(written, 13);
        let mut back = [0; 20];
        assert_eq!(read_at(&file, &mut back, 4101).unwrap(), 8);
        assert_eq!(&back[..8], b"snapshot");
        match allocate(&file, 0, 1 << 20) {
            Ok(()) => assert_eq!(file.metadata().unwrap().len(), 4109),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported),
        }
    }

    #[test]
    fn a_new_file_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = create_private(&path).unwrap();
        let mode = || file.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode() & 0o177, 0, "{:o}", mode());
        assert_eq!(create_private(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(ours_alone(&file).unwrap());
        std::fs::hard_link(&path, dir.path().join("other")).unwrap();
        assert!(!ours_alone(&file).unwrap(), "it has two names");
        std::fs::remove_file(dir.path().join("other")).unwrap();
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o660)).unwrap();
        assert!(!ours_alone(&file).unwrap(), "its group may write to it");
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        if std::os::unix::fs::fchown(&file, Some(12345), None).is_ok() {
            assert!(!ours_alone(&file).unwrap(), "it is another user's");
        }
    }

    #[test]
    fn directly_written_pages_are_read_back() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("file");
        let file = File::create_new(&path).unwrap();
        let Some(direct) = direct(&file, &path) else {
            eprintln!("SKIPPED: the file system of {path:?} has no direct I/O");
            return;
        };
        let mut buffer = vec![0u8; 3 * 4096];
        let at = buffer.as_ptr().align_offset(4096);
        buffer[at..at + 4096].fill(7);
        let written = write_vectored_at(&direct, &[IoSlice::new(&buffer[at..at + 4096])], 8192).unwrap();
        assert_eq!(written, 4096);
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() == 3 * 4096 && bytes[8192..].iter().all(|&byte| byte == 7));
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        File::create_new(&path).unwrap();
        assert!(super::direct(&file, &path).is_none(), "another file has that name now");
    }

    #[test]
    fn more_slices_than_the_kernel_takes_are_written_in_part() {
        let file = tempfile::tempfile().unwrap();
        let slices: Vec<_> = (0..1500).map(|_| IoSlice::new(b"x")).collect();
        assert_eq!(write_vectored_at(&file, &slices, 0).unwrap(), 1024);
    }

    #[test]
    fn an_offset_beyond_the_kernels_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write_vectored_at(&file, &[], u64::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(sync_dir(Path::new("/nonexistent-directory")).is_err());
        sync_dir(&std::env::temp_dir()).unwrap();
    }
}
