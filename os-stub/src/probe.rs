//! What this system offers: nothing, with the reason.

use std::fmt;

use ramshot_core::{Backing, BlockIndex, Treatment};

use crate::error::Missing;
use crate::ram::GuestRam;
use crate::unsupported;

/// What write tracking this system has. [`Display`](fmt::Display) prints it as a list for a person.
#[derive(Clone, Debug)]
pub struct Probe {
    missing: [Missing; 1],
}

/// Asks the system what it offers. Never fails: what is not there is in [`Probe::missing`].
#[must_use]
pub fn probe() -> Probe {
    Probe { missing: [unsupported("write tracking")] }
}

impl Probe {
    /// Whether writes to some kind of guest RAM can be tracked: no.
    #[must_use]
    pub fn is_available(&self) -> bool {
        false
    }

    /// Whether writes to this kind of memory can be tracked.
    ///
    /// # Errors
    /// What is missing, always.
    pub fn can_track(&self, backing: Backing) -> Result<(), Missing> {
        Err(unsupported(&format!("write tracking of {backing:?} memory")))
    }

    /// Everything that is not there, with the reason and the way out.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.missing.iter().try_for_each(|missing| writeln!(f, "missing: {missing}"))
    }
}

/// Whether each block could be tracked now: none, and those that a snapshot does not track are fine as they are.
#[must_use]
pub fn compatible(ram: &GuestRam) -> Vec<(BlockIndex, Result<(), Missing>)> {
    let table = ram.table();
    let verdicts = table.iter().map(|(index, block)| match block.treatment {
        Treatment::Tracked => (index, Err(unsupported(&format!("write tracking of RAM block {:?}", block.name)))),
        _ => (index, Ok(())),
    });
    verdicts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_available_and_it_says_why() {
        let probe = probe();
        assert!(!probe.is_available());
        assert_eq!(probe.missing().len(), 1);
        assert!(probe.can_track(Backing::Anonymous).is_err_and(|m| m.what.contains("Anonymous")));
        assert!(probe.to_string().contains("not on this system"), "{probe}");
        assert!(probe.to_string().contains("Linux 5.7"), "{probe}");
    }
}
