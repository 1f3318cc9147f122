//! `ramshot export`.

use std::fs::{self, File};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ramshot::file::next_data;
use ramshot::{AnonymousRam, GuestRam, Options, Pending};

use super::forge::{self, Page};
use super::support::{
    PAGE, World, block, fails, flip, increment, installed, json, memory, run, skipped, snapshot, two_blocks, yes,
};

#[test]
fn raw_is_the_memory_and_zero_is_a_hole() {
    let world = World::new();
    let dir = world.dir.path();
    yes(dir, &["export", "--format", "raw", "snap", "raw"]);
    assert!(fs::read(world.path("raw")).unwrap() == world.flat);

    // Large enough for any file system's blocks: 1 MiB of data behind 16 MiB of nothing.
    let mut flat = vec![0; 17 << 20];
    flat[16 << 20..].fill(3);
    snapshot(&world.path("sparse"), &[block("ram", 0, flat.len() / PAGE)], &flat);
    yes(dir, &["export", "--format", "raw", "sparse", "raw2"]);
    assert!(fs::read(world.path("raw2")).unwrap() == flat);
    // Where the file system knows holes, the snapshot has one there too.
    let data_at = |name: &str| next_data(&File::open(world.path(name)).unwrap(), 0).unwrap();
    assert_eq!(data_at("raw2"), data_at("sparse"));
    let stock = Command::new("cmp").arg(world.path("raw2")).arg(world.path("sparse")).args(["-n", "17825792"]).status();
    assert!(stock.map_or(true, |status| status.success()), "cmp says that flat RAM and raw image differ");
}

#[test]
fn an_increment_needs_its_parents() {
    let world = World::new();
    let dir = world.dir.path();
    fs::create_dir(world.path("old")).unwrap();
    let base = forge::write(&world.path("old/base"), 1, None, &two_blocks(), &forge::pages(&world.flat));
    let mut pages = vec![Page::InParent; 64];
    pages[3] = Page::Data(vec![9; PAGE]);
    pages[5] = Page::Zero;
    let middle = forge::write(&world.path("old/middle"), 2, Some((1, base)), &two_blocks(), &pages);
    let mut newer = vec![Page::InParent; 64];
    newer[5] = Page::Data(vec![8; PAGE]);
    newer[63] = Page::Zero;
    forge::write(&world.path("top"), 3, Some((2, middle)), &two_blocks(), &newer);

    let export = |more: &[&str]| run(dir, &[&["export", "--format", "raw", "top", "out"], more].concat());
    for (more, missing) in [(&[][..], "02"), (&["--parent", "old/base"], "02")] {
        let ran = export(more);
        assert!(ran.code == 2 && ran.err.contains(&missing.repeat(16)) && ran.err.contains("--parent"), "{ran:?}");
    }
    // The parent's own parent lies beside it.
    assert_eq!(export(&["--parent", "old/middle"]).code, 0);
    let mut expected = world.flat.clone();
    expected[3 * PAGE..4 * PAGE].fill(9);
    expected[5 * PAGE..6 * PAGE].fill(8);
    expected[63 * PAGE..].fill(0);
    assert!(fs::read(world.path("out")).unwrap() == expected);
}

#[test]
fn an_increment_of_the_library_is_put_together() {
    let world = World::new();
    let dir = world.dir.path();
    let (nines, zeros) = ([9; PAGE], [0; PAGE]);
    increment(&world.path("child"), &two_blocks(), &world.path("snap"), &[(3, &nines), (5, &zeros), (63, &nines)]);
    yes(dir, &["export", "child", "--parent", "snap", "core", "--format", "elf"]);
    yes(dir, &["export", "child", "raw", "--format", "raw"]);
    let mut expected = world.flat.clone();
    expected[3 * PAGE..4 * PAGE].fill(9);
    expected[5 * PAGE..6 * PAGE].fill(0);
    expected[63 * PAGE..].fill(9);
    assert!(fs::read(world.path("raw")).unwrap() == expected);
    assert!(fs::read(world.path("core")).unwrap().ends_with(&expected), "the RAM is the end of the core file");
    let differ = json(&run(dir, &["diff", "--json", "snap", "child"]).out);
    assert_eq!((&differ["blocks"][0]["differ"], &differ["blocks"][1]["differ"]), (&2.into(), &1.into()));
    let states = json(&yes(dir, &["inspect", "--json", "child"]));
    assert_eq!(
        (&states["data_pages"], &states["zero_pages"], &states["in_parent_pages"]),
        (&2.into(), &1.into(), &61.into())
    );
    yes(dir, &["verify", "child"]);
}

