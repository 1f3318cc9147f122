//! `ramshot demo`.

use super::support::{World, fails, json, run, skipped, yes};

const QUICK: [&str; 7] = ["demo", "--mem", "32M", "--around", "50", "--fill", "50"];

#[test]
fn a_live_snapshot_is_the_memory_at_t0() {
    let world = World::new();
    let dir = world.dir.path();
    for more in [&["--keep", "live"][..], &["--no-arm-ahead", "--threads", "1"], &["--keep", "live", "--replace"]] {
        let ran = run(dir, &[&QUICK, more].concat());
        if ran.code == 2 && (ran.err.contains("userfaultfd") || ran.err.contains("not on this system")) {
            skipped(&format!("the demo: {}", ran.err));
            return;
        }
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
        assert!(ran.out.contains("the image is the memory at T0, all 8192 pages"), "{}", ran.out);
        for line in ["pause ", "faults ", "captured ", "before ", "during ", "after "] {
            assert!(ran.out.lines().any(|said| said.trim_start().starts_with(line)), "{line}: {}", ran.out);
        }
    }
    yes(dir, &["verify", "live"]);
    let value = json(&yes(dir, &["inspect", "--json", "live"]));
    assert_eq!(value["ram_bytes"], 32 << 20);
    assert!(value["data_pages"].as_u64().unwrap() >= 4096 && value["zero_pages"].as_u64().unwrap() > 0, "{value}");
    fails(dir, 2, &["\"live\"", "exists"], &[&QUICK[..], &["--keep", "live"]].concat());
    fails(dir, 2, &["\"none\""], &[&QUICK[..], &["--keep", "none/live"]].concat());
    assert_eq!(world.names(), ["live", "snap"]);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let world = World::new();
    let dir = world.dir.path();
    for mem in ["0", "5000", "16E", "4096"] {
        fails(dir, 2, &["--mem"], &["demo", "--threads", "2", "--mem", mem]);
    }
    let ran = run(dir, &["demo", "--mem", "8388608T"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    fails(dir, 2, &["--threads"], &["demo", "--threads", "0"]);
    fails(dir, 2, &["--keep"], &["demo", "--replace"]);
}
