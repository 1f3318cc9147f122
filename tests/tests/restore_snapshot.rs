//! A live snapshot of memory that is still being restored lazily: the image is memory at T0, whatever was in by then.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use ramshot::core::{HostAddr, HostRange, PageId};
use ramshot::file::{FileSink, FileSinkOptions, PageSource};
use ramshot::sink::{ImageMeta, PageDigest, Piece};
use ramshot::{
    Cause, GuestRam, ImageSink, LazyOptions, LazyRestore, Options, Pending, Report, SnapshotFailed, SnapshotFile, lazy,
};
use ramshot_tests::{Backing, Memory};

const PAGE: usize = 4096;
const SIZE: u64 = 8 << 20;
const PAGES: u64 = SIZE / 4096;
const BACKINGS: [Backing; 3] = [Backing::Anon, Backing::Thp, Backing::Memfd];

/// The byte that fills a page of the image that is restored: every fifth run of 32 pages is zero.
fn content(page: u64) -> u8 {
    if page / 32 % 5 == 4 { 0 } else { u8::try_from(page % 100 + 1).unwrap() }
}

fn write_image(path: &Path) {
    let memory = Memory::new(SIZE, Backing::Anon).unwrap();
    let ram = GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap();
    let options = FileSinkOptions { replace: false, sync: false, direct: false };
    let sink = FileSink::create(path, ram.table(), &options).unwrap();
    for page in 0..PAGES {
        let bytes = [content(page); PAGE];
        let digests = [PageDigest::of(&bytes)];
        sink.write(&[Piece { first: PageId(page), bytes: &bytes, digests: &digests }]).unwrap();
    }
    Box::new(sink).commit(&ImageMeta { device_state: Vec::new(), statistics: Vec::new() }).unwrap();
}

/// Memory that is being restored.
struct World {
    memory: Arc<Memory>,
    ram: Arc<GuestRam>,
    restore: LazyRestore,
    dir: tempfile::TempDir,
}

impl World {
    fn new(backing: Backing, options: &LazyOptions, spoil: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("first");
        write_image(&path);
        spoil(&path);
        let memory = Memory::new(SIZE, backing).unwrap();
        let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap());
        let source = Arc::new(SnapshotFile::open(&path).unwrap());
        let restore = lazy(source as Arc<dyn PageSource>, &ram, options).unwrap();
        Self { memory, ram, restore, dir }
    }

    fn second(&self) -> PathBuf {
        self.dir.path().join("second")
    }

    fn prepare(&self, ahead: bool) -> ramshot::Prepared {
        let options = Options { replace: true, ..Options::default() };
        let prepared = self.restore.prepare(&self.ram, self.second(), &options).unwrap();
        if ahead { prepared.arm_ahead().unwrap() } else { prepared }
    }

    fn write(&self, page: u64, byte: u8) {
        self.memory.write(page * 4096 + 64, &[byte; 8]).unwrap();
    }

    fn read(&self, page: u64) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        self.memory.read(page * 4096, &mut bytes).unwrap();
        bytes
    }
}

/// A page of the image with what was written over it (0: nothing).
fn page_with(page: u64, written: u8) -> [u8; PAGE] {
    let mut bytes = [content(page); PAGE];
    if written != 0 {
        bytes[64..72].fill(written);
    }
    bytes
}

#[track_caller]
fn assert_image(path: &Path, written: impl Fn(u64) -> u8, what: &str) {
    assert_pages(path, |page| page_with(page, written(page)), what);
}

#[track_caller]
fn assert_pages(path: &Path, expected: impl Fn(u64) -> [u8; PAGE], what: &str) {
    let file = SnapshotFile::open(path).unwrap();
    file.verify(1, &mut |_, _| {}).unwrap();
    let mut bytes = [0; PAGE];
    for page in 0..PAGES {
        file.read_page(PageId(page), &mut bytes).unwrap();
        assert!(bytes == expected(page), "{what}: page {page} is not what it was at T0: {:?}", &bytes[60..76]);
    }
}

/// Nothing comes in but what is touched.
fn still() -> LazyOptions {
    LazyOptions { prefetch: false, around_min: 4096, around_max: 4096, ..LazyOptions::default() }
}

