//! Scripts: full pools, full claim lists, discards, ends.

use std::{string::ToString, vec};

use super::rig::{Core, SINGLE, Script, core, core_of, host_of, part, ram, run};
use crate::*;

const EIO: OsError = OsError::new("read", 5);

fn range(first: u64, pages: u64) -> HostRange {
    HostRange::new(HostAddr(host_of(0) + first * PAGE_SIZE), pages * PAGE_SIZE)
}

#[test]
fn the_scan_stops_first_and_the_reserve_is_for_faults() {
    let mut core = core(&[ram(8)], 4, Limits { reserve_slots: 2, ..SINGLE }).unwrap();
    let (first, second) = (core.claim(Worker::Scan), core.claim(Worker::Scan));
    assert!(matches!(core.next_claim(Worker::Scan), Next::Full), "two slots are left, and not for the scan");
    let _ = core.fault(6);
    let fault = core.claim(Worker::Scan);
    assert_eq!((fault.run(), fault.origin()), (run(6, 1), Origin::Fault), "a scan worker may serve a fault");
    let _ = core.handle_request(PageId(5));
    let request = core.claim(Worker::Faults);
    let captured = core.captured(first);
    let released = core.released(captured);
    let _ = core.fault(7);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Full));
    assert_eq!((core.counts().faults_held, core.counts().slots_peak), (1, 4));
    // A slot written is a slot free, and it goes to the fault.
    core.written(released);
    assert_eq!(core.claim(Worker::Scan).run(), run(7, 1));
    assert_eq!((core.pending(), core.cause()), (3, None));
    [second, fault, request].into_iter().for_each(|claim| core.finish(claim));
    assert!(matches!(core.next_claim(Worker::Scan), Next::Claim(_)), "three slots are free, one more than the reserve");
}

#[test]
fn the_scan_does_not_take_the_reserve_of_an_empty_pool() {
    let limits = Limits { reserve_slots: 2, scan_pages: 8, ..SINGLE };
    let mut core = core(&[ram(8)], 4, limits).unwrap();
    assert_eq!(core.claim(Worker::Scan).run(), run(0, 2), "not all four slots");
    let _ = core.fault(7);
    assert_eq!(core.claim(Worker::Faults).run(), run(7, 1));
}

#[test]
fn a_host_page_that_needs_the_reserve_waits_for_the_empty_pool() {
    let huge = part(8, 4 * PAGE_SIZE, Treatment::Tracked);
    let mut core = core(&[huge, ram(1)], 4, Limits { reserve_slots: 1, scan_pages: 8, ..SINGLE }).unwrap();
    let first = core.claim(Worker::Scan);
    assert_eq!(first.run(), run(0, 4), "one host page, although two were wanted");
    assert!(matches!(core.next_claim(Worker::Scan), Next::Full));
    core.finish(first);
    assert_eq!(core.drain(Worker::Scan), [run(4, 4), run(8, 1)]);
}

#[test]
fn a_host_page_never_gets_a_part_of_its_slots() {
    let huge = part(4, 4 * PAGE_SIZE, Treatment::Tracked);
    let mut core = core(&[ram(1), huge], 4, SINGLE).unwrap();
    let small = core.claim(Worker::Scan);
    let _ = core.fault(2);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Full), "three slots are free, four are needed");
    core.finish(small);
    assert_eq!(core.claim(Worker::Faults).run(), run(1, 4));
}

#[test]
fn slots_may_be_larger_than_what_goes_into_them() {
    let huge = part(4, 2 * PAGE_SIZE, Treatment::Tracked);
    let limits = Limits { slot_pages: 3, scan_pages: 8, ..SINGLE };
    let mut core = core(&[huge], 2, limits).unwrap();
    let claim = core.claim(Worker::Scan);
    assert_eq!((claim.run(), claim.slots()), (run(0, 4), &[SlotId(0), SlotId(1)][..]));
}

