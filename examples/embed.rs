//! Embedding in the smallest way: guest RAM of `vm-memory`, one thread that plays the vCPU, a live snapshot, a restore.
//! Run it with `cargo run --example embed --features vm-memory`; it needs userfaultfd, not KVM.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ramshot::{GuestRam, Options, Pending, SnapshotFile};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEM: u64 = 64 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?);
    // The guest: counts up in every page, one write under the lock at a time, so that the lock pauses it.
    let (running, pause) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(())));
    let vcpu = {
        let (memory, running, pause) = (Arc::clone(&memory), Arc::clone(&running), Arc::clone(&pause));
        std::thread::spawn(move || {
            for n in (0u64..).take_while(|_| running.load(Ordering::Relaxed)) {
                let _stopped = pause.lock();
                let _ = memory.write_obj(n, GuestAddress(n * 4096 % MEM));
            }
        })
    };
    std::thread::sleep(std::time::Duration::from_millis(100));

    // The snapshot: prepare while the guest runs, begin while it is stopped, finish while it runs.
    let path = std::env::temp_dir().join("embed.ramshot");
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(&memory))?);
    let prepared = ramshot::prepare(&ram, &path, &Options { replace: true, ..Options::default() })?;
    let begun = {
        let _stopped = pause.lock();
        prepared.begin(Pending::All, b"vCPU registers would stand here".to_vec())
    };
    let report = begun?.finish()?;
    running.store(false, Ordering::Relaxed);
    vcpu.join().map_err(|_| "the guest died")?;
    println!("{} pages, {} write faults, paused for {:?}", report.counts.total, report.counts.faults, report.begin);

    // The restore: into fresh memory, every page checked.
    let fresh = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?);
    let target = GuestRam::from_guest_memory(Arc::clone(&fresh))?;
    let file = SnapshotFile::open(&path)?;
    file.restore_into(target.table(), &target, 2)?;
    println!("restored; device state: {:?}", String::from_utf8_lossy(file.device_state()));
    std::fs::remove_file(&path)?;
    Ok(())
}
