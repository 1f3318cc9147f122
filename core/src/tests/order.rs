//! Scripts: what is captured next, and what becomes of faults and requests.

use super::rig::{SINGLE, Script, core, core_of, host_of, part, ram, run};
use crate::*;

const FAR: Limits = Limits { around_min: 4, around_max: 4, slot_pages: 4, scan_pages: 4, ..SINGLE };

#[test]
fn requests_then_faults_then_the_scan() {
    let mut core = core(&[ram(8)], 8, SINGLE).unwrap();
    assert_eq!(core.fault(5), FaultOutcome::Queued);
    assert_eq!(core.handle_request(PageId(3)), RequestOutcome::Queued);
    let order = [3, 5, 6, 7, 0].map(|page| {
        let claim = core.claim(Worker::Scan);
        assert_eq!(claim.run(), run(page, 1));
        let origin = claim.origin();
        core.finish(claim);
        origin
    });
    assert_eq!(order, [Origin::Request, Origin::Fault, Origin::Scan, Origin::Scan, Origin::Scan]);
}

#[test]
fn the_scan_goes_on_behind_an_out_of_order_page() {
    let mut core = core(&[ram(8)], 8, SINGLE).unwrap();
    let first = core.claim(Worker::Scan);
    assert_eq!((first.run(), core.search().page), (run(0, 1), PageId(1)));
    let _ = core.fault(5);
    let fault = core.claim(Worker::Faults);
    assert_eq!((fault.run(), core.search().page), (run(5, 1), PageId(6)));
    assert!(!core.search().round_complete);
    core.finish(first);
    core.finish(fault);
    assert_eq!(core.drain(Worker::Scan), [6, 7, 1, 2, 3, 4].map(|page| run(page, 1)));
    assert!(core.search().round_complete && core.is_written());
}

#[test]
fn the_fault_thread_does_not_scan() {
    let mut core = core(&[ram(2)], 2, SINGLE).unwrap();
    assert!(matches!(core.next_claim(Worker::Faults), Next::Idle));
    let _ = core.drain(Worker::Scan);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Done));
    assert!(matches!(core.next_claim(Worker::Scan), Next::Done));
}

#[test]
fn requests_are_answered_by_where_the_page_is() {
    let flash = part(1, PAGE_SIZE, Treatment::InPause);
    let mut core = core(&[ram(3), flash], 8, SINGLE).unwrap();
    let claim = core.claim(Worker::Scan);
    assert_eq!(core.handle_request(PageId(0)), RequestOutcome::Claimed);
    core.finish(claim);
    assert_eq!(core.handle_request(PageId(0)), RequestOutcome::NotPending, "saved already: nothing to do");
    assert_eq!(core.handle_request(PageId(2)), RequestOutcome::Queued);
    assert_eq!(core.handle_request(PageId(2)), RequestOutcome::Queued, "once in the queue is enough");
    assert_eq!(core.handle_request(PageId(3)), RequestOutcome::Claimed, "the pause captures it");
    assert_eq!(core.handle_request(PageId(4)), RequestOutcome::NoSuchPage);
    assert_eq!(core.drain(Worker::Faults), [run(2, 1)]);
    assert_eq!(core.counts().by_request, 1);
}

#[test]
fn a_request_queue_that_is_full_says_so() {
    let mut core = core(&[ram(8)], 8, SINGLE).unwrap();
    (0..4).for_each(|page| assert_eq!(core.handle_request(PageId(page)), RequestOutcome::Queued));
    assert_eq!(core.handle_request(PageId(4)), RequestOutcome::QueueFull);
    assert_eq!(core.handle_request(PageId(3)), RequestOutcome::Queued, "it is in there");
    let _ = core.claim(Worker::Faults);
    assert_eq!(core.handle_request(PageId(4)), RequestOutcome::Queued);
}

#[test]
fn faults_are_answered_by_where_the_page_is() {
    let mut core = core_of(&[ram(4)], &[run(0, 3)], 8, SINGLE).unwrap();
    assert_eq!(core.fault(0), FaultOutcome::Queued);
    assert_eq!(core.fault(0), FaultOutcome::Queued, "two vCPUs, one page");
    let claim = core.claim(Worker::Faults);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Idle), "claimed once");
    assert_eq!(core.fault(0), FaultOutcome::Waits);
    let captured = core.captured(claim);
    assert_eq!(core.fault(0), FaultOutcome::Waits, "the release is still to come");
    let released = core.released(captured);
    let stale = FaultOutcome::Stale(HostRange::new(HostAddr(host_of(0)), PAGE_SIZE));
    assert_eq!(core.fault(0), stale, "written or not");
    core.written(released);
    assert_eq!(core.fault(0), stale);
    assert!(matches!(core.fault(3), FaultOutcome::Stale(_)), "never part of this snapshot");
    let counts = core.counts();
    assert_eq!((counts.faults, counts.stale_faults, counts.by_fault), (7, 3, 1));
}

