//! The test VM alone, without any snapshot: does the guest do what the end-to-end tests rely on?
//!
//! Every test runs with threads as the guest, and with KVM where it can be used.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::Read;
use std::mem::offset_of;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ramshot_images::layout::{FIRST_USABLE, Header, PAGE, Range, STATS_ADDRESS};
use ramshot_images::{IMAGE, READY_LINE};
use ramshot_tests::{
    Accel, Backing, Guest, GuestConfig, KvmGuest, Memory, ThreadGuest, Workload, kvm_unavailable, new_guest,
};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Guests that write flat out on two cores: one at a time, or the time limits say nothing.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accels(test: &str) -> Vec<Accel> {
    match kvm_unavailable() {
        None => vec![Accel::Threads, Accel::Kvm],
        Some(why) => {
            eprintln!("SKIPPED with KVM: {test}: {why}");
            vec![Accel::Threads]
        }
    }
}

fn memory(mib: u64, backing: Backing) -> Arc<Memory> {
    Memory::new(mib * MIB, backing).unwrap()
}

fn started(accel: Accel, mib: u64, config: GuestConfig) -> Box<dyn Guest> {
    let guest = new_guest(accel, memory(mib, Backing::Anon), config).unwrap();
    if let Err(error) = guest.start() {
        panic!("{accel}: {error}; console: {}", guest.console());
    }
    guest
}

fn config(vcpus: u32, workload: Workload) -> GuestConfig {
    GuestConfig { vcpus, workload, working_set: 16 * MIB, ..GuestConfig::default() }
}

#[test]
fn it_boots_and_every_vcpu_writes() {
    let _alone = alone();
    for accel in accels("it_boots_and_every_vcpu_writes") {
        for (vcpus, workload) in [(1, Workload::Random), (2, Workload::Seq), (2, Workload::Random), (4, Workload::Seq)]
        {
            let guest = started(accel, 64, config(vcpus, workload));
            assert!(guest.rate(Duration::from_millis(200)).unwrap() > 1000.0);
            let stats = guest.stats().unwrap();
            assert_eq!(stats.vcpus.len(), vcpus as usize);
            assert!(stats.vcpus.iter().all(|v| v.writes > 0), "{accel} {workload}: a vCPU wrote nothing");
            assert!(stats.gaps.count() > 0);
            let report = guest.self_check(PATIENCE).unwrap();
            assert!(report.is_ok(), "{accel} {workload}: {report:?}");
            // All usable RAM was filled, so all of it is checked.
            assert_eq!(report.pages, (64 * MIB - FIRST_USABLE) / PAGE);
        }
    }
}

#[test]
fn an_idle_guest_writes_nothing_and_answers() {
    let _alone = alone();
    for accel in accels("an_idle_guest_writes_nothing_and_answers") {
        let guest = started(accel, 64, config(2, Workload::Idle));
        assert_eq!(guest.writes().unwrap(), 0);
        assert!(guest.self_check(PATIENCE).unwrap().is_ok());
        assert_eq!(guest.writes().unwrap(), 0);
    }
}

#[test]
fn a_rate_is_kept() {
    let _alone = alone();
    for accel in accels("a_rate_is_kept") {
        let guest = started(accel, 64, GuestConfig { rate: Some(2000), ..config(2, Workload::Random) });
        std::thread::sleep(Duration::from_millis(100));
        let rate = guest.rate(Duration::from_secs(1)).unwrap();
        assert!((2000.0..6000.0).contains(&rate), "{accel}: {rate} writes/s of 4000");
        let history = &guest.stats().unwrap().vcpus[0].history;
        assert!(history.len() > 20, "{accel}: {} slots", history.len());
    }
}

