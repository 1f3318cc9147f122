//! A tracker that cannot exist.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use ramshot_core::{Done, Event, HostRange, OsError, WriteTracker};

use crate::error::TrackError;
use crate::ram::GuestRam;
use crate::unsupported;

/// How a [`Tracker`] is opened and how patient it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrackerOptions {
    /// Of no effect here.
    pub user_mode_only: bool,
    /// Of no effect here.
    pub patience: Duration,
}

impl Default for TrackerOptions {
    fn default() -> Self {
        Self { user_mode_only: false, patience: Duration::from_secs(1) }
    }
}

/// Tracks writes to guest RAM: on this system no such value exists.
#[derive(Debug)]
pub struct Tracker {
    never: Infallible,
}

impl Tracker {
    /// Says why not.
    ///
    /// # Errors
    /// [`TrackError::Unavailable`], always.
    pub fn open(_ram: Arc<GuestRam>, _options: &TrackerOptions) -> Result<Self, TrackError> {
        Err(TrackError::Unavailable(unsupported("write tracking")))
    }

    /// The guest RAM it tracks.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        match self.never {}
    }
}

impl WriteTracker for Tracker {
    fn populated(&self, _within: HostRange, _each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        match self.never {}
    }

    fn protect(&self, _range: HostRange) -> Result<(), OsError> {
        match self.never {}
    }

    fn release(&self, _range: HostRange) -> Result<Done, OsError> {
        match self.never {}
    }

    fn next_events(&self, _events: &mut [Event], _timeout_ms: Option<u32>) -> Result<usize, OsError> {
        match self.never {}
    }

    fn interrupt(&self) {
        match self.never {}
    }

    fn disarm(&self) -> Result<(), OsError> {
        match self.never {}
    }
}
