//! What is measured.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramshot::core::{HostAddr, PAGE_SIZE, PageId, Treatment};
use ramshot::file::{FileSink, FileSinkOptions, MergeOptions, PageSource};
use ramshot::restore::order_path;
use ramshot::sink::{ImageMeta, PageDigest, Piece};
use ramshot::{
    Chain, DirtyTracking, GuestAddr, GuestRam, ImageSink, LazyOptions, MapTarget, Pending, Region, flatten, lazy,
};
use ramshot_tests::snapshot_run::{self, RestoreMode, Running};
use ramshot_tests::{Accel, Backing, Guest, GuestConfig, Memory, Workload, new_guest};

use crate::figure::Figures;
use crate::{Options, Result};

const BACKING: Backing = Backing::Anon;
/// What the guest writes to, at most.
const WORKING_SET: u64 = 256 << 20;
/// Read at a time by a floor.
const STEP: usize = 1 << 20;

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

// Sizes are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn float(value: u64) -> f64 {
    value as f64
}

fn name(mem: u64) -> String {
    if mem.is_multiple_of(1 << 40) {
        format!("{}t", mem >> 40)
    } else if mem.is_multiple_of(1 << 30) {
        format!("{}g", mem >> 30)
    } else {
        format!("{}m", mem >> 20)
    }
}

/// Everything that a guest of `mem` bytes can show.
pub(crate) fn guest(options: &Options, mem: u64, folder: &Path, figures: &mut Figures) -> Result<()> {
    let working_set = WORKING_SET.min(mem / 4);
    let config = GuestConfig { vcpus: 1, workload: Workload::Random, working_set, ..GuestConfig::default() };
    let path = folder.join("full.ramshot");
    let rate = {
        let guest = new_guest(Accel::Kvm, Memory::new(mem, BACKING)?, config)?;
        guest.start()?;
        let rate = guest.rate(Duration::from_millis(600))?;
        let ram = snapshot_run::guest_ram(guest.as_ref())?;
        let prepared = ramshot::prepare(&ram, &path, &settings(None))?.arm_ahead()?;
        take(guest.as_ref(), prepared, Pending::All)?;
        rate
    };
    let chain = Arc::new(Chain::open(&path)?);
    let world = World { mem, config, rate, runs: options.runs };
    eager(&world, &chain, figures)?;
    back(&world, &chain, RestoreMode::Mapped, "mapped", figures)?;
    back(&world, &chain, RestoreMode::Lazy, "lazy", figures)?;
    working(&world, &chain, figures)?;
    drop(chain);
    fs::remove_file(&path)?;
    increments(options, &world, folder, figures)
}

struct World {
    mem: u64,
    config: GuestConfig,
    /// Writes a second of the guest before.
    rate: f64,
    runs: u32,
}

fn settings(dirty: Option<Arc<DirtyTracking>>) -> ramshot::Options {
    ramshot::Options { replace: true, dirty, ..ramshot::Options::default() }
}

/// A snapshot, without a copy to compare it with; how long the guest stood, and what `finish` says.
fn take(guest: &dyn Guest, prepared: ramshot::Prepared, pending: Pending) -> Result<(Duration, ramshot::Report)> {
    let stopping = Instant::now();
    guest.pause()?;
    let live = guest.save_state().map(|state| prepared.begin(pending, state));
    guest.resume()?;
    let pause = stopping.elapsed();
    Ok((pause, live??.finish()?))
}

