//! A snapshot in a VMM with an event loop: nobody waits on a thread of the runtime, and none is spent on waiting.
//! Run it with `cargo run --example tokio`; it needs userfaultfd, not KVM.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramshot::{AnonymousRam, GuestRam, Options, Pending, Prepared, SnapshotFile};

const MEM: u64 = 128 << 20;

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Fallible<()> {
    tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(vmm())
}

async fn vmm() -> Fallible<()> {
    let memory = Arc::new(AnonymousRam::new(MEM)?);
    memory.words().iter().step_by(512).for_each(|word| word.store(1, Ordering::Relaxed));
    let (running, pause) = (Arc::new(AtomicBool::new(true)), Arc::new(std::sync::RwLock::new(())));
    // The guest: one thread in the part of a vCPU.
    let vcpu = {
        let (memory, running, pause) = (Arc::clone(&memory), Arc::clone(&running), Arc::clone(&pause));
        std::thread::spawn(move || {
            for n in (0usize..).take_while(|_| running.load(Ordering::Relaxed)) {
                let _runs = pause.read();
                memory
                    .words()
                    .iter()
                    .skip(n * 7919 % 32_768 * 512)
                    .take(1)
                    .for_each(|word| word.store(2, Ordering::Relaxed));
            }
        })
    };

    let directory = std::env::temp_dir().join(format!("ramshot-tokio-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let path = directory.join("vm.ramshot");
    let ram = Arc::new(GuestRam::from_anonymous(Arc::clone(&memory))?);
    // Preparing opens files and allocates: not on the event loop.
    let target = path.clone();
    let prepare = move || -> Fallible<Prepared> {
        Ok(ramshot::prepare(&ram, target, &Options { pool_bytes: 8 << 20, ..Options::default() })?.arm_ahead()?)
    };
    let prepared = tokio::task::spawn_blocking(prepare).await??;

    let live = {
        let _stopped = pause.write();
        prepared.begin(Pending::All, b"device state".to_vec())?
    };
    // T0 has passed. The loop goes on with its work, and is told.
    let (done, mut is_done) = tokio::sync::oneshot::channel();
    let begun = Instant::now();
    live.when_done(move || {
        let _ = done.send(());
    });
    let mut ticks = 0;
    loop {
        tokio::select! {
            _ = &mut is_done => break,
            () = tokio::time::sleep(Duration::from_millis(5)) => ticks += 1,
        }
    }
    println!("done after {:?}; the loop ran {ticks} times meanwhile", begun.elapsed());
    // What is left is the commit: a sync and a rename.
    let report = tokio::task::spawn_blocking(move || live.finish()).await??;
    running.store(false, Ordering::Relaxed);
    vcpu.join().map_err(|_| "the guest died")?;
    println!("{} pages, {} write faults", report.counts.total, report.counts.faults);
    println!("id {}", SnapshotFile::open(&path)?.id());
    std::fs::remove_dir_all(&directory)?;
    Ok(())
}
