//! Guest RAM as a description only: the block table can be had, its memory cannot be touched.

use std::fs::File;
use std::sync::Arc;

use ramshot_core::{
    Backing, BlockIndex, BlockName, BlockTable, GuestAddr, HostAddr, HostRange, OsError, PAGE_SIZE, RamBlock,
    RamSource, RamTarget, Treatment,
};

use crate::error::RamError;
use crate::handoff::Handoff;

/// The file behind a piece of guest RAM.
#[derive(Debug)]
pub struct RegionFile {
    /// The file.
    pub file: File,
    /// Offset at which the region starts in it.
    pub offset: u64,
}

/// A piece of guest RAM as the VMM describes it.
#[derive(Debug)]
pub struct Region {
    /// Name by which the block is found again at restore; 1 to 47 bytes, unique.
    pub name: String,
    /// Where the guest sees it.
    pub guest: GuestAddr,
    /// Where this process maps it.
    pub host: HostAddr,
    /// Length of the mapping in bytes.
    pub len: u64,
    /// How much of it is in use (`None`: all).
    pub used: Option<u64>,
    /// What a snapshot does with it.
    pub treatment: Treatment,
    /// The file behind it, if the VMM has it.
    pub file: Option<RegionFile>,
}

/// Guest RAM: the block table. Nothing of it can be read or filled on this system.
#[derive(Debug)]
pub struct GuestRam {
    table: Arc<BlockTable>,
}

impl GuestRam {
    /// Guest RAM as the VMM describes it, with 4 KiB pages and a backing that is not known.
    ///
    /// On Linux a caller promises here that the regions stay mapped. Here no address is ever followed, so there is
    /// nothing to promise and this is a plain function; code that is written for Linux compiles with it.
    ///
    /// # Errors
    /// The first thing found that makes this no RAM layout.
    pub fn from_regions(regions: Vec<Region>) -> Result<Self, RamError> {
        let block = |region: Region| {
            Ok(RamBlock {
                name: BlockName::new(&region.name).ok_or(RamError::Name { name: region.name })?,
                guest: region.guest,
                host: region.host,
                len: region.len,
                used: region.used.unwrap_or(region.len),
                page_size: PAGE_SIZE,
                backing: Backing::Foreign,
                treatment: region.treatment,
            })
        };
        let blocks = regions.into_iter().map(block).collect::<Result<Vec<_>, RamError>>()?;
        Ok(Self { table: Arc::new(BlockTable::new(&blocks)?) })
    }

    /// Guest RAM of another process: there is none here.
    ///
    /// # Errors
    /// Never: nothing can be handed over.
    pub fn from_handoff(handoff: Handoff) -> Result<Self, RamError> {
        match handoff {}
    }

    /// The blocks.
    #[must_use]
    pub fn table(&self) -> &Arc<BlockTable> {
        &self.table
    }

    /// None are known of.
    ///
    /// # Errors
    /// Never on this system.
    pub fn aliases(&self) -> std::io::Result<Vec<(BlockIndex, HostRange)>> {
        Ok(Vec::new())
    }
}

impl RamSource for GuestRam {
    /// Never.
    fn read(&self, from: HostAddr, into: &mut [u8]) -> Result<(), OsError> {
        Err(unsupported("reading guest RAM (unsupported on this system)", from, into.len()))
    }
}

impl RamTarget for GuestRam {
    /// Never.
    fn with_mut(&self, at: HostAddr, len: usize, _fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
        Err(unsupported("filling guest RAM (unsupported on this system)", at, len))
    }
}

fn unsupported(op: &'static str, at: HostAddr, len: usize) -> OsError {
    OsError::new(op, 0).on(HostRange::new(at, u64::try_from(len).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, at: u64) -> Region {
        Region {
            name: name.to_owned(),
            guest: GuestAddr(at),
            host: HostAddr(at),
            len: 0x4000,
            used: Some(0x3000),
            treatment: Treatment::Tracked,
            file: None,
        }
    }

    #[test]
    fn a_layout_is_checked_and_laid_out() {
        let ram = GuestRam::from_regions(vec![region("a", 0), region("b", 0x4000)]);
        assert!(ram.is_ok_and(|ram| ram.table().pages() == 6));
        let overlap = GuestRam::from_regions(vec![region("a", 0), region("b", 0x2000)]);
        assert!(overlap.is_err_and(|e| e.to_string() == "RAM blocks \"a\" and \"b\" overlap"));
        let unnamed = GuestRam::from_regions(vec![region("", 0)]);
        assert!(unnamed.is_err_and(|e| e.to_string().contains("1 to 47 bytes")));
    }

    #[test]
    fn no_address_is_followed() {
        let Ok(ram) = GuestRam::from_regions(vec![region("a", 0)]) else { panic!("layout refused") };
        let error = ram.read(HostAddr(0), &mut [0; 8]).expect_err("nothing to read");
        assert!(error.to_string().contains("unsupported"), "{error}");
        let error = ram.with_mut(HostAddr(0), 8, &mut |_| panic!("called")).expect_err("nothing to fill");
        assert!(error.to_string().contains("0x0+0x8"), "{error}");
    }
}
