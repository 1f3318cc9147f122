//! What the machine itself charges for what a snapshot cannot do without, measured on the same guest in the same run.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramshot::core::{Done, Event, HostAddr, HostRange, PAGE_SIZE, RamSource, Treatment, WriteTracker};
use ramshot::{GuestRam, Tracker, TrackerOptions};

use crate::machine;
use crate::metric::{Sample, medians};
use crate::num::{float, millis};
use crate::options::Target;
use crate::ours::{OurGuest, WATCH, lost, stalls};
use crate::stats::{Result, SHORT_US, STALL_US};

/// Bytes copied and written at a time: still in the cache when copied, large for a write.
const PIECE: u64 = 2 << 20;

/// Floors of one guest, whatever the target: arming and copying. Medians of `runs`.
pub(crate) fn of_guest(guest: &OurGuest, working_set: u64, busy: bool, runs: u32) -> Result<Sample> {
    let mut samples = Vec::new();
    for _ in 0..runs {
        let mut sample = Sample::new();
        let arm = bare_arm(guest)?;
        sample.insert("arm_ms", arm);
        sample.insert("pause_ms", arm);
        guest.guest.pause()?;
        let (bytes, copying) = copy(&guest.ram)?;
        guest.guest.resume()?;
        sample.insert("capture_ms", millis(copying));
        // What is stopped while its working set is copied loses that much.
        sample.insert("lost_ms", millis(copying) * float(working_set) / float(bytes));
        if busy {
            refaults(guest, &mut sample)?;
        }
        samples.push(sample);
    }
    Ok(medians(&samples))
}

/// What the guest loses when all of its memory is protected and released again inside a pause: its first write to each
/// page then costs a second-level fault, which KVM serves alone. No snapshot by write protection can cost less.
fn refaults(guest: &OurGuest, sample: &mut Sample) -> Result<()> {
    let stats = guest.stats()?;
    let (before, _) = stats.rate_before(WATCH, false)?;
    let tracker = Tracker::open(Arc::clone(&guest.ram), &TrackerOptions::default())?;
    guest.guest.pause()?;
    let armed = protect_all(&guest.ram, &tracker);
    tracker.disarm()?;
    stats.ask_reset()?;
    let (writes, start) = (stats.writes()?, Instant::now());
    guest.guest.resume()?;
    armed?;
    std::thread::sleep(WATCH);
    sample.insert("refault_ms", lost(start.elapsed(), stats.writes()? - writes, before));
    sample.insert("short_ms", stats.gaps()?.sum_ms(SHORT_US, STALL_US));
    Ok(())
}

/// One protecting ioctl per block, without looking what is there.
fn bare_arm(guest: &OurGuest) -> Result<f64> {
    let tracker = Tracker::open(Arc::clone(&guest.ram), &TrackerOptions::default())?;
    guest.guest.pause()?;
    let start = Instant::now();
    let armed = protect_all(&guest.ram, &tracker);
    let took = millis(start.elapsed());
    // Before the guest runs: nobody would release it.
    tracker.disarm()?;
    guest.guest.resume()?;
    armed?;
    Ok(took)
}

fn protect_all(ram: &GuestRam, tracker: &Tracker) -> Result<()> {
    for block in ram.table().blocks().iter().filter(|block| block.treatment == Treatment::Tracked) {
        tracker.protect(block.used_range())?;
    }
    Ok(())
}

/// Every byte of RAM into a warm buffer, by one thread.
fn copy(ram: &GuestRam) -> Result<(u64, Duration)> {
    let mut buffer = vec![1; usize::try_from(PIECE)?];
    let mut bytes = 0;
    let start = Instant::now();
    for piece in pieces(ram) {
        let Some(into) = buffer.get_mut(..usize::try_from(piece.len)?) else { continue };
        ram.read(piece.start, into)?;
        std::hint::black_box(&into);
        bytes += piece.len;
    }
    Ok((bytes, start.elapsed()))
}

fn pieces(ram: &GuestRam) -> impl Iterator<Item = HostRange> + '_ {
    ram.table().blocks().iter().flat_map(|block| {
        let range = block.used_range();
        (0..range.len.div_ceil(PIECE))
            .map(move |n| HostRange::new(HostAddr(range.start.0 + n * PIECE), PIECE.min(range.len - n * PIECE)))
    })
}

