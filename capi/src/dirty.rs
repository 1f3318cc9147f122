//! Which pages were written since the last snapshot, told by a C program or by KVM.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use ramshot::core::{HostRange, OsError};
use ramshot::{DirtyLog, DirtyTracking, HostAddr, KvmDirtyLog, KvmSlot as Slot};

use crate::error::{Error, guard};
use crate::file::File;
use crate::pass::{self, Out, Plain};
use crate::ram::{Ram, duplicate};

/// Reports that `len` bytes of this process's memory from `host` on were written. `context` is what the log was called with.
/// Memory that is no guest RAM is passed over.
pub type DirtyReport = unsafe extern "C" fn(context: *mut c_void, host: *mut c_void, len: u64);

/// Reports, by calling `report` with `context`, every range that was written since the last call, and starts afresh. What is
/// written while it runs is reported now or by the next call. More may be reported than was written, less never.
/// Returns 0, or a negative errno; what was not reported then must be by a later call.
///
/// Called from whatever thread calls ramshot, inside ramshot_dirty_new, ramshot_dirty_written, ramshot_arm_ahead,
/// ramshot_precopy and ramshot_begin (that is: inside the pause), never from two threads at a time. It must not call
/// ramshot, longjmp or throw.
pub type DirtyTake =
    Option<unsafe extern "C" fn(opaque: *mut c_void, report: DirtyReport, context: *mut c_void) -> c_int>;

/// A dirty log of the caller's own.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Log {
    /// Reports what was written. Not NULL.
    pub take: DirtyTake,
    /// Passed to `take` as it is. Must stay valid until the tracking, and every snapshot prepared with it, has been freed.
    pub opaque: *mut c_void,
}

// SAFETY: an optional function pointer and a pointer, which are NULL if zero.
unsafe impl Plain for Log {}

/// A memory slot of a KVM VM, registered with KVM_MEM_LOG_DIRTY_PAGES.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct KvmSlot {
    /// Where it is mapped in this process.
    pub host: *mut c_void,
    /// Its length in bytes, exactly as it was registered: the kernel writes one bit a page of it.
    pub len: u64,
    /// Number of the slot, address space in the upper 16 bits.
    pub slot: u32,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: integers and a pointer.
unsafe impl Plain for KvmSlot {}

/// Where a dirty tracking learns what is written. Together the logs must see every writer of guest RAM. Fields that are 0
/// have their default.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DirtyLogs {
    /// Logs of the caller's own.
    pub logs: *const Log,
    /// How many.
    pub logs_count: usize,
    /// Slots of a KVM VM, whose log ramshot reads itself (KVM_GET_DIRTY_LOG): nobody else may.
    pub kvm_slots: *const KvmSlot,
    /// How many. 0: no KVM.
    pub kvm_slots_count: usize,
    /// If there are slots: the VM's descriptor; duplicated.
    pub kvm_vm_fd: c_int,
    /// Must be 0.
    pub reserved: u32,
    /// The snapshot that the VM was just restored from, before its first vCPU runs: the next snapshot can be an increment
    /// on it. NULL: the first snapshot taken with this tracking is a full one. Not kept.
    pub restored_from: *const File,
}

// SAFETY: integers and pointers.
unsafe impl Plain for DirtyLogs {}

/// Follows the writes to one VM's RAM from snapshot to snapshot.
#[derive(Debug)]
pub struct Dirty(pub(crate) Arc<DirtyTracking>);

