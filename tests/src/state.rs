//! The state of a vCPU outside RAM, as bytes: sections of tag (u32), length (u32), and a KVM structure as it is.
//!
//! For the same build on the same kind of host; a VMM that migrates between hosts has to do better.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::guest::GuestError;

const MP_STATE: u32 = 1;
const REGS: u32 = 2;
const SREGS: u32 = 3;
const XSAVE: u32 = 4;
const XCRS: u32 = 5;
const DEBUG_REGS: u32 = 6;
const LAPIC: u32 = 7;
const MSRS: u32 = 8;
const EVENTS: u32 = 9;

/// Turns the answer of a KVM call that failed into ours.
pub(crate) fn kvm_error(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> GuestError {
    move |error| GuestError::Kvm { what, source: std::io::Error::from_raw_os_error(error.errno()) }
}

fn put(into: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    into.extend_from_slice(&tag.to_le_bytes());
    into.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
    into.extend_from_slice(bytes);
}

/// Reads the state of a vCPU that does not run. `msrs`: which of them the kernel can save.
pub(crate) fn save(vcpu: &VcpuFd, msrs: &[u32], lapic: bool) -> Result<Vec<u8>, GuestError> {
    let mut state = Vec::with_capacity(16 << 10);
    if lapic {
        // First: asking for it makes KVM take in an INIT or SIPI that is under way.
        put(&mut state, MP_STATE, vcpu.get_mp_state().map_err(kvm_error("KVM_GET_MP_STATE"))?.as_bytes());
    }
    put(&mut state, REGS, vcpu.get_regs().map_err(kvm_error("KVM_GET_REGS"))?.as_bytes());
    put(&mut state, SREGS, vcpu.get_sregs().map_err(kvm_error("KVM_GET_SREGS"))?.as_bytes());
    put(&mut state, XSAVE, vcpu.get_xsave().map_err(kvm_error("KVM_GET_XSAVE"))?.as_bytes());
    put(&mut state, XCRS, vcpu.get_xcrs().map_err(kvm_error("KVM_GET_XCRS"))?.as_bytes());
    put(&mut state, DEBUG_REGS, vcpu.get_debug_regs().map_err(kvm_error("KVM_GET_DEBUGREGS"))?.as_bytes());
    if lapic {
        put(&mut state, LAPIC, vcpu.get_lapic().map_err(kvm_error("KVM_GET_LAPIC"))?.as_bytes());
    }
    put(&mut state, MSRS, get_msrs(vcpu, msrs)?.as_bytes());
    put(&mut state, EVENTS, vcpu.get_vcpu_events().map_err(kvm_error("KVM_GET_VCPU_EVENTS"))?.as_bytes());
    Ok(state)
}

/// Those of the MSRs that can be read. KVM stops at the first that cannot: leave that out and go on.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, GuestError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| GuestError::SavedState("too many MSRs".to_owned()))?;
        let got = vcpu.get_msrs(&mut msrs).map_err(kvm_error("KVM_GET_MSRS"))?;
        read.extend_from_slice(msrs.as_slice().get(..got).unwrap_or_default());
        rest = rest.get(got + 1..).unwrap_or_default();
    }
    Ok(read)
}

/// Writes the MSRs. One that cannot be written is all right if it has that value anyway.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), GuestError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| GuestError::SavedState("too many MSRs".to_owned()))?;
        let done = vcpu.set_msrs(&msrs).map_err(kvm_error("KVM_SET_MSRS"))?;
        if let Some(refused) = rest.get(done) {
            let has = get_msrs(vcpu, &[refused.index])?.first().map(|msr| msr.data);
            if has != Some(refused.data) {
                return Err(GuestError::SavedState(format!(
                    "KVM refuses {:#x} for MSR {:#x}, which is {has:x?} here",
                    refused.data, refused.index
                )));
            }
        }
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}

fn value<T: FromBytes>(tag: u32, bytes: &[u8]) -> Result<T, GuestError> {
    T::read_from_bytes(bytes)
        .map_err(|_| GuestError::SavedState(format!("section {tag} has {} bytes, not {}", bytes.len(), size_of::<T>())))
}

fn list<T: FromBytes + Immutable + Clone>(tag: u32, bytes: &[u8]) -> Result<Vec<T>, GuestError> {
    bytes.chunks(size_of::<T>()).map(|chunk| value(tag, chunk)).collect()
}

/// Writes what [`save`] read into a vCPU that has not run yet. The order of the sections is the order in which KVM wants
/// them.
pub(crate) fn restore(vcpu: &VcpuFd, state: &[u8]) -> Result<(), GuestError> {
    for section in sections(state) {
        let (tag, bytes) = section?;
        match tag {
            MP_STATE => {
                vcpu.set_mp_state(value::<kvm_mp_state>(tag, bytes)?).map_err(kvm_error("KVM_SET_MP_STATE"))?;
            }
            REGS => vcpu.set_regs(&value::<kvm_regs>(tag, bytes)?).map_err(kvm_error("KVM_SET_REGS"))?,
            SREGS => vcpu.set_sregs(&value::<kvm_sregs>(tag, bytes)?).map_err(kvm_error("KVM_SET_SREGS"))?,
            XSAVE => {
                let xsave = value::<kvm_xsave>(tag, bytes)?;
                // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only after the process asked for dynamic
                // features by arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this one does not.
                unsafe { vcpu.set_xsave(&xsave) }.map_err(kvm_error("KVM_SET_XSAVE"))?;
            }
            XCRS => vcpu.set_xcrs(&value::<kvm_xcrs>(tag, bytes)?).map_err(kvm_error("KVM_SET_XCRS"))?,
            DEBUG_REGS => {
                vcpu.set_debug_regs(&value::<kvm_debugregs>(tag, bytes)?).map_err(kvm_error("KVM_SET_DEBUGREGS"))?;
            }
            LAPIC => vcpu.set_lapic(&value::<kvm_lapic_state>(tag, bytes)?).map_err(kvm_error("KVM_SET_LAPIC"))?,
            MSRS => set_msrs(vcpu, &list::<kvm_msr_entry>(tag, bytes)?)?,
            EVENTS => {
                let events = value::<kvm_vcpu_events>(tag, bytes)?;
                vcpu.set_vcpu_events(&events).map_err(kvm_error("KVM_SET_VCPU_EVENTS"))?;
            }
            _ => return Err(GuestError::SavedState(format!("unknown section {tag}"))),
        }
    }
    Ok(())
}

fn sections(mut state: &[u8]) -> impl Iterator<Item = Result<(u32, &[u8]), GuestError>> {
    std::iter::from_fn(move || {
        if state.is_empty() {
            return None;
        }
        let split = || {
            let ([tag, len], rest) = <[u32; 2]>::read_from_prefix(state).ok()?;
            let (bytes, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
            Some(((u32::from_le(tag), bytes), rest))
        };
        if let Some((section, rest)) = split() {
            state = rest;
            return Some(Ok(section));
        }
        state = &[];
        Some(Err(GuestError::SavedState("it is truncated".to_owned())))
    })
}
