//! Chains of any shape: what is read and restored is what a naive model says.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

use std::time::Instant;

use proptest::prelude::*;
use ramshot_core::{BlockTable, PageId, RamBlock};

use super::Chain;
use crate::file::format::PAGE;
use crate::file::source::extents;
use crate::file::tests_round_trip::{Content, blocks};
use crate::file::tests_support::{Layer, TestRam, memory, read_all, table, write_chain, write_layer};
use crate::file::{PageSource, PageState, RestoreError, SnapshotFile};

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![3 => Just(Content::NeverGiven), 2 => Just(Content::Zero), 3 => (1..=255u8).prop_map(Content::Data)]
}

/// Layers of `pages` pages each, made of runs.
pub(in crate::file) fn layers(pages: usize, count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Layer>> {
    let runs = prop::collection::vec((content(), 1..(pages / 4).max(2)), pages);
    let layer = runs.prop_map(move |runs| {
        runs.into_iter().flat_map(|(content, n)| vec![content; n]).take(pages).collect::<Layer>()
    });
    prop::collection::vec(layer, count)
}

/// A layout and a chain of up to ten snapshots.
pub(in crate::file) fn world() -> impl Strategy<Value = (Vec<RamBlock>, Vec<Layer>)> {
    blocks().prop_flat_map(|blocks| {
        let pages = usize::try_from(BlockTable::new(&blocks).unwrap().pages()).unwrap();
        (Just(blocks), layers(pages, 1..11))
    })
}

fn check(blocks: &[RamBlock], layers: &[Layer], window: usize) {
    let dir = tempfile::tempdir().unwrap();
    let table = BlockTable::new(blocks).unwrap();
    let path = write_chain(dir.path(), &table, layers);
    let flat = memory(layers);

    let chain = Chain::open(&path).unwrap();
    assert_eq!(chain.depth(), layers.len());
    assert_eq!(chain.device_state(), format!("device {path:?}").as_bytes());
    assert_eq!(read_all(&chain), flat);
    chain.check_whole().unwrap();
    assert!(extents(&chain).all(|extent| extent.is_ok()));
    check_extents(&chain, layers);
    check_windows(&chain, &flat, window);

    // Each file knows what it has: a lone increment with pages elsewhere is refused, whoever asks.
    for file in chain.files() {
        assert_eq!(file.check_whole().is_ok(), file.in_parent_pages() == 0);
        let found: Vec<bool> = extents(file).map(|extent| extent.is_ok()).collect();
        assert_eq!(found.iter().all(|&ok| ok), file.in_parent_pages() == 0);
        let restored = file.restore_into(&table, &TestRam::new(&table, 0), 1);
        assert_eq!(restored.is_ok(), file.in_parent_pages() == 0);
    }

    let ram = TestRam::new(&table, 0);
    let report = chain.restore_into(&table, &ram, 3).unwrap();
    assert_eq!(report.data_pages, chain.data_pages());
    assert_eq!(report.data_pages + report.zero_pages, table.pages());
    for block in chain.blocks().iter().filter(|block| block.pages() > 0) {
        let from = usize::try_from(block.first_page.0).unwrap() * PAGE;
        let bytes = ram.bytes(block.name);
        assert!(bytes == flat[from..from + bytes.len()], "block {:?}", block.name);
    }
    let verified = chain.verify(2, &mut |_, _| {}).unwrap();
    assert_eq!(verified.data_pages + verified.other_pages, table.pages() * layers.len() as u64);
}

/// Which layer has the data of a page, by the model; `None`: it is zero.
fn owner(layers: &[Layer], page: usize) -> Option<usize> {
    let last = layers.iter().rposition(|layer| layer[page] != Content::NeverGiven)?;
    matches!(layers[last][page], Content::Data(_)).then_some(last)
}

/// From every page on, the extent is exactly as long as it can be.
fn check_extents(chain: &Chain, layers: &[Layer]) {
    let pages = layers[0].len();
    for page in 0..pages {
        let owner_here = owner(layers, page);
        let end = (page..pages).find(|&p| owner(layers, p) != owner_here).unwrap_or(pages);
        let extent = chain.extent(PageId(page as u64)).unwrap();
        let state = if owner_here.is_some() { PageState::Data } else { PageState::Zero };
        assert_eq!((extent.state, extent.run.first), (state, PageId(page as u64)));
        assert_eq!(extent.run.end(), PageId(end as u64), "from page {page}");
    }
    assert_eq!(chain.extent(PageId(pages as u64)), None);
    assert_eq!(chain.extent(PageId(u64::MAX)), None);
}

/// Windows from every page on are read if and only if all of their pages have data, in whichever files.
fn check_windows(chain: &Chain, flat: &[u8], window: usize) {
    let pages = flat.len() / PAGE;
    for page in 0..pages {
        let count = window.min(pages - page);
        let mut bytes = vec![0; count * PAGE];
        let all = (page..page + count).all(|p| chain.extent(PageId(p as u64)).unwrap().state == PageState::Data);
        assert_eq!(chain.read_run(PageId(page as u64), &mut bytes).is_ok(), all);
        assert!(!all || bytes == flat[page * PAGE..][..bytes.len()]);
    }
    chain.read_run(PageId(pages as u64), &mut [0; PAGE]).unwrap_err();
    chain.read_run(PageId(u64::MAX), &mut [0; PAGE]).unwrap_err();
    chain.read_run(PageId(0), &mut [0; PAGE - 1]).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_chain_is_what_the_model_says((blocks, layers) in world(), window in 1..9usize) {
        check(&blocks, &layers, window);
    }
}

/// Every page once in each state over each other, and through increments that say nothing of it.
#[test]
fn every_state_over_every_state() {
    let kinds = [Content::NeverGiven, Content::Zero, Content::Data(7)];
    let mut layers: Vec<Layer> = vec![Vec::new(); 4];
    for page in 0..81 {
        let mut digits = page;
        for layer in &mut layers {
            let kind = kinds[digits % 3];
            digits /= 3;
            // Other bytes in each layer.
            let number = u8::try_from(digits % 200).unwrap();
            layer.push(if let Content::Data(seed) = kind { Content::Data(seed + number) } else { kind });
        }
    }
    check(&[crate::file::tests_support::block("ram", 0, 81)], &layers, 2);
}

#[test]
fn a_hundred_increments() {
    let dir = tempfile::tempdir().unwrap();
    let pages = 4096;
    let mut layers: Vec<Layer> =
        vec![(0..pages).map(|page| Content::Data(u8::try_from(page % 255).unwrap())).collect()];
    for number in 1..=100usize {
        let mut layer = vec![Content::NeverGiven; pages];
        for k in 0..40 {
            let page = (number * 7919 + k * 104_729) % pages;
            layer[page] = if k % 5 == 0 { Content::Zero } else { Content::Data(u8::try_from(number).unwrap()) };
        }
        layers.push(layer);
    }
    let path = write_chain(dir.path(), &table(pages as u64), &layers);
    let start = Instant::now();
    let chain = Chain::open(&path).unwrap();
    println!("101 snapshots opened in {:?}, {} data pages", start.elapsed(), chain.data_pages());
    assert_eq!(chain.depth(), 101);
    assert!(read_all(&chain) == memory(&layers));
}

#[test]
fn a_lone_increment_is_no_source() {
    let dir = tempfile::tempdir().unwrap();
    let table = table(4);
    let full = vec![Content::Data(1); 4];
    let mut change = vec![Content::NeverGiven; 4];
    change[0] = Content::Data(2);
    let path = write_chain(dir.path(), &table, &[full, change]);
    let file = SnapshotFile::open(&path).unwrap();
    assert!(PageSource::extent(&file, PageId(0)).is_some());
    assert_eq!(PageSource::extent(&file, PageId(1)), None);
    // Who does not ask beforehand runs into the first page that is not there.
    let error = extents(&file).find_map(Result::err).unwrap();
    assert!(matches!(error, RestoreError::Incomplete { page: PageId(1), .. }), "{error}");
    assert!(error.to_string().contains("Chain::open"), "{error}");
    let error = file.restore_into(&table, &TestRam::new(&table, 0), 1).unwrap_err();
    assert!(matches!(error, RestoreError::NeedsParent { pages: 3, .. }), "{error}");
    assert!(error.to_string().contains("Chain::open"), "{error}");
}

/// An increment that was given everything needs its parent by name, not by content.
#[test]
fn a_zero_page_hides_data_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let table = table(3);
    let base = write_layer(&dir.path().join("base"), &table, &vec![Content::Data(9); 3], None);
    let zeros = vec![Content::Zero, Content::NeverGiven, Content::Zero];
    write_layer(&dir.path().join("child"), &table, &zeros, Some(base));
    let chain = Chain::open(dir.path().join("child")).unwrap();
    assert_eq!(chain.data_pages(), 1);
    let ram = TestRam::new(&table, 0x55);
    chain.restore_into(&table, &ram, 1).unwrap();
    let bytes = ram.bytes(table.blocks()[0].name);
    // Not touched: the target is fresh.
    assert!(bytes[..PAGE].iter().chain(&bytes[2 * PAGE..]).all(|&byte| byte == 0x55));
}
