//! Lazy and mapped restore without a guest: real userfaultfd, threads that touch memory, images that fail.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ramshot::core::{BlockName, GuestAddr, PageId, Run, Treatment};
use ramshot::file::{
    FileBlock, FileSink, FileSinkOptions, MapError, MapReport, PageSource, PageState, ReadError, ReadErrorKind,
    RestoreError, StateRun,
};
use ramshot::restore::{LazyError, LazyFailed, LostPages, LostWhy, WhenLost, order_path};
use ramshot::sink::{ImageMeta, PageDigest, Piece};
use ramshot::{GuestRam, ImageSink, LazyOptions, MapTarget, Pending, SnapshotFile, lazy};
use ramshot_tests::{Backing, Memory};

const PAGE: usize = 4096;
const SIZE: u64 = 8 << 20;
const PAGES: u64 = SIZE / 4096;
const SOON: Duration = Duration::from_millis(60);
const LONG: Duration = Duration::from_secs(10);

/// The byte that fills a page: every fifth run of 32 pages is zero.
fn content(page: u64) -> u8 {
    if page / 32 % 5 == 4 { 0 } else { u8::try_from(page % 250 + 1).unwrap() }
}

/// An image in nobody's file.
struct Fake {
    blocks: Vec<FileBlock>,
    /// Pages that cannot be read.
    bad: Vec<u64>,
    /// A page whose reading panics.
    panics: Option<u64>,
    /// First pages of all reads.
    reads: Mutex<Vec<Run>>,
    /// While true, reads of more than so many pages wait: the prefetcher's.
    hold: (Mutex<Option<u64>>, Condvar),
}

impl Fake {
    fn new(ram: &GuestRam) -> Self {
        let mut first = 0;
        let blocks = ram.table().blocks().iter().map(|block| {
            let file = FileBlock {
                name: block.name,
                guest: block.guest,
                len: block.len,
                used: block.used,
                page_size: block.page_size,
                first_page: PageId(first),
                treatment: Treatment::Tracked,
                backing: block.backing,
            };
            first += block.used / 4096;
            file
        });
        let blocks = blocks.collect();
        Self { blocks, bad: vec![], panics: None, reads: Mutex::default(), hold: (Mutex::new(None), Condvar::new()) }
    }
}

impl PageSource for Fake {
    fn blocks(&self) -> &[FileBlock] {
        &self.blocks
    }

    fn pages(&self) -> u64 {
        PAGES
    }

    fn extent(&self, first: PageId) -> Option<StateRun> {
        let zero = content(first.0) == 0;
        let end = (first.0..PAGES).find(|&page| (content(page) == 0) != zero).unwrap_or(PAGES);
        let state = if zero { PageState::Zero } else { PageState::Data };
        (first.0 < PAGES).then(|| StateRun { run: Run::new(first, end - first.0), state })
    }

    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        let run = Run::new(first, (into.len() / PAGE) as u64);
        self.reads.lock().unwrap().push(run);
        let mut hold = self.hold.0.lock().unwrap();
        while hold.is_some_and(|most| run.pages > most) {
            hold = self.hold.1.wait(hold).unwrap();
        }
        drop(hold);
        assert!(self.panics.is_none_or(|page| !run.contains(PageId(page))), "as it was told");
        if let Some(&page) = self.bad.iter().find(|&&page| run.contains(PageId(page))) {
            let kind = ReadErrorKind::OutOfRange { page: PageId(page), count: 1, pages: PAGES };
            return Err(ReadError { path: "fake".into(), kind });
        }
        for (page, bytes) in (first.0..).zip(into.chunks_mut(PAGE)) {
            assert_ne!(content(page), 0, "a zero page is read");
            bytes.fill(content(page));
        }
        Ok(())
    }

    fn device_state(&self) -> &[u8] {
        &[]
    }
}

fn memory(backing: Backing) -> (Arc<Memory>, Arc<GuestRam>) {
    let memory = Memory::new(SIZE, backing).unwrap();
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
    (memory, ram)
}

fn still() -> LazyOptions {
    LazyOptions { prefetch: false, around_min: 4096, around_max: 4096, ..LazyOptions::default() }
}

