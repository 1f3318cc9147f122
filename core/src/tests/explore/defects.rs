//! The exploration can fail: each deliberate mistake is caught, and here is the shortest way to it.

use super::world::{DiscardPlan, Judge, Part, Setup, tracked};
use super::{explore, report};
use crate::tests::Defect;
use crate::*;

/// Expects that `setup` is right as it is, and that with `defect` it is wrong with `complaint`.
fn catches<const F: usize, const C: usize>(defect: Defect, setup: Setup, complaint: &str) {
    assert!(explore::<F, C>(&setup).is_ok(), "the world must be right without the defect");
    let broken = Setup { name: "", defect: Some(defect), ..setup };
    let Err(violation) = explore::<F, C>(&broken) else { panic!("{defect:?} was not caught") };
    std::print!("{defect:?}, judged by {:?}", setup.judge);
    report(&broken, &violation);
    assert!(violation.what.contains(complaint), "{defect:?} was caught, but as: {}", violation.what);
}

/// No errors and no cancel: the defect alone must be enough.
const CALM: Setup = Setup { errors: false, ..Setup::PLAIN };
/// Followed to its end: what the defect does to the image or to the guest, not what it does to the bookkeeping.
const OUTCOME: Setup = Setup { judge: Judge::Outcome, ..CALM };
const THREE: &[Part] = &[tracked(3)];
const TORN: &str = "the image is complete, but page";

#[test]
fn bug_1_captured_before_it_is_read() {
    catches::<2, 3>(Defect::CapturedBeforeRead, CALM, "invariant 2");
    catches::<2, 3>(Defect::CapturedBeforeRead, OUTCOME, TORN);
}

#[test]
fn bug_2_a_fault_waits_for_the_writer() {
    catches::<2, 3>(Defect::FaultWaitsForWriter, CALM, "invariant 3: a fault waits for the writer");
    catches::<2, 3>(Defect::ClaimHeldAcrossWrite, CALM, "invariant 3: worker 1 waits with a claim");
}

#[test]
fn bug_3_pages_beyond_a_cap_are_released_unsaved() {
    catches::<2, 3>(Defect::CapOnPages, Setup { slots: 1, ..CALM }, "invariant 1");
    catches::<2, 3>(Defect::CapOnPages, Setup { slots: 1, ..OUTCOME }, TORN);
}

#[test]
fn bug_4_the_fault_loop_ends_at_the_first_eagain() {
    catches::<2, 3>(Defect::FaultLoopEndsAtAgain, Setup { again: 1, ..CALM }, "invariant 1");
    catches::<2, 3>(Defect::FaultLoopEndsAtAgain, Setup { again: 1, ..OUTCOME }, "deadlock: vCPU");
}

#[test]
fn release_before_capture() {
    catches::<2, 3>(Defect::ReleaseBeforeCapture, CALM, "invariant 2");
    catches::<2, 3>(Defect::ReleaseBeforeCapture, OUTCOME, TORN);
}

#[test]
fn lost_wake_up_of_a_stale_fault() {
    // Page 0 is protected, although it does not belong to the snapshot.
    let setup = Setup { members: 0b10, gaps: 0b01, ..CALM };
    catches::<2, 3>(Defect::StaleNotWoken, setup, "invariant 4: vCPU 0");
}

#[test]
fn lost_wake_up_in_a_full_queue() {
    let setup = Setup { parts: THREE, programs: [&[0], &[1]], ..CALM };
    catches::<1, 3>(Defect::FullQueueDropsFault, setup, "invariant 4: vCPU 1");
}

#[test]
fn lost_wake_up_after_the_end() {
    catches::<2, 3>(Defect::NoDisarm, Setup { judge: Judge::Outcome, ..Setup::PLAIN }, "deadlock: vCPU");
}

#[test]
fn a_slot_is_free_before_its_bytes_are_written() {
    catches::<2, 3>(Defect::SlotFreedAtRelease, CALM, "a slot leaked, or was freed too early");
    catches::<2, 3>(Defect::SlotFreedAtRelease, OUTCOME, TORN);
}

#[test]
fn a_later_cause_replaces_the_first() {
    catches::<2, 3>(Defect::LastCauseKept, Setup::PLAIN, "invariant 6");
}

#[test]
fn a_discard_event_is_read_before_it_is_handed_in() {
    let discard = Some(DiscardPlan { run: Run::new(PageId(1), 1), announced: false });
    let setup = Setup { discard, programs: [&[], &[]], ..OUTCOME };
    catches::<2, 3>(Defect::EventReadOutsideLock, setup, TORN);
}

#[test]
fn events_are_not_read_while_the_pool_is_full() {
    let discard = Some(DiscardPlan { run: Run::new(PageId(0), 1), announced: true });
    let setup = Setup { discard, parts: THREE, programs: [&[2], &[]], slots: 1, ..OUTCOME };
    catches::<2, 3>(Defect::NoEventsWhileFull, setup, "deadlock: vCPU");
}
