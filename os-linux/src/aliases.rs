//! Other mappings of the memory of a block: writes through them are not seen.

use std::io;

use ramshot_core::{BlockIndex, HostRange, Treatment};

use crate::maps::{self, Vma};
use crate::ram::GuestRam;

impl GuestRam {
    /// Mappings in this process, outside of all blocks, through which memory of a tracked block can be written: the kernel
    /// protects mappings, so what is written there while a snapshot runs may be in the image, or not. Each with its block.
    ///
    /// What is no mapping of this process cannot be found: another process, `pwrite` on a memfd.
    ///
    /// # Errors
    /// `/proc/self/maps` cannot be read.
    pub fn aliases(&self) -> io::Result<Vec<(BlockIndex, HostRange)>> {
        let vmas = maps::read(self.owner())?;
        let blocks = || self.table().iter().filter(|(_, block)| block.treatment != Treatment::Ignored);
        let mut found = Vec::new();
        for (index, block) in blocks().filter(|(_, block)| block.treatment == Treatment::Tracked) {
            let Ok(ours) = maps::cover(&vmas, block.mapping()) else { continue };
            for own in ours.iter().filter(|own| own.shared && own.inode != 0) {
                let others = vmas.iter().filter(|vma| may_write(vma) && shows(vma, own));
                let outside = others.filter(|vma| !blocks().any(|(_, block)| block.mapping().overlaps(vma.range)));
                found.extend(outside.map(|vma| (index, vma.range)));
            }
        }
        found.dedup();
        Ok(found)
    }

    /// Says so, once for each.
    pub(crate) fn warn_of_aliases(&self) {
        for (index, range) in self.aliases().unwrap_or_default() {
            let Some(block) = self.table().block(index) else { continue };
            log::warn!(
                target: "ramshot::track",
                "block {}: its memory is mapped a second time at {range}; what is written there during a snapshot is not seen",
                block.name
            );
        }
    }
}

fn may_write(vma: &Vma) -> bool {
    vma.shared && vma.writable
}

/// Whether the two show the same bytes of one file.
fn shows(vma: &Vma, own: &Vma) -> bool {
    let end = |vma: &Vma| vma.offset.saturating_add(vma.range.len);
    (vma.dev, vma.inode) == (own.dev, own.inode) && vma.offset < end(own) && own.offset < end(vma)
}