fn byte(memory: &Memory, page: u64) -> u8 {
    let mut byte = [0];
    memory.read(page * 4096 + 5, &mut byte).unwrap();
    byte[0]
}

#[track_caller]
fn assert_all(memory: &Memory, except: &[u64]) {
    for page in (0..PAGES).filter(|page| !except.contains(page)) {
        assert_eq!(byte(memory, page), content(page), "page {page}");
    }
}

/// Has the kernel read a page, which gets an error where a thread would get SIGBUS.
fn is_poisoned(memory: &Memory, page: u64) -> bool {
    let (_read, write) = nix::unistd::pipe().unwrap();
    let address = (memory.regions()[0].host + page * 4096) as *const libc::c_void;
    // SAFETY: the address is in guest memory; write(2) reads one byte there and says EFAULT if it cannot.
    unsafe { libc::write(write.as_raw_fd(), address, 1) != 1 }
}

/// Reads a byte on a thread of its own, that need not come back.
fn reader(memory: &Arc<Memory>, page: u64) -> mpsc::Receiver<u8> {
    let (sender, receiver) = mpsc::channel();
    let memory = Arc::clone(memory);
    std::thread::spawn(move || sender.send(byte(&memory, page)));
    receiver
}

fn can_poison(failed: &LazyFailed) {
    assert!(matches!(failed, LazyFailed::Lost { .. }), "{failed}");
}

#[test]
fn what_is_touched_comes_in_and_so_does_the_rest() {
    for backing in [Backing::Anon, Backing::Thp, Backing::Memfd] {
        let (memory, ram) = memory(backing);
        let source = Arc::new(Fake::new(&ram));
        // The prefetcher waits, or it would be through before the first touch.
        *source.hold.0.lock().unwrap() = Some(16);
        let options = LazyOptions { around_max: 64 << 10, ..LazyOptions::default() };
        let restore = lazy(Arc::clone(&source) as Arc<dyn PageSource>, &ram, &options).unwrap();
        std::thread::scope(|scope| {
            for seed in 0..3u64 {
                let memory = &memory;
                scope.spawn(move || {
                    for i in 0..400 {
                        let page = (i * 7919 + seed * 131) % PAGES;
                        assert_eq!(byte(memory, page), content(page), "page {page}");
                    }
                });
            }
        });
        *source.hold.0.lock().unwrap() = None;
        source.hold.1.notify_all();
        let report = restore.finish().unwrap();
        assert!(report.progress.complete && report.progress.faults > 0 && report.progress.lost == 0, "{report:?}");
        assert_eq!(report.progress.data_pages, (0..PAGES).filter(|&page| content(page) != 0).count() as u64);
        assert_all(&memory, &[]);
    }
}

#[test]
fn only_what_is_touched_is_read_until_the_rest_is_asked_for() {
    let (memory, ram) = memory(Backing::Anon);
    let source = Arc::new(Fake::new(&ram));
    let restore = lazy(Arc::clone(&source) as Arc<dyn PageSource>, &ram, &still()).unwrap();
    assert_eq!([byte(&memory, 100), byte(&memory, 130)], [content(100), 0]);
    std::thread::sleep(SOON);
    assert_eq!(*source.reads.lock().unwrap(), [Run::new(PageId(100), 1)]);
    assert!(!restore.progress().complete);
    restore.prefetch();
    let report = restore.finish().unwrap();
    assert!(report.progress.prefetched > PAGES / 2, "{report:?}");
    assert_all(&memory, &[]);
}

// The prefetcher is stuck in a read: a fault on one of its very pages is served nevertheless.
#[test]
fn no_fault_waits_for_the_prefetcher() {
    let (memory, ram) = memory(Backing::Anon);
    let source = Arc::new(Fake::new(&ram));
    *source.hold.0.lock().unwrap() = Some(16);
    let restore = lazy(
        Arc::clone(&source) as Arc<dyn PageSource>,
        &ram,
        &LazyOptions { around_max: 64 << 10, ..LazyOptions::default() },
    );
    let restore = restore.unwrap();
    std::thread::sleep(SOON);
    assert!(source.reads.lock().unwrap().iter().any(|run| run.contains(PageId(3))), "the prefetcher is at the start");
    for page in [3, 70, 400] {
        assert_eq!(reader(&memory, page).recv_timeout(LONG).unwrap(), content(page));
    }
    *source.hold.0.lock().unwrap() = None;
    source.hold.1.notify_all();
    restore.finish().unwrap();
    assert_all(&memory, &[]);
}

