//! Which pages were written since the last snapshot: what an increment, or the last step of a pre-copy, consists of.

use ramshot_core::{BlockTable, DirtyLog, DirtyPages, HostRange, OsError, PAGE_SIZE, PageBitmap, RamBlock, Treatment};

use crate::file::{LayoutMismatch, PageState, ParentRef, SnapshotFile};
use crate::sync::{Arc, Mutex, MutexGuard, lock};

/// Follows the writes to one VM's RAM from snapshot to snapshot.
///
/// It combines any number of [`DirtyLog`]s: what one of them reports is dirty. Together they must see *every* writer of
/// guest RAM: KVM's dirty log the vCPUs (and KVM itself), the VMM's own bitmap its devices. What no log sees (a discard, a
/// DMA by hand) the VMM reports with [`mark`](Self::mark), before or after it happens, but before the VM is paused for
/// the next snapshot.
///
/// The first snapshot taken with it is a full one and becomes its base; an increment holds what changed since its base and
/// becomes the base in turn, once it is committed. A snapshot that fails changes nothing: what it would have held, the
/// next one holds. So logging must be on before the base's T0: [`start`](Self::start) says if a log is not.
pub struct DirtyTracking {
    blocks: Vec<RamBlock>,
    table: BlockTable,
    /// Locked from asking the first until all they said is noted: what one thread has asked for, another must not miss.
    logs: Mutex<Vec<Box<dyn DirtyLog>>>,
    state: Mutex<State>,
}

struct State {
    pages: DirtyPages<Vec<u64>>,
    base: Option<ParentRef>,
    in_use: bool,
}

/// Why writes cannot be followed, or an increment not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// A log does not answer: it is not switched on, most likely.
    #[error("the dirty log cannot be read, and without it writes would be lost: {0}")]
    Log(#[from] OsError),
    /// No snapshot was committed yet that an increment could build on.
    #[error(
        "there is no snapshot to build on: take a full one with this tracking first (Options::dirty), or start the \
         tracking from the one that the VM was restored from (DirtyTracking::resume)"
    )]
    NoBase,
    /// Another snapshot with this tracking is under way.
    #[error("another snapshot with the same dirty tracking is under way: finish or drop it first")]
    Busy,
    /// It follows other RAM.
    #[error("the dirty tracking was started for other RAM blocks than those of this snapshot")]
    OtherRam,
    /// The snapshot to go on from is of other RAM.
    #[error("the dirty tracking cannot go on from {path:?}: {source}")]
    Layout {
        /// The snapshot.
        path: std::path::PathBuf,
        /// The difference.
        source: LayoutMismatch,
    },
}

impl DirtyTracking {
    /// Follows the RAM of `table` from now on. Every log is read once, which shows that it is on.
    ///
    /// # Errors
    /// A log does not answer.
    pub fn start(table: &BlockTable, logs: Vec<Box<dyn DirtyLog>>) -> Result<Arc<Self>, DirtyError> {
        Self::with_base(table, logs, None)
    }

    /// The same for a VM that was just restored from `snapshot`, before its first vCPU runs: the next snapshot can be an
    /// increment on it.
    ///
    /// # Errors
    /// A log does not answer; the snapshot has other RAM blocks, or has them in another order.
    pub fn resume(
        table: &BlockTable,
        logs: Vec<Box<dyn DirtyLog>>,
        snapshot: &SnapshotFile,
    ) -> Result<Arc<Self>, DirtyError> {
        let layout = |source| DirtyError::Layout { path: snapshot.path().to_owned(), source };
        snapshot.check_layout(table).map_err(layout)?;
        let in_image = table.blocks().iter().filter(|block| block.treatment != Treatment::Ignored);
        let in_file = snapshot.blocks().iter().filter(|block| block.treatment != Treatment::Ignored);
        if let Some((block, _)) = in_image.zip(in_file).find(|(here, there)| here.name != there.name) {
            return Err(layout(LayoutMismatch::Unknown { block: block.name }));
        }
        let tracking = Self::with_base(table, logs, Some(snapshot.as_parent()))?;
        {
            let mut state = tracking.lock();
            // What an ancestor has counts as saved: zero would have to be said.
            let saved = snapshot.state_runs().filter(|run| run.state != PageState::Zero);
            saved.for_each(|run| state.pages.handle_saved(run.run));
        }
        Ok(tracking)
    }

