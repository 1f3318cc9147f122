//! Pages that the image does not give.

use std::fmt;

use ramshot_core::{BlockName, GuestAddr, HostAddr, OsError};

use crate::file::ReadError;

/// What becomes of a page that cannot be read or is damaged. It is never fed as zeros, nor as what was read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum WhenLost {
    /// The page is poisoned, as after a memory error of the machine: a vCPU or thread that touches it gets SIGBUS, with
    /// the address (`BUS_MCEERR_AR`); system calls fail. **Without a handler for it the process dies.** Needs Linux 6.6; before that
    /// as [`Block`](Self::Block).
    #[default]
    Poison,
    /// Who touches the page stays blocked. Stop the VM when you are told; after such a loss the handler stays for as long
    /// as the process lives.
    Block,
}

/// Why pages are lost.
#[derive(Debug, Clone)]
pub enum LostWhy {
    /// The image cannot be read there, or is damaged.
    Read(std::sync::Arc<ReadError>),
    /// The kernel did not take them.
    Ram(OsError),
    /// The [`PageSource`](crate::file::PageSource) panicked, or read something else than it was asked for.
    Source,
}

/// Consecutive pages of guest RAM that are lost.
#[derive(Debug, Clone)]
pub struct LostPages {
    /// The block.
    pub block: BlockName,
    /// Where the guest sees them.
    pub guest: GuestAddr,
    /// Where this process maps them.
    pub host: HostAddr,
    /// How many bytes.
    pub len: u64,
    /// Why.
    pub why: LostWhy,
}

impl fmt::Display for LostPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, guest, len, why, .. } = self;
        write!(f, "RAM block {block:?}, guest address {guest}+{len:#x}: ")?;
        match why {
            LostWhy::Read(error) => error.fmt(f),
            LostWhy::Ram(error) => error.fmt(f),
            LostWhy::Source => f.write_str("the page source failed"),
        }
    }
}
