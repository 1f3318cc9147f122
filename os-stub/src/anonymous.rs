//! Memory that cannot be had here.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::RamError;
use crate::ram::GuestRam;
use crate::unsupported;

/// Anonymous memory in the part of guest RAM: on this system no such value exists.
#[derive(Debug)]
pub struct AnonymousRam {
    never: Infallible,
}

impl AnonymousRam {
    /// Says why not.
    ///
    /// # Errors
    /// [`RamError::Unsupported`], always.
    pub fn new(_len: u64) -> Result<Self, RamError> {
        Err(RamError::Unsupported(unsupported("guest RAM to try a live snapshot on")))
    }

    /// The memory.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        match self.never {}
    }
}

impl GuestRam {
    /// Guest RAM that is all of `memory`.
    ///
    /// # Errors
    /// None: there is no such memory.
    pub fn from_anonymous(memory: Arc<AnonymousRam>) -> Result<Self, RamError> {
        match memory.never {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_missing() {
        let error = AnonymousRam::new(4096).expect_err("there is none");
        assert!(error.to_string().contains("not on this system"), "{error}");
    }
}
