//! Memory handed over to a handler in a process of its own (`examples/handler.rs`): live snapshots, lazy restores, and the death of
//! either side.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramshot::core::Treatment;
use ramshot::file::PageSource;
use ramshot::{Chain, GuestAddr, GuestRam, Handoff, HostAddr, Options, Pending, Region, RegionFile, SnapshotFile};
use ramshot_tests::{Accel, Backing, Guest, GuestConfig, Memory, Workload, new_guest, snapshot_run, verify};

const MEM: u64 = 96 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn config() -> GuestConfig {
    GuestConfig { vcpus: 2, workload: Workload::Random, working_set: 32 << 20, ..GuestConfig::default() }
}

/// KVM where there is one, and threads.
fn accels() -> Vec<Accel> {
    #[cfg(target_arch = "x86_64")]
    if let Some(why) = ramshot_tests::kvm_unavailable() {
        println!("==== SKIPPED: KVM guests: {why}");
    } else {
        return vec![Accel::Kvm, Accel::Threads];
    }
    vec![Accel::Threads]
}

fn regions(memory: &Memory) -> Vec<Region> {
    // The names that `GuestRam::from_guest_memory` gives.
    let region = |(number, info): (usize, &ramshot_tests::RegionInfo)| Region {
        name: format!("ram{number}"),
        guest: GuestAddr(info.guest),
        host: HostAddr(info.host),
        len: info.len,
        used: None,
        treatment: Treatment::Tracked,
        file: info.file.as_ref().map(|file| RegionFile { file: file.try_clone().unwrap(), offset: info.file_offset }),
    };
    memory.regions().iter().enumerate().map(region).collect()
}

/// A handler and the socket to it. Killed on drop.
struct Handler {
    child: Child,
    socket: PathBuf,
}

