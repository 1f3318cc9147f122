//! A second embedder, as different from the test VM as Firecracker is: guest memory of `vm-memory`, threads that write in
//! place of vCPUs, a seccomp filter on every thread from `prepare` on (or from before), no thread that waits for the end.
//! It takes one live snapshot to the path given, and leaves its own copy of guest memory at T0 beside it, as `PATH.t0`.
//!
//! `ramshot-embedder PATH after|before|none [forbidden]`: when the filter comes; `forbidden` makes a system call that it
//! does not allow.

mod filter;

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use ramshot::{GuestRam, Options, Pending};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// As on x86: RAM leaves out a hole below 4 GiB.
const LOW: usize = 48 << 20;
const HIGH: (GuestAddress, usize) = (GuestAddress(4 << 30), 16 << 20);

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, when, rest @ ..] = args.as_slice() else {
        return Err("usage: ramshot-embedder PATH after|before|none [forbidden]".into());
    };
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LOW), HIGH])?);
    let mut t0_file = File::create(format!("{path}.t0"))?;
    let vcpus = Vcpus::start(&memory)?;
    filter::report_violations()?;

    if when == "before" {
        filter::install(&[ramshot::seccomp::RUNNING, ramshot::seccomp::PREPARE])?;
    }
    // SAFETY of what follows is ramshot's: `GuestRam` keeps the memory mapped.
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(&memory))?);
    let done = EventFd::new()?;
    let prepared = ramshot::prepare(&ram, path, &Options { pool_bytes: 4 << 20, ..Options::default() })?;
    if when == "after" {
        filter::install(&[ramshot::seccomp::RUNNING])?;
    }
    let prepared = prepared.arm_ahead()?;

    let paused = vcpus.pause();
    for region in memory.iter() {
        let mut copy = vec![0; 1 << 20];
        for at in (0..region.len()).step_by(copy.len()) {
            memory.read_slice(&mut copy, region.start_addr().unchecked_add(at))?;
            t0_file.write_all(&copy)?;
        }
    }
    let live = prepared.begin(Pending::All, b"vCPU and device state".to_vec())?;
    drop(paused);

    // The event loop of the VMM: it hears of the end by a descriptor.
    let tell = done.as_fd().try_clone_to_owned()?;
    live.when_done(move || {
        let _ = nix::unistd::write(tell, &1u64.to_ne_bytes());
    });
    poll(&mut [PollFd::new(done.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    let report = live.finish()?;
    println!("{} pages, {} faults", report.counts.released, report.counts.faults);
    if vcpus.stop() == 0 || report.counts.faults == 0 {
        return Err("nobody wrote meanwhile: this proved nothing".into());
    }
    if rest.first().is_some_and(|word| word == "forbidden") {
        nix::unistd::getcwd()?;
        println!("descriptor {} and the rest are still here", done.as_raw_fd());
    }
    Ok(())
}

/// Threads that write to guest memory, and stand still while the gate is closed.
struct Vcpus {
    gate: Arc<RwLock<()>>,
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Vcpus {
    fn start(memory: &Arc<GuestMemoryMmap<()>>) -> Result<Self, Box<dyn Error>> {
        let page = |n: u64| if n < 12_288 { n * 4096 } else { HIGH.0.raw_value() + (n - 12_288) * 4096 };
        // Every page but some has something in it.
        for n in (0..16_384).filter(|n| n % 16 != 3) {
            memory.write_slice(&[u8::try_from(n % 251)?; 4096], GuestAddress(page(n)))?;
        }
        let mut vcpus =
            Self { gate: Arc::default(), stop: Arc::default(), writes: Arc::default(), threads: Vec::new() };
        for seed in 1..=2u64 {
            let (gate, stop, writes) = (Arc::clone(&vcpus.gate), Arc::clone(&vcpus.stop), Arc::clone(&vcpus.writes));
            let memory = Arc::clone(memory);
            vcpus.threads.push(std::thread::spawn(move || {
                let mut dice = seed;
                while !stop.load(Ordering::Relaxed) {
                    let Ok(_open) = gate.read() else { return };
                    for _ in 0..64 {
                        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        if memory.write_obj(dice, GuestAddress(page((dice >> 40) % 16_384) + (dice & 0xff8))).is_err() {
                            return;
                        }
                    }
                    writes.fetch_add(64, Ordering::Relaxed);
                }
            }));
        }
        std::thread::sleep(Duration::from_millis(50));
        Ok(vcpus)
    }

    fn pause(&self) -> impl Drop + '_ {
        self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let dead = self.threads.into_iter().filter_map(|thread| thread.join().err()).count();
        if dead > 0 { 0 } else { self.writes.load(Ordering::Relaxed) }
    }
}