#[test]
fn a_fault_that_the_scan_has_overtaken_is_dropped_from_the_queue() {
    let mut core = core(&[ram(2)], 8, SINGLE).unwrap();
    let _ = core.fault(0);
    let _ = core.fault(1);
    let (zero, one) = (core.claim(Worker::Scan), core.claim(Worker::Scan));
    assert_eq!((zero.origin(), one.run()), (Origin::Fault, run(1, 1)));
    assert!(matches!(core.next_claim(Worker::Faults), Next::Done));
}

#[test]
fn a_fault_queue_that_is_full_stops_reading() {
    let mut core = core(&[ram(8)], 8, SINGLE).unwrap();
    (0..4).for_each(|page| assert_eq!(core.fault(page), FaultOutcome::Queued));
    assert_eq!(core.fault(4), FaultOutcome::QueueFull);
    assert_eq!(core.fault(1), FaultOutcome::Queued, "it is in there");
    assert_eq!(core.counts().faults, 5, "what was not taken does not count");
    let _ = core.claim(Worker::Faults);
    assert_eq!(core.fault(4), FaultOutcome::Queued);
}

#[test]
fn only_tracked_blocks_have_faults_of_ours() {
    let rom = part(2, PAGE_SIZE, Treatment::ReadOnly);
    let flash = part(2, PAGE_SIZE, Treatment::InPause);
    let shared = part(2, PAGE_SIZE, Treatment::Ignored);
    let mut core = core(&[ram(2), rom, flash, shared], 8, SINGLE).unwrap();
    for block in 1..4 {
        let at = HostAddr(host_of(block) + 0x1234);
        let page = HostRange::new(HostAddr(host_of(block) + 0x1000), PAGE_SIZE);
        // Queued, it would be captured without a release, and its writer would never wake.
        assert_eq!(core.handle_fault(at), FaultOutcome::Stale(page), "block {block}");
    }
    let tail = HostAddr(host_of(0) + 0x2fff);
    assert_eq!(core.handle_fault(tail), FaultOutcome::Stale(HostRange::new(HostAddr(host_of(0) + 0x2000), PAGE_SIZE)));
    assert_eq!(core.handle_fault(HostAddr(host_of(0) + 0x3000)), FaultOutcome::NotOurs);
    assert_eq!(core.handle_fault(HostAddr(0)), FaultOutcome::NotOurs);
    assert_eq!(core.handle_fault(HostAddr(u64::MAX)), FaultOutcome::NotOurs);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Idle));
}

#[test]
fn read_only_blocks_are_saved_but_need_no_release() {
    let mut core = core(&[part(1, PAGE_SIZE, Treatment::ReadOnly), ram(1)], 8, SINGLE).unwrap();
    let (rom, tracked) = (core.claim(Worker::Scan), core.claim(Worker::Scan));
    assert!(!rom.is_protected() && tracked.is_protected());
}

#[test]
fn a_stale_fault_names_its_whole_host_page() {
    let mut core = core_of(&[part(1024, 2 << 20, Treatment::Tracked)], &[run(0, 1)], 32, FAR_HUGE).unwrap();
    let stale = HostRange::new(HostAddr(host_of(0) + (2 << 20)), 2 << 20);
    assert_eq!(core.handle_fault(HostAddr(host_of(0) + (2 << 20) + 0x12_3456)), FaultOutcome::Stale(stale));
}

const FAR_HUGE: Limits = Limits { slot_pages: 16, ..SINGLE };

#[test]
fn a_host_page_is_claimed_whole() {
    // One page of the second 2 MiB page is pending, so all of it is.
    let mut core = core_of(&[part(1024, 2 << 20, Treatment::Tracked)], &[run(700, 1)], 40, FAR_HUGE).unwrap();
    assert_eq!((core.counts().total, core.pending()), (512, 512));
    assert!(matches!(core.fault(0), FaultOutcome::Stale(_)));
    let _ = core.fault(1023);
    let _ = core.fault(600);
    let claim = core.claim(Worker::Faults);
    assert_eq!(claim.run(), run(512, 512));
    assert_eq!(claim.range(), HostRange::new(HostAddr(host_of(0) + (2 << 20)), 2 << 20));
    assert_eq!(claim.slots().len(), 32);
    assert_eq!(core.fault(512), FaultOutcome::Waits);
    let captured = core.captured(claim);
    assert_eq!(core.released(captured).run(), run(512, 512), "released together");
    assert!(core.is_captured());
}