impl Handler {
    fn start(dir: &Path, image: Option<&Path>) -> Self {
        let socket = dir.join(format!("handler-{}", std::fs::read_dir(dir).unwrap().count()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_ramshot-handler"));
        let child = command.arg(&socket).args(image).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self { child, socket }
    }

    fn connect(&self) -> Line {
        let begun = Instant::now();
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    return Line { answers: BufReader::new(stream.try_clone().unwrap()), stream };
                }
                Err(error) if begun.elapsed() > PATIENCE => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn ends(&mut self) -> ExitStatus {
        ends(&mut self.child)
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ends(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "the process does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Line {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Line {
    fn say(&mut self, line: &str) {
        writeln!(self.stream, "{line}").unwrap();
    }

    #[track_caller]
    fn hear(&mut self, start: &str) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(line.starts_with(start), "{line:?}, where {start:?} was due");
        line
    }

    /// A snapshot of `guest`: memory and state at T0, and the answer.
    fn snapshot(&mut self, guest: &dyn Guest, path: &Path) -> (Vec<Vec<u8>>, Vec<u8>, String) {
        self.say(&format!("prepare {}", path.display()));
        self.hear("prepared");
        guest.pause().unwrap();
        let t0 = guest.memory().copy().unwrap();
        let state = guest.save_state().unwrap();
        self.say("begin");
        self.hear("begun");
        guest.resume().unwrap();
        (t0, state, self.hear("done "))
    }
}

/// Whether this process has memory registered with a userfaultfd, in one of these ways.
fn registered(guest: &Memory, flag: &str) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((range, _)) = line.split_once(' ').filter(|(range, _)| range.contains('-')) {
            let (start, end) = range.split_once('-').unwrap();
            let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            inside = guest.regions().iter().any(|region| region.host < end && start < region.host + region.len);
        } else if inside && line.starts_with("VmFlags:") && line.split(' ').any(|word| word == flag) {
            return true;
        }
    }
    false
}

#[track_caller]
fn writes_on(guest: &dyn Guest) {
    let before = guest.writes().unwrap();
    let begun = Instant::now();
    while guest.writes().unwrap() < before + 1000 {
        assert!(begun.elapsed() < PATIENCE, "the guest stands still");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.failure(), None);
}

#[track_caller]
fn checks_itself(guest: &dyn Guest) {
    let mut problems = Vec::new();
    snapshot_run::self_check(guest, "the guest", PATIENCE, &mut problems).unwrap();
    assert_eq!(problems, [""; 0]);
}

/// The image, with the state that goes with it, runs.
#[track_caller]
fn is_a_vm(file: &SnapshotFile, state: &[u8], accel: Accel, backing: Backing) {
    let memory = Memory::new(MEM, backing).unwrap();
    let ram = GuestRam::from_guest_memory(Arc::clone(memory.guest())).unwrap();
    file.restore_into(ram.table(), &ram, 1).unwrap();
    drop(ram);
    let guest = new_guest(accel, memory, config()).unwrap();
    guest.restore(state).unwrap();
    guest.resume().unwrap();
    writes_on(guest.as_ref());
    checks_itself(guest.as_ref());
}

#[test]
fn another_process_takes_live_snapshots_that_are_memory_at_t0() {
    for accel in accels() {
        for backing in [Backing::Anon, Backing::Thp, Backing::Memfd] {
            let dir = tempfile::tempdir().unwrap();
            let memory = Memory::new(MEM, backing).unwrap();
            let guest = new_guest(accel, Arc::clone(&memory), config()).unwrap();
            guest.start().unwrap();
            let mut handler = Handler::start(dir.path(), None);
            let mut line = handler.connect();
            // Nothing is missing, so this process keeps no descriptor.
            Handoff::of_this_process(regions(&memory), false).unwrap().send(&line.stream).unwrap();
            line.hear("ready");
            let mut faults = 0;
            for number in 0..2 {
                let path = dir.path().join(format!("{number}.ramshot"));
                let (t0, state, done) = line.snapshot(guest.as_ref(), &path);
                faults += done.trim().rsplit(' ').next().unwrap().parse::<u64>().unwrap();
                let file = SnapshotFile::open(&path).unwrap();
                file.verify(1, &mut |_, _| {}).unwrap();
                let verified = verify::against_file(&file, &t0).unwrap();
                assert_eq!((verified.mismatched, verified.pages), (0, MEM / 4096), "{accel:?} {backing}");
                assert!(!registered(&memory, "uw"), "{accel:?} {backing}");

                is_a_vm(&file, &state, accel, backing);
            }
            assert!(faults > 0, "{accel:?} {backing}: this proved nothing");
            // Without a word the VMM closes the socket.
            drop(line);
            assert!(handler.ends().success());
            writes_on(guest.as_ref());
            checks_itself(guest.as_ref());
        }
    }
}

/// An image with its device state.
fn image(accel: Accel, dir: &Path) -> PathBuf {
    let path = dir.join("image");
    let memory = Memory::new(MEM, Backing::Anon).unwrap();
    let guest = new_guest(accel, memory, config()).unwrap();
    guest.start().unwrap();
    writes_on(guest.as_ref());
    let ram = snapshot_run::guest_ram(guest.as_ref()).unwrap();
    let prepared = ramshot::prepare(&ram, &path, &Options::default()).unwrap();
    guest.pause().unwrap();
    let state = guest.save_state().unwrap();
    let live = prepared.begin(Pending::All, state).unwrap();
    guest.resume().unwrap();
    live.finish().unwrap();
    path
}

#[test]
fn another_process_restores_lazily_and_snapshots_meanwhile() {
    for accel in accels() {
        for backing in [Backing::Anon, Backing::Memfd] {
            let what = format!("{accel:?} {backing}");
            let dir = tempfile::tempdir().unwrap();
            let path = image(accel, dir.path());
            let chain = Chain::open(&path).unwrap();
            let memory = Memory::new(MEM, backing).unwrap();
            let handoff = Handoff::of_this_process(regions(&memory), true).unwrap();
            let guest = new_guest(accel, Arc::clone(&memory), config()).unwrap();
            let mut handler = Handler::start(dir.path(), Some(&path));
            let mut line = handler.connect();
            handoff.send(&line.stream).unwrap();
            line.hear("ready");
            guest.restore(PageSource::device_state(&chain)).unwrap();
            guest.resume().unwrap();

            // Another one does the talking.
            let mut other = handler.connect();
            let second = dir.path().join("second");
            let (t0, state, _) = {
                other.say(&format!("prepare {}", second.display()));
                other.hear("prepared");
                guest.pause().unwrap();
                let state = guest.save_state().unwrap();
                other.say("begin");
                other.hear("begun");
                // Read through the mapping: what is not in comes in. Nobody writes yet.
                let t0 = memory.read_all().unwrap();
                guest.resume().unwrap();
                (t0, state, other.hear("done "))
            };
            let file = SnapshotFile::open(&second).unwrap();
            file.verify(1, &mut |_, _| {}).unwrap();
            assert_eq!(verify::against_file(&file, &t0).unwrap().mismatched, 0, "{what}");
            line.say("wait");
            line.hear("restored ");
            drop(handoff);
            assert!(!registered(&memory, "um") && !registered(&memory, "uw"), "{what}");
            writes_on(guest.as_ref());
            checks_itself(guest.as_ref());

            // And it goes on: a snapshot of the restored VM, on the same descriptor.
            let third = dir.path().join("third");
            let (t0, ..) = line.snapshot(guest.as_ref(), &third);
            assert_eq!(
                verify::against_file(&SnapshotFile::open(&third).unwrap(), &t0).unwrap().mismatched,
                0,
                "{what}"
            );
            drop(line);
            assert!(handler.ends().success(), "{what}");
            writes_on(guest.as_ref());
            drop(guest);

            is_a_vm(&file, &state, accel, backing);
        }
    }
}

#[test]
fn a_handler_that_dies_in_a_snapshot_leaves_the_vm_running_and_no_image() {
    for keep in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(MEM, Backing::Anon).unwrap();
        let guest = new_guest(Accel::Threads, Arc::clone(&memory), config()).unwrap();
        guest.start().unwrap();
        let path = dir.path().join("vm.ramshot");
        let mut handler = Handler::start(dir.path(), None);
        let mut line = handler.connect();
        let handoff = Handoff::of_this_process(regions(&memory), false).unwrap();
        handoff.send(&line.stream).unwrap();
        let kept = keep.then_some(handoff);
        line.hear("ready");
        line.say(&format!("prepare {}", path.display()));
        line.hear("prepared");
        guest.pause().unwrap();
        line.say("begin");
        line.hear("begun");
        handler.child.kill().unwrap();
        handler.child.wait().unwrap();
        guest.resume().unwrap();
        if let Some(handoff) = &kept {
            assert!(registered(&memory, "uw"), "killed too late: this proves nothing");
            handoff.lift_protection().unwrap();
        } else {
            assert!(!registered(&memory, "uw"));
        }
        writes_on(guest.as_ref());
        checks_itself(guest.as_ref());
        assert!(!path.exists(), "an image of a snapshot that was not finished");
        drop(kept);

        // The next one takes over, and over what the first one left behind.
        let handler = Handler::start(dir.path(), None);
        let mut line = handler.connect();
        Handoff::of_this_process(regions(&memory), false).unwrap().send(&line.stream).unwrap();
        line.hear("ready");
        let (t0, ..) = line.snapshot(guest.as_ref(), &path);
        assert_eq!(verify::against_file(&SnapshotFile::open(&path).unwrap(), &t0).unwrap().mismatched, 0);
        checks_itself(guest.as_ref());
    }
}

