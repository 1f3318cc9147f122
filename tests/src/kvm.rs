//! A KVM virtual machine that runs the guest image: RAM, vCPUs with local APICs, a serial port to write to. No other device.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use ramshot::{DirtyLog, HostAddr, KvmDirtyLog, KvmDirtyRing, KvmSlot};
use ramshot_images::{EXCEPTION_LINE, IMAGE};

use crate::gate::Gate;
use crate::guest::{Guest, GuestConfig, GuestError, Talk};
use crate::loader::{self, Entry};
use crate::memory::Memory;
use crate::state::{self, kvm_error};
use crate::vcpu::{Console, Rings, VcpuThread};

const STATE_MAGIC: &[u8; 8] = b"rskvm\0\0\x01";
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
const PAUSE_PATIENCE: Duration = Duration::from_secs(30);
/// Interrupt lines of the I/O APIC that we say we emulate. Nobody uses it.
const IOAPIC_PINS: u64 = 24;
/// Three pages KVM wants on Intel hosts, outside RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Why a KVM guest cannot run here, or `None` if it can.
#[must_use]
pub fn kvm_unavailable() -> Option<String> {
    if IMAGE.is_none() {
        return Some(GuestError::NoImage.to_string());
    }
    let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
    vm.err().map(|error| format!("/dev/kvm: {}", std::io::Error::from_raw_os_error(error.errno())))
}

/// See the module.
#[derive(Debug)]
pub struct KvmGuest {
    // Fields go in this order: threads end in `drop`, then vCPUs, VM, RAM.
    threads: Mutex<Vec<VcpuThread>>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    vm: VmFd,
    msrs: Vec<u32>,
    lapic: bool,
    tsc_khz: u32,
    gate: Arc<Gate>,
    console: Console,
    rings: Rings,
    /// Bytes of each ring, if the VM has rings.
    ring_bytes: Option<usize>,
    /// A vCPU that runs is locked.
    vcpu_fds: Vec<RawFd>,
    talk: Talk,
    config: GuestConfig,
}

impl KvmGuest {
    /// A guest in `memory`, not started.
    ///
    /// # Errors
    /// The configuration makes no sense, or a KVM call failed.
    pub fn new(memory: Arc<Memory>, config: GuestConfig) -> Result<Self, GuestError> {
        let split = Kvm::new().map_err(kvm_error("opening /dev/kvm"))?.check_extension(Cap::SplitIrqchip);
        Self::with_lapic(memory, config, split)
    }

