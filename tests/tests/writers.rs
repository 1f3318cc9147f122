//! Who else writes to guest RAM during a snapshot, besides vCPUs: threads of the VMM, system calls, io_uring, KVM itself.
//! Whatever goes through the mapping that is tracked waits until its page is captured: the image is T0. What goes round
//! it is not seen by the kernel; the last tests show what that means.
//!
//! Each write happens while its page is certainly pending: the image's writers are stuck behind a tap and the pool is too
//! small to get as far. So the tests also prove that a write waits for a copy only, never for the image.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use ramshot::{Options, Parts, Report, SnapshotFile};
use ramshot_tests::chaos::{BadSink, Injected, Rig, Tap, accels, alone, registered_buffers, say, skipped};
use ramshot_tests::{Accel, Backing, GuestConfig, Workload, snapshot_run, verify};

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: u64 = 32 * MIB;
/// Guest-physical: RAM the guest knows nothing of, to the end. It holds a pattern at T0.
const SCRATCH: u64 = 16 * MIB;
/// Three places in it, far from each other, the last one across two pages.
const PLACES: [u64; 3] = [SCRATCH + MIB + 100, 24 * MIB, 30 * MIB - 50];

/// A guest that does nothing, so that the pool belongs to the writer under test.
fn rig(accel: Accel, backing: Backing) -> Rig {
    let (working_set, fill) = (4 * MIB, Some(8 * MIB));
    let config = GuestConfig { workload: Workload::Idle, working_set, fill, ..GuestConfig::default() };
    Rig::new(accel, SIZE, backing, config).unwrap()
}

/// The address of guest RAM in this process.
fn host(rig: &Rig, guest: u64) -> *mut u8 {
    let region = rig.guest.memory().regions().iter().find(|r| (r.guest..r.guest + r.len).contains(&guest)).unwrap();
    ptr::with_exposed_provenance_mut(usize::try_from(region.host + (guest - region.guest)).unwrap())
}

fn text(number: usize) -> Vec<u8> {
    format!("written after T0, number {number}. ").repeat(8).into_bytes()
}

/// What came of a write while its pages were pending.
struct Outcome {
    report: Report,
    t0: Vec<Vec<u8>>,
}

/// Takes a snapshot during which `write` is called, in a thread of its own, while the scratch area is pending. `write` has
/// to come back before the image gets on.
fn write_during(rig: &Rig, write: impl FnOnce() + Send) -> Outcome {
    for (number, at) in (SCRATCH..SIZE).step_by(1 << 16).enumerate() {
        let value = u8::try_from(number % 250).unwrap() + 1;
        rig.guest.memory().write(at, &vec![value; 1 << 16]).unwrap();
    }
    let tap = Arc::new(Tap::closed());
    let behind = |parts: Parts| {
        let sink = BadSink::new(parts.sink, &Injected::default()).behind(&tap);
        Parts { sink: Box::new(sink), ..parts }
    };
    let options = Options { pool_bytes: 4 << 20, workers: 1, around_max: 64 << 10, ..rig.options() };
    let begun = rig.begin_with_copy(rig.prepare(&options, behind).unwrap()).unwrap();
    let live = begun.live.unwrap();
    assert!(tap.somebody_waits(PATIENCE));
    // Until the scan is stuck, with a quarter of the pool left for faults.
    let mut captured = 0;
    while std::mem::replace(&mut captured, live.progress().pages_captured) != captured {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!live.progress().captured);
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let writer = scope.spawn(move || {
            write();
            let _ = done.send(());
        });
        let in_time = is_done.recv_timeout(PATIENCE);
        // Also if it did not: whoever waits is to be freed.
        tap.open();
        let wrote = writer.join();
        assert!(wrote.is_ok(), "{}: the writer failed", rig.accel);
        in_time.expect("the writer waited for the image");
    });
    Outcome { report: live.finish().unwrap(), t0: begun.t0 }
}

/// The right outcome for a writer that the kernel sees: its bytes are in guest RAM, and not in the image.
fn is_captured_first(accel: Accel, backing: Backing, what: &str, write: impl FnOnce(&Rig) + Send) {
    let mut rig = rig(accel, backing);
    let outcome = write_during(&rig, || write(&rig));
    assert!(outcome.report.counts.by_fault > 0, "{accel} {backing}, {what}: no fault: this proved nothing");
    for (number, &at) in PLACES.iter().enumerate() {
        let mut bytes = text(number);
        rig.guest.memory().read(at, &mut bytes).unwrap();
        assert!(bytes == text(number), "{accel} {backing}, {what}: write {number} is not in guest RAM");
    }
    rig.is_exact(&outcome.t0).unwrap_or_else(|why| panic!("{accel} {backing}, {what}: {why}"));
    rig.adopt().unwrap();
    rig.unharmed().unwrap();
}