#[test]
fn pages_that_cannot_be_read_are_told_and_poisoned() {
    let (memory, ram) = memory(Backing::Anon);
    let source = Arc::new(Fake { bad: vec![40, 41, 600], panics: Some(1000), ..Fake::new(&ram) });
    let told = Arc::new(Mutex::new(Vec::<LostPages>::new()));
    let tell = Arc::clone(&told);
    let options = LazyOptions {
        on_lost: Some(Arc::new(move |lost: &LostPages| {
            tell.lock().unwrap().push(lost.clone());
            panic!("as a bad embedder does");
        })),
        ..LazyOptions::default()
    };
    let failed = lazy(source, &ram, &options).unwrap().finish().unwrap_err();
    assert!(matches!(&failed, LazyFailed::Lost { report, .. } if report.progress.lost == 4), "{failed}");
    let mut guests: Vec<u64> = told.lock().unwrap().iter().map(|lost| lost.guest.0 / 4096).collect();
    guests.sort_unstable();
    assert_eq!(guests, [40, 41, 600, 1000]);
    assert!(told.lock().unwrap().iter().any(|lost| matches!(lost.why, LostWhy::Source)));
    for page in [40, 41, 600, 1000] {
        assert!(is_poisoned(&memory, page), "page {page}");
    }
    assert_all(&memory, &[40, 41, 600, 1000]);
}

#[test]
fn who_waits_for_a_lost_page_stays_blocked_if_that_was_asked_for() {
    let (memory, ram) = memory(Backing::Anon);
    let source = Arc::new(Fake { bad: vec![40, 41], ..Fake::new(&ram) });
    let restore = lazy(source, &ram, &LazyOptions { when_lost: WhenLost::Block, ..LazyOptions::default() }).unwrap();
    let (lost, discarded) = (reader(&memory, 40), reader(&memory, 41));
    let failed = restore.finish().unwrap_err();
    can_poison(&failed);
    assert!(failed.to_string().contains("2 pages of guest RAM are lost"), "{failed}");
    assert_eq!(lost.recv_timeout(SOON), Err(RecvTimeoutError::Timeout));
    assert_all(&memory, &[40, 41]);
    // The handler is still there: a page that the VMM throws away is zero.
    let address = (memory.regions()[0].host + 41 * 4096) as *mut libc::c_void;
    // SAFETY: a page of guest memory, which nobody holds a reference into.
    assert_eq!(unsafe { libc::madvise(address, PAGE, libc::MADV_DONTNEED) }, 0);
    assert_eq!(discarded.recv_timeout(LONG), Ok(0));
    assert_eq!(lost.recv_timeout(SOON), Err(RecvTimeoutError::Timeout));
}

#[test]
fn a_page_discarded_meanwhile_is_zero_and_stays_so() {
    let (memory, ram) = memory(Backing::Anon);
    let restore = lazy(Arc::new(Fake::new(&ram)), &ram, &still()).unwrap();
    assert_eq!(byte(&memory, 10), content(10));
    let address = (memory.regions()[0].host + 10 * 4096) as *mut libc::c_void;
    // One that is in, and others that are not.
    // SAFETY: pages of guest memory, which nobody holds a reference into.
    assert_eq!(unsafe { libc::madvise(address, 4 * PAGE, libc::MADV_DONTNEED) }, 0);
    assert_eq!([byte(&memory, 9), byte(&memory, 10), byte(&memory, 12)], [content(9), 0, 0]);
    memory.write(12 * 4096 + 5, &[77]).unwrap();
    restore.finish().unwrap();
    assert_eq!([byte(&memory, 10), byte(&memory, 11), byte(&memory, 12), byte(&memory, 13)], [0, 0, 77, 0]);
    assert_all(&memory, &[10, 11, 12, 13]);
}

