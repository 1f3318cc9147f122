//! Increments and pre-copy of a KVM guest whose writes are followed by dirty rings, which are full all the time.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ramshot::{Chain, DirtyTracking, GuestRam, Options, Pending};
use ramshot_tests::{Backing, Guest, GuestConfig, KvmGuest, Memory, Workload, snapshot_run, verify};

const MEM: u64 = 96 << 20;
/// 4096 entries: a quarter of the working set.
const RING: usize = 64 << 10;

fn config() -> GuestConfig {
    GuestConfig { vcpus: 2, workload: Workload::Random, working_set: 64 << 20, ..GuestConfig::default() }
}

fn unavailable() -> bool {
    let why = ramshot_tests::kvm_unavailable();
    why.iter().for_each(|why| println!("==== SKIPPED: dirty rings: {why}"));
    why.is_some()
}

#[test]
fn increments_by_dirty_rings_are_memory_at_t0() {
    if unavailable() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::new(MEM, Backing::Anon).unwrap();
    let guest = match KvmGuest::with_dirty_rings(memory, config(), RING) {
        Ok(guest) => guest,
        Err(error) => return println!("==== SKIPPED: dirty rings: {error}"),
    };
    guest.start().unwrap();
    let ram = snapshot_run::guest_ram(&guest).unwrap();
    let dirty = DirtyTracking::start(ram.table(), guest.dirty_logs().unwrap()).unwrap();
    let options = Options { dirty: Some(dirty), pool_bytes: 4 << 20, ..Options::default() };
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut faults = 0;
    // A full snapshot, increments, pre-copy (which is full again), and an increment on that.
    for (number, kind) in ["full", "increment", "increment", "precopy", "increment"].into_iter().enumerate() {
        let path = dir.path().join(format!("{number}"));
        let prepared = match kind {
            "increment" => ramshot::prepare_increment(&ram, &path, &options).unwrap(),
            "precopy" => ramshot::prepare(&ram, &path, &options).unwrap().precopy(2).unwrap(),
            _ => ramshot::prepare(&ram, &path, &options).unwrap(),
        };
        let pending = if kind == "full" { Pending::All } else { Pending::Dirty };
        let begun = snapshot_run::begin_with(&guest, prepared, pending).unwrap();
        let report = begun.live.unwrap().finish().unwrap();
        faults += report.counts.faults;
        if kind != "increment" {
            paths.clear();
        }
        paths.push(path.clone());
        let files: Vec<_> = paths.iter().map(|path| ramshot::SnapshotFile::open(path).unwrap()).collect();
        let verified = verify::against_chain(&files, &begun.t0).unwrap();
        assert_eq!((verified.mismatched, verified.pages), (0, MEM / 4096), "{number}, {kind}: {verified:?}");
        assert!(kind != "increment" || report.counts.total < MEM / 4096, "{number}: an increment of everything");
        assert_eq!(guest.failure(), None);
        std::thread::sleep(Duration::from_millis(30));
    }
    assert!(faults > 0, "this proved nothing");

    // The last of them is a VM.
    let fresh = Memory::new(MEM, Backing::Anon).unwrap();
    let chain = Chain::open(paths.last().unwrap()).unwrap();
    let ram = GuestRam::from_guest_memory(Arc::clone(fresh.guest())).unwrap();
    chain.restore_into(ram.table(), &ram, 2).unwrap();
}

#[test]
fn rings_of_another_size_or_none_are_refused() {
    if unavailable() {
        return;
    }
    let make = |enabled: Option<usize>| {
        let memory = Memory::new(MEM, Backing::Anon).unwrap();
        match enabled {
            Some(bytes) => KvmGuest::with_dirty_rings(memory, config(), bytes),
            None => KvmGuest::new(memory, config()),
        }
    };
    let Ok(guest) = make(Some(RING)) else { return println!("==== SKIPPED: dirty rings: this KVM has none") };
    for bytes in [RING / 2, RING * 2, 0, 100, usize::MAX] {
        let error = guest.rings_of(bytes).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{bytes}: {error}");
    }
    guest.rings_of(RING).unwrap();
    assert!(make(None).unwrap().rings_of(RING).unwrap_err().to_string().contains("no dirty ring of 65536 bytes"));
}
