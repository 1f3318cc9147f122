//! `ramshot demo`: a live snapshot to watch, without a hypervisor.

mod guest;
mod show;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use ramshot::core::PageId;
use ramshot::{AnonymousRam, GuestRam, Live, Options, Pending, Report, SnapshotFile};

use crate::chain::{PAGE, PAGE_BYTES};
use crate::out::Out;
use crate::outcome::{Answer, Failure};
use crate::progress::Progress;
use crate::size;
use guest::{Guest, Phase};

/// Words of 8 bytes in a page.
const WORDS: usize = PAGE / 8;

/// Shows a live snapshot: threads of this process write to memory all over while a snapshot of it is taken, which is
/// then compared with a copy made at T0, byte by byte.
///
/// The threads play the vCPUs of a VM; no KVM is needed, only Linux with userfaultfd. Stalls are what a writing thread
/// notices: how long a single write took. Exit code 1 if the image is not the memory at T0.
#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Size of the memory. Twice as much is needed: the copy.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    mem: u64,
    /// Threads that write.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// How much of the memory is filled at first. The threads write to all of that and to half of the rest; the other
    /// half is never touched.
    #[arg(long, value_name = "PERCENT", default_value_t = 75, value_parser = clap::value_parser!(u8).range(0..=100))]
    fill: u8,
    /// How long to write before and after the snapshot, to compare.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    around: u64,
    /// Protect only inside the pause, not ahead of it.
    #[arg(long)]
    no_arm_ahead: bool,
    /// Keep the snapshot as this file, for the other subcommands.
    #[arg(long, value_name = "FILE")]
    keep: Option<PathBuf>,
    /// Replace the file to keep if it exists.
    #[arg(long, requires = "keep")]
    replace: bool,
}

/// What was seen.
struct Seen {
    report: Report,
    /// Writers stopped to writers running, less the time of the copy, which only the comparison needs.
    pause: Duration,
    counts: guest::Counts,
    /// The first page that differs.
    wrong: Option<PageId>,
}

impl Demo {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let unit = PAGE_BYTES * u64::from(self.threads);
        if self.mem < unit || !self.mem.is_multiple_of(PAGE_BYTES) {
            return Err(Failure::says(format!(
                "--mem {:#x} must be a multiple of 4096, and at least a page for each thread",
                self.mem
            )));
        }
        let ram = AnonymousRam::new(self.mem).map_err(refused)?;
        // Where it goes if nobody wants it.
        let scratch =
            tempfile::tempdir().map_err(|source| Failure::io("no temporary directory can be made", source))?;
        let path = self.keep.clone().unwrap_or_else(|| scratch.path().join("demo.ramshot"));
        let seen = self.snapshot(Arc::new(ram), &path)?;
        show::write(self, &seen, out)?;
        Ok(if seen.wrong.is_none() { Answer::Yes } else { Answer::No })
    }

    fn snapshot(&self, memory: Arc<AnonymousRam>, path: &std::path::Path) -> Result<Seen, Failure> {
        let ram = Arc::new(GuestRam::from_anonymous(Arc::clone(&memory)).map_err(refused)?);
        // Before anything that takes time: it says what is missing.
        let options = Options { replace: self.replace, ..Options::default() };
        let prepared = ramshot::prepare(&ram, path, &options).map_err(refused)?;
        let mut copy = copy_buffer(memory.words().len())?;
        fill(&memory, self.fill);

        let guest = Guest::start(&memory, self.threads, written_pages(&memory, self.fill))?;
        std::thread::sleep(Duration::from_millis(self.around));
        let prepared = if self.no_arm_ahead {
            prepared
        } else {
            guest.enter(Phase::Arming);
            prepared.arm_ahead().map_err(refused)?
        };

        let pausing = Instant::now();
        guest.pause();
        let paused = pausing.elapsed();
        for (word, live) in copy.iter_mut().zip(memory.words()) {
            *word = live.load(std::sync::atomic::Ordering::Relaxed);
        }
        let beginning = Instant::now();
        let begun = prepared.begin(Pending::All, b"vCPUs and devices would stand here".to_vec());
        guest.resume(Phase::During);
        let pause = paused + beginning.elapsed();

        let live = begun.map_err(refused)?;
        watch(&live, self.mem);
        let report = live.finish().map_err(refused)?;
        guest.enter(Phase::After);
        std::thread::sleep(Duration::from_millis(self.around));
        let counts = guest.stop()?;
        let wrong = compare(path, &copy)?;
        Ok(Seen { report, pause, counts, wrong })
    }
}

fn refused(error: impl std::error::Error + 'static) -> Failure {
    Failure::Refused(Box::new(error))
}

/// Room for the copy, touched, so that the pause does not pay for it.
fn copy_buffer(words: usize) -> Result<Vec<u64>, Failure> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(words)
        .map_err(|error| Failure::says(format!("no memory for the copy that the image is compared with: {error}")))?;
    copy.resize(words, u64::MAX);
    Ok(copy)
}

/// Writes something different to each of the first pages.
fn fill(memory: &AnonymousRam, percent: u8) {
    let pages = memory.words().chunks_exact(WORDS);
    let filled = pages.len() * usize::from(percent) / 100;
    for (number, page) in (1u64..).zip(pages.take(filled)) {
        for word in page {
            word.store(number.wrapping_mul(0x9e37_79b9_7f4a_7c15), std::sync::atomic::Ordering::Relaxed);
        }
    }
}

/// How many pages, from the first on, the threads write to: at least one.
fn written_pages(memory: &AnonymousRam, percent: u8) -> u64 {
    let pages = (memory.words().len() / WORDS) as u64;
    let filled = pages * u64::from(percent) / 100;
    (filled + (pages - filled) / 2).max(1)
}

/// Shows how far it is until all pages are captured.
fn watch(live: &Live, mem: u64) {
    let mut progress = Progress::new("snapshotting");
    loop {
        let now = live.progress();
        if now.captured || now.ended {
            return;
        }
        progress.line(|| {
            let captured = size::bytes(now.pages_captured * PAGE_BYTES);
            format!("{captured} of at most {}, {} write faults", size::bytes(mem), now.write_faults)
        });
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The first page of the image that is not as it was at T0. Reading it checks its CRC besides.
fn compare(path: &std::path::Path, copy: &[u64]) -> Result<Option<PageId>, Failure> {
    let file = SnapshotFile::open(path)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    file.verify(threads, &mut |_, _| {})?;
    if file.ram_bytes() != copy.len() as u64 * 8 {
        return Ok(Some(PageId(file.pages())));
    }
    let mut progress = Progress::new("comparing");
    let mut bytes = [0; PAGE];
    for (page, words) in (0..).map(PageId).zip(copy.chunks_exact(WORDS)) {
        file.read_page(page, &mut bytes)?;
        let (found, _) = bytes.as_chunks::<8>();
        if !found.iter().map(|word| u64::from_ne_bytes(*word)).eq(words.iter().copied()) {
            return Ok(Some(page));
        }
        progress.bytes(page.0 * PAGE_BYTES, file.ram_bytes());
    }
    Ok(None)
}
