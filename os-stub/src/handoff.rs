//! Guest RAM of another process, which only Linux can look into.

use ramshot_core::OsError;

use crate::error::TrackError;
use crate::ram::Region;
use crate::unsupported;

/// A VM's memory handed over by the process that runs it: there is no value of this type here.
#[derive(Debug)]
pub enum Handoff {}

impl Handoff {
    /// Not here.
    ///
    /// # Errors
    /// [`TrackError::Unavailable`], always.
    pub fn of_this_process(_regions: Vec<Region>, _missing: bool) -> Result<Self, TrackError> {
        Err(TrackError::Unavailable(unsupported("handing guest RAM over")))
    }

    /// Never.
    ///
    /// # Errors
    /// None.
    pub fn lift_protection(&self) -> Result<(), OsError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_handed_over_here() {
        assert!(
            Handoff::of_this_process(Vec::new(), true)
                .is_err_and(|error| error.to_string().contains("handing guest RAM over"))
        );
    }
}