    /// The same, with local APICs in the kernel or none at all. With them the guest starts its other vCPUs itself, by
    /// INIT and SIPI; without, they all start at the entry.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_lapic(memory: Arc<Memory>, config: GuestConfig, lapic: bool) -> Result<Self, GuestError> {
        Self::with(memory, config, lapic, None)
    }

    /// The same with dirty rings of so many bytes instead of the dirty log, and local APICs in the kernel.
    ///
    /// # Errors
    /// As [`new`](Self::new); KVM has no rings of that size.
    pub fn with_dirty_rings(memory: Arc<Memory>, config: GuestConfig, bytes: usize) -> Result<Self, GuestError> {
        Self::with(memory, config, true, Some(bytes))
    }

    fn with(
        memory: Arc<Memory>,
        config: GuestConfig,
        lapic: bool,
        ring_bytes: Option<usize>,
    ) -> Result<Self, GuestError> {
        config.check()?;
        let kvm = Kvm::new().map_err(kvm_error("opening /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(kvm_error("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm_error("KVM_SET_TSS_ADDR"))?;
        set_slots(&vm, &memory, 0)?;
        if lapic {
            let split =
                kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [IOAPIC_PINS, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&split).map_err(kvm_error("KVM_CAP_SPLIT_IRQCHIP"))?;
        }
        if let Some(bytes) = ring_bytes {
            let cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
            let ring = kvm_enable_cap { cap, args: [bytes as u64, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&ring).map_err(kvm_error("KVM_CAP_DIRTY_LOG_RING_ACQ_REL"))?;
        }
        let vcpus = (0..config.vcpus).map(|index| create_vcpu(&kvm, &vm, index)).collect::<Result<Vec<_>, _>>()?;
        let vcpu_fds = vcpus.iter().map(AsRawFd::as_raw_fd).collect();
        let msrs = kvm.get_msr_index_list().map_err(kvm_error("KVM_GET_MSR_INDEX_LIST"))?;
        let tsc_khz = vcpus.first().map_or(Ok(0), VcpuFd::get_tsc_khz).map_err(kvm_error("KVM_GET_TSC_KHZ"))?;
        Ok(Self {
            threads: Mutex::default(),
            vcpus: vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect(),
            vm,
            msrs: msrs.as_slice().to_vec(),
            lapic,
            tsc_khz,
            gate: Arc::new(Gate::new(config.vcpus)),
            console: Console::default(),
            rings: Rings::default(),
            ring_bytes,
            vcpu_fds,
            talk: Talk::new(memory),
            config,
        })
    }

    fn slots(&self) -> Vec<KvmSlot> {
        let slots = (0..).zip(self.talk.memory().regions());
        slots.map(|(slot, region)| KvmSlot { slot, host: HostAddr(region.host), len: region.len }).collect()
    }

    /// Its dirty rings, taken to have so many bytes.
    ///
    /// # Errors
    /// ramshot's.
    pub fn rings_of(&self, bytes: usize) -> std::io::Result<KvmDirtyRing> {
        // SAFETY: descriptors of the VM and its vCPUs, open as long as those are.
        let fd = |raw| unsafe { BorrowedFd::borrow_raw(raw) };
        let vcpus = self.vcpu_fds.iter().map(|&vcpu| fd(vcpu));
        KvmDirtyRing::new(fd(self.vm.as_raw_fd()), vcpus, bytes, self.slots())
    }

    fn command_line(&self) -> String {
        let config = &self.config;
        let or = |value: Option<u64>, otherwise: &str| value.map_or(otherwise.to_owned(), |v| v.to_string());
        format!(
            "workload={} ws={} rate={} vcpus={} fill={} late={} seed={} tsc_khz={} ap={}",
            config.workload,
            config.working_set,
            or(config.rate, "max"),
            config.vcpus,
            or(config.fill, "all"),
            config.late,
            config.seed,
            self.tsc_khz,
            if self.lapic { "sipi" } else { "vmm" },
        )
    }

    /// Starts the threads; they wait at the gate.
    fn spawn(&self) -> Result<(), GuestError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let (vcpu, gate, console) = (Arc::clone(vcpu), Arc::clone(&self.gate), Arc::clone(&self.console));
            threads.push(VcpuThread::spawn(index, vcpu, gate, console, Arc::clone(&self.rings))?);
        }
        Ok(())
    }

    fn fresh(&self) -> Result<(), GuestError> {
        if self.threads.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return Ok(());
        }
        Err(GuestError::State { what: "start or restore:", needs: "a guest that runs already cannot" })
    }

    fn kick(&self) {
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            thread.kick();
        }
    }

    fn healthy(&self) -> Result<(), GuestError> {
        self.failure().map_or(Ok(()), |why| Err(GuestError::Failed(why)))
    }

    fn for_each_vcpu<T>(
        &self,
        each: impl FnMut(&Arc<Mutex<VcpuFd>>) -> Result<T, GuestError>,
    ) -> Result<Vec<T>, GuestError> {
        self.vcpus.iter().map(each).collect()
    }
}

fn create_vcpu(kvm: &Kvm, vm: &VmFd, index: u32) -> Result<VcpuFd, GuestError> {
    let vcpu = vm.create_vcpu(u64::from(index)).map_err(kvm_error("KVM_CREATE_VCPU"))?;
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm_error("KVM_GET_SUPPORTED_CPUID"))?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // The APIC id.
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | index << 24,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(kvm_error("KVM_SET_CPUID2"))?;
    Ok(vcpu)
}

