//! What this system offers, and who we are.

use std::ffi::{CStr, c_char, c_int};

use crate::error::{Error, guard};
use crate::pass;
use crate::ram::Ram;

/// Version of the library: three numbers with dots.
#[unsafe(no_mangle)]
pub extern "C" fn ramshot_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// Whether writes to guest RAM can be tracked by this process on this system. Costs nothing, changes nothing.
///
/// `text`, unless it is NULL, receives a list for people of what is there and what is missing: at most `size` bytes, the
/// terminating zero included.
///
/// Returns 0, or -ENOTSUP: ramshot_last_error says what is missing, why, and what to do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_probe(text: *mut c_char, size: usize) -> c_int {
    guard(|| {
        let probe = ramshot::probe();
        if !text.is_null() && size > 0 {
            let list = probe.to_string();
            let end = (0..size.min(list.len() + 1)).rev().find(|&end| list.is_char_boundary(end)).unwrap_or(0);
            let list = list.get(..end).unwrap_or_default();
            // SAFETY: `size` bytes are writable (the caller's promise), and no more than that are written.
            unsafe {
                std::ptr::copy_nonoverlapping(list.as_ptr(), text.cast(), list.len());
                text.add(list.len()).write(0);
            }
        }
        match probe.missing().first() {
            Some(missing) if !probe.is_available() => Err(Error::from(missing)),
            None if !probe.is_available() => Err(Error::new(libc::ENOTSUP, "writes cannot be tracked on this system")),
            _ => Ok(()),
        }
    })
}

/// Whether every region of `ram` could be tracked now. Registers each with a throw-away userfaultfd and unregisters it.
///
/// Returns 0, or -ENOTSUP: ramshot_last_error says which region, what is missing, and what to do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_compatible(ram: *const Ram) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let ram = unsafe { pass::get(ram, "ram") }?;
        let mut verdicts = ramshot::compatible(&ram.0).into_iter();
        verdicts.find_map(|(_, verdict)| verdict.err()).map_or(Ok(()), |missing| Err(Error::from(&missing)))
    })
}
