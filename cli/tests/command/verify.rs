//! `ramshot verify`.

use std::fs;

use super::support::{World, fails, flip, run, truncate, yes};

#[test]
fn an_intact_snapshot_is_intact() {
    let world = World::new();
    for threads in [&[][..], &["--threads", "1"], &["--threads", "7"]] {
        let said = yes(world.dir.path(), &[&["verify", "snap"], threads].concat());
        assert_eq!(said, "snap: intact, 48 pages with data (192 KiB), 16 without\n");
    }
    fails(world.dir.path(), 2, &["--threads"], &["verify", "--threads", "0", "snap"]);
}

#[test]
fn every_kind_of_damage_is_found() {
    let world = World::new();
    let dir = world.dir.path();
    let len = fs::metadata(world.path("snap")).unwrap().len();
    let damaged = |name: &str, offset| {
        fs::copy(world.path("snap"), world.path(name)).unwrap();
        flip(&world.path(name), offset);
    };
    damaged("page", 41 * 4096 + 77);
    fails(dir, 1, &["page 41 (block \"high\", guest address 0x100001000)", "damaged"], &["verify", "page"]);
    damaged("hole", 8 * 4096);
    fails(dir, 1, &["page 8", "is not zero"], &["verify", "hole"]);
    damaged("trailer", 64 * 4096 + 10);
    fails(dir, 1, &["trailer"], &["verify", "trailer"]);
    damaged("tail", len - 10);
    fails(dir, 1, &["tail"], &["verify", "tail"]);
    fs::copy(world.path("snap"), world.path("short")).unwrap();
    truncate(&world.path("short"), 4096);
    fails(dir, 1, &["no ramshot tail"], &["verify", "short"]);
    fails(dir, 2, &["No such file"], &["verify", "nowhere"]);
    fails(dir, 2, &["a directory"], &["verify", "."]);
}

#[test]
fn several_files_are_all_looked_at_and_the_worst_counts() {
    let world = World::new();
    let dir = world.dir.path();
    fs::copy(world.path("snap"), world.path("bad")).unwrap();
    flip(&world.path("bad"), 4096);
    let ran = run(dir, &["verify", "bad", "snap"]);
    assert!(ran.code == 1 && ran.out.starts_with("snap: intact") && ran.err.contains("page 1"), "{ran:?}");
    let ran = run(dir, &["verify", "nowhere", "bad", "snap"]);
    assert!(ran.code == 2 && ran.out.starts_with("snap: intact") && ran.err.contains("page 1"), "{ran:?}");
    yes(dir, &["verify", "snap", "snap"]);
    fails(dir, 2, &["SNAPSHOT"], &["verify"]);
}