/// Written before T0: every seventh page. After it: every third. Pages that are in, pages that are not, zero pages.
#[test]
fn what_was_not_in_at_t0_is_in_the_image_as_it_is_in_the_first_one() {
    for backing in BACKINGS {
        for ahead in [false, true] {
            let what = format!("{backing}, ahead {ahead}");
            let world = World::new(backing, &still(), |_| ());
            let before = |page: u64| if page.is_multiple_of(7) { 201 } else { 0 };
            (0..PAGES).filter(|page| before(*page) != 0).for_each(|page| world.write(page, 201));
            // Read, so that it is in and not written.
            (0..PAGES)
                .filter(|page| page % 11 == 5)
                .for_each(|page| assert!(world.read(page) == page_with(page, before(page))));
            let live = world.prepare(ahead).begin(Pending::All, b"state".to_vec()).unwrap();
            let after = |page: u64| if page.is_multiple_of(3) { 202 } else { before(page) };
            (0..PAGES).filter(|page| page.is_multiple_of(3)).for_each(|page| world.write(page, 202));
            let report: Report = live.finish().unwrap();
            assert_image(&world.second(), before, &what);
            assert!(report.counts.faults > 0, "{what}: {:?}", report.counts);
            // Zero pages that nobody has touched cost nothing.
            let zero =
                (0..PAGES).filter(|page| content(*page) == 0 && before(*page) == 0 && page % 11 != 5).count() as u64;
            if backing != Backing::Thp {
                assert!(report.counts.total <= PAGES - zero, "{what}: {:?}", report.counts);
            }
            let done = world.restore.finish().unwrap();
            assert!(done.progress.complete, "{what}: {done:?}");
            let world = (world.memory, world.ram);
            for page in 0..PAGES {
                let mut bytes = [0; PAGE];
                world.0.read(page * 4096, &mut bytes).unwrap();
                assert!(bytes == page_with(page, after(page)), "{what}: page {page} afterwards");
            }
            // Nothing is left behind: an ordinary snapshot of it can be taken.
            let third = tempfile::tempdir().unwrap();
            let path = third.path().join("third");
            ramshot::prepare(&world.1, &path, &Options::default())
                .unwrap()
                .begin(Pending::All, vec![])
                .unwrap()
                .finish()
                .unwrap();
            assert_image(&path, after, &what);
        }
    }
}

/// Writers all the time, pages coming in all the time, one snapshot after the other.
#[test]
fn snapshots_one_after_the_other_while_pages_come_in() {
    for backing in BACKINGS {
        let options = LazyOptions { around_min: 4096, around_max: 16384, prefetch: false, ..LazyOptions::default() };
        let world = World::new(backing, &options, |_| ());
        let shadow: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        // Held for reading by who writes: T0 holds it for writing.
        let gate = RwLock::new(());
        let stop = AtomicBool::new(false);
        let mut faults = 0;
        std::thread::scope(|scope| {
            for seed in 1..=2u64 {
                let (world, shadow, gate, stop) = (&world, &shadow, &gate, &stop);
                scope.spawn(move || {
                    let mut dice = seed;
                    while !stop.load(Ordering::Relaxed) {
                        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        // Pages of its own.
                        let page = (dice >> 33) % (PAGES / 2) * 2 + seed - 1;
                        let byte = u8::try_from((dice >> 20) % 100 + 101).unwrap();
                        let open = gate.read().unwrap();
                        world.write(page, byte);
                        shadow[usize::try_from(page).unwrap()].store(byte.into(), Ordering::Relaxed);
                        drop(open);
                        std::thread::sleep(Duration::from_micros(50));
                    }
                });
            }
            for round in 0..6 {
                if round == 3 {
                    world.restore.prefetch();
                }
                let prepared = world.prepare(round % 2 == 1);
                let closed = gate.write().unwrap();
                let t0: Vec<u8> =
                    shadow.iter().map(|byte| u8::try_from(byte.load(Ordering::Relaxed)).unwrap()).collect();
                let live = prepared.begin(Pending::All, vec![]).unwrap();
                drop(closed);
                faults += live.finish().unwrap().counts.faults;
                assert_image(
                    &world.second(),
                    |page| t0[usize::try_from(page).unwrap()],
                    &format!("{backing}, {round}"),
                );
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(faults > 0, "{backing}: this proved nothing");
        assert!(world.restore.finish().unwrap().progress.complete);
    }
}

#[test]
fn a_discard_of_what_was_not_captured_ends_the_snapshot_and_not_the_restore() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let world = World::new(backing, &still(), |_| ());
        let advice = if backing == Backing::Memfd { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        world.write(1, 201);
        // In, and to be captured; not in, and to be captured.
        for (page, discarded) in [(1, None), (40, Some(1))] {
            let options = Options { replace: true, pool_bytes: 1 << 20, ..Options::default() };
            let prepared = world.restore.prepare(&world.ram, world.second(), &options).unwrap();
            let live = prepared.begin(Pending::All, vec![]).unwrap();
            let host = world.memory.regions()[0].host + page * 4096;
            // SAFETY: guest memory, which is the test's own, and of which nobody holds a reference.
            assert_eq!(unsafe { libc::madvise(host as *mut libc::c_void, PAGE, advice) }, 0);
            match live.finish() {
                Err(SnapshotFailed::Ended { cause: Cause::Discarded(_), .. }) => {}
                // The scan was faster.
                Ok(_) => {
                    let expected = |at| match at {
                        _ if discarded == Some(at) => [0; PAGE],
                        1 => page_with(1, 201),
                        _ => page_with(at, 0),
                    };
                    assert_pages(&world.second(), expected, "captured before");
                }
                Err(other) => panic!("{backing}: {other}"),
            }
            assert!(world.read(page) == [0; PAGE], "{backing}: what was discarded is zero");
            world.write(page, 0);
        }
        // Announced, it is captured first.
        let live = world.prepare(false).begin(Pending::All, vec![]).unwrap();
        let host = world.memory.regions()[0].host + 80 * 4096;
        live.before_discard(HostRange::new(HostAddr(host), 4096)).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::madvise(host as *mut libc::c_void, PAGE, advice) }, 0);
        live.finish().unwrap();
        let mut bytes = [0; PAGE];
        SnapshotFile::open(world.second()).unwrap().read_page(PageId(80), &mut bytes).unwrap();
        assert!(bytes == page_with(80, 0));
        assert!(world.read(80) == [0; PAGE]);
        assert!(world.restore.finish().unwrap().progress.complete);
    }
}

