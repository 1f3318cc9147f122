//! Memory of every kind, a thread that serves faults, and a look at what is registered.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // each test binary uses a part

use std::ffi::c_void;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use ramshot_core::{BlockIndex, Done, Event, GuestAddr, HostAddr, HostRange, Treatment, WriteTracker};
use ramshot_linux::{GuestRam, Region, RegionFile, Tracker, TrackerOptions};

pub const PAGE: usize = 4096;
pub const HUGE: usize = 2 << 20;
/// Long enough that a thread which is not blocked would have gone on.
pub const SOON: Duration = Duration::from_millis(60);
/// Far longer than anything that works takes.
pub const LONG: Duration = Duration::from_secs(10);

/// Mapped memory, unmapped on drop.
pub struct Memory {
    pub start: NonNull<c_void>,
    pub len: usize,
    pub file: Option<File>,
}

// SAFETY: it is an address range; what is written through it is the tests' business, with volatile accesses.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

fn reserve(len: usize) -> NonNull<c_void> {
    // Twice as much, so that a 2 MiB-aligned start is in it; the rest goes back at once.
    let whole = len + HUGE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { mmap_anonymous(None, NonZeroUsize::new(whole).unwrap(), ProtFlags::PROT_NONE, flags) };
    let start = start.unwrap().addr().get();
    let aligned = start.next_multiple_of(HUGE);
    for (from, to) in [(start, aligned), (aligned + len, start + whole)] {
        if to > from {
            // SAFETY: part of the mapping just made, used by nobody.
            unsafe { munmap(NonNull::with_exposed_provenance(NonZeroUsize::new(from).unwrap()), to - from).unwrap() };
        }
    }
    NonNull::with_exposed_provenance(NonZeroUsize::new(aligned).unwrap())
}

