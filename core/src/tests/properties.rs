//! Any layout, any order of events, against naive oracles.

use std::{collections::VecDeque, vec, vec::Vec};

use proptest::prelude::*;

use super::rig::{Script, core_of, part};
use crate::*;

/// Blocks of up to 12 pages with any page size, treatment and tail.
fn parts() -> impl Strategy<Value = Vec<RamBlock>> {
    let treatment = prop_oneof![
        4 => Just(Treatment::Tracked),
        1 => Just(Treatment::ReadOnly),
        1 => Just(Treatment::InPause),
        1 => Just(Treatment::Ignored),
    ];
    let one = (1u64..6, 0u32..3, 0u64..3, treatment).prop_map(|(used, order, tail, treatment)| {
        let unit = 1 << order;
        let page_size = unit * PAGE_SIZE;
        RamBlock { len: (used + tail) * page_size, ..part(used * unit, page_size, treatment) }
    });
    prop::collection::vec(one, 1..7)
        .prop_filter("something to save", |parts| parts.iter().any(|p| p.treatment != Treatment::Ignored))
}

/// What the table says, page by page: host and guest address of each page of the image, in order.
fn naive(table: &BlockTable) -> Vec<(u64, u64, usize)> {
    let mut pages = Vec::new();
    for (index, block) in table.blocks().iter().enumerate() {
        if block.treatment != Treatment::Ignored {
            let offsets = (0..block.used).step_by(4096);
            pages.extend(offsets.map(|offset| (block.host.0 + offset, block.guest.0 + offset, index)));
        }
    }
    pages
}