/// Follows the writes to `ram` from now on. Every log is read once, which shows that it is on. `size` is sizeof *logs.
///
/// The first snapshot prepared with it (ramshot_options.dirty) is a full one and becomes its base; an increment holds what
/// changed since the base, and becomes the base when it is committed. A snapshot that fails changes nothing.
///
/// Returns 0 and a handle in *dirty, to be freed with ramshot_dirty_free; or -EINVAL, or what a log answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_dirty_new(
    ram: *const Ram,
    logs: *const DirtyLogs,
    size: usize,
    dirty: *mut *mut Dirty,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(dirty, "dirty") }?;
        // SAFETY: the caller's promise.
        let table = unsafe { pass::get(ram, "ram") }?.0.table();
        // SAFETY: the caller's promise.
        let given = unsafe { pass::read(logs, size, "logs") }?;
        // SAFETY: the caller's promise.
        let own = unsafe { pass::read_all(given.logs, given.logs_count, size_of::<Log>(), "logs->logs") }?;
        let mut logs: Vec<Box<dyn DirtyLog>> = Vec::new();
        for log in own {
            let take = log.take.ok_or_else(|| Error::invalid("the take function of a dirty log is NULL"))?;
            logs.push(Box::new(Callback { take, opaque: log.opaque }));
        }
        if given.kvm_slots_count > 0 {
            let (first, count) = (given.kvm_slots, given.kvm_slots_count);
            // SAFETY: the caller's promise.
            let slots = unsafe { pass::read_all(first, count, size_of::<KvmSlot>(), "logs->kvm_slots") }?;
            let slot = |slot: KvmSlot| Slot { slot: slot.slot, host: HostAddr(slot.host.addr() as u64), len: slot.len };
            let vm = duplicate(given.kvm_vm_fd, "logs->kvm_vm_fd")?;
            let log = KvmDirtyLog::new(vm, slots.into_iter().map(slot).collect());
            logs.push(Box::new(log.map_err(|error| Error::new(libc::EMFILE, error.to_string()))?));
        }
        // SAFETY: the caller's promise.
        let tracking = match unsafe { given.restored_from.as_ref() } {
            None => DirtyTracking::start(table, logs),
            Some(file) => DirtyTracking::resume(table, logs, &file.0),
        };
        out.give(Dirty(tracking?));
        Ok(())
    })
}

/// Reports a change that no log sees (a DMA or a discard by the VMM): `len` bytes from `host` on. Before or after it
/// happens, but before the VM is paused for the next snapshot. From any thread.
///
/// Returns 0, or -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_dirty_mark(dirty: *const Dirty, host: *mut c_void, len: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let dirty = unsafe { pass::get(dirty, "dirty") }?;
        dirty.0.mark(HostRange::new(HostAddr(host.addr() as u64), len));
        Ok(())
    })
}

/// Reads the logs: *bytes is what was written since the last snapshot began, in whole pages. From any thread.
///
/// Returns 0, -EINVAL, or what a log answered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_dirty_written(dirty: *const Dirty, bytes: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let dirty = unsafe { pass::get(dirty, "dirty") }?;
        let written = dirty.0.written_bytes()?;
        // SAFETY: the caller's promise.
        unsafe { pass::write(bytes, size_of::<u64>(), written) };
        Ok(())
    })
}

/// Frees the handle; NULL is allowed. Snapshots prepared with it may still be there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ramshot_dirty_free(dirty: *mut Dirty) {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { pass::free(dirty) };
        Ok(())
    });
}

/// A log that is a C function.
struct Callback {
    take: unsafe extern "C" fn(*mut c_void, DirtyReport, *mut c_void) -> c_int,
    opaque: *mut c_void,
}

// SAFETY: the caller of `ramshot_dirty_new` was told that the function is called from any thread, and the pointer is passed
// on to it only.
unsafe impl Send for Callback {}
// SAFETY: as above; calls come one at a time, because the tracking holds a lock from asking to noting.
unsafe impl Sync for Callback {}

impl DirtyLog for Callback {
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        let mut each: &mut dyn FnMut(HostRange) = each;
        // SAFETY: the function and its argument are the caller's; the context is valid for this call, in which alone it is
        // used (the promise of the caller).
        let outcome = unsafe { (self.take)(self.opaque, report, (&raw mut each).cast()) };
        if outcome == 0 {
            return Ok(());
        }
        // A positive answer is no success either.
        Err(OsError::new("the take function of a dirty log", outcome.checked_abs().unwrap_or(libc::EIO)))
    }
}

/// What a log calls for every range. Does not panic: it adds to a list.
unsafe extern "C" fn report(context: *mut c_void, host: *mut c_void, len: u64) {
    // SAFETY: `context` is what `Callback::take` passed, during that call.
    let each = unsafe { &mut *context.cast::<&mut dyn FnMut(HostRange)>() };
    each(HostRange::new(HostAddr(host.addr() as u64), len));
}