/// Floors of one target: the same bytes by one thread that does nothing but write them to a fresh file, and `cat` of that
/// file to another. On a disk the faster of buffered and direct, synced.
pub(crate) fn of_target(guest: &OurGuest, target: Target, folder: &Path, busy: bool, runs: u32) -> Result<Sample> {
    let (file, copy) = (folder.join("ramshot-bench.floor"), folder.join("ramshot-bench.cat"));
    let mut samples = Vec::new();
    for _ in 0..runs {
        guest.guest.pause()?;
        let measured = one_of_target(guest, target, &file, &copy);
        guest.guest.resume()?;
        let _ = std::fs::remove_file(&copy);
        let _ = std::fs::remove_file(&file);
        let mut sample = measured?;
        if busy {
            let beside = beside(guest, target, &file);
            let _ = std::fs::remove_file(&file);
            sample.insert("beside_ms", beside?);
        }
        samples.push(sample);
    }
    Ok(medians(&samples))
}

/// What the guest loses while the same bytes are written beside it, with nothing protected and nothing consistent: by the
/// memory and the caches that the two share.
fn beside(guest: &OurGuest, target: Target, file: &Path) -> Result<f64> {
    let stats = guest.stats()?;
    let (before, _) = stats.rate_before(WATCH, false)?;
    let (writes, start) = (stats.writes()?, Instant::now());
    write_all(&guest.ram, target, file, target == Target::Disk)?;
    Ok(lost(start.elapsed(), stats.writes()? - writes, before))
}

fn one_of_target(guest: &OurGuest, target: Target, file: &Path, copy: &Path) -> Result<Sample> {
    let mut sample = Sample::new();
    let (bytes, mut took) = write_all(&guest.ram, target, file, false)?;
    let before = machine::children_time()?;
    let status = Command::new("cat").arg(file).stdout(File::create(copy)?).status()?;
    if !status.success() {
        return Err(format!("cat: {status}").into());
    }
    sample.insert("cpu_ms", millis(machine::children_time()? - before));
    std::fs::remove_file(copy)?;
    std::fs::remove_file(file)?;
    if target == Target::Disk {
        sample.insert("buffered_ms", millis(took));
        // Not every file system has it.
        if let Ok((_, direct)) = write_all(&guest.ram, target, file, true) {
            sample.insert("direct_ms", millis(direct));
            took = took.min(direct);
        }
    }
    sample.insert("total_ms", millis(took));
    sample.insert("gb_per_s", float(bytes) / took.as_secs_f64() / 1e9);
    Ok(sample)
}

fn write_all(ram: &GuestRam, target: Target, path: &Path, direct: bool) -> Result<(u64, Duration)> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(path)?;
    let start = Instant::now();
    let mut at = 0;
    for piece in pieces(ram) {
        let mut done = 0;
        while done < piece.len {
            let from = (piece.start.0 + done) as *const libc::c_void;
            let (len, offset) = (usize::try_from(piece.len - done)?, libc::off_t::try_from(at + done)?);
            // SAFETY: a part of a block of guest RAM, which `ram` keeps mapped; the kernel reads it.
            let n = unsafe { libc::pwrite(file.as_raw_fd(), from, len, offset) };
            done += u64::try_from(n).map_err(|_| std::io::Error::last_os_error())?;
        }
        at += piece.len;
    }
    if target == Target::Disk {
        file.sync_data()?;
    }
    Ok((at, start.elapsed()))
}

/// The bare round trip of a fault: all RAM protected, one thread that reads faults and unprotects 4 KiB, nothing else.
/// Stalls as the guest sees them, over `time`. Not for memory in huge pages: it splits them.
pub(crate) fn bare_faults(guest: &OurGuest, time: Duration) -> Result<Sample> {
    let stats = guest.stats()?;
    let tracker = Tracker::open(Arc::clone(&guest.ram), &TrackerOptions::default())?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&tracker, &stop));
        guest.guest.pause()?;
        let armed = stats.ask_reset().and_then(|_| protect_all(&guest.ram, &tracker));
        guest.guest.resume()?;
        if armed.is_ok() {
            std::thread::sleep(time);
        }
        let gaps = stats.gaps();
        stop.store(true, Ordering::Release);
        tracker.interrupt();
        let served = server.join().unwrap_or_else(|_| Err("panicked".to_owned()));
        tracker.disarm()?;
        armed?;
        let mut sample = Sample::new();
        stalls(&mut sample, &gaps?);
        sample.insert("faults", float(served?));
        Ok(sample)
    })
}

fn serve(tracker: &Tracker, stop: &AtomicBool) -> std::result::Result<u64, String> {
    let mut events = [Event::WriteFault { at: HostAddr(0) }; 16];
    let mut served = 0;
    while !stop.load(Ordering::Acquire) {
        let count = tracker.next_events(&mut events, None).map_err(|error| error.to_string())?;
        for event in events.iter().take(count) {
            let Event::WriteFault { at } = *event else { continue };
            let page = HostRange::new(HostAddr(at.0 & !(PAGE_SIZE - 1)), PAGE_SIZE);
            while tracker.release(page).map_err(|error| error.to_string())? == Done::Again {}
            served += 1;
        }
    }
    Ok(served)
}