#[test]
fn nothing_is_replaced_or_left_behind() {
    let world = World::new();
    let dir = world.dir.path();
    fs::write(world.path("out"), b"precious").unwrap();
    fs::create_dir(world.path("folder")).unwrap();
    for format in ["raw", "elf"] {
        fails(dir, 2, &["\"out\"", "--replace"], &["export", "--format", format, "snap", "out"]);
        fails(dir, 2, &["\"none/out\""], &["export", "--format", format, "snap", "none/out"]);
        fails(dir, 2, &["names no file"], &["export", "--format", format, "snap", ".."]);
        fails(dir, 2, &["not a regular file"], &["export", "--format", format, "snap", "folder"]);
    }
    fs::remove_dir(world.path("folder")).unwrap();
    assert_eq!(fs::read(world.path("out")).unwrap(), b"precious");
    fs::copy(world.path("snap"), world.path("bad")).unwrap();
    flip(&world.path("bad"), 63 * 4096);
    let args = ["export", "--format", "raw", "bad", "out", "--replace"];
    fails(dir, 1, &["page 63", "damaged"], &args);
    assert_eq!(fs::read(world.path("out")).unwrap(), b"precious");
    assert_eq!(world.names(), ["bad", "out", "snap"]);
    yes(dir, &["export", "--format", "raw", "snap", "out", "--replace"]);
    assert!(fs::read(world.path("out")).unwrap() == world.flat);
    fails(dir, 2, &["--machine"], &["export", "--format", "raw", "--machine", "aarch64", "snap", "out2"]);
    fails(dir, 2, &["No such file"], &["export", "--format", "raw", "nowhere", "out2"]);
    fails(dir, 2, &["--format"], &["export", "snap", "out2"]);
    assert_eq!(world.names(), ["bad", "out", "snap"]);
}

#[test]
fn elf_has_a_program_header_for_each_block() {
    let world = World::new();
    let dir = world.dir.path();
    let core = |machine: &str| {
        yes(dir, &["export", "--format", "elf", "--machine", machine, "snap", "core", "--replace"]);
        fs::read(world.path("core")).unwrap()
    };
    let bytes = core("aarch64");
    assert_eq!(u16::from_le_bytes([bytes[18], bytes[19]]), 183);
    let bytes = core("x86-64");
    assert_eq!((&bytes[..6], bytes[16], bytes[18]), (&b"\x7fELF\x02\x01"[..], 4, 62));
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(u16::from_le_bytes([bytes[56], bytes[57]]), 3, "PT_NOTE and two PT_LOAD");
    for (number, (guest, flat)) in
        [(0, &world.flat[..40 * PAGE]), (1u64 << 32, &world.flat[40 * PAGE..])].iter().enumerate()
    {
        let header = 64 + 56 * (number + 1);
        assert_eq!((bytes[header], word(header + 16), word(header + 24)), (1, *guest, *guest));
        let (at, len) = (usize::try_from(word(header + 8)).unwrap(), usize::try_from(word(header + 32)).unwrap());
        assert!(at % PAGE == 0 && bytes[at..at + len] == **flat, "block {number}");
        assert_eq!(word(header + 40), len as u64);
    }
    if installed("readelf") {
        let said = Command::new("readelf").args(["-lW", "core"]).current_dir(dir).output().unwrap();
        let (text, warned) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        assert!(said.status.success() && warned.is_empty(), "{warned}");
        let loads: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|words| words.first() == Some(&"LOAD"))
            .collect();
        assert_eq!(loads[0][2..6], ["0x0000000000000000", "0x0000000000000000", "0x028000", "0x028000"], "{text}");
        assert_eq!(loads[1][2..6], ["0x0000000100000000", "0x0000000100000000", "0x018000", "0x018000"], "{text}");
        assert_eq!(loads.len(), 2);
    }
}

