//! A page fault handler in a process of its own: it restores the VM that a VMM hands over, and takes live snapshots of it.
//!
//! ```text
//! cargo run --example handler --features handoff -- SOCKET [IMAGE]
//! ```
//! It listens on SOCKET. Who connects first is the VMM (Firecracker, with a `mem_backend` of type `Uffd`, or any other that
//! calls `Handoff::send`): its memory is restored from IMAGE lazily, if there is one. After that it does what lines tell it,
//! from the VMM or from whoever connects next, such as a program that pauses Firecracker through its API:
//!
//! | line | answer |
//! |---|---|
//! | (the first thing the VMM hears) | `ready`: it may run |
//! | `prepare PATH` | `prepared`: pause the VM now |
//! | `begin` | `begun`: resume it. Then, once the image is there: `done PAGES FAULTS` |
//! | `wait` | `restored PAGES`: everything is in |
//!
//! or `failed WHY`; the VM runs on as it was. It ends when the VMM does, or closes the socket.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ramshot::file::PageSource;
use ramshot::restore::order_path;
use ramshot::{Chain, GuestRam, Handoff, LazyOptions, LazyRestore, Options, Pending, Prepared};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Fallible<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let socket = args.next().ok_or("usage: handler SOCKET [IMAGE]")?;
    let listener = UnixListener::bind(&socket)?;
    let (vmm, _) = listener.accept()?;
    let vm = Arc::new(Mutex::new(take_over(&vmm, args.next())?));
    writeln!(&vmm, "ready")?;

    // Others who connect. They end with the process.
    let others = Arc::clone(&vm);
    std::thread::spawn(move || {
        for other in listener.incoming().flatten() {
            let vm = Arc::clone(&others);
            std::thread::spawn(move || obey(&vm, &other));
        }
    });
    let result = obey(&vm, &vmm);
    // The VMM is gone, or wants no more: no image, and nobody waits for what is not in.
    let mut vm = lock(&vm);
    drop(vm.prepared.take());
    if let Some(restore) = vm.restore.take() {
        restore.cancel();
    }
    std::fs::remove_file(&socket)?;
    result
}

struct Vm {
    ram: Arc<GuestRam>,
    restore: Option<LazyRestore>,
    prepared: Option<Prepared>,
}

fn take_over(vmm: &UnixStream, image: Option<PathBuf>) -> Fallible<Vm> {
    let mut handoff = Handoff::receive(vmm)?;
    println!("process {} hands over {} regions of guest memory", handoff.pid, handoff.regions.len());
    let Some(image) = image else {
        return Ok(Vm { ram: Arc::new(GuestRam::from_handoff(handoff)?), restore: None, prepared: None });
    };
    let chain = Chain::open(&image)?;
    // A VMM that does not say what its regions are called has those of the image, in this order.
    handoff.lay_out_as(PageSource::blocks(&chain).iter().map(|block| (block.name, block.guest, block.used)))?;
    let ram = Arc::new(GuestRam::from_handoff(handoff)?);
    let options = LazyOptions { order: Some(order_path(&image)), ..LazyOptions::default() };
    let restore = ramshot::lazy(Arc::new(chain), &ram, &options)?;
    Ok(Vm { ram, restore: Some(restore), prepared: None })
}

fn lock(vm: &Mutex<Vm>) -> std::sync::MutexGuard<'_, Vm> {
    vm.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does what the lines say, until there are no more.
fn obey(vm: &Mutex<Vm>, mut socket: &UnixStream) -> Fallible<()> {
    for line in BufReader::new(socket).lines() {
        let line = line?;
        let result = match line.split_once(' ').unwrap_or((&line, "")) {
            ("prepare", path) => prepare(&mut lock(vm), path),
            ("begin", _) => begin(vm, socket),
            ("wait", _) => wait(vm),
            (other, _) => Err(format!("{other:?} is none of prepare, begin, wait").into()),
        };
        match result {
            Ok(answer) => writeln!(socket, "{answer}")?,
            Err(error) => writeln!(socket, "failed {error}")?,
        }
    }
    Ok(())
}

fn prepare(vm: &mut Vm, path: &str) -> Fallible<String> {
    let options = Options::default();
    let prepared = match &vm.restore {
        Some(restore) => restore.prepare(&vm.ram, path, &options)?,
        None => ramshot::prepare(&vm.ram, path, &options)?,
    };
    // Protected while the VM runs, so that the pause is short.
    vm.prepared = Some(prepared.arm_ahead()?);
    Ok("prepared".to_owned())
}

fn begin(vm: &Mutex<Vm>, mut socket: &UnixStream) -> Fallible<String> {
    let prepared = lock(vm).prepared.take().ok_or("nothing was prepared")?;
    // The state of its devices the VMM keeps itself, here; it could send it along.
    let live = prepared.begin(Pending::All, Vec::new())?;
    writeln!(socket, "begun")?;
    let report = live.finish()?;
    Ok(format!("done {} {}", report.counts.total, report.counts.faults))
}

fn wait(vm: &Mutex<Vm>) -> Fallible<String> {
    let restore = lock(vm).restore.take().ok_or("nothing is being restored")?;
    let report = restore.finish()?;
    Ok(format!("restored {}", report.progress.by_fault + report.progress.prefetched))
}