/// All of it, against the same bytes read in parallel into the same kind of memory.
fn eager(world: &World, chain: &Chain, figures: &mut Figures) -> Result<()> {
    let ours = || -> Result<Duration> {
        let memory = Memory::new(world.mem, BACKING)?;
        let ram = GuestRam::from_guest_memory(Arc::clone(memory.guest()))?;
        let start = Instant::now();
        chain.restore_into(ram.table(), &ram, 2)?;
        Ok(start.elapsed())
    };
    let bare = || parallel_read(chain.tip().path(), &*Memory::new(world.mem, BACKING)?, world.mem);
    let (mut restored, mut floor) = (Vec::new(), Vec::new());
    for run in 0..=world.runs {
        // In turns: the second gets memory that the first gave back, where a host that takes free memory has not taken it yet.
        let (took, read) = if run % 2 == 0 {
            let took = ours()?;
            (took, bare()?)
        } else {
            let read = bare()?;
            (ours()?, read)
        };
        if run > 0 {
            restored.push(ms(took));
            floor.push(ms(read));
        }
    }
    let case = format!("{}/eager", name(world.mem));
    figures.note(&case, "restore_ms", &restored, Some(("pread of all of it by 2 threads", &floor)))
}

/// The flat RAM read into guest memory by two threads, nothing checked.
fn parallel_read(path: &Path, memory: &Memory, mem: u64) -> Result<Duration> {
    let file = File::open(path)?;
    let start = Instant::now();
    let read = |first: u64, end: u64| -> std::io::Result<()> {
        let mut offset = 0;
        for region in memory.regions() {
            let (from, to) = (first.max(offset), end.min(offset + region.len));
            let mut at = from;
            while at < to {
                let len = (to - at).min(STEP as u64);
                let host = region.host + (at - offset);
                let (len, host) = (usize::try_from(len).unwrap_or(0), usize::try_from(host).unwrap_or(0));
                // SAFETY: guest memory, mapped writable as long as `memory` lives; nobody else uses it yet.
                let into = unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(host), len) };
                file.read_exact_at(into, at)?;
                at += len as u64;
            }
            offset += region.len;
        }
        Ok(())
    };
    let half = mem / 2 / PAGE_SIZE * PAGE_SIZE;
    std::thread::scope(|scope| {
        let other = scope.spawn(|| read(half, mem));
        read(0, half)?;
        other.join().map_err(|_| "a reader died")??;
        Ok::<(), Box<dyn std::error::Error>>(())
    })?;
    Ok(start.elapsed())
}

fn run(world: &World, chain: &Arc<Chain>, mode: RestoreMode, settings: &LazyOptions) -> Result<Running> {
    snapshot_run::restore_and_run(Accel::Kvm, world.config, (world.mem, BACKING), chain, (mode, settings))
}

/// Until the guest's first write.
fn back(world: &World, chain: &Arc<Chain>, mode: RestoreMode, what: &str, figures: &mut Figures) -> Result<()> {
    let (mut call, mut first, mut all_in) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..=world.runs {
        let running = run(world, chain, mode, &LazyOptions::default())?;
        let times = (ms(running.call), ms(running.first_instruction));
        let took = running.lazy.map(|lazy| lazy.finish()).transpose()?.map(|report| ms(report.all_in));
        if n > 0 {
            call.push(times.0);
            first.push(times.1);
            all_in.extend(took);
        }
    }
    let case = format!("{}/{what}", name(world.mem));
    figures.note(&case, "call_ms", &call, None)?;
    figures.note(&case, "first_write_ms", &first, None)?;
    if all_in.is_empty() { Ok(()) } else { figures.note(&case, "all_in_ms", &all_in, None) }
}