proptest! {
    #[test]
    fn translation_agrees_with_a_list_of_pages(parts in parts(), at in any::<u64>(), len in 0u64..0x400_0000) {
        let table = super::rig::table(&parts);
        let pages = naive(&table);
        prop_assert_eq!(table.pages(), pages.len() as u64);
        // Probes near every block's ends, and one anywhere.
        let mut probes = vec![at];
        for block in table.blocks() {
            for edge in [block.host.0, block.host.0 + block.used, block.host.0 + block.len, block.guest.0, block.guest.0 + block.used] {
                probes.extend([edge.saturating_sub(1), edge, edge + 1, edge + at % 0x8000]);
            }
        }
        for &probe in &probes {
            let inside = |start: u64| start <= probe && probe - start < PAGE_SIZE;
            let id = |found: Option<usize>| found.map(|page| PageId(page as u64));
            prop_assert_eq!(table.page_at(HostAddr(probe)), id(pages.iter().position(|page| inside(page.0))));
            prop_assert_eq!(table.page_at_guest(GuestAddr(probe)), id(pages.iter().position(|page| inside(page.1))));
            let touched = |page: u64| page < probe.saturating_add(len) && page + PAGE_SIZE > probe && len > 0;
            let naive: Vec<u64> = (0u64..).zip(&pages).filter(|(_, page)| touched(page.0)).map(|(id, _)| id).collect();
            let runs: Vec<Run> = table.runs_in(HostRange::new(HostAddr(probe), len)).collect();
            let listed: Vec<u64> = runs.iter().flat_map(|run| run.first.0..run.end().0).collect();
            prop_assert_eq!(listed, naive);
            for run in runs {
                let range = table.host_range(run);
                prop_assert_eq!(range.map(|r| (r.start.0, r.len)), Some((pages[usize::try_from(run.first.0).unwrap()].0, run.bytes())));
            }
        }
        for (id, page) in (0u64..).zip(&pages) {
            prop_assert_eq!(table.block_of(PageId(id)).map(|b| usize::from(b.0)), Some(page.2));
            for pages_in_run in 1..4 {
                let end = usize::try_from(id + pages_in_run).unwrap();
                let one_block = pages.get(end - 1).is_some_and(|last| last.2 == page.2);
                let expected = one_block.then(|| HostRange::new(HostAddr(page.0), pages_in_run * PAGE_SIZE));
                prop_assert_eq!(table.host_range(Run::new(PageId(id), pages_in_run)), expected);
            }
        }
        prop_assert_eq!(table.block_of(PageId(table.pages())), None);
    }

    /// One host page at a time, the order is: requests, faults, then up from the last one, then from the start.
    #[test]
    fn the_search_order_agrees_with_a_naive_one(
        parts in parts(),
        dirty in prop::collection::vec((0u64..60, 1u64..9), 0..8),
        events in prop::collection::vec((0u8..5, 0u64..60), 0..120),
    ) {
        let limits = Limits { slot_pages: 4, ..super::rig::SINGLE };
        let runs: Vec<Run> = dirty.iter().map(|&(first, pages)| Run::new(PageId(first), pages)).collect();
        let mut core = core_of(&parts, &runs, 8, limits).unwrap();
        let blocks = core.table().blocks().to_vec();
        let pages = naive(core.table());
        let total = pages.len() as u64;
        let unit_of = |page: u64| {
            let block = &blocks[pages[usize::try_from(page).unwrap()].2];
            let first = pages.iter().position(|p| p.0 == block.host.0).unwrap() as u64;
            let unit = block.pages_per_host_page();
            let start = first + (page - first) / unit * unit;
            (Run::new(PageId(start), unit), block.treatment)
        };
        let mut pending: Vec<bool> = (0..total).map(|page| {
            let (unit, _) = unit_of(page);
            (unit.first.0..unit.end().0).any(|p| runs.iter().any(|run| run.contains(PageId(p))))
        }).collect();
        let (mut requests, mut faults, mut position) = (VecDeque::new(), VecDeque::new(), 0);
        let is = |pending: &[bool], page: u64| pending[usize::try_from(page).unwrap()];
        for (event, page) in events.into_iter().chain([(4, 0); 80]) {
            let page = page % total;
            match event {
                0 => {
                    let outcome = core.handle_request(PageId(page));
                    if outcome == RequestOutcome::Queued && !requests.contains(&page) {
                        requests.push_back(page);
                    }
                    let expected = is(&pending, page) && unit_of(page).1 != Treatment::InPause;
                    prop_assert_eq!(expected, matches!(outcome, RequestOutcome::Queued | RequestOutcome::QueueFull));
                }
                1 => {
                    let outcome = core.fault(page);
                    if outcome == FaultOutcome::Queued && !faults.contains(&page) {
                        faults.push_back(page);
                    }
                    let expected = is(&pending, page) && unit_of(page).1 == Treatment::Tracked;
                    prop_assert_eq!(expected, matches!(outcome, FaultOutcome::Queued | FaultOutcome::QueueFull));
                }
                _ => {
                    requests.retain(|&page| is(&pending, page));
                    faults.retain(|&page| is(&pending, page));
                    let scannable = |&page: &u64| is(&pending, page) && unit_of(page).1 != Treatment::InPause;
                    let expected = requests.pop_front().or_else(|| faults.pop_front())
                        .or_else(|| (position..total).find(scannable))
                        .or_else(|| (0..total).find(scannable))
                        .map(|page| unit_of(page).0);
                    match core.next_claim(Worker::Scan) {
                        Next::Claim(claim) => {
                            prop_assert_eq!(Some(claim.run()), expected);
                            let run = claim.run();
                            position = run.end().0;
                            (run.first.0..run.end().0).for_each(|p| pending[usize::try_from(p).unwrap()] = false);
                            core.finish(claim);
                        }
                        _ => prop_assert_eq!(None, expected),
                    }
                }
            }
        }
        let left = pending.iter().filter(|&&p| p).count() as u64;
        prop_assert_eq!(core.pending(), left);
        prop_assert!((0..total).filter(|&p| is(&pending, p)).all(|p| unit_of(p).1 == Treatment::InPause));
    }
}
