//! KVM's dirty log, which only Linux has.

use std::io;

use ramshot_core::{DirtyLog, HostAddr, HostRange, OsError};

/// A memory slot of a KVM VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvmSlot {
    /// Number of the slot.
    pub slot: u32,
    /// Where it is mapped in this process.
    pub host: HostAddr,
    /// Its length in bytes.
    pub len: u64,
}

/// KVM's dirty log: there is none here, so there is no value of this type.
#[derive(Debug)]
pub enum KvmDirtyLog {}

impl KvmDirtyLog {
    /// Not here.
    ///
    /// # Errors
    /// [`Unsupported`](io::ErrorKind::Unsupported), always.
    pub fn new<V>(_vm: V, _slots: Vec<KvmSlot>) -> io::Result<Self> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "KVM's dirty log is not on this system: only Linux has KVM"))
    }
}

impl DirtyLog for KvmDirtyLog {
    fn take(&self, _each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        match *self {}
    }
}

/// KVM's dirty rings: there are none here, so there is no value of this type.
#[derive(Clone, Debug)]
pub enum KvmDirtyRing {}

impl KvmDirtyRing {
    /// Not here.
    ///
    /// # Errors
    /// [`Unsupported`](io::ErrorKind::Unsupported), always.
    pub fn new<V, C>(_vm: V, _vcpus: C, _bytes: usize, _slots: Vec<KvmSlot>) -> io::Result<Self> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "KVM's dirty rings are not on this system: only Linux has KVM"))
    }

    /// Never.
    ///
    /// # Errors
    /// None.
    pub fn harvest(&self) -> Result<(), OsError> {
        match *self {}
    }
}

impl DirtyLog for KvmDirtyRing {
    fn take(&self, _each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_kvm_here() {
        assert_eq!(KvmDirtyLog::new((), Vec::new()).err().map(|error| error.kind()), Some(io::ErrorKind::Unsupported));
        let ring = KvmDirtyRing::new((), (), 0, Vec::new());
        assert_eq!(ring.err().map(|error| error.kind()), Some(io::ErrorKind::Unsupported));
    }
}