/// Lazily with the working set of the last time: until the guest is as fast as it is once everything is in. (Before the snapshot it
/// may have been faster or slower: this machine may have been.)
fn working(world: &World, chain: &Arc<Chain>, figures: &mut Figures) -> Result<()> {
    const WINDOW: Duration = Duration::from_millis(5);
    // What is in has to be mapped by KVM, too.
    const SETTLES: Duration = Duration::from_millis(500);
    const LONG: Duration = Duration::from_millis(600);
    let order = order_path(chain.tip().path());
    let settings = LazyOptions { order: Some(order.clone()), ..LazyOptions::default() };
    let (mut ours, mut floor, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    // The first records, the second warms up.
    for n in 0..world.runs + 2 {
        let start = Instant::now();
        let running = run(world, chain, RestoreMode::Lazy, &settings)?;
        let lazy = running.lazy.ok_or("restored otherwise")?;
        let (mut windows, mut complete) = (Vec::new(), None);
        while complete.is_none_or(|at: Instant| at.elapsed() < SETTLES) {
            let rate = running.guest.rate(WINDOW)?;
            windows.push((start.elapsed(), rate));
            complete = complete.or_else(|| lazy.progress().complete.then(Instant::now));
        }
        lazy.finish()?;
        let rate = running.guest.rate(LONG)?;
        drop((running.ram, running.guest));
        let fast = windows.into_iter().find(|&(_, in_window)| in_window >= 0.9 * rate);
        let (took, _) =
            fast.ok_or("the restored guest is not as fast within 0.5 s as it is in the 0.6 s after that")?;
        let bare = read_some(chain.tip().path(), world.config.working_set)?;
        if n > 1 {
            ours.push(ms(took));
            floor.push(ms(bare));
            rates.push(rate / 1e6);
        }
    }
    let _ = fs::remove_file(order);
    let case = format!("{}/lazy, order recorded", name(world.mem));
    figures.note(&case, "at_90_percent_ms", &ours, Some(("reading the working set from the file", &floor)))?;
    figures.note(&case, "writes_per_us", &rates, Some(("before the snapshot", &[world.rate / 1e6])))
}

fn read_some(path: &Path, bytes: u64) -> Result<Duration> {
    let file = File::open(path)?;
    let mut into = vec![0; usize::try_from(bytes)?];
    let start = Instant::now();
    for (n, piece) in (0u64..).zip(into.chunks_mut(STEP)) {
        file.read_exact_at(piece, n * STEP as u64)?;
    }
    Ok(start.elapsed())
}

/// Increments on a full snapshot, with 1 % of memory written between two; then a chain of many.
fn increments(options: &Options, world: &World, folder: &Path, figures: &mut Figures) -> Result<()> {
    let dirty_set = (world.mem / 100) & !(PAGE_SIZE - 1);
    let config = GuestConfig { working_set: dirty_set, ..world.config };
    let guest = new_guest(Accel::Kvm, Memory::new(world.mem, BACKING)?, config)?;
    guest.start()?;
    let ram = snapshot_run::guest_ram(guest.as_ref())?;
    let dirty = DirtyTracking::start(ram.table(), guest.dirty_logs()?)?;
    let settings = settings(Some(dirty));
    let (mut full, mut total, mut pauses, mut overhead) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let path = |number: u32| -> PathBuf { folder.join(format!("{number}.ramshot")) };
    for run in 0..=world.runs {
        // Only now, that the new image finds in place what the old one leaves.
        for old in [path(1), path(0)] {
            if run > 0 {
                fs::remove_file(old)?;
            }
        }
        let prepared = ramshot::prepare(&ram, path(0), &settings)?.arm_ahead()?;
        let (_, report) = take(guest.as_ref(), prepared, Pending::All)?;
        std::thread::sleep(Duration::from_millis(100));
        let prepared = ramshot::prepare_increment(&ram, path(1), &settings)?.arm_ahead()?;
        let (pause, increment) = take(guest.as_ref(), prepared, Pending::Dirty)?;
        if run > 0 {
            full.push(ms(report.total));
            total.push(ms(increment.total));
            pauses.push(ms(pause));
            let data = increment.counts.total * PAGE_SIZE;
            overhead.push((float(increment.image.written_bytes) / float(data) - 1.0) * 100.0);
        }
    }
    let case = format!("{}/increment of 1 %", name(world.mem));
    figures.note(&case, "total_ms", &total, Some(("the full snapshot before it", &full)))?;
    figures.note(&case, "pause_ms", &pauses, None)?;
    figures.note(&case, "file_overhead_percent", &overhead, None)?;
    if options.chain == 0 {
        return Ok(());
    }

    for number in 2..=options.chain {
        let prepared = ramshot::prepare_increment(&ram, path(number), &settings)?.arm_ahead()?;
        take(guest.as_ref(), prepared, Pending::Dirty)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    drop((ram, guest));
    let chain = Arc::new(Chain::open(path(options.chain))?);
    chain.verify(2, &mut |_, _| {})?;
    let flat_path = folder.join("flat.ramshot");
    flatten(&chain, &flat_path, &MergeOptions::default(), &mut |_, _| {})?;
    let flat = Arc::new(Chain::open(&flat_path)?);
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for n in 0..=world.runs {
        for (chain, times) in [(&chain, &mut ours), (&flat, &mut floor)] {
            let running = run(world, chain, RestoreMode::Lazy, &LazyOptions::default())?;
            if n > 0 {
                times.push(ms(running.first_instruction));
            }
            running.lazy.map(|lazy| lazy.finish()).transpose()?;
        }
    }
    let case = format!("{}/chain of {}, lazy", name(world.mem), options.chain);
    figures.note(&case, "first_write_ms", &ours, Some(("one flat file", &floor)))?;
    for number in 0..=options.chain {
        fs::remove_file(path(number))?;
    }
    Ok(fs::remove_file(flat_path)?)
}

/// Memory of a huge nominal size, of which 1 GiB has data: the calls, and the first page that a thread reads. No guest.
pub(crate) fn huge(options: &Options, folder: &Path, figures: &mut Figures) -> Result<()> {
    let mem = options.huge;
    let path = folder.join("huge.ramshot");
    let first = PageId(mem / 2 / PAGE_SIZE);
    {
        let memory = Nominal::new(mem)?;
        let sink =
            FileSink::create(&path, memory.ram()?.table(), &FileSinkOptions { sync: false, ..Default::default() })?;
        let bytes = vec![7; STEP];
        let digests = vec![PageDigest::of(&[7; 4096]); STEP / 4096];
        for n in 0..1024 {
            let first = PageId(first.0 + n * 256);
            sink.write(&[Piece { first, bytes: &bytes, digests: &digests }])?;
        }
        Box::new(sink).commit(&ImageMeta { device_state: Vec::new(), statistics: Vec::new() })?;
    }
    let chain = Arc::new(Chain::open(&path)?);
    let case = |what: &str| format!("{} nominal, 1 GiB of data/{what}", name(mem));
    let (mut mapped, mut call, mut touched) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..=options.runs {
        let memory = Nominal::new(mem)?;
        let ram = Arc::new(memory.ram()?);
        let start = Instant::now();
        // SAFETY: the memory is this function's own, unmapped by address, and nobody uses it yet.
        chain.map_into(&unsafe { MapTarget::new(ram) })?;
        let took = ms(start.elapsed());
        drop(memory);

        let memory = Nominal::new(mem)?;
        let ram = Arc::new(memory.ram()?);
        let start = Instant::now();
        let restore = lazy(Arc::clone(&chain) as Arc<dyn PageSource>, &ram, &LazyOptions::default())?;
        let called = ms(start.elapsed());
        // SAFETY: inside the mapping.
        let byte = unsafe { memory.at(first.0 * PAGE_SIZE).read_volatile() };
        let read = ms(start.elapsed());
        if byte != 7 {
            return Err(format!("{byte} was read, not 7").into());
        }
        restore.finish()?;
        if n > 0 {
            mapped.push(took);
            call.push(called);
            touched.push(read);
        }
    }
    figures.note(&case("mapped"), "call_ms", &mapped, None)?;
    figures.note(&case("lazy"), "call_ms", &call, None)?;
    figures.note(&case("lazy"), "first_page_ms", &touched, None)?;
    Ok(fs::remove_file(path)?)
}

/// Snapshots of memory of a huge nominal size, of which 1 GiB in its middle is there, mapped by small pages; beside them those of
/// 1 GiB, all of it there. No guest: what is measured is what the engine does, and nobody writes.
pub(crate) fn huge_snapshot(options: &Options, folder: &Path, figures: &mut Figures) -> Result<()> {
    const THERE: u64 = 1 << 30;
    const TIMES: [&str; 4] = ["prepare_ms", "arm_ms", "pause_ms", "total_ms"];
    let path = folder.join("nominal.ramshot");
    for ahead in [true, false] {
        let mut times: [[Vec<f64>; 4]; 2] = Default::default();
        for (mem, times) in [options.huge, THERE].into_iter().zip(&mut times) {
            let memory = Nominal::new(mem)?;
            memory.fill((mem - THERE) / 2, THERE)?;
            let ram = Arc::new(memory.ram()?);
            for n in 0..=options.runs {
                let start = Instant::now();
                let prepared = ramshot::prepare(&ram, &path, &settings(None))?;
                let prepared = if ahead { prepared.arm_ahead()? } else { prepared };
                let prepare = start.elapsed();
                let live = prepared.begin(Pending::All, Vec::new())?;
                let pause = start.elapsed() - prepare;
                let report = live.finish()?;
                fs::remove_file(&path)?;
                if report.counts.total != THERE / PAGE_SIZE {
                    return Err(format!("{} pages were captured", report.counts.total).into());
                }
                if n > 0 {
                    let took = [prepare, report.arm, pause, report.total];
                    times.iter_mut().zip(took).for_each(|(times, took)| times.push(ms(took)));
                }
            }
        }
        let how = if ahead { "armed ahead" } else { "armed in the pause" };
        let case = format!("{} nominal, 1 GiB there/snapshot, {how}", name(options.huge));
        for (at, what) in TIMES.into_iter().enumerate() {
            figures.note(&case, what, &times[0][at], Some(("1 GiB, all of it there", &times[1][at])))?;
        }
    }
    Ok(())
}

/// Memory that is promised and not there.
struct Nominal {
    at: *mut libc::c_void,
    len: usize,
}

impl Nominal {
    fn new(len: u64) -> Result<Self> {
        let len = usize::try_from(len)?;
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(format!("{len:#x} bytes cannot be mapped: {}", std::io::Error::last_os_error()).into());
        }
        Ok(Self { at, len })
    }

    fn ram(&self) -> Result<GuestRam> {
        let region = Region {
            name: "ram0".to_owned(),
            guest: GuestAddr(0),
            host: HostAddr(self.at.expose_provenance() as u64),
            len: self.len as u64,
            used: None,
            treatment: Treatment::Tracked,
            file: None,
        };
        // SAFETY: the mapping outlives what describes it: both are dropped by their function, in that order.
        Ok(unsafe { GuestRam::from_regions(vec![region]) }?)
    }

    /// Has something in every page of a part of it, in small pages.
    fn fill(&self, from: u64, len: u64) -> Result<()> {
        let at = self.at(from).cast_mut();
        // SAFETY: a part of the mapping; advice about how it is backed.
        if unsafe { libc::madvise(at.cast(), usize::try_from(len)?, libc::MADV_NOHUGEPAGE) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        for offset in (0..usize::try_from(len)?).step_by(4096) {
            // SAFETY: inside the mapping, which is writable and nobody else's.
            unsafe { at.wrapping_add(offset).cast::<usize>().write_volatile(offset + 1) };
        }
        Ok(())
    }

    fn at(&self, offset: u64) -> *const u8 {
        self.at.cast_const().cast::<u8>().wrapping_add(usize::try_from(offset).unwrap_or(0))
    }
}

impl Drop for Nominal {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, or what was mapped in its place.
        unsafe { libc::munmap(self.at, self.len) };
    }
}
