//! What a RAM block is made of: kind of memory, page size, and the file behind it.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use ramshot_core::{Backing, HostRange, RamBlock, Treatment};

use crate::error::RamError;
use crate::maps::{self, Detail, Vma};
use crate::owner::Owner;
use crate::ram::RegionFile;

/// One mapping (VMA) of a block.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) range: HostRange,
    pub(crate) writable: bool,
    /// What is written shows in the file behind it, and the other way round.
    pub(crate) shared: bool,
    pub(crate) content: Content,
    /// File system and inode: the same for two pieces of one file.
    pub(crate) file_id: ((u32, u32), u64),
}

/// Where it is written down which pages of a piece may hold something other than zeros.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// In the page table: what is not there is zero.
    PageTable,
    /// In the page table, and in the file: a page can be absent from our page table and still have content. (In a
    /// private mapping the page table also has its own copies.)
    File(FileAt),
    /// In the page table, if it has as many pages as the hugetlbfs file has; otherwise nowhere (hugetlbfs has no
    /// SEEK_DATA).
    HugeFile(FileAt),
    /// Nowhere: all of it may.
    Unknown,
}

/// A file of memory, and where a piece starts in it.
#[derive(Clone, Debug)]
pub(crate) struct FileAt {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
}

/// The base page size of this kernel.
pub(crate) fn base_page_size() -> u64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u64::try_from(size).ok()).unwrap_or(ramshot_core::PAGE_SIZE)
}

/// What kind of memory a mapping is, with the knowledge for it read no earlier than needed.
pub(crate) struct Kinds {
    owner: Owner,
    base: u64,
    /// Device number of the kernel's own tmpfs: memfd, SysV, shared anonymous memory.
    shm_dev: Option<(u32, u32)>,
    /// Device numbers of all mounted tmpfs.
    tmpfs_devs: Option<Vec<(u32, u32)>>,
    details: Option<Vec<Detail>>,
}

impl Kinds {
    pub(crate) fn new(owner: &Owner) -> Self {
        let shm_dev = memfd_create(c"ramshot-which-device", MFdFlags::MFD_CLOEXEC)
            .ok()
            .and_then(|fd| File::from(fd).metadata().ok())
            .map(|meta| device(&meta));
        Self { owner: owner.clone(), base: base_page_size(), shm_dev, tmpfs_devs: None, details: None }
    }

    fn of(&mut self, vma: &Vma) -> Result<(Backing, u64), RamError> {
        if vma.inode == 0 {
            let plain = vma.path.is_empty() || ["[heap]", "[stack", "[anon:"].iter().any(|p| vma.path.starts_with(p));
            return Ok((if plain { Backing::Anonymous } else { Backing::Foreign }, self.base));
        }
        if Some(vma.dev) == self.shm_dev {
            return Ok((Backing::Shmem, self.base));
        }
        let Some(detail) = self.detail(vma.range)? else { return Ok((Backing::Foreign, self.base)) };
        let page_size = detail.page_size.max(self.base);
        // Page frames without a struct page, or device memory: nothing the kernel can protect for us.
        let device_memory = detail.has("pf") || detail.has("io") || vma.path.starts_with("anon_inode:");
        Ok(if detail.has("ht") {
            (Backing::HugeTlb, page_size)
        } else if device_memory {
            (Backing::Foreign, self.base)
        } else if self.is_tmpfs(vma.dev) {
            (Backing::Shmem, self.base)
        } else {
            (Backing::File, self.base)
        })
    }

    fn detail(&mut self, range: HostRange) -> Result<Option<Detail>, RamError> {
        if self.details.is_none() {
            let failed = |source| RamError::Maps { path: self.owner.proc_name("smaps"), source };
            let read = maps::read_details(&self.owner).map_err(failed)?;
            self.details = Some(read);
        }
        Ok(self.details.iter().flatten().find(|d| d.range.contains(range.start)).cloned())
    }

    fn is_tmpfs(&mut self, dev: (u32, u32)) -> bool {
        self.tmpfs_devs
            .get_or_insert_with(|| tmpfs_devices(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()))
            .contains(&dev)
    }
}

/// `36 35 0:32 / /dev/shm rw,nosuid shared:16 - tmpfs tmpfs rw`
fn tmpfs_devices(mountinfo: &str) -> Vec<(u32, u32)> {
    let device = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let (major, minor) = left.split_ascii_whitespace().nth(2)?.split_once(':')?;
        (right.split_ascii_whitespace().next()? == "tmpfs").then_some((major.parse().ok()?, minor.parse().ok()?))
    };
    mountinfo.lines().filter_map(device).collect()
}

fn device(meta: &fs::Metadata) -> (u32, u32) {
    (libc::major(meta.dev()), libc::minor(meta.dev()))
}

