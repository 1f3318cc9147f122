//! `ramshot flatten`, `ramshot rebase`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use ramshot::SnapshotFile;

use crate::support::{PAGE, World, fails, increment, json, memory, run, snapshot, two_blocks, yes};

/// A snapshot of 64 pages, and two increments on it, one on the other; what the last one's memory is.
fn chain() -> (World, Vec<u8>) {
    let world = World::new();
    let (nines, sevens, zeros) = ([9; PAGE], [7; PAGE], [0; PAGE]);
    increment(&world.path("one"), &two_blocks(), &world.path("snap"), &[(3, &nines), (5, &zeros), (63, &nines)]);
    increment(&world.path("two"), &two_blocks(), &world.path("one"), &[(3, &zeros), (40, &sevens)]);
    let mut expected = world.flat.clone();
    expected[3 * PAGE..4 * PAGE].fill(0);
    expected[5 * PAGE..6 * PAGE].fill(0);
    expected[40 * PAGE..41 * PAGE].fill(7);
    expected[63 * PAGE..].fill(9);
    (world, expected)
}

fn flat_ram(world: &World, name: &str) -> Vec<u8> {
    fs::read(world.path(name)).unwrap()[..64 * PAGE].to_vec()
}

#[test]
fn a_chain_becomes_one_file_and_stays() {
    let (world, expected) = chain();
    let dir = world.dir.path();
    let before: Vec<_> = ["snap", "one", "two"].iter().map(|name| fs::read(world.path(name)).unwrap()).collect();
    let said = yes(dir, &["flatten", "two", "flat"]);
    let id = SnapshotFile::open(world.path("flat")).unwrap().id().to_string();
    assert!(said.contains("3 snapshots merged into one") && said.contains(&id), "{said}");
    assert!(flat_ram(&world, "flat") == expected);
    yes(dir, &["verify", "flat"]);
    yes(dir, &["diff", "two", "flat"]);
    let after: Vec<_> = ["snap", "one", "two"].iter().map(|name| fs::read(world.path(name)).unwrap()).collect();
    assert!(before == after);
    assert_eq!(fs::metadata(world.path("flat")).unwrap().permissions().mode() & 0o077, 0, "others can read it");

    fails(dir, 2, &["exists"], &["flatten", "two", "flat"]);
    assert!(yes(dir, &["flatten", "flat", "flat", "--replace"]).contains("1 snapshot copied"));
    // In place: the last of the chain gives way to the whole.
    yes(dir, &["flatten", "two", "two", "--replace", "--threads", "1"]);
    fs::remove_file(world.path("snap")).unwrap();
    fs::remove_file(world.path("one")).unwrap();
    assert!(flat_ram(&world, "two") == expected);
    assert_eq!(json(&yes(dir, &["inspect", "--json", "two"]))["parent"], serde_json::Value::Null);
}

#[test]
fn an_increment_is_put_on_another_parent() {
    let (world, expected) = chain();
    let dir = world.dir.path();
    yes(dir, &["flatten", "one", "flat"]);
    let said = yes(dir, &["rebase", "two", "moved", "--onto", "flat"]);
    assert!(said.contains("an increment on flat"), "{said}");
    yes(dir, &["diff", "two", "moved"]);
    let moved = SnapshotFile::open(world.path("moved")).unwrap();
    assert_eq!(moved.parent(), Some(SnapshotFile::open(world.path("flat")).unwrap().as_parent()));
    assert_eq!(moved.data_pages(), 1, "only what the new parent does not have");
    yes(dir, &["export", "moved", "raw", "--format", "raw"]);
    assert!(fs::read(world.path("raw")).unwrap() == expected);
}

#[test]
fn bad_input_leaves_nothing_behind() {
    let (world, _) = chain();
    let dir = world.dir.path();
    snapshot(&world.path("other"), &two_blocks()[..1], &memory(40, 3));
    fs::write(world.path("text"), "no snapshot").unwrap();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    fails(dir, 2, &["absent"], &["flatten", "absent", "out"]);
    fails(dir, 2, &["different RAM"], &["rebase", "two", "out", "--onto", "other"]);
    fails(dir, 2, &["builds on"], &["flatten", "two", "snap", "--replace"]);
    fails(dir, 2, &["builds on"], &["rebase", "two", "snap", "--onto", "snap", "--replace"]);
    fails(dir, 2, &["--onto"], &["rebase", "two", "out"]);
    fails(dir, 2, &["--threads"], &["flatten", "two", "out", "--threads", "0"]);
    let ran = run(dir, &["flatten", "two", "out", "--parent", "text"]);
    assert!(ran.code != 0 && ran.err.contains("text"), "{ran:?}");
    fails(dir, 2, &["no/out"], &["flatten", "two", "no/out"]);
    assert_eq!(names(), before);

    fs::create_dir(world.path("elsewhere")).unwrap();
    fs::rename(world.path("one"), world.path("elsewhere/one")).unwrap();
    fails(dir, 2, &["not found"], &["flatten", "two", "out"]);
    fs::rename(world.path("snap"), world.path("elsewhere/snap")).unwrap();
    yes(dir, &["flatten", "two", "out", "--parent", "elsewhere/one"]);
}

#[test]
fn damage_is_found_on_the_way() {
    let (world, _) = chain();
    let dir = world.dir.path();
    let mut bytes = fs::read(world.path("snap")).unwrap();
    // A page with data that is still the first one's.
    let page = (6..40).find(|page| world.flat[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0)).unwrap();
    bytes[page * PAGE + 7] ^= 1;
    fs::write(world.path("snap"), bytes).unwrap();
    fails(dir, 1, &["snap"], &["flatten", "two", "out"]);
    assert!(!world.path("out").exists() && !world.path("out.partial").exists());
}
