//! The decisions of a live snapshot, and nothing else: a deterministic state machine without I/O, threads, clock or
//! allocation.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod block;
mod seams;
mod units;

pub use block::{Backing, BlockName, BlockTable, LayoutError, MAX_BLOCKS, MAX_NAME, RamBlock, Treatment};
pub use seams::{Done, Event, OsError, RamSource, RamTarget, WriteTracker};
pub use units::{BlockIndex, GuestAddr, HostAddr, HostRange, PAGE_SIZE, PageId, Run};
