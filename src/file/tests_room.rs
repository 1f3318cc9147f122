//! Room made ahead of the pages: what was not needed is a hole again.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use ramshot_core::{PageId, Run};

use super::tests_support::{digests, some_ram, table};
use super::{FileSink, FileSinkOptions};
use crate::sink::{ImageMeta, ImageSink, Piece};

/// Blocks of 512 bytes that `path` takes on the disk.
fn disk_blocks(path: &std::path::Path) -> u64 {
    std::os::linux::fs::MetadataExt::st_blocks(&std::fs::metadata(path).unwrap())
}

#[test]
fn room_that_was_not_needed_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let flat = some_ram(1000, 3);
    let mut sizes = Vec::new();
    for room in [false, true] {
        let path = dir.path().join(format!("{room}.ramshot"));
        // Through the page cache.
        let options = FileSinkOptions { direct: false, ..FileSinkOptions::default() };
        let sink = FileSink::create(&path, &table(1000), &options).unwrap();
        if room {
            assert!(sink.make_room(Run::new(PageId(0), 0)));
            assert!(sink.make_room(Run::new(PageId(100), 300)) && sink.make_room(Run::new(PageId(900), 500)));
        }
        let digests = digests(&flat);
        sink.write(&[Piece { first: PageId(0), bytes: &flat, digests: &digests }]).unwrap();
        Box::new(sink).commit(&ImageMeta::default()).unwrap();
        assert!(disk_blocks(&path) * 512 / 4096 < 1000, "zero pages are holes");
        sizes.push(disk_blocks(&path));
        assert_eq!(std::fs::read(&path).unwrap()[..flat.len()], flat);
    }
    // File systems keep a block or two of their own.
    assert!(sizes[0].abs_diff(sizes[1]) <= 64, "{sizes:?}");
}
