//! The hot paths in isolation, so that a regression shows: `cargo bench`, which compares with the run before.
//!
//! What a vCPU waits for is a fault's way through core and the copy; what bounds the scan is its way through core and the
//! digest; what bounds the pause is the bitmap work at T0.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ramshot::core::{
    ArmAhead, Backing, BlockName, BlockTable, DirtyPages, FaultOutcome, GuestAddr, HostAddr, Limits, Next, PAGE_SIZE,
    PageBitmap, PageId, RamBlock, Run, Snapshot, Treatment, Worker,
};
use ramshot::sink::PageDigest;

const GIB: u64 = 1 << 30;
const BASE: u64 = 0x7000_0000_0000;
const SLOTS: u16 = 1024;

fn table(bytes: u64) -> BlockTable {
    let block = RamBlock {
        name: BlockName::new("ram").unwrap(),
        guest: GuestAddr(0),
        host: HostAddr(BASE),
        len: bytes,
        used: bytes,
        page_size: PAGE_SIZE,
        backing: Backing::Anonymous,
        treatment: Treatment::Tracked,
    };
    BlockTable::new(&[block]).unwrap()
}

fn bitmap(pages: u64) -> PageBitmap<Vec<u64>> {
    let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(pages)).unwrap();
    PageBitmap::new(vec![0; words], pages, true).unwrap()
}

type Core<'t> = Snapshot<&'t BlockTable, Vec<u64>, 256, 64>;

fn snapshot(table: &BlockTable) -> Core<'_> {
    let mut pending = bitmap(table.pages());
    pending.insert(Run::new(PageId(0), table.pages()));
    let words = usize::try_from(PageBitmap::<Vec<u64>>::words_for(SLOTS.into())).unwrap();
    Core::new(table, pending, SLOTS, vec![0; words], Limits::default()).unwrap()
}

/// From a claim to its slots free again, without the copy.
fn through(core: &mut Core<'_>, who: Worker) -> bool {
    let Next::Claim(claim) = core.next_claim(who) else { return false };
    let captured = core.captured(claim);
    let released = core.released(captured);
    core.written(released);
    true
}

fn core(c: &mut Criterion) {
    let table = table(4 * GIB);
    let mut group = c.benchmark_group("core");
    group.bench_function("an isolated fault, message to release", |b| {
        b.iter_batched_ref(
            || (snapshot(&table), 0u64),
            |(core, at)| {
                // A prime stride: never where it was before.
                *at = (*at + 7919 * PAGE_SIZE) % (4 * GIB);
                core.handle_lull();
                let outcome = core.handle_fault(HostAddr(BASE + *at));
                assert!(matches!(outcome, FaultOutcome::Queued | FaultOutcome::Stale(_)));
                through(core, Worker::Faults)
            },
            BatchSize::NumIterations(4096),
        );
    });
    group.throughput(Throughput::Bytes(4 * GIB));
    group.sample_size(20);
    group.bench_function("the scan of 4 GiB", |b| {
        b.iter_batched_ref(|| snapshot(&table), |core| while through(core, Worker::Scan) {}, BatchSize::PerIteration);
    });
    group.finish();
}

fn at_t0(c: &mut Criterion) {
    let (table, pages) = (table(4 * GIB), 4 * GIB / PAGE_SIZE);
    let mut group = c.benchmark_group("at T0");
    group.bench_function("1 TiB of nothing: the next page", |b| {
        let map = bitmap((1 << 40) / PAGE_SIZE);
        b.iter(|| black_box(&map).next_set(PageId(0)));
    });
    group.bench_function("4 GiB armed ahead, 64 MiB opened: what to protect again", |b| {
        let mut ahead =
            ArmAhead::new(&table, [bitmap(pages), bitmap(pages), bitmap(pages), bitmap(pages)], 512).unwrap();
        ahead.protecting(table.blocks()[0].used_range());
        for n in 0..32 {
            let _ = ahead.handle_fault(HostAddr(BASE + n * (96 << 20)));
        }
        b.iter(|| {
            let (mut from, mut runs) = (PageId(0), 0);
            while let Some(run) = black_box(&ahead).next_unprotected(ahead.there(), from) {
                from = run.end();
                runs += 1;
            }
            (runs, ahead.next_absent(PageId(0), table.block_run(ramshot::core::BlockIndex(0))))
        });
    });
    group.bench_function("an increment of 1 % of 4 GiB: its pages", |b| {
        let mut there = bitmap(pages);
        there.insert(Run::new(PageId(0), pages));
        b.iter_batched_ref(
            || {
                let mut dirty = DirtyPages::new(&table, [bitmap(pages), bitmap(pages), bitmap(pages)]).unwrap();
                dirty.begin_full();
                dirty.committed(&there, &there, true);
                (0..pages / 100).for_each(|n| dirty.handle_written(Run::new(PageId(n * 100), 1)));
                (dirty, bitmap(pages))
            },
            |(dirty, pending)| dirty.begin(&table, &there, false, pending),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn digests(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest");
    group.throughput(Throughput::Bytes(PAGE_SIZE));
    let mut page = [0u8; 4096];
    group.bench_function("a zero page", |b| b.iter(|| PageDigest::of(black_box(&page))));
    page.iter_mut().zip(0..).for_each(|(byte, n): (_, u32)| *byte = n.to_le_bytes()[0] | 1);
    group.bench_function("a page of data", |b| b.iter(|| PageDigest::of(black_box(&page))));
    group.finish();
}

criterion_group!(benches, core, at_t0, digests);
criterion_main!(benches);