#[test]
fn a_request_that_does_not_fit_does_not_hold_up_a_fault_that_does() {
    let huge = part(4, 4 * PAGE_SIZE, Treatment::Tracked);
    let mut core = core(&[ram(2), huge], 4, SINGLE).unwrap();
    let small = core.claim(Worker::Scan);
    assert_eq!(core.handle_request(PageId(3)), RequestOutcome::Queued);
    let _ = core.fault(1);
    assert_eq!(core.claim(Worker::Faults).run(), run(1, 1));
    assert!(matches!(core.next_claim(Worker::Scan), Next::Full), "but the scan does not overtake it");
    core.finish(small);
}

#[test]
fn a_full_pool_cancels_if_that_is_the_policy() {
    let limits = Limits { when_full: WhenFull::Cancel, ..SINGLE };
    let mut core = core(&[ram(4)], 1, limits).unwrap();
    let claim = core.claim(Worker::Scan);
    assert!(matches!(core.next_claim(Worker::Scan), Next::Full), "a scan that waits cancels nothing");
    let _ = core.handle_request(PageId(3));
    assert!(matches!(core.next_claim(Worker::Faults), Next::Full), "nor does a reader");
    let _ = core.fault(2);
    // The request is first in line, and the writer must not wait all the same.
    assert!(matches!(core.next_claim(Worker::Faults), Next::Ended));
    assert_eq!((core.cause(), core.counts().faults_held), (Some(Cause::PoolFull), 1));
    assert!(matches!(core.fault(2), FaultOutcome::Stale(_)), "the writer goes on");
    core.finish(claim);
}

#[test]
fn a_pool_too_full_for_a_host_page_cancels_too() {
    let huge = part(2, 2 * PAGE_SIZE, Treatment::Tracked);
    let limits = Limits { when_full: WhenFull::Cancel, ..SINGLE };
    let mut core = core(&[ram(1), huge], 2, limits).unwrap();
    let _ = core.claim(Worker::Scan);
    let _ = core.fault(1);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Ended), "one slot is free, two are needed");
    assert_eq!(core.cause(), Some(Cause::PoolFull));
}

#[test]
fn a_full_claim_list_waits_for_a_release_and_cancels_nothing() {
    let limits = Limits { when_full: WhenFull::Cancel, ..SINGLE };
    let mut core = core(&[ram(8)], 8, limits).unwrap();
    let claims: [Claim; 4] = std::array::from_fn(|_| core.claim(Worker::Scan));
    let _ = core.fault(7);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Full));
    assert!(matches!(core.next_claim(Worker::Scan), Next::Full));
    assert!(matches!(core.claim_for_discard(run(6, 1)), Discard::Wait));
    assert_eq!((core.cause(), core.counts().faults_held), (None, 0), "it is not the pool that is full");
    let [first, ..] = claims;
    let captured = core.captured(first);
    assert!(matches!(core.next_claim(Worker::Faults), Next::Full), "captured is not released");
    let released = core.released(captured);
    assert_eq!(core.claim(Worker::Faults).run(), run(7, 1), "and need not be written");
    core.written(released);
}

#[test]
fn a_fault_is_counted_as_held_once() {
    let mut core = core(&[ram(4)], 1, SINGLE).unwrap();
    let claim = core.claim(Worker::Scan);
    let _ = core.fault(2);
    (0..5).for_each(|_| assert!(matches!(core.next_claim(Worker::Faults), Next::Full)));
    assert_eq!(core.counts().faults_held, 1, "asked five times, held once");
    core.finish(claim);
}

#[test]
fn a_discard_captures_first_then_waits_then_is_clear() {
    let mut core = core(&[ram(4)], 4, SINGLE).unwrap();
    let scanned = core.claim(Worker::Scan);
    let position = core.search();
    let Discard::Claim(claim) = core.claim_for_discard(run(0, 2)) else { panic!() };
    assert_eq!((claim.run(), claim.origin(), core.search()), (run(1, 1), Origin::Discard, position));
    assert!(matches!(core.claim_for_discard(run(0, 2)), Discard::Wait), "both are claimed");
    core.finish(claim);
    assert!(matches!(core.claim_for_discard(run(0, 2)), Discard::Wait), "page 0 is");
    assert!(matches!(core.claim_for_discard(run(1, 1)), Discard::Clear));
    let captured = core.captured(scanned);
    assert!(matches!(core.claim_for_discard(run(0, 2)), Discard::Wait), "the release is still to come");
    let released = core.released(captured);
    assert!(matches!(core.claim_for_discard(run(0, 2)), Discard::Clear), "written or not");
    core.written(released);
    assert!(!core.handle_discarded(range(0, 2)) && core.cause().is_none());
    assert_eq!(core.counts().by_discard, 1);
}