fn everywhere(test: &str, write: impl Fn(&Rig) + Send + Sync) {
    let _alone = alone();
    for accel in accels(test) {
        for backing in [Backing::Anon, Backing::Memfd] {
            is_captured_first(accel, backing, test, &write);
        }
    }
}

fn pipe_with(bytes: &[u8]) -> std::io::PipeReader {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // Less than a pipe holds.
    writer.write_all(bytes).unwrap();
    reader
}

fn iovec(rig: &Rig, number: usize) -> libc::iovec {
    libc::iovec { iov_base: host(rig, PLACES[number]).cast(), iov_len: text(number).len() }
}

fn all_text() -> Vec<u8> {
    (0..PLACES.len()).flat_map(text).collect()
}

#[test]
fn another_thread() {
    everywhere("another_thread", |rig| {
        for (number, &at) in PLACES.iter().enumerate() {
            rig.guest.memory().write(at, &text(number)).unwrap();
        }
    });
}

#[test]
fn read_from_a_pipe() {
    everywhere("read_from_a_pipe", |rig| {
        for number in 0..PLACES.len() {
            let (pipe, into) = (pipe_with(&text(number)), iovec(rig, number));
            // SAFETY: guest RAM, mapped as long as the rig lives.
            let read = unsafe { libc::read(pipe.as_raw_fd(), into.iov_base, into.iov_len) };
            assert_eq!(usize::try_from(read), Ok(into.iov_len), "read: {}", std::io::Error::last_os_error());
        }
    });
}

#[test]
fn readv_from_a_pipe() {
    everywhere("readv_from_a_pipe", |rig| {
        let pipe = pipe_with(&all_text());
        let into: Vec<libc::iovec> = (0..PLACES.len()).map(|number| iovec(rig, number)).collect();
        // SAFETY: guest RAM, mapped as long as the rig lives.
        let read = unsafe { libc::readv(pipe.as_raw_fd(), into.as_ptr(), 3) };
        assert_eq!(usize::try_from(read), Ok(all_text().len()), "readv: {}", std::io::Error::last_os_error());
    });
}

/// The kernel has the disk write into guest RAM: pinned for as long as that takes.
#[test]
fn a_direct_read_from_a_file() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0xdd; 2 * PAGE]).unwrap();
    let Ok(disk) = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path) else {
        return skipped("a_direct_read_from_a_file", "this file system has no direct I/O");
    };
    for accel in accels("a_direct_read_from_a_file") {
        for backing in [Backing::Anon, Backing::Memfd] {
            let rig = rig(accel, backing);
            let at = SCRATCH + 5 * MIB;
            let outcome = write_during(&rig, || {
                // SAFETY: guest RAM, mapped as long as the rig lives.
                let read = unsafe { libc::pread(disk.as_raw_fd(), host(&rig, at).cast(), 2 * PAGE, 0) };
                assert_eq!(read, 2 * 4096, "pread: {}", std::io::Error::last_os_error());
            });
            let mut now = [0; 2 * PAGE];
            rig.guest.memory().read(at, &mut now).unwrap();
            assert!(now == [0xdd; 2 * PAGE], "{accel} {backing}: it did not write");
            assert!(outcome.report.counts.by_fault > 0);
            rig.is_exact(&outcome.t0).unwrap_or_else(|why| panic!("{accel} {backing}: {why}"));
        }
    }
}

/// A ring, if this system allows one.
fn ring(test: &str) -> Option<IoUring> {
    IoUring::new(8).map_err(|error| skipped(test, &format!("io_uring_setup is refused: {error}"))).ok()
}