/// Completes `block` by what `vmas`, which cover it, are.
pub(crate) fn examine(
    block: &mut RamBlock,
    vmas: &[Vma],
    file: Option<RegionFile>,
    kinds: &mut Kinds,
) -> Result<Vec<Piece>, RamError> {
    let given = match file {
        Some(given) => Some(reopen(given).map_err(|source| RamError::File { block: block.name, source })?),
        None => None,
    };
    let mut pieces = Vec::with_capacity(vmas.len());
    for vma in vmas {
        let (backing, page_size) = kinds.of(vma)?;
        if pieces.is_empty() {
            (block.backing, block.page_size) = (backing, page_size);
        } else if (backing, page_size) != (block.backing, block.page_size) {
            return Err(RamError::Mixed {
                block: block.name,
                backing: block.backing,
                page_size: block.page_size,
                other: vma.range,
                other_backing: backing,
                other_page_size: page_size,
            });
        }
        check_permission(block, vma)?;
        let file = match &given {
            Some(given) => Some(same_file(block, vma, given)?),
            None => mapped_file(&kinds.owner, vma, backing),
        };
        let content = content(block, vma, file);
        let (writable, shared) = (vma.writable, vma.shared);
        pieces.push(Piece { range: vma.range, writable, shared, content, file_id: (vma.dev, vma.inode) });
    }
    Ok(pieces)
}

fn check_permission(block: &RamBlock, vma: &Vma) -> Result<(), RamError> {
    let (right, remedy) = match block.treatment {
        Treatment::Ignored => return Ok(()),
        _ if !vma.readable => ("read", "map it readable, or leave the block out (Treatment::Ignored)"),
        Treatment::Tracked if !vma.writable => ("write", "a block nobody writes is Treatment::ReadOnly"),
        _ => return Ok(()),
    };
    Err(RamError::Permission { block: block.name, range: vma.range, right, remedy })
}

/// A descriptor of our own: SEEK_DATA moves the file position, which a duplicate shares with the VMM.
fn reopen(given: RegionFile) -> std::io::Result<FileAt> {
    given.file.metadata()?;
    let own = File::open(format!("/proc/self/fd/{}", given.file.as_raw_fd()));
    Ok(FileAt { file: Arc::new(own.unwrap_or(given.file)), offset: given.offset })
}

/// The file given, at the offset of `vma`; an error if something else is mapped there.
fn same_file(block: &RamBlock, vma: &Vma, given: &FileAt) -> Result<FileAt, RamError> {
    let meta = given.file.metadata().map_err(|source| RamError::File { block: block.name, source })?;
    let into_block = vma.range.start.0.saturating_sub(block.host.0);
    let offset = given.offset.saturating_add(into_block);
    // Some disk file systems report another device number in maps than in fstat, so only memory files are compared.
    let comparable = matches!(block.backing, Backing::Shmem | Backing::HugeTlb | Backing::Anonymous);
    if comparable && ((device(&meta), meta.ino()) != (vma.dev, vma.inode) || offset != vma.offset) {
        let mapped = if vma.path.is_empty() { "anonymous memory" } else { &vma.path };
        return Err(RamError::WrongFile {
            block: block.name,
            range: vma.range,
            mapped: format!("{mapped} at offset {:#x}", vma.offset),
            offset,
        });
    }
    Ok(FileAt { file: Arc::clone(&given.file), offset })
}

/// The file behind `vma`, opened through the kernel's own link to it, if we may.
fn mapped_file(owner: &Owner, vma: &Vma, backing: Backing) -> Option<FileAt> {
    if !matches!(backing, Backing::Shmem | Backing::HugeTlb) {
        return None;
    }
    // The link is named after the whole area, of which `vma` may be a part.
    let whole = maps::read(owner).ok()?.into_iter().find(|v| v.range.contains(vma.range.start))?.range;
    let link = owner.proc(&format!("map_files/{:x}-{:x}", whole.start.0, whole.end().0));
    Some(FileAt { file: Arc::new(File::open(link).ok()?), offset: vma.offset })
}

fn content(block: &RamBlock, vma: &Vma, file: Option<FileAt>) -> Content {
    let content = match (block.backing, vma.shared, file) {
        (Backing::Anonymous, ..) => Content::PageTable,
        (Backing::Shmem, _, Some(file)) => Content::File(file),
        // MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB: the kernel's unnamed file behind it stays empty.
        (Backing::HugeTlb, false, _) if vma.path.starts_with("/anon_hugepage") => Content::PageTable,
        (Backing::HugeTlb, true, Some(file)) => Content::HugeFile(file),
        _ => Content::Unknown,
    };
    if matches!((&content, block.backing), (Content::Unknown, Backing::Shmem | Backing::HugeTlb)) {
        log::warn!(
            target: "ramshot::track",
            "block {}: which pages of {} ({}) hold data cannot be known, so all of it is saved; give the file behind it",
            block.name, vma.range, vma.path
        );
    }
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmpfs_devices_are_found_in_mountinfo() {
        let text = "\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
36 35 0:32 / /dev/shm rw,nosuid shared:16 - tmpfs tmpfs rw
37 35 0:33 / /dev rw,nosuid - devtmpfs devtmpfs rw
not a mount
";
        assert_eq!(tmpfs_devices(text), [(0, 32)]);
    }
}
