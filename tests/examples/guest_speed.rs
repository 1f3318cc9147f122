//! How fast the guest writes and how quickly it is paused, with nothing else going on:
//! `cargo run --release -p ramshot-tests --example guest_speed`.

use std::time::{Duration, Instant};

use ramshot_tests::{Accel, Backing, GuestConfig, GuestError, Memory, Workload, kvm_unavailable, new_guest};

const MIB: u64 = 1 << 20;

fn main() -> Result<(), GuestError> {
    println!("writes/s over 256 MiB of 512 MiB; times to: boot and fill, pause, save state, resume");
    for accel in [Accel::Kvm, Accel::Threads] {
        if accel == Accel::Kvm
            && let Some(why) = kvm_unavailable()
        {
            println!("kvm: SKIPPED: {why}");
            continue;
        }
        for backing in [Backing::Anon, Backing::Thp, Backing::Memfd, Backing::HugeTlb] {
            for (vcpus, workload) in [(1, Workload::Random), (2, Workload::Random), (1, Workload::Seq)] {
                let config = GuestConfig { vcpus, workload, working_set: 256 * MIB, ..GuestConfig::default() };
                measure(accel, backing, config)?;
            }
        }
    }
    Ok(())
}

fn measure(accel: Accel, backing: Backing, config: GuestConfig) -> Result<(), GuestError> {
    let guest = new_guest(accel, Memory::new(512 * MIB, backing)?, config)?;
    let start = Instant::now();
    guest.start()?;
    let booted = start.elapsed();
    guest.rate(Duration::from_millis(500))?;
    guest.reset_gaps()?;
    let rate = guest.rate(Duration::from_secs(1))?;
    let gaps = guest.stats()?.gaps;
    let mut times = Vec::new();
    for _ in 0..21 {
        let start = Instant::now();
        guest.pause()?;
        let paused = start.elapsed();
        guest.save_state()?;
        let saved = start.elapsed();
        guest.resume()?;
        times.push((paused, saved - paused, start.elapsed() - saved));
        std::thread::sleep(Duration::from_millis(20));
    }
    times.sort();
    let (paused, saved, resumed) = times.get(times.len() / 2).copied().unwrap_or_default();
    println!(
        "{accel:7} {backing:7} {} x {:6} {rate:>12.0}/s  gaps p50 {:?} p99.9 {:?} max {:?}  boot {booted:.2?}, pause {paused:?} \
         (worst {:?}), save {saved:?}, resume {resumed:?}",
        config.vcpus,
        config.workload.to_string(),
        gaps.p50(),
        gaps.p999(),
        gaps.max(),
        times.last().copied().unwrap_or_default().0
    );
    Ok(())
}
