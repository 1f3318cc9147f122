//! Lazy restore: the VM runs, and its pages come in as it touches them.
//!
//! ```text
//! vCPU touches a page ──▶ server:  reads events, serves faults first: read 64 KiB to 2 MiB, check, put in, wake
//!                            ▲     then puts in what the prefetcher has read, a piece at a time
//!                            └──── prefetcher: reads ahead, in the order of the last time, and makes way for faults
//! ```
//! One thread, the server, both reads the kernel's events and puts pages in. So nothing is put in on account of what was
//! true before a discard, and no fault waits for the prefetcher: what that is reading is read again for a fault.

mod lost;
pub(crate) mod order;
mod prefetch;
mod read;
mod server;
mod shared;
mod snapshot;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ramshot_core::{
    BlockTable, Fill, LayoutError, Limits, OsError, PAGE_SIZE, PageBitmap, RamBlock, RamFiller, Treatment,
};

pub use lost::{LostPages, LostWhy, WhenLost};
pub use order::order_path;

use self::shared::{Phase, Shared};
use crate::file::{LayoutMismatch, PageSource, RestoreError, match_blocks};
use crate::options::OptionError;
use crate::os::{Filler, FillerOptions, GuestRam, TrackError};
use crate::report::Latencies;

/// What is told when pages are lost.
pub type OnLost = dyn Fn(&LostPages) + Send + Sync;

/// Settings of a lazy restore. `LazyOptions::default()` is right for most.
#[derive(Clone)]
pub struct LazyOptions {
    /// Fewest bytes that are read for a fault, if its neighbours are missing too. Default 64 KiB.
    pub around_min: u64,
    /// Most bytes that are read for a fault. Default 2 MiB; how many it is depends on how thick faults come.
    pub around_max: u64,
    /// Whether what nobody has touched yet is read beside. Default yes. Without it the restore is never over, until
    /// [`LazyRestore::prefetch`] or [`LazyRestore::finish`] is called.
    pub prefetch: bool,
    /// The file that has the order in which pages were touched last time ([`order_path`] of the image, usually). It is read
    /// if it is there, and written when the restore is over; a snapshot can have begun it
    /// ([`Options::order`](crate::Options::order)). Default none: the prefetcher goes from the first page to the last.
    pub order: Option<PathBuf>,
    /// What becomes of a page that cannot be read or is damaged. Default [`WhenLost::Poison`].
    pub when_lost: WhenLost,
    /// Told of such pages, on the thread that serves faults: it must not touch guest RAM, nor wait for anybody who does.
    pub on_lost: Option<Arc<OnLost>>,
    /// As [`TrackerOptions::user_mode_only`](crate::TrackerOptions::user_mode_only). Not for KVM guests. Default no.
    pub user_mode_only: bool,
}

impl Default for LazyOptions {
    fn default() -> Self {
        Self {
            around_min: 64 << 10,
            around_max: 2 << 20,
            prefetch: true,
            order: None,
            when_lost: WhenLost::Poison,
            on_lost: None,
            user_mode_only: false,
        }
    }
}

impl fmt::Debug for LazyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyOptions")
            .field("around", &(self.around_min..=self.around_max))
            .field("prefetch", &self.prefetch)
            .field("order", &self.order)
            .field("when_lost", &self.when_lost)
            .finish_non_exhaustive()
    }
}

impl LazyOptions {
    fn check(&self) -> Result<(), OptionError> {
        let within = |name, value, min, max| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(OptionError { name, value, min, max }) }
        };
        within("around_min", self.around_min, PAGE_SIZE, 1 << 30)?;
        within("around_max", self.around_max, self.around_min, 1 << 30)
    }
}