#[test]
fn a_handler_that_dies_in_a_restore_leaves_no_zeros_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(Accel::Threads, dir.path());
    let memory = Memory::new(MEM, Backing::Anon).unwrap();
    let handoff = Handoff::of_this_process(regions(&memory), true).unwrap();
    let mut handler = Handler::start(dir.path(), Some(&path));
    let mut line = handler.connect();
    handoff.send(&line.stream).unwrap();
    line.hear("ready");
    handler.child.kill().unwrap();
    handler.child.wait().unwrap();
    let chain = Chain::open(&path).unwrap();
    let there = Arc::new(AtomicBool::new(false));
    // The last page that has data: it is not in yet.
    let last = (0..MEM / 4096).rev().find_map(|page| {
        let mut bytes = vec![0; 4096];
        chain.read_run(ramshot::core::PageId(page), &mut bytes).ok()?;
        bytes.iter().any(|&byte| byte != 0).then_some((page, bytes))
    });
    let (page, expected) = last.unwrap();
    let reader = {
        let (memory, there) = (Arc::clone(&memory), Arc::clone(&there));
        std::thread::spawn(move || {
            let mut bytes = vec![0; 4096];
            memory.read(page * 4096, &mut bytes).unwrap();
            there.store(true, Ordering::Release);
            bytes
        })
    };
    std::thread::sleep(Duration::from_millis(300));
    assert!(!there.load(Ordering::Acquire), "page {page} was read, and nobody can have put it in");
    // This process gives up, and with it the promise.
    drop(handoff);
    assert_ne!(reader.join().unwrap(), expected, "killed too late: this proves nothing");
}