    fn with_base(
        table: &BlockTable,
        logs: Vec<Box<dyn DirtyLog>>,
        base: Option<ParentRef>,
    ) -> Result<Arc<Self>, DirtyError> {
        for log in &logs {
            log.take(&mut |_| {})?;
        }
        let bitmaps = [bitmap(table)?, bitmap(table)?, bitmap(table)?];
        let pages = DirtyPages::new(table, bitmaps).map_err(|_| DirtyError::OtherRam)?;
        let state = State { pages, base, in_use: false };
        let (logs, state) = (Mutex::new(logs), Mutex::new(state));
        Ok(Arc::new(Self { blocks: table.blocks().to_vec(), table: table.clone(), logs, state }))
    }

    /// The snapshot that an increment would build on.
    #[must_use]
    pub fn base(&self) -> Option<ParentRef> {
        self.lock().base
    }

    /// Reports a change that no log sees.
    pub fn mark(&self, range: HostRange) {
        let mut state = self.lock();
        self.table.runs_in(range).for_each(|run| state.pages.handle_written(run));
    }

    /// Bytes written since the last snapshot began, as far as known now. Reads the logs.
    ///
    /// # Errors
    /// A log does not answer.
    pub fn written_bytes(&self) -> Result<u64, DirtyError> {
        self.read_logs()?;
        Ok(self.lock().pages.written().saturating_mul(PAGE_SIZE))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn read_logs(&self) -> Result<(), OsError> {
        let logs = lock(&self.logs);
        let mut ranges = Vec::new();
        let mut result = Ok(());
        for log in logs.iter() {
            // What one has reported it will not report again, whatever happens to the next.
            result = result.and(log.take(&mut |range| ranges.push(range)));
        }
        let mut state = self.lock();
        for range in ranges {
            self.table.runs_in(range).for_each(|run| state.pages.handle_written(run));
        }
        result
    }

    /// For one snapshot, alone.
    pub(crate) fn claim(self: &Arc<Self>, table: &BlockTable) -> Result<DirtyUse, DirtyError> {
        if self.blocks != table.blocks() {
            return Err(DirtyError::OtherRam);
        }
        if std::mem::replace(&mut self.lock().in_use, true) {
            return Err(DirtyError::Busy);
        }
        Ok(DirtyUse { tracking: Arc::clone(self) })
    }
}

impl std::fmt::Debug for DirtyTracking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("DirtyTracking");
        f.field("base", &self.base()).finish_non_exhaustive()
    }
}

/// The tracking, in the hands of one snapshot.
#[derive(Debug)]
pub(crate) struct DirtyUse {
    tracking: Arc<DirtyTracking>,
}

impl DirtyUse {
    /// What was written until now is known.
    pub(crate) fn read_logs(&self) -> Result<(), OsError> {
        self.tracking.read_logs()
    }

    pub(crate) fn mark(&self, range: HostRange) {
        self.tracking.mark(range);
    }

    /// Pages written since the last draft.
    pub(crate) fn written(&self) -> u64 {
        self.tracking.lock().pages.written()
    }

    pub(crate) fn pages<R>(&self, act: impl FnOnce(&mut DirtyPages<Vec<u64>>) -> R) -> R {
        act(&mut self.tracking.lock().pages)
    }

    /// The snapshot is committed as `snapshot`.
    pub(crate) fn committed(&self, at_t0: &AtT0, snapshot: Option<ParentRef>) {
        let mut state = self.tracking.lock();
        state.pages.committed(&at_t0.pending, &at_t0.there, at_t0.all);
        // An image that has no name cannot be built on.
        state.base = snapshot;
    }
}

impl Drop for DirtyUse {
    fn drop(&mut self) {
        self.tracking.lock().in_use = false;
    }
}

/// What is remembered of T0 until the commit.
#[derive(Debug)]
pub(crate) struct AtT0 {
    pub(crate) pending: PageBitmap<Vec<u64>>,
    pub(crate) there: PageBitmap<Vec<u64>>,
    /// They are the same.
    pub(crate) all: bool,
}

/// An empty bitmap for the pages of `table`.
pub(crate) fn bitmap(table: &BlockTable) -> Result<PageBitmap<Vec<u64>>, OsError> {
    let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(table.pages())).unwrap_or(usize::MAX);
    // Zeroed words cost nothing until they are touched.
    PageBitmap::new(vec![0; words], table.pages(), true).ok_or(OsError::new("allocating a bitmap", 12))
}