#[test]
fn a_discard_waits_for_a_slot_and_never_for_a_snapshot_that_ended() {
    let mut core = core(&[ram(4)], 1, SINGLE).unwrap();
    let claim = core.claim(Worker::Scan);
    assert!(matches!(core.claim_for_discard(run(2, 1)), Discard::Wait));
    assert!(matches!(core.claim_for_discard(run(40, 9)), Discard::Clear), "no such pages");
    core.cancel(Cause::Cancelled);
    assert!(matches!(core.claim_for_discard(run(2, 1)), Discard::Clear));
    core.finish(claim);
}

#[test]
fn losing_pages_ends_the_snapshot_only_while_they_are_needed() {
    type Loss = (fn(&mut Core, HostRange) -> bool, fn(Run) -> Cause);
    let losses: [Loss; 2] = [
        (|core, at| core.handle_discarded(at), Cause::Discarded),
        (|core, at| core.handle_unmapped(at), Cause::Unmapped),
    ];
    for (loss, cause) in losses {
        let new = || core(&[ram(4)], 4, SINGLE).unwrap();

        let mut pending = new();
        assert!(loss(&mut pending, range(1, 2)));
        assert_eq!(pending.cause(), Some(cause(run(1, 1))));

        let mut claimed = new();
        let claim = claimed.claim(Worker::Scan);
        assert!(loss(&mut claimed, range(0, 1)), "being copied this very moment");
        assert_eq!(claimed.cause(), Some(cause(run(0, 1))));
        claimed.finish(claim);

        let mut captured = new();
        let claim = captured.claim(Worker::Scan);
        let run_of_it = captured.captured(claim);
        assert!(!loss(&mut captured, range(0, 1)), "its bytes are in the pool");
        let released = captured.released(run_of_it);
        assert!(!loss(&mut captured, range(0, 1)));
        captured.written(released);
        assert!(!loss(&mut captured, HostRange::new(HostAddr(0), 0x1000)), "not guest RAM");
        assert!(!loss(&mut captured, range(4, 1)), "the unused tail");
        assert_eq!(captured.cause(), None);
    }
}

#[test]
fn a_loss_between_dirty_runs_is_none() {
    let mut core = core_of(&[ram(8)], &[run(0, 2), run(6, 2)], 4, SINGLE).unwrap();
    assert!(!core.handle_discarded(range(2, 4)));
    assert!(core.handle_discarded(range(2, 5)));
}

#[test]
fn the_first_cause_is_kept() {
    let mut core = core(&[ram(4)], 4, SINGLE).unwrap();
    let (first, second) = (core.claim(Worker::Scan), core.claim(Worker::Scan));
    let captured = core.captured(second);
    assert!(core.cancel(Cause::Sink));
    assert!(!core.cancel(Cause::Cancelled));
    core.capture_failed(first, EIO);
    core.release_failed(captured, EIO);
    assert!(core.handle_unmapped(range(3, 1)), "still true, and still not the cause");
    assert_eq!(core.cause(), Some(Cause::Sink));
}

#[test]
fn every_way_to_fail_gives_claim_and_slots_back() {
    let new = || core(&[ram(4)], 1, SINGLE).unwrap();

    let mut capture = new();
    let claim = capture.claim(Worker::Scan);
    capture.capture_failed(claim, EIO);
    assert_eq!(capture.cause(), Some(Cause::Capture(EIO)));

    let mut release = new();
    let claim = release.claim(Worker::Scan);
    let captured = release.captured(claim);
    release.release_failed(captured, EIO);
    assert_eq!(release.cause(), Some(Cause::Release(EIO)));

    let mut late = new();
    let claim = late.claim(Worker::Scan);
    late.cancel(Cause::Cancelled);
    late.finish(claim);

    for core in [&mut capture, &mut release, &mut late] {
        assert_eq!((core.claimed_runs().count(), core.slots_in_use()), (0, 0));
        assert!(matches!(core.next_claim(Worker::Scan), Next::Ended));
        assert!(matches!(core.next_claim(Worker::Pause), Next::Ended));
        assert!(!core.is_captured() && !core.is_written(), "it has no image, however empty it is");
    }
}