impl Memory {
    fn map(len: usize, prot: ProtFlags, flags: MapFlags, file: Option<(BorrowedFd<'_>, i64)>) -> nix::Result<Self> {
        let at = reserve(len);
        let size = NonZeroUsize::new(len).unwrap();
        let flags = flags | MapFlags::MAP_FIXED;
        // SAFETY: replaces the reservation just made, which nobody else knows.
        let start = unsafe {
            match file {
                Some((file, offset)) => mmap(Some(at.addr()), size, prot, flags, file, offset),
                None => mmap_anonymous(Some(at.addr()), size, prot, flags),
            }
        };
        match start {
            Ok(start) => {
                start.as_ptr().expose_provenance();
                Ok(Self { start, len, file: None })
            }
            Err(errno) => {
                // SAFETY: the reservation.
                unsafe { munmap(at, len).unwrap() };
                Err(errno)
            }
        }
    }

    fn rw() -> ProtFlags {
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
    }

    pub fn anonymous(len: usize) -> Self {
        let memory = Self::map(len, Self::rw(), MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE, None).unwrap();
        // 4 KiB pages, whatever the system's setting.
        // SAFETY: advice on our own mapping.
        unsafe { madvise(memory.start, len, MmapAdvise::MADV_NOHUGEPAGE).unwrap() };
        memory
    }

    pub fn thp(len: usize) -> Self {
        let memory = Self::map(len, Self::rw(), MapFlags::MAP_PRIVATE, None).unwrap();
        // SAFETY: advice on our own mapping.
        unsafe { madvise(memory.start, len, MmapAdvise::MADV_HUGEPAGE).unwrap() };
        memory
    }

    pub fn shared_anonymous(len: usize) -> Self {
        Self::map(len, Self::rw(), MapFlags::MAP_SHARED, None).unwrap()
    }

    pub fn memfd(len: usize) -> Self {
        Self::of_memfd(len, MFdFlags::empty(), MapFlags::MAP_SHARED).unwrap()
    }

    pub fn private_memfd(len: usize) -> Self {
        Self::of_memfd(len, MFdFlags::empty(), MapFlags::MAP_PRIVATE).unwrap()
    }

    pub fn of_memfd(len: usize, how: MFdFlags, flags: MapFlags) -> nix::Result<Self> {
        let file = File::from(memfd_create(c"test", how | MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len as u64).map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
        let mut memory = Self::map(len, Self::rw(), flags, Some((file.as_fd(), 0)))?;
        memory.file = Some(file);
        Ok(memory)
    }

    pub fn anonymous_hugetlb(len: usize) -> nix::Result<Self> {
        Self::map(len, Self::rw(), MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB, None)
    }

    pub fn of_file(file: &File, len: usize, flags: MapFlags, prot: ProtFlags) -> Self {
        Self::map(len, prot, flags, Some((file.as_fd(), 0))).unwrap()
    }

    pub fn address(&self, at: usize) -> HostAddr {
        HostAddr((self.start.addr().get() + at) as u64)
    }

    pub fn range(&self, at: usize, len: usize) -> HostRange {
        HostRange::new(self.address(at), len as u64)
    }

    pub fn pointer(&self, at: usize) -> *mut u8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping, just checked.
        unsafe { self.start.cast::<u8>().as_ptr().add(at) }
    }

    pub fn write(&self, at: usize, value: u8) {
        // SAFETY: inside the mapping (`pointer` checks), and no reference to it exists.
        unsafe { self.pointer(at).write_volatile(value) };
    }

    pub fn read(&self, at: usize) -> u8 {
        // SAFETY: as in `write`.
        unsafe { self.pointer(at).read_volatile() }
    }

    pub fn advise(&self, at: usize, len: usize, advice: MmapAdvise) -> nix::Result<()> {
        let at = NonNull::new(self.pointer(at)).unwrap().cast();
        // SAFETY: part of our mapping, into which no reference exists.
        unsafe { madvise(at, len, advice) }
    }

    /// As a tracked block.
    pub fn region(&self, name: &str, guest: u64) -> Region {
        Region {
            name: name.to_owned(),
            guest: GuestAddr(guest),
            host: self.address(0),
            len: self.len as u64,
            used: None,
            treatment: Treatment::Tracked,
            file: self.file.as_ref().map(|file| RegionFile { file: file.try_clone().unwrap(), offset: 0 }),
        }
    }

    /// As the only block of guest RAM.
    pub fn ram(&self) -> Arc<GuestRam> {
        ram(vec![self.region("ram0", 0)])
    }

    pub fn tracker(&self) -> Tracker {
        open(&self.ram())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our mapping; the tests join their threads before it goes.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

pub fn ram(regions: Vec<Region>) -> Arc<GuestRam> {
    // SAFETY: every test keeps its memory until the tracker is gone.
    Arc::new(unsafe { GuestRam::from_regions(regions).unwrap() })
}

pub fn open(ram: &Arc<GuestRam>) -> Tracker {
    Tracker::open(Arc::clone(ram), &TrackerOptions::default()).unwrap()
}

/// Events of up to `timeout`, at most 16.
pub fn events(tracker: &Tracker, timeout: Duration) -> Vec<Event> {
    let mut events = [Event::WriteFault { at: HostAddr(0) }; 16];
    let timeout = u32::try_from(timeout.as_millis()).unwrap();
    let count = tracker.next_events(&mut events, Some(timeout)).unwrap();
    events[..count].to_vec()
}

pub fn populated(tracker: &Tracker, block: u16) -> Vec<HostRange> {
    let used = tracker.ram().table().block(BlockIndex(block)).unwrap().used_range();
    let mut ranges = Vec::new();
    tracker.populated(used, &mut |range| ranges.push(range)).unwrap();
    ranges
}

pub fn release(tracker: &Tracker, range: HostRange) {
    while tracker.release(range).unwrap() == Done::Again {
        thread::yield_now();
    }
}

/// Something a thread of its own does, and whether it is done.
pub struct Doing<T> {
    done: Receiver<T>,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Doing<T> {
    pub fn start(what: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, done) = mpsc::channel();
        let thread = thread::spawn(move || sender.send(what()).unwrap());
        Self { done, thread }
    }

    #[track_caller]
    pub fn assert_blocked(&self) {
        assert_eq!(self.done.recv_timeout(SOON).err(), Some(RecvTimeoutError::Timeout), "went on");
    }

    #[track_caller]
    pub fn finish(self) -> T {
        let result = self.done.recv_timeout(LONG).expect("still blocked");
        self.thread.join().unwrap();
        result
    }
}

/// Writes one byte on a thread of its own.
pub fn writer(memory: &Arc<Memory>, at: usize, value: u8) -> Doing<()> {
    let memory = Arc::clone(memory);
    Doing::start(move || memory.write(at, value))
}

/// Reads events all the time and keeps them; releases every write fault if told to.
pub struct Reader {
    stop: Arc<AtomicBool>,
    tracker: Arc<Tracker>,
    thread: JoinHandle<Vec<Event>>,
}

impl Reader {
    pub fn start(tracker: &Arc<Tracker>, releasing: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, tracker, served) = (Arc::clone(&stop), Arc::clone(tracker), Arc::clone(tracker));
        let thread = thread::spawn(move || {
            let mut seen = Vec::new();
            let mut retry = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                let mut events = [Event::WriteFault { at: HostAddr(0) }; 16];
                let timeout = if retry.is_empty() { None } else { Some(0) };
                let count = served.next_events(&mut events, timeout).unwrap();
                for event in &events[..count] {
                    if let (Event::WriteFault { at }, true) = (event, releasing) {
                        retry.push(HostRange::new(HostAddr(at.0 & !0xfff), 0x1000));
                    }
                    seen.push(*event);
                }
                retry.retain(|&range| served.release(range).unwrap() == Done::Again);
            }
            seen
        });
        Self { stop, tracker, thread }
    }

    pub fn stop(self) -> Vec<Event> {
        self.stop.store(true, Ordering::Release);
        self.tracker.interrupt();
        self.thread.join().unwrap()
    }
}

/// The value of `key` in smaps, of the mapping at `address`: `"VmFlags"`, `"AnonHugePages"`.
pub fn smaps(address: HostAddr, key: &str) -> String {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let hex = |s| u64::from_str_radix(s, 16).unwrap();
            inside = hex(start) <= address.0 && address.0 < hex(end);
        } else if let (true, Some(value)) = (inside, line.strip_prefix(key)) {
            return value.trim_start_matches(':').trim().to_owned();
        }
    }
    panic!("no {key} for {address}");
}

