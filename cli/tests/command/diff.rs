//! `ramshot diff`.

use std::fs;

use super::forge::{self, Page};
use super::support::{PAGE, World, block, fails, flip, json, memory, run, snapshot, two_blocks, yes};

/// Pages, as numbers within the image, that the JSON says differ (or are unknown).
fn differing(value: &serde_json::Value, known: bool) -> Vec<u64> {
    let mut pages = Vec::new();
    for (block, base) in value["blocks"].as_array().unwrap().iter().zip([0, 40]) {
        let address = |value: &serde_json::Value| {
            u64::from_str_radix(value["guest_address"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
        };
        for run in block["runs"].as_array().unwrap().iter().filter(|run| run["known"] == known) {
            let first = base + (address(run) - address(block)) / 4096;
            pages.extend(first..first + run["pages"].as_u64().unwrap());
        }
    }
    pages
}

#[test]
fn exactly_the_pages_that_differ_are_named() {
    let world = World::new();
    let dir = world.dir.path();
    yes(dir, &["diff", "snap", "snap"]);
    let mut other = world.flat.clone();
    // A byte, a page that was zero, a page that becomes zero, across blocks.
    other[PAGE * 3 + 5] ^= 1;
    other[PAGE * 8] = 1;
    other[PAGE * 10..PAGE * 11].fill(0);
    for page in 38..43 {
        other[PAGE * page + 4095] ^= 0x80;
    }
    snapshot(&world.path("other"), &two_blocks(), &other);
    let expected = [3, 8, 10, 38, 39, 40, 41, 42];
    for args in [&["diff", "--json", "snap", "other"][..], &["diff", "--json", "--checksums", "other", "snap"]] {
        let ran = run(dir, args);
        let value = json(&ran.out);
        assert_eq!((ran.code, &value["same"]), (1, &false.into()));
        assert_eq!(differing(&value, true), expected);
        assert_eq!(differing(&value, false), [0u64; 0]);
        assert_eq!(value["device_state_same"], true);
    }
    let ran = run(dir, &["diff", "--pages", "snap", "other"]);
    assert!(ran.out.contains("  0x26000+0x2000 differ (2 pages)\n"), "{}", ran.out);
    assert!(ran.out.contains("  0x100000000+0x3000 differ (3 pages)\n"), "{}", ran.out);
    assert!(ran.out.contains(&format!("  0x000000000000  ...#....#.#{}##\n", ".".repeat(27))), "{}", ran.out);
}

/// `page` with other bytes and the same CRC-32C: the generator polynomial is added somewhere.
fn same_checksum(page: &[u8]) -> Vec<u8> {
    let mut other = page.to_vec();
    let generator = 0x1_1edc_6f41_u64;
    for bit in 0..33 {
        if generator >> (32 - bit) & 1 == 1 {
            // The first bit of a byte, as CRC-32C counts them, is its lowest.
            other[100 + bit / 8] ^= 1 << (bit % 8);
        }
    }
    assert_eq!(crc32c::crc32c(&other), crc32c::crc32c(page));
    other
}

#[test]
fn equal_checksums_are_not_taken_for_equal_pages() {
    let world = World::new();
    let dir = world.dir.path();
    let mut other = world.flat.clone();
    let page = same_checksum(&other[PAGE..2 * PAGE]);
    other[PAGE..2 * PAGE].copy_from_slice(&page);
    // Not zero, and with the checksum of zeros.
    let zeros = same_checksum(&[0; PAGE]);
    other[4 * PAGE..5 * PAGE].copy_from_slice(&zeros);
    snapshot(&world.path("other"), &two_blocks(), &other);
    let ran = run(dir, &["diff", "--json", "snap", "other"]);
    assert_eq!((ran.code, differing(&json(&ran.out), true)), (1, vec![1, 4]));
    assert!(yes(dir, &["diff", "--json", "--checksums", "snap", "other"]).contains("\"same\": true"));
}

#[test]
fn increments_are_followed_and_what_is_not_known_is_unknown() {
    let world = World::new();
    let dir = world.dir.path();
    fs::create_dir(world.path("old")).unwrap();
    let base = forge::write(&world.path("old/base"), 1, None, &two_blocks(), &forge::pages(&world.flat));
    let mut pages = vec![Page::InParent; 64];
    pages[3] = Page::Data(vec![9; PAGE]);
    pages[5] = Page::Zero;
    pages[6] = Page::Data(world.flat[6 * PAGE..7 * PAGE].to_vec());
    pages[8] = Page::Zero;
    let a = forge::write(&world.path("a"), 2, Some((1, base)), &two_blocks(), &pages);
    pages[50] = Page::Data(vec![7; PAGE]);
    forge::write(&world.path("b"), 3, Some((1, base)), &two_blocks(), &pages);
    forge::write(&world.path("on-a"), 4, Some((2, a)), &two_blocks(), &vec![Page::InParent; 64]);

    let ran = run(dir, &["diff", "--json", "old/base", "a"]);
    assert_eq!((ran.code, differing(&json(&ran.out), true)), (1, vec![3, 5]));
    // Both without their parent: what both have from it is the same, the rest of page 50 nobody knows.
    let ran = run(dir, &["diff", "--json", "a", "b"]);
    let value = json(&ran.out);
    assert_eq!((ran.code, differing(&value, true), differing(&value, false)), (1, vec![], vec![50]));
    let ran = run(dir, &["diff", "--json", "a", "b", "--parent", "old/base"]);
    let value = json(&ran.out);
    assert_eq!((ran.code, differing(&value, true), differing(&value, false)), (1, vec![50], vec![]));
    yes(dir, &["diff", "a", "on-a", "--parent", "old/base"]);
    // The one has pages in a parent that nobody gave; four are in that of the other, which lies beside it.
    let ran = run(dir, &["diff", "--json", "snap", "on-a"]);
    assert_eq!((ran.code, differing(&json(&ran.out), false).len()), (1, 60));
}

#[test]
fn other_layouts_are_said() {
    let world = World::new();
    let dir = world.dir.path();
    let other = [block("low", 0, 30), block("high", 2 << 32, 24), block("rom", 0xf000_0000, 10)];
    let flat = [&world.flat[..30 * PAGE], &world.flat[40 * PAGE..], &memory(10, 3)].concat();
    snapshot(&world.path("other"), &other, &flat);
    let ran = run(dir, &["diff", "snap", "other"]);
    assert_eq!(ran.code, 1);
    for words in
        ["block \"rom\" is in B only", "\"high\" is at 0x100000000 in A and at 0x200000000", "\"low\" has 0x28000"]
    {
        assert!(ran.out.contains(words), "{}", ran.out);
    }
    assert_eq!(json(&run(dir, &["diff", "--json", "snap", "other"]).out)["blocks"][0]["differ"], 0);
}

#[test]
fn damage_is_not_a_difference() {
    let world = World::new();
    let dir = world.dir.path();
    std::fs::copy(world.path("snap"), world.path("bad")).unwrap();
    // Same checksums, so it is read; and it is not the same file.
    let mut pages = forge::pages(&world.flat);
    pages[0] = Page::Data(vec![1; PAGE]);
    forge::write(&world.path("other"), 1, None, &two_blocks(), &pages);
    flip(&world.path("bad"), 9 * 4096);
    fails(dir, 2, &["page 9", "damaged"], &["diff", "bad", "other"]);
    fails(dir, 2, &["No such file"], &["diff", "snap", "nowhere"]);
    fails(dir, 2, &["a directory"], &["diff", ".", "snap"]);
    fails(dir, 2, &["<B>"], &["diff", "snap"]);
}