fn io_uring_read(test: &str, flags: squeue::Flags) {
    if ring(test).is_none() {
        return;
    }
    everywhere(test, |rig| {
        let mut ring = ring(test).unwrap();
        let pipes: Vec<_> = (0..PLACES.len()).map(|number| pipe_with(&text(number))).collect();
        for (number, pipe) in pipes.iter().enumerate() {
            let into = iovec(rig, number);
            let len = u32::try_from(into.iov_len).unwrap();
            let read = opcode::Read::new(types::Fd(pipe.as_raw_fd()), into.iov_base.cast(), len);
            let read = read.build().flags(flags).user_data(number as u64);
            // SAFETY: guest RAM and pipe live until the completions are there, below.
            unsafe { ring.submission().push(&read).unwrap() };
        }
        while ring.completion().len() < PLACES.len() {
            ring.submit_and_wait(PLACES.len()).unwrap();
        }
        for done in ring.completion() {
            let number = usize::try_from(done.user_data()).unwrap();
            assert_eq!(usize::try_from(done.result()), Ok(text(number).len()), "io_uring read {number}");
        }
    });
}

#[test]
fn io_uring() {
    io_uring_read("io_uring", squeue::Flags::empty());
}

#[test]
fn io_uring_by_its_workers() {
    io_uring_read("io_uring_by_its_workers", squeue::Flags::ASYNC);
}

/// Memory written by process id and address (a debugger, a monitor): through the tracked mapping, so it waits, too.
#[test]
fn process_vm_writev() {
    everywhere("process_vm_writev", |rig| {
        let bytes = all_text();
        let from = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let into: Vec<libc::iovec> = (0..PLACES.len()).map(|number| iovec(rig, number)).collect();
        let me = libc::pid_t::try_from(std::process::id()).unwrap();
        // SAFETY: guest RAM, mapped as long as the rig lives.
        let wrote = unsafe { libc::process_vm_writev(me, &raw const from, 1, into.as_ptr(), 3, 0) };
        assert_eq!(usize::try_from(wrote), Ok(bytes.len()), "{}", std::io::Error::last_os_error());
    });
}

/// What can go round the mapping that is tracked: the pages that differ from T0 are those written, and no others.
/// Returns how many.
fn leaks(rig: &Rig, outcome: &Outcome, written: &[u64]) -> u64 {
    let file = SnapshotFile::open(rig.target()).unwrap();
    let mut expected = outcome.t0.clone();
    let mut page = [0; PAGE];
    for &at in written {
        // Whatever the image has there is allowed; everything else has to be T0.
        file.read_page(ramshot::core::PageId(at / 4096), &mut page).unwrap();
        let from = usize::try_from(at / 4096 * 4096).unwrap();
        expected[0][from..from + PAGE].copy_from_slice(&page);
    }
    assert_eq!(verify::against_file(&file, &expected).unwrap().mismatched, 0, "other pages differ, too");
    verify::against_file(&file, &outcome.t0).unwrap().mismatched
}

const UNSEEN: [u64; 2] = [SCRATCH + 2 * MIB, 28 * MIB];

/// `pwrite` on the memfd, a second mapping of it in this process, one in another process. None of them can be seen: what
/// they write before a page is captured is in the image. The embedder has to stop such writers at T0 until `finish`, or
/// give them the tracked mapping. The second mapping is the one that can be found, in `/proc/self/maps`: there is a warning.
#[test]
fn round_the_tracked_mapping() {
    let _alone = alone();
    for accel in accels("round_the_tracked_mapping") {
        let rig = rig(accel, Backing::Memfd);
        let file: Arc<File> = Arc::clone(rig.guest.memory().regions()[0].file.as_ref().unwrap());
        let ram = snapshot_run::guest_ram(rig.guest.as_ref()).unwrap();
        assert_eq!(ram.aliases().unwrap(), []);

        let outcome = write_during(&rig, || UNSEEN.iter().for_each(|&at| file.write_all_at(b"pwrite", at).unwrap()));
        assert_eq!(leaks(&rig, &outcome, &UNSEEN), 2, "{accel}: pwrite is seen: the documentation is out of date");

        let second = Second::map(&file);
        let blocks: Vec<_> = ram.aliases().unwrap().iter().map(|(block, _)| block.0).collect();
        assert!(!blocks.is_empty() && blocks.iter().all(|block| *block == 0), "found of blocks {blocks:?}");
        let outcome = write_during(&rig, || UNSEEN.iter().for_each(|&at| second.write(at, 1)));
        assert_eq!(leaks(&rig, &outcome, &UNSEEN), 2, "{accel}: a second mapping is seen: the documentation is wrong");

        let outcome = write_during(&rig, || {
            in_a_child(|| UNSEEN.iter().for_each(|&at| second.write(at, 2)));
        });
        assert_eq!(leaks(&rig, &outcome, &UNSEEN), 2, "{accel}: another process is seen: the documentation is wrong");
        drop(second);

        // The child's own copy of the very mapping that is tracked: a memfd is shared with it, the tracking is not.
        let outcome = write_during(&rig, || {
            // SAFETY: guest RAM, mapped in the child, too.
            in_a_child(|| UNSEEN.iter().for_each(|&at| unsafe { host(&rig, at).write_volatile(3) }));
        });
        assert_eq!(leaks(&rig, &outcome, &UNSEEN), 2, "{accel}: a child is seen: the documentation is out of date");
        say(&format!(
            "round_the_tracked_mapping, {accel}: pwrite, second mapping, other process: all unseen, as documented"
        ));
    }
}

