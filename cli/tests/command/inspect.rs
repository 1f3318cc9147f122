//! `ramshot inspect`.

use std::fs;

use super::forge::{self, Page};
use super::support::{PAGE, World, block, fails, flip, json, memory, snapshot, truncate, two_blocks, yes};

#[test]
fn tables_and_json_say_what_is_in_it() {
    let world = World::new();
    let dir = world.dir.path();
    let text = yes(dir, &["inspect", "snap"]);
    let said: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(said.contains(&vec!["parent", "none"]), "{text}");
    assert!(said.contains(&vec!["device", "state", "12", "bytes"]), "{text}");
    assert!(said.contains(&vec!["write_faults", "4321"]), "{text}");
    let high = "high 0x100000000 96 KiB 96 KiB 4 KiB anonymous tracked 18 6 0 0x28000";
    assert!(said.contains(&high.split(' ').collect()), "{text}");

    let value = json(&yes(dir, &["inspect", "--json", "snap"]));
    assert_eq!(value["pages"], 64);
    assert_eq!((&value["data_pages"], &value["zero_pages"]), (&48.into(), &16.into()));
    assert_eq!(value["ram_bytes"], 64 * 4096);
    assert_eq!(value["file_bytes"], fs::metadata(world.path("snap")).unwrap().len());
    assert_eq!(value["parent"], serde_json::Value::Null);
    assert_eq!(value["blocks"][1]["guest_address"], "0x100000000");
    assert_eq!(value["blocks"][0]["zero_pages"], 10);
    assert_eq!(value["statistics"][0]["value"], 4321);
    assert!(text.contains(value["id"].as_str().unwrap()) && text.contains(value["checksum"].as_str().unwrap()));
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let world = World::new();
    let dir = world.dir.path();
    fails(dir, 2, &["\"nowhere\"", "No such file"], &["inspect", "nowhere"]);
    fails(dir, 2, &["a directory"], &["inspect", "."]);
    fs::write(world.path("raw"), memory(3, 1)).unwrap();
    fails(dir, 1, &["has no ramshot tail"], &["inspect", "raw"]);
    fs::write(world.path("empty"), b"").unwrap();
    fails(dir, 1, &["has no ramshot tail"], &["inspect", "--json", "empty"]);
    let len = fs::metadata(world.path("snap")).unwrap().len();
    fs::copy(world.path("snap"), world.path("flipped")).unwrap();
    flip(&world.path("flipped"), len - 200);
    fails(dir, 1, &["damaged"], &["inspect", "flipped"]);
    truncate(&world.path("snap"), 1);
    fails(dir, 1, &["truncated"], &["inspect", "snap"]);
}

#[test]
fn names_cannot_drive_the_terminal() {
    let world = World::new();
    let name = "a\x1b[2J\rb";
    snapshot(&world.path("odd"), &[block(name, 0, 4)], &memory(4, 1));
    let text = yes(world.dir.path(), &["inspect", "odd"]);
    assert!(!text.contains('\x1b') && !text.contains('\r') && text.contains("a\\u{1b}[2J\\rb"), "{text:?}");
    let value = json(&yes(world.dir.path(), &["inspect", "--json", "odd"]));
    assert_eq!(value["blocks"][0]["name"], name);
}

#[test]
fn the_chain_is_shown_as_far_as_it_is_found() {
    let world = World::new();
    let dir = world.dir.path();
    fs::create_dir(world.path("old")).unwrap();
    let base = forge::write(&world.path("old/base"), 1, None, &two_blocks(), &forge::pages(&world.flat));
    let mut pages = vec![Page::InParent; 64];
    pages[3] = Page::Data(vec![9; PAGE]);
    pages[5] = Page::Zero;
    let middle = forge::write(&world.path("old/middle"), 2, Some((1, base)), &two_blocks(), &pages);
    forge::write(&world.path("top"), 3, Some((2, middle)), &two_blocks(), &vec![Page::InParent; 64]);

    let alone = yes(dir, &["inspect", "top"]);
    assert!(alone.contains(&format!("{} (not found", "02".repeat(16))), "{alone}");
    let all = ["inspect", "top", "--json", "--parent", "old/middle"];
    let value = json(&yes(dir, &all));
    let paths: Vec<_> = value["chain"].as_array().unwrap().iter().map(|link| link["path"].as_str().unwrap()).collect();
    assert_eq!(paths, ["old/middle", "old/base"]);
    assert_eq!((&value["in_parent_pages"], &value["default_state"]), (&64.into(), &"in parent".into()));
    let value = json(&yes(dir, &["inspect", "--json", "old/middle"]));
    assert_eq!(
        (&value["data_pages"], &value["zero_pages"], &value["in_parent_pages"]),
        (&1.into(), &1.into(), &62.into())
    );

    // Another file that claims to be the base.
    forge::write(&world.path("old/base"), 1, None, &two_blocks(), &forge::pages(&memory(64, 1)));
    fails(dir, 1, &["is not the parent", "any more"], &["inspect", "old/middle"]);
}