// A balloon that discards page after page, while everything comes in.
#[test]
fn discards_all_the_time_hold_nothing_up() {
    let (memory, ram) = memory(Backing::Anon);
    let restore = lazy(Arc::new(Fake::new(&ram)), &ram, &LazyOptions::default()).unwrap();
    let half = PAGES / 2;
    std::thread::scope(|scope| {
        let host = memory.regions()[0].host;
        scope.spawn(move || {
            for page in half..PAGES {
                let address = (host + page * 4096) as *mut libc::c_void;
                // SAFETY: a page of guest memory, which nobody holds a reference into.
                assert_eq!(unsafe { libc::madvise(address, PAGE, libc::MADV_DONTNEED) }, 0);
            }
        });
        for page in (0..half).rev() {
            assert_eq!(byte(&memory, page), content(page), "page {page}");
        }
    });
    restore.finish().unwrap();
    for page in 0..PAGES {
        assert_eq!(byte(&memory, page), if page < half { content(page) } else { 0 }, "page {page}");
    }
}

#[test]
fn dropped_early_everything_is_in_when_the_drop_is_done() {
    let (memory, ram) = memory(Backing::Memfd);
    let restore = lazy(Arc::new(Fake::new(&ram)), &ram, &still()).unwrap();
    let waits = reader(&memory, 500);
    drop(restore);
    assert_eq!(waits.recv_timeout(LONG), Ok(content(500)));
    assert_all(&memory, &[]);
}

#[test]
fn cancelled_it_reads_nothing_more_and_feeds_no_zeros() {
    let (memory, ram) = memory(Backing::Anon);
    let source = Arc::new(Fake::new(&ram));
    let restore = lazy(Arc::clone(&source) as Arc<dyn PageSource>, &ram, &still()).unwrap();
    assert_eq!(byte(&memory, 7), content(7));
    restore.cancel();
    assert_eq!(source.reads.lock().unwrap().len(), 1);
    assert_eq!([byte(&memory, 7), byte(&memory, 130)], [content(7), 0]);
    assert!(is_poisoned(&memory, 8) && is_poisoned(&memory, 500) && !is_poisoned(&memory, 130));
}

#[test]
fn the_order_of_the_last_time_is_the_order_of_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let order = order_path(dir.path().join("vm.ramshot"));
    let (memory_1, ram) = memory(Backing::Anon);
    let restore =
        lazy(Arc::new(Fake::new(&ram)), &ram, &LazyOptions { order: Some(order.clone()), ..still() }).unwrap();
    let touched = [1500, 3, 700];
    touched.iter().for_each(|&page| assert_eq!(byte(&memory_1, page), content(page)));
    restore.finish().unwrap();

    let first_reads = |order: &Path| {
        let (memory, ram) = memory(Backing::Anon);
        let source = Arc::new(Fake::new(&ram));
        let options = LazyOptions { order: Some(order.to_owned()), ..LazyOptions::default() };
        lazy(Arc::clone(&source) as Arc<dyn PageSource>, &ram, &options).unwrap().finish().unwrap();
        assert_all(&memory, &[]);
        let reads = source.reads.lock().unwrap();
        reads.iter().take(3).map(|run| run.first.0).collect::<Vec<_>>()
    };
    assert_eq!(first_reads(&order), touched);
    // Damaged: as if there were none.
    let mut bytes = std::fs::read(&order).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&order, bytes).unwrap();
    assert_eq!(first_reads(&order)[0], 0);
}

/// A file that notes where it is read first.
struct First(SnapshotFile, Mutex<Option<PageId>>);

impl PageSource for First {
    fn blocks(&self) -> &[FileBlock] {
        self.0.blocks()
    }

    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn extent(&self, first: PageId) -> Option<StateRun> {
        self.0.extent(first)
    }

    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        self.1.lock().unwrap().get_or_insert(first);
        PageSource::read_run(&self.0, first, into)
    }

    fn device_state(&self) -> &[u8] {
        self.0.device_state()
    }
}

