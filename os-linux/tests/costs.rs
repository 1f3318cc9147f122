//! What the calls inside the pause cost per GiB, printed: `cargo test -p ramshot-linux --release --test costs --
//! --nocapture`. As a test it only checks that the figures exist; how long things take is the machine's affair.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Error;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use common::{HUGE, Memory, PAGE, ioctl, open, populated, raw_uffd, release, smaps};
use ramshot_core::{RamSource, WriteTracker};

fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = what();
    (result, started.elapsed())
}

#[test]
fn per_gib() {
    // A quarter is enough for the figures, and for the memory of a small machine.
    const LEN: usize = 256 << 20;
    let kinds = [
        ("anonymous 4 KiB", Memory::anonymous(LEN)),
        ("anonymous THP", Memory::thp(LEN)),
        ("memfd", Memory::memfd(LEN)),
    ];
    for (kind, memory) in kinds {
        (0..LEN).step_by(PAGE).for_each(|at| memory.write(at, 1));
        let ram = memory.ram();
        let (tracker, opening) = timed(|| open(&ram));
        let (found, searching) = timed(|| populated(&tracker, 0));
        assert_eq!(found, [memory.range(0, LEN)]);
        let ((), protecting) = timed(|| tracker.protect(found[0]).unwrap());
        let mut buffer = vec![1; HUGE];
        let copy = |buffer: &mut Vec<u8>| {
            (0..LEN).step_by(HUGE).for_each(|at| ram.read(memory.address(at), buffer).unwrap());
        };
        copy(&mut buffer);
        let ((), reading) = timed(|| copy(&mut buffer));
        let ((), releasing) = timed(|| (0..LEN).step_by(HUGE).for_each(|at| release(&tracker, memory.range(at, HUGE))));
        let (result, disarming) = timed(|| tracker.disarm());
        result.unwrap();
        println!(
            "{kind}: open {opening:?} (of {} MiB); per GiB: populated {:?}, protect {:?}, release in 2 MiB {:?}, \
             disarm {:?}, read {:?}",
            LEN >> 20,
            searching * 4,
            protecting * 4,
            releasing * 4,
            disarming * 4,
            reading * 4,
        );
    }
}

// Why asynchronous write protection is no dirty log for us (ARCHITECTURE.md): the marks cannot be kept while a snapshot is live, and
// taking them away costs more than protecting everything.
#[test]
fn of_asynchronous_protection_per_gib() {
    const LEN: usize = 256 << 20;
    const STEP: usize = 100 * PAGE;
    const SYNCHRONOUS: u64 = 1 << 0;
    const ASYNCHRONOUS: u64 = 1 << 13 | 1 << 15;
    const REGISTER: u64 = 0xc020_aa00;
    const UNREGISTER: u64 = 0x8010_aa01;
    const PROTECT: u64 = 0xc018_aa06;
    const PAGEMAP_SCAN: u64 = 0xc060_6610;
    // `PAGE_IS_WRITTEN`; `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`.
    const WRITTEN: u64 = 2;
    const GET_AND_PROTECT: u64 = 3;

    if ramshot_linux::probe().missing().iter().any(|missing| missing.what.contains("WP_ASYNC")) {
        eprintln!("SKIPPED: asynchronous protection, which this kernel lacks");
        return;
    }
    for (kind, memory) in [("anonymous 4 KiB", Memory::anonymous(LEN)), ("anonymous THP", Memory::thp(LEN))] {
        (0..LEN).step_by(PAGE).for_each(|at| memory.write(at, 1));
        let (start, len) = (memory.address(0).0, LEN as u64);
        let huge = || smaps(memory.address(0), "AnonHugePages");
        let before = huge();
        let fd = raw_uffd(Some(ASYNCHRONOUS));
        assert_eq!(ioctl(&fd, REGISTER, &mut [start, len, 2, 0]), 0);
        let (done, protecting) = timed(|| ioctl(&fd, PROTECT, &mut [start, len, 1]));
        assert_eq!(done, 0);
        let ((), writing) = timed(|| (0..LEN).step_by(STEP).for_each(|at| memory.write(at, 2)));

        let pagemap = OwnedFd::from(File::open("/proc/self/pagemap").unwrap());
        let mut found = vec![[0_u64; 3]; LEN / STEP + 1];
        let list = [found.as_mut_ptr().expose_provenance() as u64, found.len() as u64];
        let mut scan = [96, GET_AND_PROTECT, start, start + len, 0, list[0], list[1], 0, 0, WRITTEN, 0, WRITTEN];
        let (count, scanning) = timed(|| ioctl(&pagemap, PAGEMAP_SCAN, &mut scan));
        assert_eq!(usize::try_from(count).unwrap(), LEN.div_ceil(STEP));
        assert_eq!(found[1][0], memory.address(STEP).0);

        // One mapping has one context, and a snapshot needs a synchronous one.
        let snapshot = raw_uffd(Some(SYNCHRONOUS));
        assert_eq!(ioctl(&snapshot, REGISTER, &mut [start, len, 2, 0]), -1);
        assert_eq!(Error::last_os_error().raw_os_error(), Some(libc::EBUSY));
        let (done, unregistering) = timed(|| ioctl(&fd, UNREGISTER, &mut [start, len]));
        assert_eq!(done, 0);
        println!(
            "{kind}, asynchronous: per GiB: protect {:?}, get and protect again {:?}, unregister {:?}; a first write {:?}; \
             AnonHugePages {before} before the writes, {} after",
            protecting * 4,
            scanning * 4,
            unregistering * 4,
            writing / u32::try_from(LEN.div_ceil(STEP)).unwrap(),
            huge(),
        );
    }
}
