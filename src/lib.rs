//! Snapshots the memory of a running virtual machine without stopping it.
#![forbid(unsafe_code)]

mod engine;
mod options;
mod report;
mod sink;
mod sync;

// The one place where the operating system is chosen.
#[cfg(target_os = "linux")]
#[allow(unused_imports)]
use ramshot_linux as os;
#[cfg(not(target_os = "linux"))]
use ramshot_stub as os;