/// Without a restore before it, what the guest wrote around T0 comes first.
#[test]
fn the_order_of_the_capture_is_the_order_of_the_first_restore() {
    // Less than 64 MiB is not armed ahead.
    const LARGE: u64 = 96 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (path, order) = (dir.path().join("vm.ramshot"), dir.path().join("order"));
    let large = || {
        let memory = Memory::new(LARGE, Backing::Anon).unwrap();
        let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
        (memory, ram)
    };
    let (live, ram) = large();
    for page in 0..LARGE / 4096 {
        live.write(page * 4096, &[1; PAGE]).unwrap();
    }
    let options = ramshot::Options { order: Some(order.clone()), ..ramshot::Options::default() };
    let prepared = ramshot::prepare(&ram, &path, &options).unwrap().arm_ahead().unwrap();
    let written = 20_000;
    live.write(written * 4096, &[2; PAGE]).unwrap();
    prepared.begin(Pending::All, vec![]).unwrap().finish().unwrap();

    for (order, first) in [(None, 0), (Some(order), written / 512 * 512)] {
        let (restored, ram) = large();
        let source = Arc::new(First(SnapshotFile::open(&path).unwrap(), Mutex::new(None)));
        let options = LazyOptions { order, ..LazyOptions::default() };
        lazy(Arc::clone(&source) as Arc<dyn PageSource>, &ram, &options).unwrap().finish().unwrap();
        assert_eq!(*source.1.lock().unwrap(), Some(PageId(first)));
        let bytes: Vec<u8> = [written - 1, written].map(|page| byte(&restored, page)).into();
        assert_eq!(bytes, [1, 2]);
    }
}

/// The image of [`content`] as a file.
fn image(path: &Path, ram: &GuestRam) {
    let options = FileSinkOptions { direct: false, sync: false, ..FileSinkOptions::default() };
    let sink = Box::new(FileSink::create(path, ram.table(), &options).unwrap());
    for page in (0..PAGES).filter(|&page| content(page) != 0) {
        let bytes = [content(page); PAGE];
        let digests = [PageDigest::Data(crc32c::crc32c(&bytes))];
        sink.write(&[Piece { first: PageId(page), bytes: &bytes, digests: &digests }]).unwrap();
    }
    sink.commit(&ImageMeta::default()).unwrap();
}

/// A file, and what is done to it after it was opened.
fn with_file(harm: impl FnOnce(&Path), check: impl FnOnce(Arc<Memory>, Arc<GuestRam>, Arc<SnapshotFile>)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.ramshot");
    let (memory, ram) = memory(Backing::Anon);
    image(&path, &ram);
    let file = Arc::new(SnapshotFile::open(&path).unwrap());
    harm(&path);
    check(memory, ram, file);
}

#[test]
fn a_file_that_is_cut_off_meanwhile_is_told() {
    let cut = |path: &Path| OpenOptions::new().write(true).open(path).unwrap().set_len(1000 * 4096 + 100).unwrap();
    with_file(cut, |memory, ram, file| {
        let failed = lazy(file, &ram, &LazyOptions::default()).unwrap().finish().unwrap_err();
        let gone: Vec<u64> = (1000..PAGES).filter(|&page| content(page) != 0).collect();
        let text = failed.to_string();
        assert!(text.contains("cut off") && text.contains(&format!("{} pages", gone.len())), "{text}");
        assert!(gone.iter().step_by(50).all(|&page| is_poisoned(&memory, page)));
        assert_all(&memory, &gone);
    });
}

#[test]
fn a_page_that_was_changed_is_told_and_never_fed() {
    let change = |path: &Path| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(b"x", 330 * 4096 + 17).unwrap();
        file.write_all_at(&[0; PAGE], 331 * 4096).unwrap();
    };
    with_file(change, |memory, ram, file| {
        let failed = lazy(file, &ram, &LazyOptions::default()).unwrap().finish().unwrap_err();
        let text = failed.to_string();
        assert!(text.contains("2 pages") && text.contains("guest address 0x14a000") && text.contains("CRC"), "{text}");
        assert!(is_poisoned(&memory, 330) && is_poisoned(&memory, 331));
        assert_all(&memory, &[330, 331]);
    });
}

