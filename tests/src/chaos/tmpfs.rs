//! A small file system that really gets full.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// A tmpfs of a given size, mounted where only the calling thread and the threads it starts see it: it goes with them,
/// whatever happens.
#[derive(Debug)]
pub struct TinyFs {
    path: CString,
}

impl TinyFs {
    /// Mounts it. Takes root.
    ///
    /// # Errors
    /// The system's answer.
    pub fn mount(at: &Path, bytes: u64) -> io::Result<Self> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        let path = CString::new(at.as_os_str().as_bytes())?;
        let options = CString::new(format!("size={bytes},mode=0700"))?;
        check(mount(ptr::null(), c"/".as_ptr(), ptr::null(), libc::MS_REC | libc::MS_PRIVATE, ptr::null()))?;
        check(mount(c"tmpfs".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()))?;
        Ok(Self { path })
    }
}

fn mount(
    source: *const libc::c_char,
    target: *const libc::c_char,
    kind: *const libc::c_char,
    flags: libc::c_ulong,
    options: *const libc::c_void,
) -> libc::c_int {
    // SAFETY: each pointer is null where the call allows it, or to a C string that lives longer than the call.
    unsafe { libc::mount(source, target, kind, flags, options) }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Drop for TinyFs {
    fn drop(&mut self) {
        // SAFETY: a C string.
        unsafe { libc::umount2(self.path.as_ptr(), libc::MNT_DETACH) };
    }
}