#[test]
fn a_fault_takes_the_aligned_window_along() {
    // The block starts at 16 MiB; windows of 4 pages lie at 0-3, 4-7, 8-9.
    let claimed = |page| {
        let mut core = core(&[ram(10)], 8, FAR).unwrap();
        let _ = core.fault(page);
        core.claim(Worker::Faults).run()
    };
    assert_eq!([claimed(0), claimed(3), claimed(6), claimed(9)], [run(0, 4), run(0, 4), run(4, 4), run(8, 2)]);
}

#[test]
fn windows_are_aligned_in_host_addresses() {
    // Three pages before the block, so windows of 4 are page 0 alone, 1-4, 5-8.
    let parts = [RamBlock { host: HostAddr(host_of(0) + 3 * PAGE_SIZE), ..ram(10) }];
    let table = BlockTable::new(&parts).unwrap();
    let pending = PageBitmap::new([0; 2], 10, true).unwrap();
    let mut core: Snapshot<_, _, 4, 4> = Snapshot::new(&table, pending, 8, [0; 2], FAR).unwrap();
    assert!(core.is_written(), "nothing was pending");
    let mut pending = PageBitmap::new([0; 2], 10, true).unwrap();
    pending.insert(run(0, 10));
    core = Snapshot::new(&table, pending, 8, [0; 2], FAR).unwrap();
    for (page, expected) in [(3, run(1, 4)), (0, run(0, 1)), (5, run(5, 4))] {
        let _ = core.handle_fault(table.host_range(run(page, 1)).unwrap().start);
        let Next::Claim(claim) = core.next_claim(Worker::Faults) else { panic!() };
        assert_eq!(claim.run(), expected);
    }
}

#[test]
fn a_window_ends_where_something_is_not_pending() {
    let mut core =
        core_of(&[ram(8)], &[run(0, 1), run(2, 3), run(6, 2)], 8, Limits { around_max: 8, around_min: 8, ..FAR })
            .unwrap();
    let _ = core.fault(3);
    assert_eq!(core.claim(Worker::Faults).run(), run(2, 3));
}

#[test]
fn absurd_limits_are_harmless() {
    let limits = Limits {
        slot_pages: u64::MAX,
        reserve_slots: u64::MAX,
        scan_pages: u64::MAX,
        around_min: u64::MAX,
        around_max: u64::MAX,
        when_full: WhenFull::Stall,
    };
    let mut all = core(&[ram(3), ram(3)], 8, limits).unwrap();
    let _ = all.fault(4);
    assert_eq!(all.claim(Worker::Faults).run(), run(3, 3));
    assert_eq!(all.drain(Worker::Scan), [run(0, 3)]);
    let none = Limits { scan_pages: 0, around_min: 0, around_max: 0, ..SINGLE };
    assert_eq!(core(&[ram(2)], 1, none).unwrap().drain(Worker::Scan), [run(0, 1), run(1, 1)]);
}

#[test]
fn blocks_captured_in_the_pause_are_for_nobody_else() {
    let flash = part(2, PAGE_SIZE, Treatment::InPause);
    let mut core = core(&[ram(1), flash, ram(1)], 8, SINGLE).unwrap();
    assert!(!core.is_pause_captured());
    assert_eq!(core.drain(Worker::Scan), [run(0, 1), run(3, 1)]);
    assert!(matches!(core.next_claim(Worker::Scan), Next::Idle));
    assert!(!core.is_captured());
    let first = core.claim(Worker::Pause);
    assert_eq!((first.run(), first.origin(), first.is_protected()), (run(1, 1), Origin::Pause, false));
    let second = core.claim(Worker::Pause);
    assert!(matches!(core.next_claim(Worker::Pause), Next::Done));
    assert!(!core.is_pause_captured(), "claimed is not captured");
    core.finish(first);
    core.finish(second);
    assert!(core.is_pause_captured() && core.is_written());
    assert_eq!(core.counts().by_pause, 2);
}

#[test]
fn discarding_nothing_waits_for_nobody() {
    let mut core = core(&[ram(8)], 4, Limits::default()).unwrap();
    let claim = core.claim(Worker::Scan);
    let inside = Run::new(PageId(claim.run().first.0 + 1), 0);
    assert!(
        matches!(core.claim_for_discard(inside), Discard::Clear),
        "an empty run inside a claim has no page to lose"
    );
    assert!(matches!(core.claim_for_discard(claim.run()), Discard::Wait));
    core.finish(claim);
}