#[test]
fn a_file_that_is_removed_meanwhile_is_read_to_its_end() {
    with_file(
        |path| std::fs::remove_file(path).unwrap(),
        |memory, ram, file| {
            lazy(file, &ram, &LazyOptions::default()).unwrap().finish().unwrap();
            assert_all(&memory, &[]);
        },
    );
}

#[test]
fn a_restore_that_cannot_work_does_not_begin() {
    let (memory_1, ram) = memory(Backing::Anon);
    let begin =
        |fake: Fake, ram: &Arc<GuestRam>, options: &LazyOptions| lazy(Arc::new(fake), ram, options).unwrap_err();
    let options = LazyOptions::default();
    let mut other = Fake::new(&ram);
    other.blocks[0].guest = GuestAddr(1 << 40);
    assert!(matches!(begin(other, &ram, &options), LazyError::Layout(_)));
    let mut other = Fake::new(&ram);
    other.blocks[0].name = BlockName::new("other").unwrap();
    assert!(matches!(begin(other, &ram, &options), LazyError::Layout(_)));
    let wrong = LazyOptions { around_min: 1, ..LazyOptions::default() };
    assert!(matches!(begin(Fake::new(&ram), &ram, &wrong), LazyError::Option(_)));
    memory_1.write(4096, &[1]).unwrap();
    let error = begin(Fake::new(&ram), &ram, &options).to_string();
    assert!(error.contains("holds something already"), "{error}");
    assert_eq!([byte(&memory_1, 0), byte(&memory_1, 9)], [0, 0], "nothing stayed registered");
}

#[test]
fn a_file_is_mapped_into_place() {
    with_file(
        |_| (),
        |memory, ram, file| {
            drop(ram);
            let map = |memory: &Memory| {
                let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
                // SAFETY: `Memory` unmaps by address, and nobody uses it yet.
                file.map_into(&unsafe { MapTarget::new(ram) })
            };
            assert_eq!(map(&memory).unwrap(), MapReport { mapped_bytes: SIZE, ..MapReport::default() });
            assert_all(&memory, &[]);
            memory.write(4096, &[99; 8]).unwrap();
            assert_eq!(byte(&memory, 1), 99);
            assert!(file.verify(1, &mut |_, _| {}).is_ok(), "what the VM writes stays its own");
            // No live snapshot of it, and the reason.
            let again = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
            let dir = tempfile::tempdir().unwrap();
            let error = ramshot::prepare(&again, dir.path().join("x"), &ramshot::Options::default()).err().unwrap();
            assert!(error.to_string().contains("disk file"), "{error}");

            let shared = Memory::new(SIZE, Backing::Memfd).unwrap();
            assert!(matches!(map(&shared).unwrap_err(), MapError::Refused(why) if why.why.contains("Shmem")));
            let other = Memory::new(SIZE * 2, Backing::Anon).unwrap();
            assert!(matches!(map(&other).unwrap_err(), MapError::Layout { .. }));
        },
    );
}

#[test]
fn an_increment_alone_is_no_image() {
    // What `check_whole` says of one is in the file's own tests; here: nothing is registered when it says no.
    struct Part(Fake);
    impl PageSource for Part {
        fn blocks(&self) -> &[FileBlock] {
            self.0.blocks()
        }
        fn pages(&self) -> u64 {
            self.0.pages()
        }
        fn extent(&self, _: PageId) -> Option<StateRun> {
            None
        }
        fn read_run(&self, _: PageId, _: &mut [u8]) -> Result<(), ReadError> {
            unreachable!()
        }
        fn device_state(&self) -> &[u8] {
            &[]
        }
        fn check_whole(&self) -> Result<(), RestoreError> {
            let parent = ramshot::file::SnapshotId([1; 16]);
            Err(RestoreError::NeedsParent { path: "part".into(), parent, pages: 3 })
        }
    }
    let (memory, ram) = memory(Backing::Anon);
    let error = lazy(Arc::new(Part(Fake::new(&ram))), &ram, &LazyOptions::default()).unwrap_err();
    assert!(matches!(error, LazyError::Image(RestoreError::NeedsParent { pages: 3, .. })));
    assert_eq!(byte(&memory, 0), 0);
}
