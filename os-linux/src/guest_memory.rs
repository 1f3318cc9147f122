//! Guest RAM given as `vm-memory`'s `GuestMemoryMmap`.

use std::sync::Arc;

use ramshot_core::{BlockName, GuestAddr, HostAddr, Treatment};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::RamError;
use crate::ram::{GuestRam, Region, RegionFile};

impl GuestRam {
    /// Guest RAM as a rust-vmm VMM has it: every region is a tracked block, named `ram0`, `ram1` ... by ascending guest
    /// address. The memory is kept alive as long as the value lives.
    ///
    /// # Errors
    /// As [`from_regions`](Self::from_regions).
    pub fn from_guest_memory<B>(memory: Arc<GuestMemoryMmap<B>>) -> Result<Self, RamError>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let mut regions = Vec::new();
        for (number, region) in memory.iter().enumerate() {
            let name = format!("ram{number}");
            let file = match region.file_offset() {
                Some(behind) => {
                    let file = behind.file().try_clone().map_err(|source| {
                        // "ram" and a number always fits.
                        BlockName::new(&name)
                            .map_or(RamError::Name { name: name.clone() }, |block| RamError::File { block, source })
                    })?;
                    Some(RegionFile { file, offset: behind.start() })
                }
                None => None,
            };
            regions.push(Region {
                name,
                guest: GuestAddr(region.start_addr().raw_value()),
                host: HostAddr(region.as_ptr().expose_provenance() as u64),
                len: region.len(),
                used: None,
                treatment: Treatment::Tracked,
                file,
            });
        }
        // What `from_regions` asks for holds: `memory` keeps its regions mapped and is kept by the value, and vm-memory
        // hands out no references into guest memory, only volatile access by pointer.
        Self::build(regions, Some(Box::new(memory)))
    }
}
