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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_kvm_here() {
        assert_eq!(KvmDirtyLog::new((), Vec::new()).err().map(|error| error.kind()), Some(io::ErrorKind::Unsupported));
    }
}
