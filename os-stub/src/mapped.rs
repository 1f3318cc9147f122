//! Mapping that cannot be done.

use std::fs::File;
use std::sync::Arc;

use ramshot_core::{BlockIndex, OsError};

use crate::error::Missing;
use crate::ram::GuestRam;
use crate::unsupported;

/// Guest RAM whose mappings may be replaced: nothing is mapped on this system.
#[derive(Debug)]
pub struct MapTarget {
    ram: Arc<GuestRam>,
}

impl MapTarget {
    /// Takes `ram` for a target. On Linux a caller promises here that it may be replaced; here nothing is, so this is a
    /// plain function, and code that is written for Linux compiles with it.
    #[must_use]
    pub const fn new(ram: Arc<GuestRam>) -> Self {
        Self { ram }
    }

    /// The guest RAM.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Says why not.
    ///
    /// # Errors
    /// Always.
    pub fn check(&self, _index: BlockIndex, _offset: u64) -> Result<(), Missing> {
        Err(unsupported("mapped restore"))
    }

    /// Never.
    ///
    /// # Errors
    /// Always.
    pub fn map(&self, _index: BlockIndex, _part: (u64, u64), _file: &File, _offset: u64) -> Result<(), OsError> {
        Err(OsError::new("mapping guest RAM (unsupported on this system)", 0))
    }

    /// Of what parts would be multiples.
    #[must_use]
    pub const fn page_size() -> u64 {
        4096
    }
}
