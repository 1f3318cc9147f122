//! Guest RAM as described and as found: what is refused, and reading and filling it.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Memory, PAGE, ram};
use nix::sys::mman::{MapFlags, ProtFlags};
use ramshot_core::{Backing, GuestAddr, RamSource, RamTarget, Treatment};
use ramshot_linux::{AnonymousRam, GuestRam, RamError, Region, RegionFile};

fn refused(regions: Vec<Region>) -> RamError {
    // SAFETY: refused, so nothing is ever followed.
    unsafe { GuestRam::from_regions(regions) }.unwrap_err()
}

#[test]
fn a_gap_is_named() {
    let memory = Memory::anonymous(4 * PAGE);
    let mut region = memory.region("ram0", 0);
    // Nobody maps the first page of the address space.
    region.host = ramshot_core::HostAddr(0);
    assert!(matches!(refused(vec![region]), RamError::Gap { gap, .. } if gap.start.0 == 0));
}

#[test]
fn unlike_mappings_are_named() {
    let memory = Memory::anonymous(8 * PAGE);
    let shared = Memory::shared_anonymous(PAGE);
    // SAFETY: moves one mapping of this test over the middle of another; nobody holds references into either.
    unsafe {
        let flags = nix::sys::mman::MRemapFlags::MREMAP_MAYMOVE | nix::sys::mman::MRemapFlags::MREMAP_FIXED;
        let to = std::ptr::NonNull::new(memory.pointer(4 * PAGE)).unwrap().cast();
        nix::sys::mman::mremap(shared.start, PAGE, PAGE, flags, Some(to)).unwrap();
    }
    std::mem::forget(shared);
    let error = refused(vec![memory.region("ram0", 0)]);
    let RamError::Mixed { other, other_backing, .. } = &error else { panic!("{error}") };
    assert_eq!((*other, *other_backing), (memory.range(4 * PAGE, PAGE), Backing::Shmem));
    assert!(error.to_string().contains("two blocks"), "{error}");
}

#[test]
fn the_wrong_file_or_offset_is_refused() {
    let (memory, other) = (Memory::memfd(4 * PAGE), Memory::memfd(4 * PAGE));
    let with = |file: &Memory, offset| {
        let file = file.file.as_ref().unwrap().try_clone().unwrap();
        Region { file: Some(RegionFile { file, offset }), ..memory.region("ram0", 0) }
    };
    let error = refused(vec![with(&other, 0)]);
    assert!(error.to_string().contains("is not the file given"), "{error}");
    assert!(matches!(refused(vec![with(&memory, PAGE as u64)]), RamError::WrongFile { .. }));
    let anonymous = Memory::anonymous(4 * PAGE);
    let file = memory.file.as_ref().unwrap().try_clone().unwrap();
    let region = Region { file: Some(RegionFile { file, offset: 0 }), ..anonymous.region("ram0", 0) };
    assert!(refused(vec![region]).to_string().contains("anonymous memory"));
}

#[test]
fn permissions_are_checked_by_treatment() {
    let memory = Memory::memfd(4 * PAGE);
    let file = memory.file.as_ref().unwrap();
    let region = |memory: &Memory, treatment| Region { treatment, ..memory.region("rom", 0) };
    let rom = Memory::of_file(file, 4 * PAGE, MapFlags::MAP_SHARED, ProtFlags::PROT_READ);
    let error = refused(vec![region(&rom, Treatment::Tracked)]).to_string();
    assert!(error.contains("without write permission") && error.contains("ReadOnly"), "{error}");
    let ram = ram(vec![region(&rom, Treatment::ReadOnly)]);
    let error = ram.with_mut(rom.address(0), 8, &mut |_| panic!("handed out")).unwrap_err();
    assert_eq!(error.errno, libc::EACCES);
    let none = Memory::of_file(file, 4 * PAGE, MapFlags::MAP_SHARED, ProtFlags::PROT_NONE);
    let error = refused(vec![region(&none, Treatment::InPause)]).to_string();
    assert!(error.contains("without read permission"), "{error}");
}

#[test]
fn layouts_and_names_are_checked() {
    let memory = Memory::anonymous(4 * PAGE);
    let named = |name: &str| memory.region(name, 0);
    assert!(matches!(refused(vec![named("")]), RamError::Name { .. }));
    assert!(matches!(refused(vec![named(&"x".repeat(48))]), RamError::Name { .. }));
    assert!(matches!(refused(vec![]), RamError::Layout(_)));
    assert!(matches!(refused(vec![named("a"), named("b")]), RamError::Layout(_)));
    let uneven = Region { used: Some(100), ..named("a") };
    assert!(refused(vec![uneven]).to_string().contains("multiple of 0x1000"));
    let empty = Region { len: 0, ..named("a") };
    assert!(refused(vec![empty]).to_string().contains("is empty"));
}

