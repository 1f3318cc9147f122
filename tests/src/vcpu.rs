//! One vCPU and its thread: runs the guest while the gate is open, answers its port accesses, and comes to the gate when
//! it is kicked.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use ramshot::KvmDirtyRing;
use ramshot_images::{IDLE_PORT, SERIAL_PORT};

use crate::gate::Gate;
use crate::guest::GuestError;

/// What the guest wrote to its serial port.
pub(crate) type Console = Arc<Mutex<Vec<u8>>>;

/// The dirty rings of the VM, if it has some.
pub(crate) type Rings = Arc<OnceLock<KvmDirtyRing>>;

/// `KVM_EXIT_DIRTY_RING_FULL`, which kvm-ioctls does not know.
const RING_FULL: u32 = 31;

/// A thread that runs a vCPU.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    handle: JoinHandle<()>,
}

impl VcpuThread {
    /// Starts it; it waits at the gate first. It locks `vcpu` only while it runs the guest: at a closed gate anybody may
    /// use it.
    pub(crate) fn spawn(
        index: u32,
        vcpu: Arc<Mutex<VcpuFd>>,
        gate: Arc<Gate>,
        console: Console,
        rings: Rings,
    ) -> Result<Self, GuestError> {
        install_kick();
        let body = move || {
            let leaver = Leaver { gate: &gate, why: Some(format!("the thread of vCPU {index} panicked")) };
            let ended = run(&vcpu, &gate, &console, &rings).err().map(|why| format!("vCPU {index}: {why}"));
            leaver.leave(ended);
        };
        let handle = std::thread::Builder::new().name(format!("vcpu-{index}")).spawn(body);
        handle.map(|handle| Self { handle }).map_err(|source| GuestError::Thread { vcpu: index, source })
    }

    /// Gets it out of the guest.
    pub(crate) fn kick(&self) {
        // SAFETY: the thread is not joined while `self` is there, so its handle is valid; the signal has a handler.
        unsafe { libc::pthread_kill(self.handle.as_pthread_t(), kick_signal()) };
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    pub(crate) fn join(self) {
        // A panic was reported at the gate.
        let _ = self.handle.join();
    }
}

/// Leaves the gate whatever happens, so that nobody waits for a thread that is gone.
struct Leaver<'a> {
    gate: &'a Gate,
    why: Option<String>,
}

impl Leaver<'_> {
    fn leave(mut self, why: Option<String>) {
        self.why = why;
    }
}

impl Drop for Leaver<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.why.take());
    }
}

thread_local! {
    /// The `kvm_run` page of the vCPU that this thread runs, for the signal handler.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

/// A signal interrupts KVM_RUN; `immediate_exit` catches one that comes just before it.
extern "C" fn on_kick(_: libc::c_int) {
    let _ = RUN.try_with(|run| {
        let run = run.get();
        if !run.is_null() {
            // SAFETY: set by this very thread while it has the vCPU locked, so the page is mapped; one byte, volatile.
            unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
        }
    });
}

fn install_kick() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeroes is a valid sigaction; no SA_RESTART, since system calls are to be interrupted.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        // SAFETY: a handler that only writes a byte; a real-time signal that nobody else uses here.
        unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) };
    });
}

/// The life of the thread. `Err`: why the guest cannot go on.
fn run(vcpu: &Mutex<VcpuFd>, gate: &Gate, console: &Console, rings: &Rings) -> Result<(), String> {
    while gate.pass() {
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        RUN.set(ptr::from_mut(vcpu.get_kvm_run()));
        let ended = run_until_closed(&mut vcpu, gate, console, rings);
        RUN.set(ptr::null_mut());
        ended?;
    }
    Ok(())
}

fn run_until_closed(vcpu: &mut VcpuFd, gate: &Gate, console: &Console, rings: &Rings) -> Result<(), String> {
    loop {
        vcpu.set_kvm_immediate_exit(0);
        // A kick after this line makes KVM_RUN return at once; one before it was sent after the gate was closed.
        compiler_fence(Ordering::SeqCst);
        if gate.is_closed() {
            break;
        }
        enter(vcpu, console, rings)?;
    }
    // A port access is finished by the next KVM_RUN only: do that without running the guest, else registers that are
    // saved now would lack its result.
    vcpu.set_kvm_immediate_exit(1);
    while enter(vcpu, console, rings)? == Entered::Exit {}
    vcpu.set_kvm_immediate_exit(0);
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Entered {
    /// The guest wanted something, and has it.
    Exit,
    /// A signal, or `immediate_exit`.
    Interrupted,
}

fn enter(vcpu: &mut VcpuFd, console: &Console, rings: &Rings) -> Result<Entered, String> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(SERIAL_PORT, bytes)) => {
            console.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        }
        Ok(VcpuExit::IoIn(IDLE_PORT, bytes)) => {
            bytes.fill(0);
            nap();
        }
        // Line status register: transmitter empty.
        Ok(VcpuExit::IoIn(port, bytes)) => bytes.fill(if port == SERIAL_PORT + 5 { 0x60 } else { 0xff }),
        Ok(VcpuExit::MmioRead(_, bytes)) => bytes.fill(0xff),
        Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(VcpuExit::Hlt) => return Err(halted(console)),
        Ok(VcpuExit::Shutdown) => return Err("shut down (triple fault)".to_owned()),
        Ok(VcpuExit::InternalError) => return Err(internal_error(vcpu)),
        Ok(VcpuExit::Unsupported(RING_FULL)) => {
            let rings = rings.get().ok_or("its dirty ring is full, and nobody reads it")?;
            rings.harvest().map_err(|error| error.to_string())?;
        }
        Ok(exit) => return Err(format!("KVM_RUN returned {exit:?}")),
        // EAGAIN: a vCPU that waited for its SIPI got something else.
        Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
            return Ok(Entered::Interrupted);
        }
        Err(error) => {
            return Err(format!("KVM_RUN: {}", io::Error::from_raw_os_error(error.errno())));
        }
    }
    Ok(Entered::Exit)
}

/// A millisecond, or until a signal.
fn nap() {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    // SAFETY: a valid time; nobody wants to know what is left of it.
    unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) };
}

fn halted(console: &Console) -> String {
    let console = console.lock().unwrap_or_else(PoisonError::into_inner);
    let text = String::from_utf8_lossy(&console);
    format!("halted; its console ends with {:?}", text.lines().last().unwrap_or(""))
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let at = vcpu.get_regs().map_or(0, |regs| regs.rip);
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM_RUN just returned KVM_EXIT_INTERNAL_ERROR, for which this member of the union is the one filled in.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let what = if error.suberror == 1 { " (an instruction it cannot emulate)" } else { "" };
    format!("KVM internal error {}{what} at rip {at:#x}, data {:x?}", error.suberror, error.data)
}
