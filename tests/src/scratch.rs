//! Files of a run that are gone with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tempfile::TempDir;

/// What an interruption removes.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();

/// A new folder that is removed with what is in it: when this is dropped, and when the program is interrupted or asked to end. The
/// images in it are as large as guests, and in tmpfs they are memory.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// A folder in `parent`, whose name starts with `prefix`.
    ///
    /// # Errors
    ///
    /// It cannot be made, or signals cannot be watched.
    pub fn new_in(parent: &Path, prefix: &str) -> io::Result<Self> {
        let mut watched = Ok(());
        WATCH.call_once(|| watched = watch());
        watched?;
        // Under the lock: an interruption right after it is made finds it on the list.
        let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
        folders.push(folder.path().to_owned());
        Ok(Self(folder))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        FOLDERS.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| path != self.0.path());
    }
}

fn watch() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let end = move || {
        if let Some(signal) = signals.forever().next() {
            let folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
            for folder in folders.iter() {
                // A thread that makes files in it meanwhile is in the way; the program ends all the same.
                let _ = (0..100).find(|_| fs::remove_dir_all(folder).is_ok());
            }
            let _ = emulate_default_handler(signal);
        }
    };
    std::thread::Builder::new().name("scratch".to_owned()).spawn(end)?;
    Ok(())
}
