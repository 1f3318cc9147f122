//! `kill -9` of a whole process that takes one snapshot of its running guest after the other, at any moment.
//!
//! After each: what is under the name is a complete snapshot, the one committed last; nothing else opens that is not
//! complete; the next snapshot to that name succeeds. `RAMSHOT_TEST_KILLS` says how many (default 200: four of five of a
//! process guest, the rest of a KVM guest).

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ramshot::{Chain, Live, Options, Pending, SnapshotFile, prepare};
use ramshot_images::rule::mix;
use ramshot_tests::chaos::{Rig, accels, alone, say};
use ramshot_tests::{Accel, Backing, GuestConfig, Memory, Workload, new_guest, snapshot_run};

const TARGET: &str = "RAMSHOT_TEST_KILL_TARGET";
const ACCEL: &str = "RAMSHOT_TEST_KILL_ACCEL";
const ROUND: &str = "RAMSHOT_TEST_KILL_ROUND";
const KILLS: &str = "RAMSHOT_TEST_KILLS";
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
const VICTIM_RAM: u64 = 12 * MIB;
/// In the victim's log, between the ids it committed.
const REMOVING: &str = "removing";

fn config() -> GuestConfig {
    let fill = Some(6 * MIB);
    GuestConfig { vcpus: 2, workload: Workload::Random, working_set: 3 * MIB, fill, ..GuestConfig::default() }
}

/// The victim: this test program, running this test alone, until it is killed.
#[test]
#[ignore = "runs until it is killed; started by the test below"]
fn victim() {
    let Some(target) = std::env::var_os(TARGET).map(PathBuf::from) else { return };
    let accel: Accel = std::env::var(ACCEL).unwrap().parse().unwrap();
    let kill: u32 = std::env::var(ROUND).unwrap().parse().unwrap();
    let guest = new_guest(accel, Memory::new(VICTIM_RAM, Backing::Anon).unwrap(), config()).unwrap();
    guest.start().unwrap();
    let ram = snapshot_run::guest_ram(guest.as_ref()).unwrap();
    let mut log = OpenOptions::new().create(true).append(true).open(log_of(&target)).unwrap();
    fs::write(ready_of(&target), b"").unwrap();
    let start = Instant::now();
    for round in kill.. {
        // Without replacing now and then, so that the kill also meets link and unlink.
        let replace = round % 4 != 3;
        let options = Options { replace, sync: round % 3 == 0, pool_bytes: 2 << 20, workers: 2, ..Options::default() };
        if !replace {
            writeln!(log, "{REMOVING}").unwrap();
            fs::remove_file(&target).unwrap_or_default();
        }
        let mut prepared = prepare(&ram, &target, &options).unwrap();
        if round % 2 == 1 {
            prepared = prepared.arm_ahead().unwrap();
        }
        guest.pause().unwrap();
        let live = prepared.begin(Pending::All, guest.save_state().unwrap());
        guest.resume().unwrap();
        live.and_then(Live::finish).unwrap();
        let id = SnapshotFile::open(&target).unwrap().id();
        writeln!(log, "{id}").unwrap();
        assert!(start.elapsed() < PATIENCE, "nobody kills me");
    }
}

fn log_of(target: &Path) -> PathBuf {
    target.with_file_name("log")
}

fn ready_of(target: &Path) -> PathBuf {
    target.with_file_name("ready")
}

/// Dies with this process at the latest.
fn start_victim(target: &Path, accel: Accel, kill: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "victim", "--ignored", "--test-threads=1"]);
    command.env(TARGET, target).env(ACCEL, accel.to_string()).env(ROUND, kill.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let die_with_me = || {
        // SAFETY: takes numbers only.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        Ok(())
    };
    // SAFETY: one system call, which is async-signal-safe.
    unsafe { command.pre_exec(die_with_me) };
    command.spawn().unwrap()
}

#[derive(Default, Debug)]
struct Seen {
    kills: u64,
    /// The victim had committed nothing, and what was there before still was.
    untouched: u64,
    /// A snapshot of the victim was there.
    new: u64,
    /// There was none: it had removed it, to make a new one.
    absent: u64,
    /// A partial file was left behind.
    partial: u64,
    /// Restored into a guest that checked itself.
    restored: u64,
}

fn kills() -> u64 {
    std::env::var(KILLS).ok().map_or(200, |text| text.parse().unwrap())
}

