//! Who runs first when cores are scarce: not decided here.

/// Does nothing.
pub fn run_at_once() {}

/// Does nothing.
pub fn run_behind() {}
