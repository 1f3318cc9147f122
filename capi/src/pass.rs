//! What crosses the boundary: pointers checked for NULL, structures by the size that the caller knows.

use std::ffi::{CStr, OsStr, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use crate::error::Error;

/// A structure that a C program fills or reads: `repr(C)`, of integers and pointers only.
///
/// # Safety
/// All bytes zero must be a valid value.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}

fn null(name: &str) -> Error {
    Error::invalid(format!("{name} is NULL"))
}

/// What a pointer to a handle or value points to.
///
/// # Safety
/// `pointer` is NULL or points to a `T` that lives and is not changed but through its own locks for `'a`.
pub(crate) unsafe fn get<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Error> {
    // SAFETY: as promised by the caller.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(name))
}

/// Frees a handle; NULL is fine.
///
/// # Safety
/// `handle` is NULL or came from [`Out::give`], and is not used any more.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: it was a `Box` there, and nobody else has it.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// Where a new handle goes. NULL stands there until it is given.
pub(crate) struct Out<T>(*mut *mut T);

impl<T> Out<T> {
    /// # Safety
    /// `place` is NULL or may be written until the value is dropped.
    pub(crate) unsafe fn new(place: *mut *mut T, name: &str) -> Result<Self, Error> {
        if place.is_null() {
            return Err(null(name));
        }
        // SAFETY: not NULL, so it may be written.
        unsafe { place.write(ptr::null_mut()) };
        Ok(Self(place))
    }

    pub(crate) fn give(self, value: T) {
        // SAFETY: the promise of `new`.
        unsafe { self.0.write(Box::into_raw(Box::new(value))) };
    }
}

/// Copies a structure in, of which the caller knows `size` bytes: what it does not know is zero, and what we do not know
/// must be.
///
/// # Safety
/// `pointer` is NULL or points to `size` readable bytes.
pub(crate) unsafe fn read<T: Plain>(pointer: *const T, size: usize, name: &str) -> Result<T, Error> {
    let known = size_of::<T>();
    if pointer.is_null() {
        return Err(null(name));
    }
    check_size(size, name)?;
    // SAFETY: `size` bytes are readable, and any byte is a `u8`.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if bytes.iter().skip(known).any(|&byte| byte != 0) {
        return Err(Error::new(
            libc::E2BIG,
            format!(
                "{name} has {size} bytes, of which this ramshot ({}) knows {known}, and those after are not zero: it uses \
                 what a newer ramshot has",
                env!("CARGO_PKG_VERSION")
            ),
        ));
    }
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: no more than a `T` is written to one; the two do not overlap, one being our own.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast(), size.min(known)) };
    // SAFETY: zeros are a valid `T`, and its fields are integers and pointers: whatever was copied is valid.
    Ok(unsafe { value.assume_init() })
}

/// Copies a structure out, of which the caller knows `size` bytes; those that we do not know become zero.
///
/// # Safety
/// `pointer` is NULL or points to `size` writable bytes.
pub(crate) unsafe fn write<T: Plain>(pointer: *mut T, size: usize, value: T) {
    if pointer.is_null() {
        return;
    }
    // SAFETY: `size` bytes are writable.
    unsafe { ptr::write_bytes(pointer.cast::<u8>(), 0, size) };
    // SAFETY: no more than `size` bytes are written and no more than a `T` read.
    unsafe { ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), pointer.cast(), size.min(size_of::<T>())) };
}

/// Whether a place for a structure can be one; done before the work whose outcome goes there.
pub(crate) fn check_size(size: usize, name: &str) -> Result<(), Error> {
    // A page is far more than any structure will ever have; beyond that it is a mistake.
    if (1..=4096).contains(&size) {
        return Ok(());
    }
    Err(Error::invalid(format!("the size given for {name} is {size}: pass sizeof *{name}")))
}

/// The same for a place that must be there.
pub(crate) fn check_out<T>(pointer: *mut T, size: usize, name: &str) -> Result<(), Error> {
    if pointer.is_null() { Err(null(name)) } else { check_size(size, name) }
}

/// `count` elements of `size` bytes each.
///
/// # Safety
/// `pointer` points to them, readable, or `count` is 0.
pub(crate) unsafe fn read_all<T: Plain>(
    pointer: *const T,
    count: usize,
    size: usize,
    name: &str,
) -> Result<Vec<T>, Error> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if pointer.is_null() {
        return Err(Error::invalid(format!("{name} is NULL, and {count} of them were announced")));
    }
    check_size(size, name)?;
    if count > 1 << 20 {
        return Err(Error::invalid(format!("{count} {name} are too many")));
    }
    let bytes = pointer.cast::<u8>();
    // SAFETY: `count` elements lie at `pointer`, `size` bytes each.
    (0..count).map(|index| unsafe { read(bytes.add(index * size).cast(), size, name) }).collect()
}

/// `len` bytes.
///
/// # Safety
/// `pointer` points to them, readable for `'a`, or `len` is 0.
pub(crate) unsafe fn bytes<'a>(pointer: *const std::ffi::c_void, len: usize, name: &str) -> Result<&'a [u8], Error> {
    if len == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(Error::invalid(format!("{name} is NULL, and {len} bytes of it were announced")));
    }
    if isize::try_from(len).is_err() {
        return Err(Error::invalid(format!("{len} bytes of {name} are more than there can be")));
    }
    // SAFETY: as promised by the caller.
    Ok(unsafe { std::slice::from_raw_parts(pointer.cast(), len) })
}

/// A path: any bytes up to the first zero.
///
/// # Safety
/// `pointer` is NULL or points to a string that ends with a zero byte, readable for `'a`.
pub(crate) unsafe fn path<'a>(pointer: *const c_char) -> Result<&'a Path, Error> {
    if pointer.is_null() {
        return Err(null("path"));
    }
    // SAFETY: as promised by the caller.
    Ok(Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(pointer) }.to_bytes())))
}

/// A text in UTF-8.
///
/// # Safety
/// As [`path`].
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Error> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: as promised by the caller.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| Error::invalid(format!("{name} {text:?} is not UTF-8")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    #[repr(C)]
    struct Two {
        first: u64,
        second: u64,
    }

    // SAFETY: two integers.
    unsafe impl Plain for Two {}

    fn take(words: &[u64]) -> Result<Two, Error> {
        // SAFETY: a slice is readable as long as it is.
        unsafe { read(words.as_ptr().cast(), size_of_val(words), "words") }
    }

    #[test]
    fn callers_of_other_versions_are_understood() {
        assert_eq!(take(&[7, 8]).unwrap(), Two { first: 7, second: 8 });
        assert_eq!(take(&[7]).unwrap(), Two { first: 7, second: 0 }, "an older caller");
        assert_eq!(take(&[7, 8, 0]).unwrap(), Two { first: 7, second: 8 }, "a newer one that uses nothing new");
        assert!(take(&[7, 8, 9]).is_err(), "a newer one that does");
        assert!(take(&[]).is_err());
    }

    #[test]
    fn what_is_written_fits_the_caller() {
        let value = Two { first: 7, second: 8 };
        let mut words = [1u64; 4];
        // SAFETY: there is room for what is said to be.
        unsafe { write(words.as_mut_ptr().cast(), 8, value) };
        assert_eq!(words, [7, 1, 1, 1], "an older caller");
        // SAFETY: as above.
        unsafe { write(words.as_mut_ptr().cast(), 24, value) };
        assert_eq!(words, [7, 8, 0, 1], "a newer one");
    }
}