#[test]
fn killed_at_any_moment() {
    let _alone = alone();
    let accels = accels("killed_at_any_moment");
    for &accel in &accels {
        let start = Instant::now();
        let kvm = if accels.len() > 1 { kills() / 5 } else { 0 };
        let kills = if accel == Accel::Kvm { kvm } else { kills() - kvm };
        let idle = GuestConfig { workload: Workload::Idle, working_set: MIB, fill: Some(MIB), ..config() };
        let mut rig = Rig::new(Accel::Threads, 8 * MIB, Backing::Anon, idle).unwrap();
        let mut seen = Seen::default();
        // How long a victim lives at most: some snapshots.
        let mut span = Duration::from_millis(50);
        for kill in 0..kills {
            let target = rig.target();
            let mut victim = start_victim(&target, accel, kill);
            let started = Instant::now();
            while !ready_of(&target).exists() {
                assert!(started.elapsed() < PATIENCE, "{accel}: the victim does not start");
                assert!(victim.try_wait().unwrap().is_none(), "{accel}: the victim ended by itself");
                std::thread::sleep(Duration::from_micros(200));
            }
            let nanos = mix(kill + 1) % u64::try_from(span.as_nanos()).unwrap();
            std::thread::sleep(Duration::from_nanos(nanos));
            assert!(victim.try_wait().unwrap().is_none(), "{accel}: the victim ended by itself, at kill {kill}");
            victim.kill().unwrap();
            victim.wait().unwrap();
            look(&mut rig, accel, &mut seen).unwrap_or_else(|why| panic!("{accel}, kill {kill}: {why}"));
            // If most are killed before their first commit they live longer, and the other way round.
            let tenth = span / 10;
            span = if seen.new * 2 < seen.kills { span + tenth } else { span.saturating_sub(tenth) };
            span = span.clamp(Duration::from_millis(5), Duration::from_secs(1));
        }
        say(&format!("killed_at_any_moment, {accel}: {seen:?} in {:.1?}", start.elapsed()));
        assert!(seen.partial > 0, "no kill hit a snapshot under way");
        assert!(seen.new > 0 && seen.untouched > 0 && seen.restored > 0, "{seen:?}");
    }
}

/// What a killed process left.
fn look(rig: &mut Rig, accel: Accel, seen: &mut Seen) -> Result<(), String> {
    let target = rig.target();
    let log = fs::read_to_string(log_of(&target)).unwrap_or_default();
    // The last line may be cut off.
    let lines = || log.rsplit_once('\n').map_or("", |(lines, _)| lines).lines();
    let removed = lines().last() == Some(REMOVING);
    let last = lines().rfind(|line| *line != REMOVING);
    fs::remove_file(log_of(&target)).unwrap_or_default();
    fs::remove_file(ready_of(&target)).unwrap();
    seen.kills += 1;
    match SnapshotFile::open(&target) {
        Ok(file) => {
            file.verify(2, &mut |_, _| {}).map_err(|error| format!("it opens, but {error}"))?;
            let bytes = file.ram_bytes();
            if bytes == VICTIM_RAM {
                seen.new += 1;
                // Not an older one than it has committed.
                let id = file.id().to_string();
                if lines().any(|line| line == id) && last != Some(id.as_str()) {
                    return Err(format!("{id} is there, {last:?} was committed last"));
                }
                if seen.new % 10 == 1 {
                    let size = (VICTIM_RAM, Backing::Anon);
                    let chain = Chain::open(rig.target()).map_err(|error| error.to_string())?;
                    let restored =
                        snapshot_run::restore(accel, config(), size, &chain, &[]).map_err(|e| e.to_string())?;
                    restored.guest.resume().map_err(|error| error.to_string())?;
                    let report = restored.guest.self_check(PATIENCE).map_err(|error| error.to_string())?;
                    if !report.is_ok() {
                        return Err(format!("restored, the guest finds {report:?}"));
                    }
                    seen.restored += 1;
                }
            } else if last.is_none() {
                seen.untouched += 1;
                rig.is_untouched()?;
            } else {
                return Err(format!("what was there before is back; {last:?} was committed last"));
            }
        }
        // Only where the victim itself had removed it.
        Err(_) if removed && !target.exists() => seen.absent += 1,
        Err(error) => return Err(format!("there was a snapshot, and now: {error}")),
    }
    let partial = target.with_file_name("vm.ramshot.partial");
    if partial.exists() {
        seen.partial += 1;
        // Complete already, and not renamed yet.
        if let Ok(file) = SnapshotFile::open(&partial) {
            file.verify(2, &mut |_, _| {}).map_err(|error| format!("the partial file opens, but {error}"))?;
        }
    }
    rig.exact_snapshot().map_err(|error| format!("the next snapshot: {error}"))?;
    if partial.exists() {
        return Err("the next snapshot did not clear away what was left behind".to_owned());
    }
    if seen.kills.is_multiple_of(10) { rig.unharmed() } else { Ok(()) }
}
