//! A filler that cannot exist.

use std::convert::Infallible;
use std::sync::Arc;

use ramshot_core::{Event, Filled, HostAddr, HostRange, OsError, RamFiller};

use crate::error::TrackError;
use crate::ram::GuestRam;
use crate::tracker::{Tracker, TrackerOptions};
use crate::unsupported;

/// How a [`Filler`] is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FillerOptions {
    /// Of no effect here.
    pub user_mode_only: bool,
}

/// Puts pages into guest RAM that was registered as missing: on this system no such value exists.
#[derive(Debug)]
pub struct Filler {
    never: Infallible,
}

impl Filler {
    /// Says why not.
    ///
    /// # Errors
    /// [`TrackError::Unavailable`], always.
    pub fn open(_ram: Arc<GuestRam>, _options: &FillerOptions) -> Result<Self, TrackError> {
        Err(TrackError::Unavailable(unsupported("lazy restore")))
    }

    /// Never.
    ///
    /// # Errors
    /// None: there is no such value.
    pub fn track(&self, _options: &TrackerOptions) -> Result<Tracker, TrackError> {
        match self.never {}
    }

    /// Never.
    #[must_use]
    pub fn is_over(&self) -> bool {
        match self.never {}
    }

    /// The guest RAM it fills.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        match self.never {}
    }
}

impl RamFiller for Filler {
    fn fill(&self, _at: HostAddr, _bytes: &[u8]) -> Result<Filled, OsError> {
        match self.never {}
    }

    fn zero(&self, _range: HostRange) -> Result<Filled, OsError> {
        match self.never {}
    }

    fn poison(&self, _range: HostRange) -> Result<Filled, OsError> {
        match self.never {}
    }

    fn can_poison(&self) -> bool {
        match self.never {}
    }

    fn next_events(&self, _events: &mut [Event], _timeout_ms: Option<u32>) -> Result<usize, OsError> {
        match self.never {}
    }

    fn interrupt(&self) {
        match self.never {}
    }

    fn finish(&self) -> Result<(), OsError> {
        match self.never {}
    }
}
