//! `ramshot map`.

use std::fs::{self, File};
use std::io::BufReader;

use super::forge::{self, Page};
use super::support::{PAGE, World, block, fails, memory, snapshot, two_blocks, yes};

const DATA: [u8; 3] = [0x0b, 0x5e, 0x99];
const ZERO: [u8; 3] = [0xe3, 0xe7, 0xea];
const IN_PARENT: [u8; 3] = [0xf0, 0xa0, 0x30];
const NOTHING: [u8; 3] = [0xff; 3];

/// Rows of pixels.
fn pixels(world: &World, name: &str) -> Vec<Vec<[u8; 3]>> {
    let decoder = png::Decoder::new(BufReader::new(File::open(world.path(name)).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    let width = usize::try_from(info.width).unwrap();
    bytes[..info.buffer_size()].as_chunks::<3>().0.chunks(width).map(<[_]>::to_vec).collect()
}

#[test]
fn a_pixel_is_a_page() {
    let world = World::new();
    yes(world.dir.path(), &["map", "snap", "map.png", "--width", "16", "--pages-per-cell", "1"]);
    let rows = pixels(&world, "map.png");
    // 40 pages in lines of 16, a line of nothing, 24 pages.
    assert_eq!(rows.len(), 3 + 1 + 2);
    let expected = |page: usize| if page.is_multiple_of(4) { ZERO } else { DATA };
    for page in 0..40 {
        assert_eq!(rows[page / 16][page % 16], expected(page), "page {page}");
    }
    assert_eq!(rows[2][8..], [NOTHING; 8]);
    assert_eq!(rows[3], [NOTHING; 16]);
    for page in 0..24 {
        assert_eq!(rows[4 + page / 16][page % 16], expected(page), "page {page} of the high block");
    }
}

#[test]
fn colours_mix_and_parents_have_their_own() {
    let world = World::new();
    let dir = world.dir.path();
    let mut pages = vec![Page::InParent; 64];
    pages[..8].fill(Page::Data(vec![1; PAGE]));
    pages[8..16].fill(Page::Zero);
    pages[16] = Page::Data(vec![1; PAGE]);
    forge::write(&world.path("increment"), 2, Some((1, 0)), &two_blocks(), &pages);
    yes(dir, &["map", "increment", "map.png", "--width", "8", "--pages-per-cell", "8"]);
    let rows = pixels(&world, "map.png");
    assert_eq!((rows[0][0], rows[0][1], rows[0][3]), (DATA, ZERO, IN_PARENT));
    let mixed = rows[0][2];
    assert!(mixed != IN_PARENT && mixed[0] < IN_PARENT[0] && mixed[0] > DATA[0], "{mixed:?}");
}

#[test]
fn a_large_image_is_shown_whole_by_default() {
    let world = World::new();
    snapshot(&world.path("large"), &[block("ram", 0, 20_000)], &memory(20_000, 1));
    let said = yes(world.dir.path(), &["map", "large", "map.png", "--width", "64"]);
    assert!(said.contains("a cell is 32 KiB (8 pages)"), "{said}");
    let rows = pixels(&world, "map.png");
    assert_eq!((rows.len(), rows[0].len()), (2500usize.div_ceil(64), 64));
    assert!(rows[0].iter().all(|pixel| *pixel == rows[0][0] && *pixel != DATA && *pixel != ZERO));
}

#[test]
fn the_drawing_is_labelled_and_cannot_be_broken_by_a_name() {
    let world = World::new();
    let dir = world.dir.path();
    snapshot(&world.path("odd"), &[block("</text><script>&\x01", 0, 8)], &memory(8, 1));
    yes(dir, &["map", "odd", "map.svg"]);
    let text = fs::read_to_string(world.path("map.svg")).unwrap();
    assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
    assert!(text.contains("&lt;/text&gt;&lt;script&gt;&amp;\\u{1}"), "{text}");
    assert!(!text.contains("<script>") && !text.contains('\x01'));
    assert!(text.contains("data 75.0 %") && text.contains("zero 25.0 %"), "{text}");
    assert!(text.contains("fill=\"#0b5e99\""));
    assert_eq!(text.matches("<text").count(), text.matches("</text>").count());
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let world = World::new();
    let dir = world.dir.path();
    fails(dir, 2, &["--format"], &["map", "snap", "map.gif"]);
    yes(dir, &["map", "snap", "map.gif", "--format", "png"]);
    fails(dir, 2, &["--replace"], &["map", "snap", "map.gif", "--format", "svg"]);
    fails(dir, 2, &["none/map.png"], &["map", "snap", "none/map.png"]);
    fails(dir, 2, &["No such file"], &["map", "nowhere", "map.png"]);
    fails(dir, 2, &["--width"], &["map", "snap", "map.png", "--width", "0"]);
    fails(dir, 1, &["no ramshot tail"], &["map", "map.gif", "map.png"]);
    assert_eq!(world.names(), ["map.gif", "snap"]);
}
