//! What the system says of processes and of itself: CPU time, memory, huge pages, load.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::stats::Result;

/// Removes the file of the run before. Not long before the next is written: a host that has free memory reported to it takes it back
/// after two seconds, and then each page costs about twice as much to have again.
pub(crate) fn make_way(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// CPU time of this process apart from threads that live on, from `start` to `used`: what threads that came and went,
/// and this thread, used. Exact: nothing is sampled.
pub(crate) struct CpuMeter {
    process: Duration,
    others: BTreeMap<u32, Duration>,
}

impl CpuMeter {
    /// Of the threads that are there now, only the calling one counts.
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { others: threads("self")?, process: process_time()? })
    }

    pub(crate) fn used(&self) -> Result<Duration> {
        let (process, now) = (process_time()?, threads("self")?);
        let me = fs::read_link("/proc/thread-self")?;
        let me: u32 = me.file_name().and_then(|name| name.to_str()).unwrap_or_default().parse()?;
        let spent = |(tid, before): (&u32, &Duration)| Some(now.get(tid)?.saturating_sub(*before));
        let others: Duration = self.others.iter().filter(|(tid, _)| **tid != me).filter_map(spent).sum();
        Ok((process - self.process).saturating_sub(others))
    }
}

fn process_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// CPU time of each thread of a process.
fn threads(pid: &str) -> Result<BTreeMap<u32, Duration>> {
    let mut times = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        // A thread that ends while we look has no time.
        let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let nanos = text.split_whitespace().next().unwrap_or("0").parse()?;
        if let Some(tid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            times.insert(tid, Duration::from_nanos(nanos));
        }
    }
    Ok(times)
}

/// CPU time of all threads of a process, past ones too, apart from those whose name starts with `but`.
pub(crate) fn cpu_time(pid: u32, but: &str) -> Result<Duration> {
    // utime and stime.
    let all = stat_time(&pid.to_string(), 11)?;
    let mut vcpus = Duration::ZERO;
    for (tid, time) in threads(&pid.to_string())? {
        let comm = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        if comm.starts_with(but) {
            vcpus += time;
        }
    }
    Ok(all.saturating_sub(vcpus))
}

/// CPU time of child processes that have ended.
pub(crate) fn children_time() -> Result<Duration> {
    // cutime and cstime.
    stat_time("self", 13)
}

/// Two neighbouring times of `/proc/PID/stat` (counted from behind the name), added. They are in hundredths of a second.
fn stat_time(pid: &str, first: usize) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let field = |n: usize| fields.get(n).and_then(|text| text.parse::<u64>().ok()).ok_or("/proc/PID/stat is too short");
    Ok(Duration::from_millis((field(first)? + field(first + 1)?) * 10))
}

/// Peak of this process' resident memory above what it is now.
pub(crate) struct MemoryMeter {
    before: u64,
}

impl MemoryMeter {
    pub(crate) fn start() -> Result<Self> {
        // SAFETY: gives unused heap back, nothing else. Else memory freed before would hide what is used now.
        unsafe { libc::malloc_trim(0) };
        // 5: the peak is forgotten (Documentation/filesystems/proc.rst).
        fs::write("/proc/self/clear_refs", "5")?;
        Ok(Self { before: status("VmRSS:")? })
    }

    pub(crate) fn peak(&self) -> Result<u64> {
        Ok(status("VmHWM:")?.saturating_sub(self.before))
    }
}

fn status(key: &str) -> Result<u64> {
    kib("/proc/self/status", key)
}

/// Memory that can be had, in bytes.
pub(crate) fn available() -> Result<u64> {
    kib("/proc/meminfo", "MemAvailable:")
}

fn kib(path: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).ok_or_else(|| format!("{path} has no {key}"))?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse::<u64>()? << 10)
}