/// Why a lazy restore did not begin. Guest RAM is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    /// The VM has other RAM than the image.
    #[error("the image does not fit this VM: {0}")]
    Layout(#[from] LayoutMismatch),
    /// The image is not whole.
    #[error(transparent)]
    Image(#[from] RestoreError),
    /// The image's blocks make no RAM layout on this system.
    #[error("the image's RAM blocks cannot be laid out: {0}")]
    Blocks(#[from] LayoutError),
    /// Pages of this RAM cannot come in late, here.
    #[error("guest RAM cannot be restored lazily: {0}")]
    Track(#[from] TrackError),
    /// A setting out of its range.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The bitmaps of so much RAM cannot be had.
    #[error("{pages} pages of RAM are more than this process can keep account of")]
    TooLarge {
        /// Pages of the image.
        pages: u64,
    },
    /// No thread could be started.
    #[error("a thread of the restore cannot be started")]
    Thread(#[source] std::io::Error),
}

/// How far a lazy restore is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LazyProgress {
    /// Pages of the image that hold data; 0 until they have been counted.
    pub data_pages: u64,
    /// Missing faults so far.
    pub faults: u64,
    /// Pages put in because somebody waited for one of them or a neighbour, zero pages included.
    pub by_fault: u64,
    /// Pages put in before anybody asked.
    pub prefetched: u64,
    /// Pages that cannot be had.
    pub lost: u64,
    /// Whether everything is in that can be had.
    pub complete: bool,
}

/// A finished lazy restore, in figures.
#[derive(Clone, Debug)]
pub struct LazyReport {
    /// Pages and faults.
    pub progress: LazyProgress,
    /// From the call of [`lazy`] to everything in.
    pub all_in: Duration,
    /// From a fault read by us to its page put in, reading and checking included.
    pub fault_service: Latencies,
}

/// A lazy restore that ended with pages lost, or without all pages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyFailed {
    /// Pages could not be read or are damaged. What became of them is [`LazyOptions::when_lost`]'s.
    #[error("{} pages of guest RAM are lost; the first: {}", .report.progress.lost, .first)]
    Lost {
        /// The first that was found.
        first: Box<LostPages>,
        /// The restore otherwise.
        report: Box<LazyReport>,
    },
    /// The kernel's events can be read no more: who touches a page that is not in stays blocked.
    #[error("the faults of guest RAM can be read no more ({0}); stop the VM")]
    Events(OsError),
    /// The last page is in, and the registration could not be ended.
    #[error("guest RAM could not be unregistered: {0}")]
    Unregister(OsError),
}

/// A VM that runs and whose pages come in.
///
/// # Dropping
/// Dropping it before it is over waits until everything is in, as [`finish`](Self::finish) does: nobody stays blocked, and nobody
/// reads zeros for data. To end it early because the VM is no more, [`cancel`](Self::cancel) it.
#[derive(Debug)]
pub struct LazyRestore {
    shared: Arc<Shared>,
    /// Unless the memory is of another kind.
    filler: Option<Arc<Filler>>,
    threads: Vec<JoinHandle<()>>,
}

/// Restores `source` into `ram` lazily. When it returns, the VM may run: whoever touches a page that is not in, a vCPU or a
/// thread of the VMM, waits until it is. The call costs the same for any size of RAM.
///
/// The memory must be fresh (nothing ever written or read), private anonymous, memfd or hugetlbfs. It is looked at. What
/// another process or another mapping sees of it is not held back: see [`Filler`].
///
/// # Errors
/// What does not fit or is missing, and what to do about it.
pub fn lazy(source: Arc<dyn PageSource>, ram: &Arc<GuestRam>, options: &LazyOptions) -> Result<LazyRestore, LazyError> {
    let begun = Instant::now();
    options.check()?;
    source.check_whole()?;
    let table = in_file_order(source.as_ref(), ram.table())?;
    let filler = Filler::open(Arc::clone(ram), &FillerOptions { user_mode_only: options.user_mode_only })?;
    let filler = Arc::new(filler);
    let mut restore = begin(Arc::clone(&filler) as Arc<dyn RamFiller>, source, Arc::new(table), options, begun)?;
    restore.filler = Some(filler);
    Ok(restore)
}

/// As [`lazy`], for a memory of your own. Nobody may run in it yet; `table` has the blocks of `source` in its order.
///
/// # Errors
/// As [`lazy`]. `filler` is [undone](RamFiller::undo) then.
pub fn lazy_with(
    filler: Arc<dyn RamFiller>,
    source: Arc<dyn PageSource>,
    table: Arc<BlockTable>,
    options: &LazyOptions,
) -> Result<LazyRestore, LazyError> {
    begin(filler, source, table, options, Instant::now())
}

/// The blocks of the VM in the order of the image: then a page has one number.
fn in_file_order(source: &dyn PageSource, table: &BlockTable) -> Result<BlockTable, LazyError> {
    let matched = match_blocks(source.blocks(), table)?;
    let in_image = matched.into_iter().flatten().filter_map(|index| table.block(index));
    let ignored = table.blocks().iter().filter(|block| block.treatment == Treatment::Ignored);
    let blocks: Vec<RamBlock> = in_image.chain(ignored).copied().collect();
    Ok(BlockTable::new(&blocks)?)
}

fn begin(
    filler: Arc<dyn RamFiller>,
    source: Arc<dyn PageSource>,
    table: Arc<BlockTable>,
    options: &LazyOptions,
    begun: Instant,
) -> Result<LazyRestore, LazyError> {
    let started = options.check().map_err(LazyError::from).and_then(|()| start(&filler, source, table, options, begun));
    if started.is_err()
        && let Err(error) = filler.undo()
    {
        log::error!(target: "ramshot::restore", "undoing: {error}");
    }
    started
}

fn start(
    filler: &Arc<dyn RamFiller>,
    source: Arc<dyn PageSource>,
    table: Arc<BlockTable>,
    options: &LazyOptions,
    begun: Instant,
) -> Result<LazyRestore, LazyError> {
    let pages = table.pages();
    let bitmap = || {
        let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(pages)).ok()?;
        // Fresh zeros: what is not looked at costs nothing.
        PageBitmap::new(vec![0u64; words], pages, true)
    };
    let (Some(settled), Some(lost)) = (bitmap(), bitmap()) else { return Err(LazyError::TooLarge { pages }) };
    let limits = Limits {
        scan_pages: prefetch::CHUNK_PAGES,
        around_min: options.around_min / PAGE_SIZE,
        around_max: options.around_max / PAGE_SIZE,
        ..Limits::default()
    };
    let core = Fill::new(Arc::clone(&table), settled, lost, limits)?;
    let host_page = table.blocks().iter().map(|block| block.page_size).max().unwrap_or(PAGE_SIZE);
    let shared = Arc::new(Shared::new(Arc::clone(filler), source, core, options, begun, host_page));
    let mut restore = LazyRestore { shared, filler: None, threads: Vec::new() };
    let spawned = restore
        .spawn("ramshot-missing", server::serve)
        .and_then(|()| restore.spawn("ramshot-prefetch", prefetch::prefetch));
    if let Err(error) = spawned {
        restore.shared.abandon();
        restore.join();
        return Err(LazyError::Thread(error));
    }
    Ok(restore)
}

impl LazyRestore {
    fn spawn(&mut self, name: &str, body: fn(&Shared)) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(move || body(&shared))?);
        Ok(())
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> LazyProgress {
        self.shared.lock().progress()
    }

    /// Reads what nobody has touched yet beside, if [`LazyOptions::prefetch`] said not to.
    pub fn prefetch(&self) {
        self.shared.start_prefetching();
    }

    /// Waits until everything is in, and the handler has ended. The VM may run meanwhile, and need not.
    ///
    /// # Errors
    /// Pages that are lost. With [`WhenLost::Block`] the handler stays then, for as long as the process lives, and so does
    /// guest RAM: who waits for a lost page waits on.
    pub fn finish(mut self) -> Result<LazyReport, LazyFailed> {
        self.end()
    }

    /// Gives the restore up: the VM will run no more. Nothing more is read. Pages with data that are not in are treated as
    /// lost: poisoned, so that who waits for one or touches one gets SIGBUS; or, with [`WhenLost::Block`] and where the kernel
    /// cannot poison (before 6.6), who waits waits on, and the handler and guest RAM stay as long as the process lives.
    ///
    /// So stop the vCPUs first where you can.
    pub fn cancel(mut self) {
        self.shared.cancel();
        let _ = self.end();
    }

    fn end(&mut self) -> Result<LazyReport, LazyFailed> {
        self.shared.start_prefetching();
        let outcome = self.shared.wait_until_over();
        self.join();
        outcome
    }

    /// Joins the threads; not those that have to stay for who is blocked.
    fn join(&mut self) {
        if self.shared.lock().phase == Phase::Staying {
            self.threads.clear();
        }
        for thread in self.threads.drain(..) {
            // A panic was logged where it was caught.
            let _ = thread.join();
        }
    }
}

impl Drop for LazyRestore {
    fn drop(&mut self) {
        if !self.threads.is_empty()
            && let Err(error) = self.end()
        {
            log::error!(target: "ramshot::restore", "{error}");
        }
    }
}
