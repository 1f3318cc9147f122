//! What the calls inside the pause cost per GiB, printed: `cargo test -p ramshot-linux --release --test costs --
//! --nocapture`. As a test it only checks that the figures exist; how long things take is the machine's affair.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{HUGE, Memory, PAGE, open, populated, release};
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
