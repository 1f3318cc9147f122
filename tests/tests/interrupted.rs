//! What runs for long and is interrupted leaves no images behind.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn an_interrupted_soak_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let out = tempfile::tempdir().unwrap();
        let files = || fs::read_dir(out.path()).unwrap().filter_map(|folder| fs::read_dir(folder.ok()?.path()).ok());
        let mut soak = Command::new(env!("CARGO_BIN_EXE_ramshot-soak"))
            .args(["--accel", "threads", "--minutes", "5", "--out"])
            .arg(out.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let patience = Instant::now() + Duration::from_secs(60);
        while files().flatten().next().is_none() {
            assert!(Instant::now() < patience && soak.try_wait().unwrap().is_none(), "the soak writes no image");
            sleep(Duration::from_millis(5));
        }
        kill(Pid::from_raw(i32::try_from(soak.id()).unwrap()), signal).unwrap();
        assert_eq!(soak.wait().unwrap().signal(), Some(signal as i32));
        assert_eq!(files().count(), 0, "left behind after {signal}");
    }
}
