//! Outcomes for C: a negative errno, and a sentence that the same thread can ask for.

use std::any::Any;
use std::cell::RefCell;
use std::error::Error as StdError;
use std::ffi::{CString, c_char, c_int};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ramshot::core::{OsError, SetupError};
use ramshot::file::{ChainError, CreateError, OpenError, OpenErrorKind, ReadError, ReadErrorKind, RestoreError};
use ramshot::{Cause, DirtyError, Missing, PrepareError, RamError, SetupFailed, SnapshotFailed, TrackError};

thread_local! {
    static LAST: RefCell<CString> = RefCell::new(CString::default());
}

/// What failed: an errno (positive) and a sentence.
#[derive(Debug)]
pub(crate) struct Error {
    errno: c_int,
    says: String,
}

impl Error {
    pub(crate) fn new(errno: c_int, says: impl Into<String>) -> Self {
        Self { errno, says: says.into() }
    }

    /// The caller gave something that cannot be.
    pub(crate) fn invalid(says: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, says)
    }

    fn of(errno: c_int, error: &dyn StdError) -> Self {
        Self::new(errno, sentence(error))
    }
}

/// The error and its causes. Some of ours quote their cause already.
fn sentence(error: &dyn StdError) -> String {
    let mut says = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !says.contains(&text) {
            says = format!("{says}: {text}");
        }
        source = cause.source();
    }
    says
}

/// Runs a function of the C ABI: 0, or the error as a negative errno, kept for [`ramshot_last_error`]. Panics end here
/// (where panics unwind; with `panic=abort` there are none to end).
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Error>) -> c_int {
    // What a panic may have left half done is behind locks that the engine never leaves half done, or is lost with it.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(panicked(payload)));
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            keep(&error.says);
            // An errno of 0 would read as success.
            if error.errno > 0 { -error.errno } else { -libc::EIO }
        }
    }
}

fn panicked(payload: Box<dyn Any + Send>) -> Error {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
    // Dropping it may panic once more.
    std::mem::forget(payload);
    Error::new(libc::ENOTRECOVERABLE, format!("a bug in ramshot, please report it: it panicked with {text:?}"))
}

fn keep(says: &str) {
    let text: Vec<u8> = says.bytes().filter(|&byte| byte != 0).collect();
    // A thread that is ending has nobody left to ask.
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = CString::new(text).unwrap_or_default();
        }
    });
}

/// What went wrong in the last call of this thread that failed: a sentence in UTF-8 that names the thing, the value and the
/// way out. Empty if none has failed yet. Successful calls leave it as it is.
///
/// The text belongs to the library and stays valid until the next call of this thread fails, or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn ramshot_last_error() -> *const c_char {
    LAST.try_with(|last| last.try_borrow().map_or(c"".as_ptr(), |last| last.as_ptr())).unwrap_or(c"".as_ptr())
}

fn os(error: OsError) -> c_int {
    error.errno
}

fn io(error: &io::Error) -> c_int {
    error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::Unsupported => libc::ENOTSUP,
        io::ErrorKind::NotFound => libc::ENOENT,
        io::ErrorKind::AlreadyExists => libc::EEXIST,
        _ => libc::EIO,
    })
}

fn cause(cause: &Cause) -> c_int {
    match cause {
        Cause::Cancelled => libc::ECANCELED,
        Cause::Arm(error) | Cause::Capture(error) | Cause::Release(error) | Cause::Events(error) => os(*error),
        Cause::PoolFull => libc::ENOBUFS,
        Cause::Discarded(_) | Cause::Unmapped(_) => libc::EFAULT,
        Cause::ThreadDied => libc::ENOTRECOVERABLE,
        _ => libc::EIO,
    }
}

fn dirty(error: &DirtyError) -> c_int {
    match error {
        DirtyError::Log(error) => os(*error),
        DirtyError::NoBase => libc::ENODATA,
        DirtyError::Busy => libc::EBUSY,
        _ => libc::EINVAL,
    }
}

fn track(error: &TrackError) -> c_int {
    match error {
        TrackError::Os(error) => os(*error),
        TrackError::Unsuitable(_) => libc::EINVAL,
        _ => libc::ENOTSUP,
    }
}

fn create(error: &CreateError) -> c_int {
    match error {
        CreateError::NoName { .. } | CreateError::NotAFile { .. } => libc::EINVAL,
        CreateError::NoDirectory { source, .. } | CreateError::Io { source, .. } => io(source),
        CreateError::Exists { .. } | CreateError::Leftover { .. } => libc::EEXIST,
        CreateError::Busy { .. } => libc::EBUSY,
        CreateError::TooLarge { .. } => libc::EFBIG,
    }
}