/// Whether a userfaultfd is registered at `address`, for writes (`uw`) or missing pages (`um`).
pub fn is_registered(address: HostAddr, flag: &str) -> bool {
    smaps(address, "VmFlags").split(' ').any(|f| f == flag)
}

/// 2 MiB pages for the time of a test; `None` (said loudly) if they cannot be had.
pub struct HugePages {
    before: String,
    _turn: std::sync::MutexGuard<'static, ()>,
}

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
static HUGE_PAGES: std::sync::Mutex<()> = std::sync::Mutex::new(());

impl HugePages {
    pub fn reserve(count: usize) -> Option<Self> {
        let turn = HUGE_PAGES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let free = || fs::read_to_string(NR_HUGEPAGES.replace("nr_", "free_")).ok()?.trim().parse::<usize>().ok();
        let Ok(before) = fs::read_to_string(NR_HUGEPAGES) else {
            eprintln!("SKIPPED: this kernel has no 2 MiB hugetlb pages ({NR_HUGEPAGES})");
            return None;
        };
        let total: usize = before.trim().parse().unwrap();
        let written = fs::write(NR_HUGEPAGES, (total + count).to_string());
        if free() < Some(count) {
            let _ = fs::write(NR_HUGEPAGES, &before);
            eprintln!(
                "SKIPPED: {count} free 2 MiB pages needed, {:?} there; raising {NR_HUGEPAGES}: {written:?}",
                free()
            );
            return None;
        }
        Some(Self { before, _turn: turn })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, &self.before);
    }
}

/// A userfaultfd made without this crate: `UFFDIO_API` called with `features`, unless `None`.
pub fn raw_uffd(features: Option<u64>) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes its flags by value.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd).unwrap();
    assert!(fd >= 0, "userfaultfd(2): {}", std::io::Error::last_os_error());
    // SAFETY: just made, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Some(features) = features {
        let mut arg = [0xAA, features, 0];
        assert_eq!(ioctl(&fd, 0xc018_aa3f, &mut arg), 0, "UFFDIO_API");
    }
    fd
}

/// An ioctl of a userfaultfd, by its literal number.
pub fn ioctl<const N: usize>(fd: &OwnedFd, number: u64, arg: &mut [u64; N]) -> i32 {
    // Bits 16 to 29 of the number are the size of the argument.
    assert_eq!(usize::try_from(number >> 16 & 0x3fff).unwrap(), size_of_val(arg));
    // SAFETY: `arg` is as large as the number says, just checked.
    unsafe { libc::ioctl(fd.as_raw_fd(), number, arg.as_mut_ptr()) }
}