#[test]
fn ignored_blocks_need_not_be_mapped() {
    let memory = Memory::anonymous(4 * PAGE);
    let external = Region {
        host: ramshot_core::HostAddr(0x1000),
        guest: GuestAddr(1 << 32),
        treatment: Treatment::Ignored,
        ..memory.region("external", 0)
    };
    let ram = ram(vec![memory.region("ram0", 0), external]);
    assert_eq!(ram.table().pages(), 4);
    assert_eq!(ram.read(ramshot_core::HostAddr(0x1000), &mut [0; 4]).unwrap_err().errno, libc::EFAULT);
}

#[test]
fn ram_is_read_and_filled_inside_one_block() {
    let (low, high) = (Memory::anonymous(4 * PAGE), Memory::memfd(4 * PAGE));
    let ram = ram(vec![low.region("low", 0), high.region("high", 1 << 32)]);
    ram.with_mut(high.address(PAGE - 2), 4, &mut |bytes| bytes.copy_from_slice(b"abcd")).unwrap();
    let mut back = [0; 6];
    ram.read(high.address(PAGE - 3), &mut back).unwrap();
    assert_eq!(&back, b"\0abcd\0");
    for (at, len) in [(low.address(4 * PAGE - 1), 2), (low.address(0), 5 * PAGE), (ramshot_core::HostAddr(8), 1)] {
        assert_eq!(ram.read(at, &mut vec![0; len]).unwrap_err().errno, libc::EFAULT);
        let error = ram.with_mut(at, len, &mut |_| panic!("handed out")).unwrap_err();
        assert_eq!((error.errno, error.range.unwrap().len), (libc::EFAULT, len as u64));
    }
    assert_eq!(ram.with_mut(low.address(0), usize::MAX, &mut |_| panic!()).unwrap_err().errno, libc::EFAULT);
}

#[test]
fn no_two_slices_of_the_same_bytes_are_handed_out() {
    let memory = Memory::anonymous(4 * PAGE);
    let ram = memory.ram();
    let mut inner = Vec::new();
    ram.with_mut(memory.address(0), 2 * PAGE, &mut |_| {
        for at in [0, PAGE, 2 * PAGE] {
            inner.push(ram.with_mut(memory.address(at), PAGE, &mut |bytes| bytes[0] = 1).map_err(|e| e.errno));
        }
    })
    .unwrap();
    assert_eq!(inner, [Err(libc::EBUSY), Err(libc::EBUSY), Ok(())]);
    // Given back, also by one that panics.
    let panicking = std::panic::AssertUnwindSafe(|| ram.with_mut(memory.address(0), PAGE, &mut |_| panic!("fill")));
    assert!(std::panic::catch_unwind(panicking).is_err());
    ram.with_mut(memory.address(0), PAGE, &mut |_| ()).unwrap();
}

#[test]
fn special_mappings_are_foreign() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let Some(line) = maps.lines().find(|line| line.ends_with("[vdso]")) else {
        eprintln!("SKIPPED: no vdso in this process");
        return;
    };
    let (start, _) = line.split_once('-').unwrap();
    let memory = Memory::anonymous(PAGE);
    let region = Region {
        host: ramshot_core::HostAddr(u64::from_str_radix(start, 16).unwrap()),
        treatment: Treatment::ReadOnly,
        ..memory.region("vdso", 0)
    };
    assert_eq!(ram(vec![region]).table().blocks()[0].backing, Backing::Foreign);
}

#[test]
fn the_position_of_the_vmms_file_is_left_alone() {
    use std::io::{Seek, SeekFrom};
    let memory = Memory::memfd(8 * PAGE);
    memory.write(PAGE, 1);
    let mut file = memory.file.as_ref().unwrap();
    file.seek(SeekFrom::Start(123)).unwrap();
    let tracker = common::open(&Arc::clone(&memory.ram()));
    assert_eq!(common::populated(&tracker, 0), [memory.range(PAGE, PAGE)]);
    assert_eq!(file.stream_position().unwrap(), 123);
}

#[test]
fn anonymous_ram_is_shared_read_and_never_filled() {
    let memory = Arc::new(AnonymousRam::new(4 * PAGE as u64).unwrap());
    let ram = GuestRam::from_anonymous(Arc::clone(&memory)).unwrap();
    let block = ram.table().blocks()[0];
    assert_eq!((block.len, block.backing, block.guest.0), (4 * PAGE as u64, Backing::Anonymous, 0));
    memory.words()[3 * PAGE / 8].store(0x1122, Ordering::Relaxed);
    let mut word = [0; 8];
    ram.read(block.host.checked_add(3 * PAGE as u64).unwrap(), &mut word).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 0x1122);
    assert_eq!(memory.words().len(), 4 * PAGE / 8);
    let error = ram.with_mut(block.host, PAGE, &mut |_| panic!("filled")).unwrap_err();
    assert_eq!(error.errno, libc::EACCES);
    // The memory lives as long as what was made of it.
    drop(memory);
    ram.read(block.host, &mut word).unwrap();
    for len in [0, 1, u64::MAX] {
        let outcome = AnonymousRam::new(len).and_then(|memory| GuestRam::from_anonymous(Arc::new(memory)));
        assert!(outcome.is_err(), "{len}");
    }
}