#[test]
fn pause_stops_all_writes_and_resume_goes_on() {
    let _alone = alone();
    for accel in accels("pause_stops_all_writes_and_resume_goes_on") {
        let guest = started(accel, 64, config(2, Workload::Random));
        for _ in 0..20 {
            let start = Instant::now();
            guest.pause().unwrap();
            let took = start.elapsed();
            let before = guest.memory().copy().unwrap();
            std::thread::sleep(Duration::from_millis(50));
            assert!(before == guest.memory().copy().unwrap(), "{accel}: paused, and RAM changed");
            let writes = guest.writes().unwrap();
            guest.resume().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(guest.writes().unwrap() > writes, "{accel}: resumed, and nothing is written");
            assert!(took < Duration::from_secs(5), "{accel}: pausing took {took:?}");
        }
        assert!(guest.self_check(PATIENCE).unwrap().is_ok());
    }
}

#[test]
fn gaps_show_a_pause_and_can_be_reset() {
    let _alone = alone();
    for accel in accels("gaps_show_a_pause_and_can_be_reset") {
        let guest = started(accel, 64, GuestConfig { rate: Some(5000), ..config(1, Workload::Random) });
        guest.reset_gaps().unwrap();
        guest.pause().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        guest.resume().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let gaps = guest.stats().unwrap().gaps;
        assert!(gaps.max() >= Duration::from_millis(290), "{accel}: {:?}", gaps.max());
        assert!(gaps.longer_than(Duration::from_millis(200)) >= 1);
        assert!(gaps.p50() < Duration::from_millis(50), "{accel}: {:?}", gaps.p50());
        guest.reset_gaps().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let gaps = guest.stats().unwrap().gaps;
        assert!(gaps.max() < Duration::from_millis(290), "{accel}: {:?}", gaps.max());
    }
}

/// Saves a guest and restores it into fresh memory.
fn restored(guest: &dyn Guest, accel: Accel, mib: u64, config: GuestConfig) -> Box<dyn Guest> {
    let copy = memory(mib, Backing::Anon);
    copy.paste(&guest.memory().copy().unwrap()).unwrap();
    let again = new_guest(accel, copy, config).unwrap();
    again.restore(&guest.save_state().unwrap()).unwrap();
    again
}

#[test]
fn a_saved_guest_goes_on_in_a_new_vm() {
    let _alone = alone();
    for accel in accels("a_saved_guest_goes_on_in_a_new_vm") {
        for workload in [Workload::Seq, Workload::Random] {
            let config = GuestConfig { late: 4 * MIB, ..config(2, workload) };
            let guest = started(accel, 64, config);
            std::thread::sleep(Duration::from_millis(100));
            guest.pause().unwrap();
            let writes = guest.writes().unwrap();
            let again = restored(guest.as_ref(), accel, 64, config);
            assert_eq!(again.writes().unwrap(), writes, "restored, it is still paused");
            again.resume().unwrap();
            let report = again.self_check(PATIENCE).unwrap();
            assert!(report.is_ok(), "{accel} {workload}: {report:?}");
            // The untouched late pages were looked at, too.
            assert_eq!(report.pages, (64 * MIB - FIRST_USABLE) / PAGE);
            assert!(again.rate(Duration::from_millis(100)).unwrap() > 1000.0);
            assert!(again.stats().unwrap().vcpus.iter().all(|v| v.writes > 0));
            // The first one does not mind.
            guest.resume().unwrap();
            assert!(guest.self_check(PATIENCE).unwrap().is_ok());
        }
    }
}