#[test]
fn counts_add_up() {
    let mut core = core(&[ram(8)], 8, SINGLE).unwrap();
    let _ = core.fault(4);
    let _ = core.handle_request(PageId(6));
    let Discard::Claim(claim) = core.claim_for_discard(run(2, 1)) else { panic!() };
    core.finish(claim);
    let _ = core.drain(Worker::Scan);
    let counts = *core.counts();
    assert_eq!((counts.total, counts.released), (8, 8));
    assert_eq!((counts.by_fault, counts.by_request, counts.by_discard, counts.by_pause), (1, 1, 1, 0));
}

#[test]
fn bits_beyond_the_image_are_no_pages() {
    // A longer bitmap whose extra bits are set: nobody could claim them, and the snapshot would never end.
    let table = super::rig::table(&[ram(3)]);
    let mut pending = PageBitmap::new(vec![0; 4], 128, true).unwrap();
    pending.insert(run(0, 128));
    let mut core: Snapshot<_, _, 4, 4> =
        Snapshot::new(std::sync::Arc::new(table), pending, 4, vec![0; 2], SINGLE).unwrap();
    assert_eq!(core.counts().total, 3);
    assert_eq!(core.drain(Worker::Scan).len(), 3);
    assert!(core.is_written());
}

#[test]
fn a_host_page_that_no_claim_can_hold_is_refused() {
    let limits = Limits::default();
    let most = u64::try_from(MAX_SLOTS_PER_CLAIM).unwrap() * limits.slot_pages * PAGE_SIZE;
    // Both at 1 GiB, so that the host address is aligned.
    let huge = |page_size| {
        let block = part(page_size / PAGE_SIZE, page_size, Treatment::Tracked);
        let table =
            BlockTable::new(&[RamBlock { host: HostAddr(1 << 30), name: BlockName::new("ram0").unwrap(), ..block }]);
        let pending = PageBitmap::new(vec![0; 1 << 13], 1 << 18, true).unwrap();
        Snapshot::<_, _, 4, 4>::new(std::sync::Arc::new(table.unwrap()), pending, 1024, vec![0; 1 << 13], limits)
    };
    assert!(huge(2 << 20).is_ok());
    let Err(error) = huge(1 << 30) else { panic!("a 1 GiB host page was accepted") };
    let block = BlockName::new("ram0").unwrap();
    assert_eq!(error, SetupError::HostPageTooLarge { block, page_size: 1 << 30, room: most });
    let said = error.to_string();
    assert!(said.contains("\"ram0\"") && said.contains("1073741824") && said.contains("2097152"), "{said}");
    // Ignored, it is nobody's concern.
    let ignored = part(1 << 18, 1 << 30, Treatment::Ignored);
    let first = RamBlock { host: HostAddr(1 << 30), guest: GuestAddr(1 << 40), ..ignored };
    let table = BlockTable::new(&[RamBlock { name: block, ..first }, RamBlock { host: HostAddr(0x1000), ..ram(1) }]);
    let pending = PageBitmap::new(vec![0; 2], 1, true).unwrap();
    assert!(Snapshot::<_, _, 4, 4>::new(&table.unwrap(), pending, 4, vec![0; 2], limits).is_ok());
}

#[test]
fn pools_that_are_none_are_refused() {
    let refused = |slots, limits| core(&[ram(1)], slots, limits).map(|_| ()).unwrap_err();
    assert!(matches!(refused(0, SINGLE), SetupError::HostPageTooLarge { room: 0, .. }));
    assert!(matches!(refused(4, Limits { slot_pages: 0, ..SINGLE }), SetupError::HostPageTooLarge { room: 0, .. }));
    let table = super::rig::table(&[ram(1)]);
    let pending = PageBitmap::new(vec![0; 2], 1, true).unwrap();
    let error = Snapshot::<_, _, 4, 4>::new(&table, pending, 65, vec![0; 2], SINGLE).unwrap_err();
    assert_eq!(error, SetupError::PoolStorage { slots: 65 });
}