#[test]
fn the_note_of_a_linux_guest_is_found() {
    let world = World::new();
    let dir = world.dir.path();
    let description = b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\n";
    let mut flat = memory(16, 9);
    let page = &mut flat[9 * PAGE..10 * PAGE];
    page.fill(0);
    page[..4].copy_from_slice(&11u32.to_le_bytes());
    page[4..8].copy_from_slice(&u32::try_from(description.len()).unwrap().to_le_bytes());
    page[12..23].copy_from_slice(b"VMCOREINFO\0");
    page[24..24 + description.len()].copy_from_slice(description);
    snapshot(&world.path("linux"), &[block("ram", 0, 16)], &flat);
    yes(dir, &["export", "--format", "elf", "--machine", "x86-64", "linux", "core"]);
    let bytes = fs::read(world.path("core")).unwrap();
    let word = |at: usize| usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap();
    let (at, len) = (word(64 + 8), word(64 + 32));
    assert_eq!((bytes[64], len), (4, 24 + description.len().next_multiple_of(4)));
    assert_eq!(bytes[at + 24..at + 24 + description.len()], *description);
    if installed("readelf") {
        let said = Command::new("readelf").args(["-n", "core"]).current_dir(dir).output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(said.status.success() && text.contains("VMCOREINFO"), "{text}");
    }
}

/// What gdb, which knows nothing of us, reads as a 64-bit number at this address.
fn gdb_reads(world: &World, core: &str, address: u64) -> Option<u64> {
    if !installed("gdb") {
        return None;
    }
    let said = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", &format!("core-file {core}"), "-ex", &format!("x/gx {address:#x}")])
        .current_dir(world.dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with(&format!("{address:#x}:")));
    let line = line.unwrap_or_else(|| panic!("gdb read nothing at {address:#x}: {text} {:?}", said.stderr));
    let number = line.split_whitespace().last().unwrap().trim_start_matches("0x");
    Some(u64::from_str_radix(number, 16).unwrap())
}

#[test]
fn gdb_reads_guest_memory_by_address() {
    let world = World::new();
    yes(world.dir.path(), &["export", "--format", "elf", "snap", "core"]);
    for (address, page) in [(0x1000, 1usize), (0x27ff8, 39), (0x1_0000_1000, 41), (0x1_0000_0000, 40)] {
        let at = page * PAGE + usize::try_from(address % 4096).unwrap();
        let expected = u64::from_le_bytes(world.flat[at..at + 8].try_into().unwrap());
        let Some(found) = gdb_reads(&world, "core", address) else { return };
        assert_eq!(found, expected, "{address:#x}");
    }
}

#[test]
fn gdb_reads_the_counter_of_a_live_snapshot_as_it_was() {
    let world = World::new();
    let Ok(memory) = AnonymousRam::new(4 << 20) else {
        skipped("no live snapshot on this system");
        return;
    };
    let memory = Arc::new(memory);
    let ram = Arc::new(GuestRam::from_anonymous(Arc::clone(&memory)).unwrap());
    let prepared = match ramshot::prepare(&ram, world.path("live"), &Options::default()) {
        Ok(prepared) => prepared,
        Err(error) => {
            skipped(&format!("the live snapshot that gdb reads: {error}"));
            return;
        }
    };
    let counter = &memory.words()[0x20_1008 / 8];
    counter.store(0x1122_3344, Ordering::Relaxed);
    let live = prepared.begin(Pending::All, Vec::new()).unwrap();
    // It counts on while the image is written.
    for _ in 0..1000 {
        counter.fetch_add(1, Ordering::Relaxed);
    }
    live.finish().unwrap();
    assert_eq!(counter.load(Ordering::Relaxed), 0x1122_3344 + 1000);
    yes(world.dir.path(), &["export", "--format", "elf", "live", "core"]);
    let value = json(&yes(world.dir.path(), &["inspect", "--json", "live"]));
    assert!(value["data_pages"].as_u64().unwrap() >= 1);
    if let Some(found) = gdb_reads(&world, "core", 0x20_1008) {
        assert_eq!(found, 0x1122_3344);
    }
}
