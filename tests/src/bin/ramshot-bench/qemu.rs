//! The peer: QEMU, booted from the same image with the same memory and workload, snapshotted by its own means.
//!
//! Its guest's statistics are read as ours are, straight from guest RAM: by `process_vm_readv` from QEMU's process, which
//! changes nothing for the guest, neither its backing (a shared memory file would) nor its vCPU (the monitor's `xp` would).

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ramshot_images::layout::{STATS_ADDRESS, STATS_MAGIC};
use ramshot_tests::{Backing, Scratch};
use serde_json::{Value, json};

use crate::case::Boot;
use crate::machine;
use crate::metric::Sample;
use crate::num::{float, mib, millis};
use crate::options::Load;
use crate::ours::{TAIL, Trace, WATCH, lost, put, stalls};
use crate::qmp::{Qmp, time_of};
use crate::stats::{GuestMemory, History, Result, Stats};

const PROGRAM: &str = "qemu-system-x86_64";
/// A pre-copy need not converge.
const PATIENCE: Duration = Duration::from_secs(120);
/// The guest remembers 10 s: collect more often.
const COLLECT: Duration = Duration::from_secs(3);

/// How QEMU takes a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Method {
    /// Background snapshot, which is what ramshot does.
    Background,
    /// Pre-copy into a mapped-ram file by two channels, with a downtime limit of 20 ms.
    PreCopy,
}

impl Method {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Background => "qemu bg",
            Self::PreCopy => "qemu pre",
        }
    }

    fn capabilities(self) -> Vec<Value> {
        let on = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let pre = self == Self::PreCopy;
        // Switched off before others are switched on: some exclude each other.
        let mut all = vec![on("background-snapshot", !pre), on("mapped-ram", pre), on("multifd", pre)];
        all.sort_by_key(|capability| capability["state"].as_bool());
        all.push(on("events", true));
        all
    }
}

/// QEMU's guest RAM, from outside.
struct Ram {
    pid: u32,
    host: Range<u64>,
}

impl Ram {
    /// The mapping that has the guest's statistics at the right place.
    fn find(pid: u32, size: u64) -> Result<Option<Self>> {
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let Some(vma) = machine::mapping(line) else { continue };
            if vma.end - vma.start < size || !line.contains(" rw") {
                continue;
            }
            // A neighbour can have been merged with it: RAM is aligned to huge pages.
            for start in [vma.start.next_multiple_of(2 << 20), vma.end - size] {
                let ram = Self { pid, host: start..start + size };
                let mut magic = [0; 8];
                if ram.read(STATS_ADDRESS, &mut magic).is_ok() && u64::from_ne_bytes(magic) == STATS_MAGIC {
                    return Ok(Some(ram));
                }
            }
        }
        Ok(None)
    }

    fn remote(&self, at: u64, len: usize) -> Result<libc::iovec> {
        if at + u64::try_from(len)? > self.host.end - self.host.start {
            return Err(format!("guest address {at:#x} is not in RAM").into());
        }
        Ok(libc::iovec { iov_base: (self.host.start + at) as *mut libc::c_void, iov_len: len })
    }

    fn pid(&self) -> Result<libc::pid_t> {
        Ok(self.pid.try_into()?)
    }
}