/// A child has its own copy of private memory, and what it writes there stays there.
#[test]
fn a_child_of_private_memory() {
    let _alone = alone();
    for accel in accels("a_child_of_private_memory") {
        let rig = rig(accel, Backing::Anon);
        let outcome = write_during(&rig, || {
            // SAFETY: guest RAM, mapped in the child, too.
            in_a_child(|| UNSEEN.iter().for_each(|&at| unsafe { host(&rig, at).write_volatile(3) }));
        });
        assert_eq!(leaks(&rig, &outcome, &UNSEEN), 0, "{accel}: a child wrote into the image");
    }
}

/// Buffers registered with io_uring are pinned, and written by address of the page, not of the mapping: like a device.
/// As with every DMA, the embedder has to stop such I/O from T0 to `finish`.
#[test]
fn buffers_registered_with_io_uring() {
    let _alone = alone();
    let Some(probe) = ring("buffers_registered_with_io_uring") else { return };
    drop(probe);
    for accel in accels("buffers_registered_with_io_uring") {
        for backing in [Backing::Anon, Backing::Memfd] {
            let rig = rig(accel, backing);
            let mut ring = ring("buffers_registered_with_io_uring").unwrap();
            let buffer = libc::iovec { iov_base: host(&rig, UNSEEN[0]).cast(), iov_len: PAGE };
            // Touched first: what is pinned has to be the page that is there at T0.
            rig.guest.memory().write(UNSEEN[0], &[1; PAGE]).unwrap();
            // SAFETY: guest RAM, mapped longer than the ring lives.
            if let Err(error) = unsafe { ring.submitter().register_buffers(&[buffer]) } {
                skipped("buffers_registered_with_io_uring", &format!("registering is refused: {error}"));
                return;
            }
            // What a warning could be made of.
            let known = registered_buffers(rig.guest.memory().regions()).unwrap().len();
            let pipe = pipe_with(&text(0));
            let (rig, pipe, ring) = (&rig, &pipe, &mut ring);
            let outcome = write_during(rig, move || {
                let into = host(rig, UNSEEN[0]);
                let len = u32::try_from(text(0).len()).unwrap();
                let read = opcode::ReadFixed::new(types::Fd(pipe.as_raw_fd()), into, len, 0).build();
                // SAFETY: guest RAM and pipe live until the completion is there, below.
                unsafe { ring.submission().push(&read).unwrap() };
                ring.submit_and_wait(1).unwrap();
                assert_eq!(usize::try_from(ring.completion().next().unwrap().result()), Ok(text(0).len()));
            });
            let leaked = leaks(rig, &outcome, &UNSEEN[..1]);
            say(&format!(
                "buffers_registered_with_io_uring, {accel} {backing}: {leaked} of 1 pages written unseen; {known} found in /proc"
            ));
        }
    }
}

/// A second mapping of guest RAM.
struct Second(*mut libc::c_void);

// SAFETY: an address; written through with volatile stores only.
unsafe impl Sync for Second {}

impl Second {
    fn map(file: &File) -> Self {
        let (len, access) = (usize::try_from(SIZE).unwrap(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert!(at != libc::MAP_FAILED);
        Self(at)
    }

    fn write(&self, at: u64, value: u8) {
        // SAFETY: inside the mapping.
        unsafe { self.0.cast::<u8>().add(usize::try_from(at).unwrap()).write_volatile(value) };
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(self.0, usize::try_from(SIZE).unwrap()) };
    }
}

/// Runs a few stores in a child, and waits for it.
fn in_a_child(body: impl FnOnce()) {
    let start = Instant::now();
    // SAFETY: the child stores to memory that is mapped, then ends; it allocates nothing and takes no lock.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        body();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(7) };
    }
    let mut status = 0;
    // SAFETY: a child of ours, and a place for its status.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        assert!(start.elapsed() < PATIENCE, "the child hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "the child ended with {status:#x}");
}
