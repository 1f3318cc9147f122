//! A path through a world, for people to read.

use std::{format, string::String, vec::Vec};

use super::step::Step;
use super::world::{DISCARD, ODD, Setup, Stage, World};

pub(super) const NAMES: [&str; 4] = ["fault thread", "worker 1", "worker 2", "VMM"];

/// One line for each step from the start.
pub(super) fn tell<const F: usize, const C: usize>(setup: &Setup, steps: &[Step]) -> Vec<String> {
    let mut world = World::<F, C>::new(setup);
    let mut lines = Vec::new();
    for &step in steps {
        let before = world.clone();
        let result = world.take(setup, step);
        let ended = match (before.core.cause(), world.core.cause()) {
            (None, Some(cause)) => format!(" [ends: {cause}]"),
            _ => String::new(),
        };
        lines.push(describe(setup, &before, step, &world) + &ended);
        if result.is_err() {
            break;
        }
    }
    lines
}

fn describe<const F: usize, const C: usize>(
    setup: &Setup,
    before: &World<F, C>,
    step: Step,
    after: &World<F, C>,
) -> String {
    let run = |thread: u8| match &before.threads[usize::from(thread)] {
        Stage::Claimed(claim, copied) => format!("{} ({copied} copied)", claim.run()),
        stage => stage.in_hand().map(|(run, _)| format!("{run}")).unwrap_or_default(),
    };
    let name = |thread: u8| NAMES[usize::from(thread)];
    match step {
        Step::Write(i) => {
            let vcpu = usize::from(i);
            let page = before.target(setup, vcpu).unwrap();
            let how = if after.vcpus[vcpu].blocked { "blocks" } else { "goes through" };
            format!("vCPU {i}: write to page {page} {how}")
        }
        Step::Spurious(i) => format!("vCPU {i}: wakes for no reason"),
        Step::Read { index, twice } => {
            let what = match before.unread[usize::from(index)] {
                DISCARD => "the discard".into(),
                odd @ ODD.. => format!("the fault at {}", before.address(setup, odd)),
                page => format!("the fault on page {page}"),
            };
            let outcome = if after.discard != before.discard {
                "it goes on"
            } else if after.stale != before.stale {
                "stale"
            } else if after.core.is_queued(crate::PageId(u64::from(before.unread[usize::from(index)]))) {
                "queued"
            } else {
                "nothing to do"
            };
            format!("fault thread: reads {what}{}: {outcome}", if twice { ", which will come again" } else { "" })
        }
        Step::HandIn => "fault thread: hands the discard in".into(),
        Step::LiftStale => "fault thread: releases what was stale".into(),
        Step::Retry(i) => format!("fault thread: takes up the release of {}", before.retries[usize::from(i)].run()),
        Step::Next(i) => match &after.threads[usize::from(i)] {
            Stage::Claimed(claim, _) => format!("{}: claims {} for a {:?}", name(i), claim.run(), claim.origin()),
            _ => format!("{}: finds nothing to do", name(i)),
        },
        Step::Copy(i) => format!("{}: copies a page of {}", name(i), run(i)),
        Step::Captured(i) => format!("{}: has captured {}", name(i), run(i)),
        Step::Lift(i) => format!("{}: kernel unprotects {}", name(i), run(i)),
        Step::Again(i) => format!("{}: EAGAIN for the release of {}", name(i), run(i)),
        Step::Released(i) => format!("{}: has released {}", name(i), run(i)),
        Step::CopyFails(i) => format!("{}: cannot read {}", name(i), run(i)),
        Step::LiftFails(i) => format!("{}: cannot release {}", name(i), run(i)),
        Step::Save(i) => format!("writer: {} in the image", before.jobs[usize::from(i)].run()),
        Step::SaveFails(i) => format!("writer: cannot write {}", before.jobs[usize::from(i)].run()),
        Step::Request => format!("reader: asks for page {}", setup.requests[before.requested]),
        Step::Ask => format!("VMM: may {} be discarded?", setup.discard.unwrap().run),
        Step::Post => format!("VMM: discards {}, kernel posts the event", setup.discard.unwrap().run),
        Step::Zap => format!("kernel: {} are gone", setup.discard.unwrap().run),
        Step::Resume => "VMM: resumes the guest".into(),
        Step::Cancel => "VMM: cancels".into(),
        Step::Commit => "writer: commits the image".into(),
        Step::Lull => "fault thread: for a while nobody has faulted".into(),
        Step::Disarm => "fault thread: disarms".into(),
    }
}
