//! The bodies of the fuzz targets. Each takes arbitrary bytes and panics if something is wrong with ramshot.
//!
//! - [`reader`]: the bytes are a file. It opens or says why not; what opens can be used in every way.
//! - [`reader_mutated`]: the bytes describe a snapshot and what is done to it. It is built from `docs/FORMAT.md` alone,
//!   so this is also the stranger who writes a file by the specification.
//! - [`core_events`]: the bytes are what happens to a guest. The image is its memory at T0, or there is none.
//!
//! `cargo xtask fuzz` runs them with libFuzzer, `cargo xtask fuzz --replay` runs what was found before as a plain test.

mod examine;
mod forge;
mod memory;
mod world;

pub use world::core_events;

use examine::{Disk, examine};
use forge::Plan;

#[global_allocator]
static MEMORY: memory::Measured = memory::Measured;

/// Arbitrary bytes as a file. The first byte says what is made right beforehand, or nothing would ever get past a
/// checksum; the second how large a hole lies before the rest, so that a file of petabytes costs nothing.
pub fn reader(data: &[u8]) {
    let [repair, hole, bytes @ ..] = data else { return };
    let hole = match *hole {
        pages @ 0..200 => u64::from(pages),
        order => 1u64 << (order - 200).min(41),
    };
    let mut bytes = bytes.to_vec();
    if repair & 2 != 0 {
        forge::repair_tail(&mut bytes, hole * 4096);
    }
    if repair & 1 != 0 {
        forge::repair_checksums(&mut bytes, hole * 4096);
    }
    let mut disk = Disk::new();
    disk.begin(hole * 4096 + bytes.len() as u64);
    disk.put(hole * 4096, &bytes);
    examine(&disk, bytes.len() as u64);
}

/// A snapshot of any layout and any page states, correct or with something wrong in it.
pub fn reader_mutated(data: &[u8]) {
    let Ok(plan) = Plan::from_bytes(data) else { return };
    plan.check();
}

#[cfg(test)]
mod replay {
    use std::fs;
    use std::path::Path;

    /// Everything in `corpus/` once more: what was found before stays fixed.
    #[test]
    fn corpus() {
        let targets: [(&str, fn(&[u8])); 3] =
            [("reader", super::reader), ("reader_mutated", super::reader_mutated), ("core_events", super::core_events)];
        // One after the other: the memory that a run takes is measured.
        for (target, run) in targets {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
            let mut files: Vec<_> = fs::read_dir(&dir)
                .unwrap_or_else(|error| panic!("{dir:?}: {error}"))
                .map(|entry| entry.unwrap().path())
                .collect();
            files.sort();
            for file in &files {
                println!("{target}: {}", file.display());
                run(&fs::read(file).unwrap());
            }
            println!("{target}: {} inputs replayed", files.len());
            assert!(!files.is_empty(), "no corpus in {dir:?}");
        }
    }
}