/// Bytes of `ranges` of a process that transparent huge pages map.
pub(crate) fn huge_pages(pid: u32, ranges: &[Range<u64>]) -> Result<u64> {
    let mut inside = false;
    let mut sum = 0;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        if let Some(vma) = mapping(line) {
            inside = ranges.iter().any(|range| vma.start < range.end && range.start < vma.end);
        } else if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
            sum += rest.split_whitespace().next().unwrap_or_default().parse::<u64>()? << 10;
        }
    }
    Ok(sum)
}

/// The range at the start of a line of `maps` or `smaps`.
pub(crate) fn mapping(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Has the kernel map `ranges` of a process by huge pages again where a snapshot split them, so that the next run
/// starts as the first did. Best effort.
pub(crate) fn collapse(pid: u32, ranges: &[Range<u64>]) {
    const MADV_COLLAPSE: c_int = 25;
    let Ok(pid) = c_int::try_from(pid) else { return };
    // SAFETY: makes a descriptor, or fails.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    for range in ranges {
        for at in range.clone().step_by(2 << 20) {
            let len = (range.end - at).min(2 << 20);
            let part = [at, len];
            // SAFETY: one iovec of address and length (of that process); the advice changes no content.
            unsafe { libc::syscall(libc::SYS_process_madvise, fd, part.as_ptr(), 1usize, MADV_COLLAPSE, 0) };
        }
    }
    if let Ok(fd) = c_int::try_from(fd)
        && fd >= 0
    {
        // SAFETY: the descriptor made above.
        unsafe { libc::close(fd) };
    }
}

/// CPU time that everybody else used, as a share of one CPU: how far the machine was ours.
pub(crate) struct OthersMeter {
    start: Instant,
    busy: Duration,
    ours: Duration,
    peer: Option<u32>,
}

impl OthersMeter {
    /// This process, its children and the process `peer` are not others.
    pub(crate) fn start(peer: Option<u32>) -> Result<Self> {
        Ok(Self { start: Instant::now(), busy: busy_time()?, ours: our_time(peer)?, peer })
    }

    pub(crate) fn percent(&self) -> Result<f64> {
        let (busy, ours) = (busy_time()? - self.busy, our_time(self.peer)? - self.ours);
        Ok(busy.saturating_sub(ours).as_secs_f64() / self.start.elapsed().as_secs_f64() * 100.0)
    }
}

/// CPU time used by all processes, and stolen by the hypervisor, since boot.
fn busy_time() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let times: Vec<u64> =
        text.lines().next().unwrap_or_default().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user nice system (idle iowait) irq softirq steal; guest time is in user.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|&n: &usize| times.get(n)).sum();
    Ok(Duration::from_millis(busy * 10))
}

fn our_time(peer: Option<u32>) -> Result<Duration> {
    let peer = peer.map_or(Ok(Duration::ZERO), |pid| stat_time(&pid.to_string(), 11))?;
    Ok(process_time()? + children_time()? + peer)
}

/// Waits until others use less than a quarter of a CPU, but no longer than `patience`.
pub(crate) fn wait_for_calm(patience: Duration, peer: Option<u32>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < patience {
        let meter = OthersMeter::start(peer)?;
        std::thread::sleep(Duration::from_millis(300));
        if meter.percent()? < 25.0 {
            break;
        }
    }
    Ok(())
}

/// Load of the last minute.
pub(crate) fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN)
}

/// The machine in one line.
pub(crate) fn describe() -> String {
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        line.trim_start_matches([':', '\t', ' ']).to_owned()
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = kib("/proc/meminfo", "MemTotal:").unwrap_or(0) >> 30;
    let nested = fs::read_to_string("/proc/cpuinfo").unwrap_or_default().contains(" hypervisor ");
    format!(
        "{cpus} x {}{}, {memory} GiB, Linux {}",
        first("/proc/cpuinfo", "model name"),
        if nested { " (itself a virtual machine)" } else { "" },
        kernel.trim()
    )
}
