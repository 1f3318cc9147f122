//! `ramshot import`.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};

use super::support::{PAGE, World, block, fails, json, snapshot, yes};

/// The memory of `world` as a Firecracker would have written it.
fn memory_file(world: &World) {
    fs::write(world.path("mem"), &world.flat).unwrap();
}

const REGIONS: [&str; 4] = ["--region", "low=0+160K", "--region", "high=4G+96K"];

#[test]
fn a_memory_file_becomes_a_snapshot_of_the_same_memory() {
    let world = World::new();
    let dir = world.dir.path();
    memory_file(&world);
    fs::write(world.path("vmstate"), b"vCPUs").unwrap();
    yes(dir, &[&["import", "mem", "new", "--device-state", "vmstate"], &REGIONS[..]].concat());
    yes(dir, &["verify", "new"]);
    yes(dir, &["diff", "snap", "new"]);
    let value = json(&yes(dir, &["inspect", "--json", "new"]));
    assert_eq!((&value["device_state_bytes"], &value["data_pages"]), (&5.into(), &48.into()));
    assert_eq!(value["blocks"][1]["guest_address"], "0x100000000");
    yes(dir, &["export", "--format", "raw", "new", "back"]);
    assert!(fs::read(world.path("back")).unwrap() == world.flat);
}

#[test]
fn a_layout_is_read_from_json_also_from_inspect() {
    let world = World::new();
    let dir = world.dir.path();
    memory_file(&world);
    fs::write(world.path("inspected"), yes(dir, &["inspect", "--json", "snap"])).unwrap();
    let by_hand = r#"[{"guest_address": 0, "used": "160K", "name": "low"},
                      {"guest_address": "0x100000000", "used": 98304, "offset": "0x28000", "name": "high"}]"#;
    fs::write(world.path("by-hand"), by_hand).unwrap();
    for layout in ["inspected", "by-hand"] {
        yes(dir, &["import", "mem", "new", "--layout", layout, "--replace"]);
        yes(dir, &["diff", "snap", "new"]);
    }
    for (text, words) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("{}", "guest_address"),
        ("[1]", "guest_address"),
        ("[]", "no RAM layout"),
        (r#"[{"guest_address": "x", "used": 4096}]"#, "\"x\""),
        (r#"[{"guest_address": -1, "used": 4096}]"#, "numbers or strings"),
    ] {
        fs::write(world.path("wrong"), text).unwrap();
        fails(
            dir,
            2,
            &["\"wrong\"", words].map(|w| if text == "[]" { "no RAM layout" } else { w }),
            &["import", "mem", "x", "--layout", "wrong"],
        );
    }
    fails(dir, 2, &["No such file"], &["import", "mem", "x", "--layout", "nowhere"]);
    assert!(!world.path("x").exists());
}

#[test]
fn regions_may_lie_anywhere_in_a_sparse_file() {
    let world = World::new();
    let dir = world.dir.path();
    let mut file = File::create(world.path("mem")).unwrap();
    // Not on a page: the page that it starts in has data.
    file.seek(SeekFrom::Start((48 << 20) + 5000)).unwrap();
    file.write_all(&[7; 10_000]).unwrap();
    file.set_len(64 << 20).unwrap();
    yes(dir, &["import", "mem", "new", "--region", "b=1G+32M@32M", "--region", "a=0+32M@0"]);
    let value = json(&yes(dir, &["inspect", "--json", "new"]));
    assert_eq!((&value["pages"], &value["data_pages"]), (&(16384).into(), &3.into()));
    assert_eq!(value["blocks"][0]["data_pages"], 3);
    yes(dir, &["export", "--format", "raw", "new", "back"]);
    let (mem, back) = (fs::read(world.path("mem")).unwrap(), fs::read(world.path("back")).unwrap());
    assert!(back[..32 << 20] == mem[32 << 20..] && back[32 << 20..] == mem[..32 << 20]);
}

#[test]
fn a_layout_that_does_not_fit_is_refused() {
    let world = World::new();
    let dir = world.dir.path();
    memory_file(&world);
    let import = |code, words: &[&str], regions: &[&str]| {
        let regions: Vec<&str> = regions.iter().flat_map(|region| ["--region", region]).collect();
        fails(dir, code, words, &[&["import", "mem", "new"], regions.as_slice()].concat());
    };
    import(2, &["0x41000", "0x40000", "not that of this file"], &["0+260K"]);
    import(2, &["0x1000 bytes beyond", "--ignore-rest"], &["0+252K"]);
    import(2, &["overlap"], &["0+128K", "64K+128K"]);
    import(2, &["multiple of"], &["0+1000"]);
    import(2, &["multiple of 4096"], &["0+4K@12"]);
    import(2, &["ADDRESS+LENGTH"], &["256K"]);
    import(2, &["unit"], &["0+256Q"]);
    import(2, &["--region"], &[]);
    yes(dir, &["import", "mem", "part", "--region", "low=0+160K", "--ignore-rest"]);
    let mut expected = world.flat.clone();
    expected.truncate(40 * PAGE);
    snapshot(&world.path("low"), &[block("low", 0, 40)], &expected);
    yes(dir, &["diff", "part", "low"]);
    assert_eq!(world.names(), ["low", "mem", "part", "snap"]);
}

#[test]
fn files_in_the_way_are_named() {
    let world = World::new();
    let dir = world.dir.path();
    memory_file(&world);
    let import = |words: &[&str], args: &[&str]| fails(dir, 2, words, &[&["import"], args, &REGIONS[..]].concat());
    import(&["\"snap\"", "exists"], &["mem", "snap"]);
    import(&["\"none\"", "not there"], &["mem", "none/new"]);
    import(&["a directory"], &["mem", "."]);
    import(&["\"nowhere\"", "No such file"], &["nowhere", "new"]);
    import(&["no regular file"], &[".", "new"]);
    import(&["\"gone\"", "No such file"], &["mem", "new", "--device-state", "gone"]);
    assert_eq!(world.names(), ["mem", "snap"]);
    yes(dir, &["verify", "snap"]);
}