fn whole(done: isize, len: usize) -> Result<()> {
    if usize::try_from(done) == Ok(len) { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

impl GuestMemory for Ram {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let (len, remote) = (into.len(), self.remote(at, into.len())?);
        let local = IoSliceMut::new(into);
        // SAFETY: IoSliceMut has the layout of an iovec and names `into`, which lives; the other one is QEMU's.
        let done =
            unsafe { libc::process_vm_readv(self.pid()?, (&raw const local).cast(), 1, &raw const remote, 1, 0) };
        whole(done, len)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<()> {
        let (len, remote) = (from.len(), self.remote(at, from.len())?);
        let local = IoSlice::new(from);
        // SAFETY: IoSlice has the layout of an iovec and names `from`, which lives; the other one is QEMU's.
        let done =
            unsafe { libc::process_vm_writev(self.pid()?, (&raw const local).cast(), 1, &raw const remote, 1, 0) };
        whole(done, len)
    }
}

/// A QEMU that runs a guest. It ends with this value.
pub(crate) struct Qemu {
    child: Child,
    qmp: Qmp,
    ram: Ram,
    /// Its files, as long as it runs.
    _folder: Scratch,
    thp: bool,
    idle: bool,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Boots the same guest. `tsc_khz`: of this machine.
    pub(crate) fn boot(boot: &Boot, tsc_khz: u64) -> Result<Self> {
        let image = ramshot_images::IMAGE.ok_or(ramshot_images::IMAGE_MISSING)?;
        let folder = Scratch::new_in(&std::env::temp_dir(), "ramshot-bench-")?;
        let [kernel, socket, serial] = ["guest.elf", "qmp", "serial"].map(|name| folder.path().join(name));
        fs::write(&kernel, image)?;
        let config = boot.config();
        let rate = config.rate.map_or("max".to_owned(), |rate| rate.to_string());
        let line = format!(
            "workload={} ws={} rate={rate} vcpus=1 fill=all late=0 seed={} tsc_khz={tsc_khz}",
            config.workload, config.working_set, config.seed
        );
        let mut command = Command::new(PROGRAM);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-name", "bench,debug-threads=on"]);
        command.args(["-accel", "kvm", "-cpu", "qemu64", "-smp", "1", "-m", &format!("{}M", boot.mem >> 20)]);
        command.arg("-machine").arg(if boot.backing == Backing::Memfd { "pc,memory-backend=ram" } else { "pc" });
        if boot.backing == Backing::Memfd {
            command.args(["-object", &format!("memory-backend-memfd,id=ram,size={},share=on", boot.mem)]);
        }
        command.arg("-kernel").arg(&kernel).arg("-append").arg(line);
        command.arg("-serial").arg(format!("file:{}", serial.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // QEMU asks for huge pages and has no option not to; this is inherited.
        let small_pages = libc::c_ulong::from(boot.backing == Backing::Anon);
        // SAFETY: between fork and exec; system calls that take numbers.
        unsafe {
            command.pre_exec(move || {
                // It does not outlive a bench that is killed.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                    || libc::prctl(libc::PR_SET_THP_DISABLE, small_pages, 0, 0, 0) != 0
                {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|error| format!("{PROGRAM}: {error}"))?;
        match booted(&mut child, &socket, boot.mem) {
            Ok((qmp, ram)) => {
                let (thp, idle) = (boot.backing == Backing::Thp, boot.load == Load::Idle);
                Ok(Self { child, qmp, ram, _folder: folder, thp, idle })
            }
            Err(error) => {
                let said = fs::read_to_string(&serial).unwrap_or_default();
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("{PROGRAM}: {error}; its guest said {said:?}").into())
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The methods that this QEMU has.
    pub(crate) fn methods(&mut self) -> Result<Vec<Method>> {
        let known = self.qmp.execute("query-migrate-capabilities", &json!({}))?;
        let has = |name: &str| known.as_array().is_some_and(|all| all.iter().any(|one| one["capability"] == name));
        let mut methods = Vec::new();
        if has("background-snapshot") {
            methods.push(Method::Background);
        }
        if has("mapped-ram") && has("multifd") {
            methods.push(Method::PreCopy);
        }
        Ok(methods)
    }

    pub(crate) fn version(&mut self) -> Result<String> {
        let v = self.qmp.execute("query-version", &json!({}))?;
        let v = &v["qemu"];
        Ok(format!("{}.{}.{}", v["major"], v["minor"], v["micro"]))
    }

    fn huge(&self) -> Result<Option<f64>> {
        let ranges = std::slice::from_ref(&self.ram.host);
        self.thp.then(|| Ok(mib(machine::huge_pages(self.child.id(), ranges)?))).transpose()
    }

    /// Takes one, into a fresh file.
    pub(crate) fn snapshot(&mut self, method: Method, path: &Path) -> Result<(Sample, Trace)> {
        if self.thp {
            machine::collapse(self.child.id(), std::slice::from_ref(&self.ram.host));
        }
        for capability in method.capabilities() {
            self.qmp.execute("migrate-set-capabilities", &json!({ "capabilities": [capability] }))?;
        }
        // As good as no limit.
        let mut parameters = json!({ "max-bandwidth": 1u64 << 40 });
        if method == Method::PreCopy {
            parameters["multifd-channels"] = json!(2);
            parameters["downtime-limit"] = json!(20);
        }
        self.qmp.execute("migrate-set-parameters", &parameters)?;

        let pid = self.child.id();
        let huge_before = self.huge()?;
        let stats = Stats::new(&self.ram)?.ok_or("QEMU's guest has not booted")?;
        let mut sample = Sample::new();
        sample.insert("load", machine::load());
        put(&mut sample, "huge_before_mib", huge_before);
        let (before, drift) = stats.rate_before(WATCH, self.idle)?;
        let mut history = History::default();
        stats.collect(&mut history)?;
        machine::make_way(path)?;
        if !self.idle {
            stats.reset()?;
        }
        let (cpu, at_start, start) = (machine::cpu_time(pid, "CPU ")?, stats.counters()?, Instant::now());
        self.qmp.execute("migrate", &json!({ "uri": format!("file:{}", path.display()) }))?;
        let mut stopped = None;
        let mut resumed = None;
        loop {
            if start.elapsed() > PATIENCE {
                self.qmp.execute("migrate_cancel", &json!({}))?;
                return Err(format!("{}: not complete within {PATIENCE:?}", method.name()).into());
            }
            let Some(event) = self.qmp.event(COLLECT)? else {
                stats.collect(&mut history)?;
                continue;
            };
            match event["event"].as_str() {
                Some("STOP") => stopped = time_of(&event),
                Some("RESUME") => resumed = time_of(&event),
                Some("MIGRATION") => match event["data"]["status"].as_str() {
                    Some("completed") => break,
                    Some("failed" | "cancelled") => {
                        let why = self.qmp.execute("query-migrate", &json!({}))?;
                        return Err(format!("{}: {why}", method.name()).into());
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        let total = start.elapsed();
        if method == Method::PreCopy {
            // Refused for a moment after "completed", until QEMU has cleaned up.
            while let Err(error) = self.qmp.execute("cont", &json!({})) {
                if start.elapsed() > total + Duration::from_secs(5) {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        let (ended, during) = (start.elapsed(), stats.writes()?);
        let gaps = stats.gaps()?;
        let cpu = machine::cpu_time(pid, "CPU ")?.saturating_sub(cpu);
        std::thread::sleep(TAIL);
        let (window, writes) = (start.elapsed(), stats.writes()? - at_start.writes);
        while resumed < stopped
            && let Some(event) = self.qmp.event(Duration::from_secs(1))?
        {
            if event["event"] == "RESUME" {
                resumed = time_of(&event);
            }
        }
        let after = stats.rate(WATCH)?;
        put(&mut sample, "huge_after_mib", self.huge()?);
        stats.collect(&mut history)?;

        if let (Some(stopped), Some(resumed)) = (stopped, resumed) {
            sample.insert("pause_ms", millis(resumed.saturating_sub(stopped)));
        }
        sample.insert("total_ms", millis(total));
        let bytes = self.ram.host.end - self.ram.host.start;
        sample.insert("gb_per_s", float(bytes) / total.as_secs_f64() / 1e9);
        sample.insert("cpu_ms", millis(cpu));
        if !self.idle {
            sample.insert("rate_before", before);
            sample.insert("drift_percent", drift);
            sample.insert("rate_during", float(during - at_start.writes) / ended.as_secs_f64());
            sample.insert("rate_after", after);
            sample.insert("lost_ms", lost(window, writes, before));
            stalls(&mut sample, &gaps);
            sample.insert("gap_ms", gaps.max_us() / 1e3);
        }
        Ok((sample, Trace { history, zero: at_start.last_tsc, total_ms: millis(total), before }))
    }
}

fn booted(child: &mut Child, socket: &Path, mem: u64) -> Result<(Qmp, Ram)> {
    let start = Instant::now();
    let qmp = Qmp::connect(socket, Duration::from_secs(10))?;
    while start.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait()? {
            return Err(format!("ended ({status})").into());
        }
        if let Some(ram) = Ram::find(child.id(), mem)?
            && Stats::new(&ram)?.is_some()
        {
            return Ok((qmp, ram));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("the guest has not booted within {PATIENCE:?}").into())
}
