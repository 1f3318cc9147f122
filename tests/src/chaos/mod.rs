//! Trouble, made to order: parts of a snapshot that fail when told to, and a rig that says afterwards whether anybody was
//! harmed. For the fault tests and the soak.

mod parts;
mod residue;
mod rig;
mod tap;
mod tmpfs;

use std::io::Write;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

pub use parts::{BadRam, BadSink, BadTracker, Injected, SinkFault, TrackerFault};
pub use residue::{Residue, engine_threads, protected_pages, registered, registered_buffers};
pub use rig::{Rig, every_vcpu_writes};
pub use tap::Tap;
pub use tmpfs::TinyFs;

use crate::{Accel, kvm_unavailable};

/// Held by each test of a program: they look at what this whole process has open, and they want the two cores.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that something was left out, past the output capture of the test harness.
pub fn skipped(what: &str, why: &str) {
    // Nothing can be done about a stderr that is closed.
    let _ = writeln!(std::io::stderr(), "\n==== SKIPPED: {what}\n==== because {why}");
}

/// Says what a test did, past the output capture of the test harness.
pub fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "     {what}");
}

/// Threads, and KVM where it can be used.
#[must_use]
pub fn accels(test: &str) -> Vec<Accel> {
    match kvm_unavailable() {
        None => vec![Accel::Threads, Accel::Kvm],
        Some(why) => {
            skipped(&format!("{test} with a KVM guest"), &why);
            vec![Accel::Threads]
        }
    }
}

/// What panics on purpose says.
pub const ON_PURPOSE: &str = "a panic on purpose";

/// Keeps panics on purpose out of the output.
pub fn hush() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let on_purpose = info.payload().downcast_ref::<&str>().is_some_and(|text| *text == ON_PURPOSE);
            if !on_purpose {
                usual(info);
            }
        }));
    });
}