#[test]
fn a_vmm_that_dies_ends_the_snapshot_and_the_handler() {
    let dir = tempfile::tempdir().unwrap();
    for (round, kill) in ["ready", "prepared", "begun"].into_iter().enumerate() {
        let path = dir.path().join(format!("{round}.ramshot"));
        let mut handler = Handler::start(dir.path(), None);
        let mut vmm = vmm(&handler, 512 << 20, false);
        let mut answers = BufReader::new(vmm.stdout.take().unwrap());
        let mut say = vmm.stdin.take().unwrap();
        for (answer, line) in [
            ("ready", format!("prepare {}", path.display())),
            ("prepared", "begin".to_owned()),
            ("begun", String::new()),
        ] {
            let mut heard = String::new();
            answers.read_line(&mut heard).unwrap();
            assert_eq!(heard.trim(), answer);
            if answer == kill {
                break;
            }
            writeln!(say, "{line}").unwrap();
        }
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        handler.ends();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().contains("ramshot")), "killed at {kill}: {left:?}");
    }
}

#[test]
fn a_vmm_that_dies_in_a_restore_ends_the_handler() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    {
        let memory = ramshot::AnonymousRam::new(512 << 20).unwrap();
        memory.words().iter().step_by(512).for_each(|word| word.store(5, Ordering::Relaxed));
        let ram = Arc::new(GuestRam::from_anonymous(Arc::new(memory)).unwrap());
        let prepared = ramshot::prepare(&ram, &path, &Options::default()).unwrap();
        prepared.begin(Pending::All, vec![]).unwrap().finish().unwrap();
    }
    let mut handler = Handler::start(dir.path(), Some(&path));
    let mut vmm = vmm(&handler, 512 << 20, true);
    let mut heard = String::new();
    BufReader::new(vmm.stdout.take().unwrap()).read_line(&mut heard).unwrap();
    assert_eq!(heard.trim(), "ready");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    handler.ends();
}

fn vmm(handler: &Handler, len: u64, missing: bool) -> Child {
    let begun = Instant::now();
    while !handler.socket.exists() {
        assert!(begun.elapsed() < PATIENCE, "the handler does not listen");
        std::thread::sleep(Duration::from_millis(2));
    }
    Command::new(env!("CARGO_BIN_EXE_ramshot-handed"))
        .arg(&handler.socket)
        .arg(len.to_string())
        .args(missing.then_some("missing"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}
