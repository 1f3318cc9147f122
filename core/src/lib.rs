//! The decisions of a live VM memory snapshot, as a deterministic state machine: no I/O, no threads, no clock, no
//! allocation, no unsafe code.
//!
//! Guest RAM is write-protected at an instant T0 and the guest runs on. From then on [`Snapshot`] decides, one call at a
//! time, what to copy next: pages that somebody asked for, pages that a blocked writer waits for, then whatever the
//! linear scan reaches. Threads, system calls and files belong to whoever embeds it (the `ramshot` crate, or another
//! hypervisor); it belongs to nobody and calls nobody.
//!
//! # A tour
//! - [`BlockTable`]: what guest RAM consists of, and where a page of the image is mapped.
//! - [`PageBitmap`]: one bit a page, over storage that you lend.
//! - [`Snapshot`]: the state; `handle_*` happened, `next_*` do this, the rest are getters.
//! - [`Claim`], [`CapturedRun`], [`ReleasedRun`]: the life of a run of pages, as values that cannot be copied.
//! - [`Fill`]: the state of a lazy restore, the way back: which page comes in next.
//! - [`Limits`]: how far a claim reaches. Policy only.
//! - [`WriteTracker`], [`RamSource`], [`RamTarget`]: what an operating system has to provide.
//!
//! # The loop
//! ```
//! use ramshot_core::*;
//!
//! # let block = RamBlock {
//! #     name: BlockName::new("ram").unwrap(), guest: GuestAddr(0), host: HostAddr(0x7000_0000), len: 1 << 20,
//! #     used: 1 << 20, page_size: PAGE_SIZE, backing: Backing::Anonymous, treatment: Treatment::Tracked,
//! # };
//! let table = BlockTable::new(&[block])?;
//! let mut pending = PageBitmap::new([0; 8], table.pages(), true).expect("5 words are enough for 256 pages");
//! pending.insert(Run::new(PageId(0), 256));
//! let mut snapshot: Snapshot<_, _, 16, 4> = Snapshot::new(&table, pending, 32, [0; 8], Limits::default())?;
//!
//! // A vCPU is blocked on page 200: it comes first.
//! let _ = snapshot.handle_fault(HostAddr(0x7000_0000 + 200 * PAGE_SIZE));
//! while let Next::Claim(claim) = snapshot.next_claim(Worker::Scan) {
//!     // copy claim.range() into the buffers claim.slots()
//!     let captured = snapshot.captured(claim);
//!     // lift the protection of captured.range(), which wakes its writers
//!     let released = snapshot.released(captured);
//!     // write the buffers to the image, whenever
//!     snapshot.written(released);
//! }
//! assert!(snapshot.is_written());
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod ahead;
mod bitmap;
mod block;
mod claim;
mod dirty;
mod fill;
mod outcome;
mod policy;
mod pool;
mod seams;
mod snapshot;
#[cfg(test)]
mod tests;
mod units;

pub use ahead::ArmAhead;
pub use bitmap::PageBitmap;
pub use block::{Backing, BlockName, BlockTable, LayoutError, MAX_BLOCKS, MAX_NAME, RamBlock, Treatment};
pub use claim::{CapturedRun, Claim, MAX_SLOTS_PER_CLAIM, Origin, ReleasedRun, SlotId, SlotList};
pub use dirty::DirtyPages;
pub use fill::{Content, Fill, FillClaim, FillCounts, FillFault, FillOrigin, Filled, Holds, NextFill, RamFiller};
pub use outcome::{Cause, Counts, Discard, FaultOutcome, Next, PageSearchStatus, RequestOutcome, SetupError, Worker};
pub use policy::{Limits, WhenFull};
pub use seams::{DirtyLog, Done, Event, OsError, RamSource, RamTarget, Residency, WriteTracker};
pub use snapshot::Snapshot;
pub use units::{BlockIndex, GuestAddr, HostAddr, HostRange, PAGE_SIZE, PageId, Run};
