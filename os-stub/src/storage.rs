//! File access at offsets with what every system has: a file position, moved under one lock of the process.

use std::fs::File;
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held from moving a file's position until it is used.
static POSITION: Mutex<()> = Mutex::new(());

fn at(mut file: &File, at: u64) -> io::Result<MutexGuard<'static, ()>> {
    let guard = POSITION.lock().unwrap_or_else(PoisonError::into_inner);
    file.seek(SeekFrom::Start(at))?;
    Ok(guard)
}

/// Creates the file at `path`, which must not exist, open for reading and writing. Who else may read it is what the system
/// gives new files (the standard library cannot say otherwise everywhere): put it into a directory of your own.
///
/// # Errors
/// What the system answered, [`AlreadyExists`](io::ErrorKind::AlreadyExists) above all.
pub fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(path)
}

/// Whether nobody else can have a say in what is in a file: not known here, so no.
///
/// # Errors
/// None; the signature is the Linux shim's.
pub fn ours_alone(_file: &File) -> io::Result<bool> {
    Ok(false)
}

/// Reads into `into` from byte `from`; returns how many bytes, 0 at the end of the file.
///
/// # Errors
/// What the system answered.
pub fn read_at(mut file: &File, into: &mut [u8], from: u64) -> io::Result<usize> {
    let _held = at(file, from)?;
    file.read(into)
}

/// Writes `slices` one after the other from byte `to`; returns how many bytes were written, which may be fewer than
/// given.
///
/// # Errors
/// What the system answered.
pub fn write_vectored_at(mut file: &File, slices: &[IoSlice<'_>], to: u64) -> io::Result<usize> {
    let _held = at(file, to)?;
    file.write_vectored(slices)
}

/// Reserves disk space ahead: not here.
///
/// # Errors
/// [`Unsupported`](io::ErrorKind::Unsupported), always; the file works without.
pub fn allocate(_file: &File, _at: u64, _len: u64) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this system cannot allocate file space ahead"))
}

/// Gives up disk space: not here.
///
/// # Errors
/// [`Unsupported`](io::ErrorKind::Unsupported), always.
pub fn give_back(_file: &File, _at: u64, _len: u64) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this system cannot give file space back"))
}

/// `file` opened once more for writes past the page cache: not here.
#[must_use]
pub const fn direct(_file: &File, _path: &Path) -> Option<File> {
    None
}

/// Makes what happened to the names in a directory durable, where a directory can be opened as a file; elsewhere
/// (Windows) that is the file system's own business and this does nothing.
///
/// # Errors
/// What the system answered, a directory that does not exist above all.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(directory) => directory.sync_all(),
        Err(_) if path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether `path` still names `file`.
///
/// # Errors
/// Always [`Unsupported`](io::ErrorKind::Unsupported): the standard library gives files no identity to compare.
pub fn same_file(_file: &File, _path: &Path) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Where the next stored data begins at or after byte `at`: at `at`, holes are not known here.
///
/// # Errors
/// None; the signature is the Linux shim's.
pub fn next_data(_file: &File, at: u64) -> io::Result<Option<u64>> {
    Ok(Some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("ramshot-stub-{name}-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        (path, file.expect("a file in the temporary directory"))
    }

    #[test]
    fn written_slices_are_read_back() {
        let (path, file) = scratch("slices");
        let mut at = 4096;
        for word in [&b"live "[..], b"snapshot"] {
            at += write_vectored_at(&file, &[IoSlice::new(word)], at).expect("written") as u64;
        }
        let mut back = [0; 20];
        assert_eq!(read_at(&file, &mut back, 4101).expect("read"), 8);
        assert_eq!(&back[..8], b"snapshot");
        assert_eq!(read_at(&file, &mut back, 9999).expect("read"), 0);
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn a_new_file_is_new() {
        let path = std::env::temp_dir().join(format!("ramshot-stub-new-{}", std::process::id()));
        let file = create_private(&path).expect("created");
        assert_eq!(create_private(&path).map_err(|e| e.kind()).err(), Some(io::ErrorKind::AlreadyExists));
        assert!(!ours_alone(&file).expect("an answer"));
        std::fs::remove_file(path).expect("removed");
    }

    // The position is shared, the accesses are not torn apart.
    #[test]
    fn threads_do_not_move_each_others_position() {
        let (path, file) = scratch("threads");
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let file = &file;
                scope.spawn(move || {
                    for turn in 0..200u64 {
                        let at = (turn * 4 + u64::from(thread)) * 8;
                        assert_eq!(write_vectored_at(file, &[IoSlice::new(&[thread; 8])], at).expect("written"), 8);
                    }
                });
            }
        });
        let mut all = vec![0; 200 * 4 * 8];
        assert_eq!(read_at(&file, &mut all, 0).expect("read"), all.len());
        for (at, chunk) in all.chunks(8).enumerate() {
            assert!(chunk.iter().all(|&byte| usize::from(byte) == at % 4), "at {at}: {chunk:?}");
        }
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn directories_are_synced_or_missing() {
        sync_dir(&std::env::temp_dir()).expect("synced");
        assert!(sync_dir(Path::new("nonexistent-directory")).is_err());
        let (path, file) = scratch("allocate");
        assert_eq!(allocate(&file, 0, 1).map_err(|e| e.kind()), Err(io::ErrorKind::Unsupported));
        std::fs::remove_file(path).expect("removed");
    }
}
