//! The kernel's pool of 2 MiB huge pages: raised while somebody needs it, lowered again after.

use std::fs;
use std::sync::Mutex;

use crate::memory::MemoryError;

const TOTAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// The pool is the whole machine's: one change at a time, at least within this process.
static POOL: Mutex<()> = Mutex::new(());

/// Huge pages added to the pool, taken away when this value goes.
#[derive(Debug)]
pub(crate) struct HugePages {
    added: u64,
}

impl HugePages {
    /// Makes sure that `needed` huge pages are free.
    pub(crate) fn reserve(needed: u64) -> Result<Self, MemoryError> {
        let _one_at_a_time = POOL.lock();
        let (total, free) = (read(TOTAL)?, read(FREE)?);
        let missing = needed.saturating_sub(free);
        if missing == 0 {
            return Ok(Self { added: 0 });
        }
        write(total + missing)?;
        let got = read(TOTAL)?.saturating_sub(total);
        if got < missing {
            write(total)?;
            return Err(MemoryError::NoHugePages { needed: missing, got });
        }
        Ok(Self { added: missing })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _one_at_a_time = POOL.lock();
        if self.added > 0
            && let Ok(total) = read(TOTAL)
        {
            // Nobody to tell if it fails; the pool is then larger than it was, which `nr_hugepages` shows.
            let _ = write(total.saturating_sub(self.added));
        }
    }
}

fn read(path: &'static str) -> Result<u64, MemoryError> {
    let failed = |source| MemoryError::HugePagePool { path, source };
    let text = fs::read_to_string(path).map_err(failed)?;
    text.trim().parse().map_err(|e| failed(std::io::Error::other(format!("{text:?}: {e}"))))
}

fn write(pages: u64) -> Result<(), MemoryError> {
    fs::write(TOTAL, pages.to_string()).map_err(|source| MemoryError::HugePagePool { path: TOTAL, source })
}