#[test]
fn a_page_that_the_restore_loses_ends_the_snapshot_without_an_image() {
    let lost = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&lost);
    let options = LazyOptions {
        on_lost: Some(Arc::new(move |pages| told.lock().unwrap().push(pages.guest.0 / 4096))),
        ..still()
    };
    let world = World::new(Backing::Anon, &options, |path| {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[77], 50 * 4096 + 9).unwrap();
    });
    let live = world.prepare(false).begin(Pending::All, vec![]).unwrap();
    let failed = live.finish().unwrap_err();
    assert!(failed.to_string().contains("lost"), "{failed}");
    assert!(!world.second().exists() && lost.lock().unwrap().contains(&50));
    // The rest of the VM goes on.
    world.write(1, 5);
    assert!(world.read(51) == page_with(51, 0));
    // And another try says the same.
    let live = world.prepare(false).begin(Pending::All, vec![]).unwrap();
    assert!(live.finish().is_err());
    assert!(world.restore.finish().unwrap_err().to_string().contains("lost"));
}

#[test]
fn one_snapshot_at_a_time_and_an_ordinary_one_says_where_to_go() {
    let world = World::new(Backing::Anon, &still(), |_| ());
    let first = world.prepare(false);
    let second = world.restore.prepare(&world.ram, world.dir.path().join("x"), &Options::default()).err().unwrap();
    assert!(second.to_string().contains("another snapshot"), "{second}");
    let plain = ramshot::prepare(&world.ram, world.dir.path().join("y"), &Options::default()).err().unwrap();
    assert!(plain.to_string().contains("LazyRestore::prepare"), "{plain}");
    drop(first);
    assert!(!world.dir.path().join("x").exists() && !world.dir.path().join("y").exists());
    // Cancelled and dropped ones leave nothing protected, and the restore goes on.
    world.prepare(true).begin(Pending::All, vec![]).unwrap().handle().cancel();
    drop(world.prepare(false).begin(Pending::All, vec![]).unwrap());
    (0..PAGES).for_each(|page| world.write(page, 9));
    assert!(world.restore.progress().faults > 0);
    world.prepare(false).begin(Pending::All, vec![]).unwrap().finish().unwrap();
    assert_image(&world.second(), |_| 9, "after all");
    let World { memory, ram, restore, dir } = world;
    restore.finish().unwrap();
    let _ = (memory, ram, dir);
}
