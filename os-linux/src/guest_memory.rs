//! Guest RAM given as `vm-memory`'s `GuestMemoryMmap`, and what the VMM has written to it.

use std::sync::Arc;

use ramshot_core::{BlockName, DirtyLog, GuestAddr, HostAddr, HostRange, OsError, Treatment};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use crate::error::RamError;
use crate::owner::Owner;
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
        Self::build(Owner::Us, regions, Some(Box::new(memory)))
    }

    /// The writes of the VMM itself, of its device models, as `vm-memory` notes them in the [`AtomicBitmap`] of each region: a
    /// dirty log to be combined with [`KvmDirtyLog`](crate::KvmDirtyLog), which sees those of the vCPUs. Writes past `vm-memory`
    /// (by pointer, by a system call that was given one) are in neither.
    ///
    /// Taking what was written clears the bitmaps: nobody else can use them for the same purpose. What was written before
    /// is reported the first time. The page size of the bitmaps must be a power of two, as the one that `vm-memory` chooses
    /// by itself is.
    #[must_use]
    pub fn vmm_writes(memory: Arc<GuestMemoryMmap<AtomicBitmap>>) -> Box<dyn DirtyLog> {
        Box::new(GuestMemoryLog { memory })
    }
}

struct GuestMemoryLog {
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
}

impl DirtyLog for GuestMemoryLog {
    /// One range for every run of bits. Cannot fail.
    fn take(&self, each: &mut dyn FnMut(HostRange)) -> Result<(), OsError> {
        for region in self.memory.iter() {
            let mapping: &MmapRegion<AtomicBitmap> = region;
            let bitmap = mapping.bitmap();
            let page = page_size(bitmap.byte_size() as u64, bitmap.len() as u64);
            let start = region.as_ptr().expose_provenance() as u64;
            let mut run: Option<(u64, u64)> = None;
            let mut flush = |run: Option<(u64, u64)>| {
                if let Some((first, end)) = run {
                    let (from, to) = ((first * page).min(region.len()), (end * page).min(region.len()));
                    each(HostRange::new(HostAddr(start + from), to - from));
                }
            };
            let words = (0u64..).zip(bitmap.get_and_reset());
            for bit in
                words.flat_map(|(n, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| n * 64 + bit))
            {
                run = match run {
                    Some((first, end)) if end == bit => Some((first, bit + 1)),
                    other => {
                        flush(other);
                        Some((bit, bit + 1))
                    }
                };
            }
            flush(run);
        }
        Ok(())
    }
}

/// Bytes for each of `bits` bits over `bytes` bytes, a power of two: the bitmap does not say.
fn page_size(bytes: u64, bits: u64) -> u64 {
    match bits {
        0 | 1 => bytes.max(1),
        _ => bytes.div_ceil(bits).next_power_of_two(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

    use super::*;

    const PAGE: u64 = 4096;

    fn taken(log: &dyn DirtyLog, memory: &GuestMemoryMmap<AtomicBitmap>) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let base = |at: u64| {
            let region =
                memory.iter().find(|r| (r.as_ptr() as u64..r.as_ptr() as u64 + r.len()).contains(&at)).unwrap();
            region.start_addr().raw_value() + (at - region.as_ptr() as u64)
        };
        log.take(&mut |range| ranges.push((base(range.start.0) / PAGE, range.len / PAGE))).unwrap();
        ranges
    }

    #[test]
    fn what_the_vmm_writes_is_taken_once() {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 300 << 12)];
        let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap());
        let log = GuestRam::vmm_writes(Arc::clone(&memory));
        assert_eq!(taken(log.as_ref(), &memory), []);
        memory.write_obj(7u64, GuestAddress(5 * PAGE + 4092)).unwrap();
        memory.write_slice(&[1; 3 * 4096], GuestAddress((1 << 32) + 296 * PAGE)).unwrap();
        memory.write_obj(1u8, GuestAddress((1 << 32) + 299 * PAGE)).unwrap();
        // Across the end of a word of the bitmap.
        memory.write_slice(&[1; 2 * 4096], GuestAddress(63 * PAGE)).unwrap();
        let high = (1 << 32) / PAGE;
        assert_eq!(taken(log.as_ref(), &memory), [(5, 2), (63, 2), (high + 296, 4)]);
        assert_eq!(taken(log.as_ref(), &memory), []);
    }

    #[test]
    fn the_page_size_of_a_bitmap_is_found() {
        for page in [4096usize, 16 << 10, 2 << 20] {
            for len in [page * 2, page * 3 + 4096, page * 65, page * 64 + 1] {
                let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(page).unwrap());
                assert_eq!(page_size(bitmap.byte_size() as u64, bitmap.len() as u64), page as u64, "{page} {len}");
            }
        }
        assert_eq!((page_size(8192, 1), page_size(0, 0)), (8192, 1));
    }

    /// vm-memory 0.17.2 hands on the types of 0.18, so VMMs that have not moved on need nothing else.
    #[test]
    fn memory_of_vm_memory_0_17_is_the_same() {
        use vm_memory_0_17::{GuestAddress as Address, GuestMemoryMmap as Mmap};
        let memory: Mmap<()> = Mmap::from_ranges(&[(Address(0), 2 << 20)]).unwrap();
        let ram = GuestRam::from_guest_memory(Arc::new(memory)).unwrap();
        assert_eq!(ram.table().pages(), 512);
    }

    #[test]
    fn a_region_of_its_own_bitmap_is_guest_ram_too() {
        let region = MmapRegion::<AtomicBitmap>::new(2 << 20).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
        assert_eq!(GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap().table().pages(), 512);
        memory.write_obj(3u32, GuestAddress(9 * PAGE)).unwrap();
        let mut found = Vec::new();
        GuestRam::vmm_writes(memory).take(&mut |range| found.push(range.len)).unwrap();
        assert_eq!(found, [PAGE]);
    }
}