#[test]
fn late_pages_stay_untouched_until_told() {
    let _alone = alone();
    for accel in accels("late_pages_stay_untouched_until_told") {
        let config = GuestConfig { late: 8 * MIB, ..config(2, Workload::Random) };
        let guest = started(accel, 64, config);
        assert!(guest.self_check(PATIENCE).unwrap().is_ok());
        guest.pause().unwrap();
        let late = |copy: &[Vec<u8>]| copy[0][56 * MIB as usize..].to_vec();
        assert!(late(&guest.memory().copy().unwrap()).iter().all(|&byte| byte == 0));
        assert_eq!(guest.stats().unwrap().late_writes, 0);
        let again = restored(guest.as_ref(), accel, 64, config);
        guest.resume().unwrap();
        guest.start_late_writes().unwrap();
        let start = Instant::now();
        while guest.stats().unwrap().late_writes < 8 * MIB / PAGE {
            assert!(start.elapsed() < PATIENCE, "{accel}: late writes do not get done");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(guest.self_check(PATIENCE).unwrap().is_ok());
        // A late page that is not zero where nobody wrote yet: what an absent page that was not tracked looks like.
        again.memory().write(60 * MIB, &[1]).unwrap();
        again.resume().unwrap();
        let report = again.self_check(PATIENCE).unwrap();
        assert_eq!(report.errors, 1, "{accel}: {report:?}");
    }
}

/// What one change to RAM is noticed as.
fn damaged(accel: Accel, workload: Workload, damage: impl Fn(&Memory)) -> ramshot_tests::CheckReport {
    let guest = started(accel, 64, config(2, workload));
    std::thread::sleep(Duration::from_millis(50));
    guest.quiesce(PATIENCE).unwrap();
    assert!(guest.self_check(PATIENCE).unwrap().is_ok());
    damage(guest.memory());
    guest.self_check(PATIENCE).unwrap()
}

#[test]
fn the_self_check_finds_one_wrong_byte_wherever_it_is() {
    let _alone = alone();
    for accel in accels("the_self_check_finds_one_wrong_byte_wherever_it_is") {
        // In the working set: front stamp, middle, back stamp; then in memory that is only filled.
        for at in [FIRST_USABLE + 9, FIRST_USABLE + 5 * PAGE + 2000, FIRST_USABLE + 7 * PAGE + 4090, 40 * MIB + 77] {
            let report = damaged(accel, Workload::Random, |memory| {
                let mut byte = [0];
                memory.read(at, &mut byte).unwrap();
                memory.write(at, &[byte[0] ^ 4]).unwrap();
            });
            assert!(report.errors > 0, "{accel}: a wrong byte at {at:#x} went unnoticed");
        }
    }
}

#[test]
fn the_self_check_finds_swapped_torn_and_stale_pages() {
    let _alone = alone();
    let page = |memory: &Memory, at: u64| {
        let mut bytes = vec![0; PAGE as usize];
        memory.read(at, &mut bytes).unwrap();
        bytes
    };
    let (one, other) = (FIRST_USABLE + 10 * PAGE, FIRST_USABLE + 12 * PAGE);
    for accel in accels("the_self_check_finds_swapped_torn_and_stale_pages") {
        for workload in [Workload::Seq, Workload::Random] {
            let report = damaged(accel, workload, |memory| {
                let (a, b) = (page(memory, one), page(memory, other));
                memory.write(one, &b).unwrap();
                memory.write(other, &a).unwrap();
            });
            assert!(report.errors > 0, "{accel} {workload}: swapped pages went unnoticed");

            // A page as it was some time ago, entirely valid by itself.
            let guest = started(accel, 64, config(1, workload));
            let old = page(guest.memory(), one);
            let start = Instant::now();
            while page(guest.memory(), one)[8..16] == old[8..16] {
                assert!(start.elapsed() < PATIENCE);
            }
            guest.quiesce(PATIENCE).unwrap();
            let new = page(guest.memory(), one);
            assert!(guest.self_check(PATIENCE).unwrap().is_ok());
            // Front of one time, back of another.
            guest.memory().write(one, &old[..2048]).unwrap();
            let report = guest.self_check(PATIENCE).unwrap();
            assert!(report.first.as_ref().is_some_and(|first| first.contains("front and back")), "{report:?}");
            // All of it of that time: `old` was read while the guest wrote, so take its front for both ends.
            let mut stale = new.clone();
            for word in 0..4 {
                let bytes = &old[word * 8..word * 8 + 8];
                stale[word * 8..word * 8 + 8].copy_from_slice(bytes);
                let back = PAGE as usize - 8 - word * 8;
                stale[back..back + 8].copy_from_slice(bytes);
            }
            guest.memory().write(one, &stale).unwrap();
            let report = guest.self_check(PATIENCE).unwrap();
            assert!(report.errors > 0, "{accel} {workload}: a stale page went unnoticed");
            guest.memory().write(one, &new).unwrap();
            assert!(guest.self_check(PATIENCE).unwrap().is_ok());
            guest.unquiesce().unwrap();
        }
    }
}

#[test]
fn every_backing_holds_a_guest_and_a_copy_touches_nothing() {
    let _alone = alone();
    for accel in accels("every_backing_holds_a_guest_and_a_copy_touches_nothing") {
        for backing in [Backing::Anon, Backing::Thp, Backing::Memfd, Backing::HugeTlb] {
            let memory = match Memory::new(64 * MIB, backing) {
                Ok(memory) => memory,
                Err(error) if backing == Backing::HugeTlb => {
                    eprintln!("SKIPPED: {backing} with {accel}: {error}");
                    continue;
                }
                Err(error) => panic!("{backing}: {error}"),
            };
            let config = GuestConfig { fill: Some(16 * MIB), ..config(1, Workload::Random) };
            let guest = new_guest(accel, memory, config).unwrap();
            guest.start().unwrap();
            guest.pause().unwrap();
            let resident = || match &guest.memory().regions()[0].file {
                Some(file) => {
                    use std::os::unix::fs::MetadataExt;
                    file.metadata().unwrap().blocks()
                }
                None => 0,
            };
            let before = resident();
            let copy = guest.memory().copy().unwrap();
            assert_eq!(before, resident(), "{backing}: the copy filled holes");
            let mut header = [0; 8];
            guest.memory().read(STATS_ADDRESS, &mut header).unwrap();
            assert_eq!(copy[0][STATS_ADDRESS as usize..][..8], header);
            assert!(copy[0][32 * MIB as usize..].iter().all(|&byte| byte == 0));
            guest.resume().unwrap();
            assert!(guest.self_check(PATIENCE).unwrap().is_ok(), "{accel} {backing}");
        }
    }
}

#[test]
fn ram_above_the_hole_is_used() {
    let _alone = alone();
    // 3 GiB below the hole and 64 MiB above; only a little is filled, but the late area lies at the very end.
    let config = GuestConfig { fill: Some(16 * MIB), late: 32 * MIB, ..config(2, Workload::Random) };
    for accel in accels("ram_above_the_hole_is_used") {
        let guest = started(accel, 3 * 1024 + 64, config);
        assert_eq!(guest.memory().regions()[1].guest, 4 << 30);
        guest.start_late_writes().unwrap();
        let start = Instant::now();
        while guest.stats().unwrap().late_writes < 32 * MIB / PAGE {
            assert!(start.elapsed() < PATIENCE, "{accel}: late writes do not get done");
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut number = [0; 8];
        let at = (4 << 30) + 64 * MIB - PAGE;
        guest.memory().read(at, &mut number).unwrap();
        assert_eq!(u64::from_le_bytes(number), at / PAGE);
        assert!(guest.self_check(PATIENCE).unwrap().is_ok());
    }
}

#[test]
fn without_local_apics_all_vcpus_start_at_the_entry() {
    let _alone = alone();
    if let Some(why) = kvm_unavailable() {
        eprintln!("SKIPPED: without_local_apics_all_vcpus_start_at_the_entry: {why}");
        return;
    }
    let config = config(2, Workload::Seq);
    let guest = KvmGuest::with_lapic(memory(64, Backing::Anon), config, false).unwrap();
    guest.start().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    guest.pause().unwrap();
    let copy = memory(64, Backing::Anon);
    copy.paste(&guest.memory().copy().unwrap()).unwrap();
    let again = KvmGuest::with_lapic(copy, config, false).unwrap();
    again.restore(&guest.save_state().unwrap()).unwrap();
    again.resume().unwrap();
    assert!(again.self_check(PATIENCE).unwrap().is_ok());
    assert!(again.stats().unwrap().vcpus.iter().all(|v| v.writes > 0));
}

#[test]
fn wrong_use_and_bad_states_are_refused() {
    let _alone = alone();
    for accel in accels("wrong_use_and_bad_states_are_refused") {
        let config = config(2, Workload::Random);
        let guest = started(accel, 64, config);
        assert!(guest.start().is_err(), "started twice");
        assert!(guest.save_state().is_err(), "saved while it runs");
        guest.pause().unwrap();
        let state = guest.save_state().unwrap();
        let copy = guest.memory().copy().unwrap();
        for bad in [&state[..state.len() - 1], &state[..3], b"something else entirely"] {
            let fresh = memory(64, Backing::Anon);
            fresh.paste(&copy).unwrap();
            let error = new_guest(accel, fresh, config).unwrap().restore(bad).unwrap_err();
            assert!(error.to_string().contains("saved state"), "{accel}: {error}");
        }
        let one = GuestConfig { vcpus: 1, ..config };
        assert!(new_guest(accel, memory(64, Backing::Anon), one).unwrap().restore(&state).is_err());
    }
    assert!(ThreadGuest::new(memory(64, Backing::Anon), config(17, Workload::Seq)).is_err());
    assert!(Memory::new(MIB, Backing::Anon).is_err());
}

#[test]
fn a_guest_that_crashes_is_reported() {
    let _alone = alone();
    if let Some(why) = kvm_unavailable() {
        eprintln!("SKIPPED: a_guest_that_crashes_is_reported: {why}");
        return;
    }
    let guest = started(Accel::Kvm, 64, config(1, Workload::Seq));
    guest.pause().unwrap();
    // RAM said to be far outside the address map: the next write faults.
    let address = STATS_ADDRESS + offset_of!(Header, range) as u64 + offset_of!(Range, address) as u64;
    guest.memory().write(address, &(1u64 << 52).to_le_bytes()).unwrap();
    guest.resume().unwrap();
    let start = Instant::now();
    while guest.failure().is_none() {
        assert!(start.elapsed() < PATIENCE, "the guest should have failed; console: {}", guest.console());
        std::thread::sleep(Duration::from_millis(5));
    }
    eprintln!("as it should be: {}", guest.failure().unwrap());
    assert!(guest.self_check(PATIENCE).is_err());
}

#[test]
fn qemu_boots_the_same_image() {
    let _alone = alone();
    let skip = |why: &str| eprintln!("SKIPPED: qemu_boots_the_same_image: {why}");
    if let Some(why) = kvm_unavailable() {
        return skip(&why);
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("guest.elf");
    std::fs::write(&image, IMAGE.unwrap()).unwrap();
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "kvm", "-cpu", "qemu64", "-m", "256M", "-smp", "2", "-nographic", "-nodefaults", "-no-reboot"])
        .args(["-serial", "stdio", "-append", "workload=random ws=64M vcpus=2 report=1 tsc_khz=2000000", "-kernel"])
        .arg(&image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut qemu = match qemu {
        Ok(qemu) => qemu,
        Err(error) => return skip(&format!("qemu-system-x86_64: {error}")),
    };
    let mut output = qemu.stdout.take().unwrap();
    let console = Arc::new(Mutex::new(String::new()));
    let reader = {
        let console = Arc::clone(&console);
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(read @ 1..) = output.read(&mut bytes) {
                console.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        })
    };
    let start = Instant::now();
    let rates = || -> Vec<u64> {
        let console = console.lock().unwrap();
        // The last line may not be complete.
        let lines = console.rsplit_once('\n').map_or("", |(lines, _)| lines);
        lines.lines().filter_map(|line| line.trim().strip_prefix("rate ")?.parse().ok()).collect()
    };
    while rates().len() < 2 && start.elapsed() < 2 * PATIENCE {
        std::thread::sleep(Duration::from_millis(50));
    }
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    reader.join().unwrap();
    let console = console.lock().unwrap().clone();
    assert!(console.contains(READY_LINE), "QEMU's console: {console:?}");
    drop(console);
    assert!(rates().iter().all(|&rate| rate > 0) && rates().len() >= 2);
}
