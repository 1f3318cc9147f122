//! KVM itself writes to guest RAM, at the entry of a vCPU: its clock (kvm-clock) and its steal time. It does so through the
//! VMM's mapping, so it waits as everybody: the page is captured first.
//!
//! A VM of a few bytes: one vCPU in real mode that writes to a port, over and over.

#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, mpsc};
use std::time::Duration;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use ramshot::core::{RamSource, WriteTracker};
use ramshot::file::{FileSink, FileSinkOptions};
use ramshot::{GuestRam, Options, Parts, Pending, SnapshotFile, Tracker, TrackerOptions, prepare_with};
use ramshot_tests::chaos::{BadSink, Injected, Tap, alone, say, skipped};
use ramshot_tests::{Backing, Memory, kvm_unavailable, verify};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the program lies.
const CODE: u64 = 0x1000;
/// `out 0x80, al` and back.
const PROGRAM: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
/// Where the clock goes, and how many bytes it has.
const CLOCK: (u64, usize) = (20 * MIB, 32);
/// Where the steal time goes.
const STEAL: (u64, usize) = (24 * MIB, 64);
const MSR_CLOCK: u32 = 0x4b56_4d01;
const MSR_STEAL: u32 = 0x4b56_4d03;
const ENABLED: u64 = 1;

struct TinyVm {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: Arc<Memory>,
}

impl TinyVm {
    fn new(memory: Arc<Memory>) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let region = &memory.regions()[0];
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: region.guest,
            memory_size: region.len,
            userspace_addr: region.host,
        };
        // SAFETY: mapped as long as `memory`, which is dropped after the VM.
        unsafe { vm.set_user_memory_region(region).unwrap() };
        let vcpu = vm.create_vcpu(0).unwrap();
        memory.write(CODE, &PROGRAM).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs).unwrap();
        Self { vcpu, _vm: vm, memory }
    }

    /// Tells KVM where to write; false if it does not want to.
    fn set(&self, msr: u32, address: u64) -> bool {
        let entry = kvm_msr_entry { index: msr, data: address | ENABLED, ..Default::default() };
        self.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).is_ok_and(|set| set == 1)
    }

    /// Enters the guest some times. KVM writes on the way.
    fn run(&mut self) {
        for _ in 0..3 {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(0x80, _) => {}
                other => panic!("KVM_RUN returned {other:?}"),
            }
        }
    }

    fn bytes(&self, (at, len): (u64, usize)) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn kvm_clock_and_steal_time() {
    let _alone = alone();
    if let Some(why) = kvm_unavailable() {
        return skipped("kvm_clock_and_steal_time", &why);
    }
    for backing in [Backing::Anon, Backing::Memfd] {
        let memory = Memory::new(SIZE, backing).unwrap();
        for at in (0..SIZE).step_by(1 << 20) {
            memory.write(at, &vec![0x5a; 1 << 20]).unwrap();
        }
        // Versions are even while nobody writes.
        memory.write(CLOCK.0, &[0; 32]).unwrap();
        memory.write(STEAL.0, &[0; 64]).unwrap();
        let mut vm = TinyVm::new(memory);
        let mut watched = Vec::new();
        for (what, msr, place) in [("kvm-clock", MSR_CLOCK, CLOCK), ("steal time", MSR_STEAL, STEAL)] {
            if vm.set(msr, place.0) {
                watched.push((what, place));
            } else {
                skipped(&format!("KVM's writes of {what}, {backing}"), "KVM refuses the MSR on this host");
            }
        }
        vm.run();
        watched.retain(|&(what, place)| {
            let written = vm.bytes(place).iter().any(|&byte| byte != 0);
            if !written {
                skipped(&format!("KVM's writes of {what}, {backing}"), "KVM takes the MSR and writes nothing");
            }
            written
        });
        one_snapshot(vm, backing, &watched);
    }
}

/// T0 is now: the vCPU is not in KVM_RUN. Then it runs, while all those pages are pending and the image is stuck.
fn one_snapshot(mut vm: TinyVm, backing: Backing, watched: &[(&str, (u64, usize))]) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("vm.ramshot");
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(vm.memory.guest())).unwrap());
    let table = Arc::clone(ram.table());
    let tap = Arc::new(Tap::closed());
    let sink = FileSink::create(&target, &table, &FileSinkOptions { sync: false, ..Default::default() }).unwrap();
    let parts = Parts {
        tracker: Arc::new(Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap())
            as Arc<dyn WriteTracker>,
        ram: Arc::clone(&ram) as Arc<dyn RamSource>,
        table,
        sink: Box::new(BadSink::new(Box::new(sink), &Injected::default()).behind(&tap)),
    };
    let options = Options { pool_bytes: 4 << 20, around_max: 64 << 10, ..Options::default() };
    let prepared = prepare_with(parts, &options).unwrap();
    let t0 = vm.memory.copy().unwrap();
    let before: Vec<_> = watched.iter().map(|&(_, place)| vm.bytes(place)).collect();
    let live = prepared.begin(Pending::All, Vec::new()).unwrap();
    assert!(tap.somebody_waits(PATIENCE));
    let mut captured = 0;
    while std::mem::replace(&mut captured, live.progress().pages_captured) != captured {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!live.progress().captured);

    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let vm = &mut vm;
        let runner = scope.spawn(move || {
            // Asks for a new clock at the next entry, which marks the guest as having been stopped.
            let clock = vm.vcpu.kvmclock_ctrl();
            vm.run();
            let _ = done.send(());
            clock
        });
        let in_time = is_done.recv_timeout(PATIENCE);
        tap.open();
        if let Err(error) = runner.join().expect("KVM_RUN failed") {
            say(&format!("KVM_KVMCLOCK_CTRL: {error}"));
        }
        in_time.expect("the vCPU waited for the image");
    });
    let report = live.finish().unwrap();
    for (&(what, place), before) in watched.iter().zip(before) {
        assert!(
            vm.bytes(place) != before,
            "{backing}: {what} was not written during the snapshot: this proved nothing"
        );
    }
    let verified = verify::against_file(&SnapshotFile::open(&target).unwrap(), &t0).unwrap();
    assert_eq!(verified.mismatched, 0, "{backing}: the image is not T0, first at {:?}", verified.first_mismatch);
    assert!(report.counts.by_fault > 0 || watched.is_empty());
    let names: Vec<_> = watched.iter().map(|(what, _)| *what).collect();
    say(&format!("KVM's own writes, {backing}: {names:?} captured first, {} write faults", report.counts.faults));
}