fn setup(error: &SetupFailed) -> c_int {
    match error {
        SetupFailed::Pool { source: SetupError::PoolStorage { .. }, .. } => libc::ENOMEM,
        SetupFailed::Dirty(error) => dirty(error),
        SetupFailed::Thread(source) => io(source),
        _ => libc::EINVAL,
    }
}

fn open(kind: &OpenErrorKind) -> c_int {
    match kind {
        OpenErrorKind::Io { source, .. } => io(source),
        OpenErrorKind::NotAFile { .. } => libc::EINVAL,
        OpenErrorKind::Version { .. } | OpenErrorKind::UnknownSection { .. } => libc::ENOTSUP,
        OpenErrorKind::OutOfMemory { .. } => libc::ENOMEM,
        _ => libc::EBADMSG,
    }
}

fn read(kind: &ReadErrorKind) -> c_int {
    match kind {
        ReadErrorKind::Io { source, .. } => io(source),
        ReadErrorKind::OutOfRange { .. } | ReadErrorKind::Buffer { .. } => libc::EINVAL,
        ReadErrorKind::NoData { .. } => libc::ENODATA,
        _ => libc::EBADMSG,
    }
}

/// Errors of the Rust API, each with the errno that says most of it.
macro_rules! from {
    ($($type:ty: |$error:ident| $errno:expr;)*) => {$(
        impl From<$type> for Error {
            fn from($error: $type) -> Self {
                Self::of($errno, &$error)
            }
        }
    )*};
}

from! {
    RamError: |error| match &error {
        RamError::Maps { source, .. } | RamError::File { source, .. } => io(source),
        RamError::Unsupported(_) => libc::ENOTSUP,
        _ => libc::EINVAL,
    };
    PrepareError: |error| match &error {
        PrepareError::Track(error) => track(error),
        PrepareError::Create(error) => create(error),
        PrepareError::Dirty(error) => dirty(error),
        PrepareError::Setup(error) => setup(error),
        _ => libc::EIO,
    };
    SnapshotFailed: |error| match &error {
        SnapshotFailed::Ended { cause: Cause::Sink, sink: Some(sink) } | SnapshotFailed::Commit(sink) => io(&sink.source),
        SnapshotFailed::Ended { cause: why, .. } => cause(why),
        _ => libc::EINVAL,
    };
    DirtyError: |error| dirty(&error);
    OpenError: |error| open(&error.kind);
    ChainError: |error| match &error {
        ChainError::Open(error) | ChainError::Parent { source: error, .. } => open(&error.kind),
        ChainError::Missing { .. } => libc::ENODATA,
        ChainError::Modified { .. } => libc::ESTALE,
        ChainError::Directory { source, .. } => io(source),
        ChainError::TooDeep { .. } => libc::EINVAL,
        ChainError::Cycle { .. } | ChainError::Layout { .. } => libc::EBADMSG,
    };
    ReadError: |error| read(&error.kind);
    RestoreError: |error| match &error {
        RestoreError::NeedsParent { .. } | RestoreError::Incomplete { .. } => libc::ENODATA,
        RestoreError::Read(error) => read(&error.kind),
        RestoreError::Ram { source, .. } => os(*source),
        RestoreError::Layout { .. } => libc::EINVAL,
    };
}

impl From<Cause> for Error {
    fn from(why: Cause) -> Self {
        Self::new(cause(&why), format!("the snapshot has ended: {why}"))
    }
}

impl From<&Missing> for Error {
    fn from(missing: &Missing) -> Self {
        Self::new(libc::ENOTSUP, missing.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last() -> String {
        // SAFETY: the text is valid until the next failure of this thread.
        unsafe { CStr::from_ptr(ramshot_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_is_an_errno_and_a_sentence() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let outcome = guard(|| panic!("number {}", 7));
        std::panic::set_hook(hook);
        assert_eq!(outcome, -libc::ENOTRECOVERABLE);
        assert!(last().contains("number 7"), "{}", last());
    }

    #[test]
    fn success_keeps_the_last_sentence_and_threads_have_their_own() {
        assert_eq!(guard(|| Err(Error::invalid("a\0b"))), -libc::EINVAL);
        assert_eq!((guard(|| Ok(())), last()), (0, "ab".to_owned()));
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
    }

    #[test]
    fn an_error_without_a_number_is_still_one() {
        assert_eq!(guard(|| Err(Error::new(0, "nothing known"))), -libc::EIO);
    }

    #[test]
    fn a_cause_is_said_once() {
        let track = TrackError::Os(OsError::new("UFFDIO_API", libc::EPERM));
        let error = Error::from(PrepareError::from(track));
        assert_eq!(error.errno, libc::EPERM);
        assert_eq!(error.says.matches("UFFDIO_API").count(), 1, "{}", error.says);
    }
}