/// The state that the PVH boot protocol promises: 32-bit protected mode, flat segments, no paging.
fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), GuestError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?;
    let segment = |selector, kind| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let (code, data) = (segment(0x8, 0xb), segment(0x10, 0x3));
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, db: 0, g: 0, ..segment(0x18, 0xb) };
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(kvm_error("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(kvm_error("KVM_GET_REGS"))?;
    regs.rip = entry.rip;
    regs.rbx = entry.start_info;
    regs.rflags = 2;
    vcpu.set_regs(&regs).map_err(kvm_error("KVM_SET_REGS"))
}

/// Registers guest RAM with KVM, once more if it is.
fn set_slots(vm: &VmFd, memory: &Memory, flags: u32) -> Result<(), GuestError> {
    for (slot, region) in (0..).zip(memory.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.guest,
            memory_size: region.len,
            userspace_addr: region.host,
        };
        // SAFETY: the regions do not overlap, and stay mapped longer than the VM lives: it is let go first.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm_error("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

impl Guest for KvmGuest {
    fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, GuestError> {
        // Before the first page is logged, or a full ring could not be emptied.
        let rings = self.ring_bytes.map(|bytes| self.rings_of(bytes)).transpose();
        let rings = rings.map_err(|source| GuestError::Kvm { what: "the dirty rings", source })?;
        set_slots(&self.vm, self.talk.memory(), KVM_MEM_LOG_DIRTY_PAGES)?;
        if let Some(rings) = rings {
            let rings = self.rings.get_or_init(|| rings).clone();
            return Ok(vec![Box::new(rings), Box::new(self.talk.written_by_us()?)]);
        }
        // SAFETY: the descriptor is open as long as the VM is.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        let log = KvmDirtyLog::new(vm, self.slots());
        let log = log.map_err(|source| GuestError::Kvm { what: "the VM's descriptor", source })?;
        Ok(vec![Box::new(log), Box::new(self.talk.written_by_us()?)])
    }

    fn start(&self) -> Result<(), GuestError> {
        self.fresh()?;
        let entry = loader::load(self.talk.memory(), IMAGE.ok_or(GuestError::NoImage)?, &self.command_line())?;
        // With local APICs the others wait for their SIPI.
        let at_entry = if self.lapic { 1 } else { self.vcpus.len() };
        for vcpu in self.vcpus.iter().take(at_entry) {
            set_entry(&vcpu.lock().unwrap_or_else(PoisonError::into_inner), entry)?;
        }
        self.spawn()?;
        self.gate.open();
        let start = Instant::now();
        while !self.talk.is_ready()? {
            self.healthy()?;
            if start.elapsed() > BOOT_PATIENCE {
                let state = format!("its console says {:?}", self.console());
                return Err(GuestError::Timeout { what: "booting the guest", after: BOOT_PATIENCE, state });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        if !self.gate.close(PAUSE_PATIENCE, &|| self.kick()) {
            let state = "a vCPU does not leave KVM_RUN (blocked on a page of guest RAM?)".to_owned();
            return Err(GuestError::Timeout { what: "pausing the guest", after: PAUSE_PATIENCE, state });
        }
        self.healthy()
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.gate.open();
        self.healthy()
    }

    fn save_state(&self) -> Result<Vec<u8>, GuestError> {
        if !self.gate.all_parked() {
            return Err(GuestError::State { what: "save_state:", needs: "the guest has to be paused first" });
        }
        let states = self.for_each_vcpu(|vcpu| {
            state::save(&vcpu.lock().unwrap_or_else(PoisonError::into_inner), &self.msrs, self.lapic)
        })?;
        let mut all = STATE_MAGIC.to_vec();
        all.extend_from_slice(&self.config.vcpus.to_le_bytes());
        all.extend_from_slice(&u32::from(self.lapic).to_le_bytes());
        for state in states {
            all.extend_from_slice(&(state.len() as u64).to_le_bytes());
            all.extend_from_slice(&state);
        }
        Ok(all)
    }

    fn restore(&self, state: &[u8]) -> Result<(), GuestError> {
        self.fresh()?;
        let bad = |why: &str| GuestError::SavedState(why.to_owned());
        let rest = state.strip_prefix(STATE_MAGIC).ok_or_else(|| bad("it is not of a KVM guest of this version"))?;
        let (vcpus, rest) = number(rest).ok_or_else(|| bad("it is truncated"))?;
        let (lapic, mut rest) = number(rest).ok_or_else(|| bad("it is truncated"))?;
        if vcpus != self.config.vcpus || lapic != u32::from(self.lapic) {
            return Err(GuestError::SavedState(format!(
                "it is of {vcpus} vCPUs, local APICs {lapic}; this VM has {} and {}",
                self.config.vcpus,
                u32::from(self.lapic)
            )));
        }
        for vcpu in &self.vcpus {
            let split = || {
                let (len, rest) = rest.split_first_chunk::<8>()?;
                rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)
            };
            let (bytes, others) = split().ok_or_else(|| bad("it is truncated"))?;
            state::restore(&vcpu.lock().unwrap_or_else(PoisonError::into_inner), bytes)?;
            rest = others;
        }
        self.talk.adopt()?;
        self.spawn()?;
        self.pause()
    }

    fn failure(&self) -> Option<String> {
        self.gate.failure().or_else(|| {
            // With a local APIC in the kernel, HLT does not come back to us: what the guest said last does.
            let console = self.console();
            console.lines().find(|line| line.starts_with(EXCEPTION_LINE)).map(str::to_owned)
        })
    }

    fn console(&self) -> String {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&console).into_owned()
    }

    fn talk(&self) -> &Talk {
        &self.talk
    }
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    bytes.split_first_chunk::<4>().map(|(number, rest)| (u32::from_le_bytes(*number), rest))
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.gate.stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            while !thread.is_finished() {
                thread.kick();
                std::thread::sleep(Duration::from_micros(200));
            }
            thread.join();
        }
    }
}
