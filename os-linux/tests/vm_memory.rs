//! Guest memory as rust-vmm VMMs have it.
#![cfg(feature = "vm-memory")]
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{LONG, events, populated, release};
use nix::sys::memfd::{MFdFlags, memfd_create};
use ramshot_core::{Backing, HostAddr, HostRange, RamSource, WriteTracker};
use ramshot_linux::GuestRam;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

#[test]
fn anonymous_and_file_regions_are_tracked() {
    let file = std::fs::File::from(memfd_create(c"high", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(3 << 20).unwrap();
    let ranges =
        [(GuestAddress(0), 1 << 20, None), (GuestAddress(1 << 32), 2 << 20, Some(FileOffset::new(file, 1 << 20)))];
    let memory: Arc<GuestMemoryMmap> = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
    memory.write_slice(b"live", GuestAddress((1 << 32) + 0x5000)).unwrap();
    let ram = Arc::new(GuestRam::from_guest_memory(Arc::clone(&memory)).unwrap());
    let blocks = ram.table().blocks();
    assert_eq!(
        blocks.iter().map(|b| (b.name.as_str(), b.guest.0, b.len, b.backing)).collect::<Vec<_>>(),
        [("ram0", 0, 1 << 20, Backing::Anonymous), ("ram1", 1 << 32, 2 << 20, Backing::Shmem),]
    );
    let page = HostRange::new(HostAddr(blocks[1].host.0 + 0x5000), 0x1000);
    let tracker = common::open(&ram);
    assert_eq!(populated(&tracker, 1), [page]);
    tracker.protect(page).unwrap();
    let writing = Arc::clone(&memory);
    let write = common::Doing::start(move || writing.write_slice(b"dead", GuestAddress((1 << 32) + 0x5000)).unwrap());
    assert_eq!(events(&tracker, LONG).len(), 1);
    let mut bytes = [0; 4];
    // The VMM's own reference may go: ours keeps the memory.
    drop(memory);
    ram.read(page.start, &mut bytes).unwrap();
    assert_eq!(&bytes, b"live");
    release(&tracker, page);
    write.finish();
    ram.read(page.start, &mut bytes).unwrap();
    assert_eq!(&bytes, b"dead");
}
