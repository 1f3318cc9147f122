//! The figures.

use std::io::Write;
use std::time::Duration;

use super::guest::SLOW;
use super::{Demo, Seen};
use crate::chain::PAGE_BYTES;
use crate::columns::{Columns, shown};
use crate::out::Out;
use crate::outcome::Failure;
use crate::size;

pub(super) fn write(demo: &Demo, seen: &Seen, out: &mut Out) -> Result<(), Failure> {
    let report = &seen.report;
    let counts = &report.counts;
    writeln!(
        out,
        "memory    {}, {} writers at random pages, {} % filled",
        size::bytes(demo.mem),
        demo.threads,
        demo.fill
    )?;
    writeln!(
        out,
        "pause     {}, of which protecting took {}; {} pages belong to the snapshot",
        time(seen.pause),
        time(report.arm),
        counts.total
    )?;
    writeln!(
        out,
        "captured  {} pages in {}, {} of them because a writer waited there or next to it",
        counts.released,
        time(report.capture),
        counts.by_fault
    )?;
    writeln!(
        out,
        "faults    {}; served in {} us (50 %), {} us (99 %), {} us at most",
        counts.faults,
        report.fault_service.percentile_us(50.0),
        report.fault_service.percentile_us(99.0),
        report.fault_service.max_us()
    )?;
    let rate = size::rate(report.image.written_bytes, report.total.as_secs_f64());
    writeln!(
        out,
        "image     {} written in {} ({rate}), {} pages were zero",
        size::bytes(report.image.written_bytes),
        time(report.total),
        report.pages_zero
    )?;
    let costs = report.costs();
    writeln!(
        out,
        "or else   stopped for {}; or copied ahead of the pause: {} pages, a pause of {} (estimates)",
        time(costs.stopped.pause),
        costs.precopy.pages,
        time(costs.precopy.pause)
    )?;
    writeln!(out, "\nwhat the writers noticed")?;
    let stalls = format!(">stalls of {} and more", time(SLOW));
    let mut columns = Columns::new(["snapshot", ">time", ">writes a second", &stalls, ">longest write"]);
    for (phase, counted) in ["before", "arming", "during", "after"].iter().zip(&seen.counts.phases) {
        // Arming ahead can be left out.
        if counted.time.is_zero() {
            continue;
        }
        columns.row([
            (*phase).to_owned(),
            time(counted.time),
            format!("{:.0}", counted.writes as f64 / counted.time.as_secs_f64().max(1e-9)),
            counted.slow.to_string(),
            time(counted.longest),
        ]);
    }
    columns.write(out)?;
    writeln!(out)?;
    match seen.wrong {
        None => writeln!(out, "the image is the memory at T0, all {} pages", demo.mem / PAGE_BYTES)?,
        Some(page) => writeln!(out, "WRONG: {page} of the image is not as it was at T0")?,
    }
    if let Some(path) = &demo.keep {
        writeln!(out, "kept as {}", shown(&path.display().to_string()))?;
    }
    Ok(())
}

fn time(duration: Duration) -> String {
    match duration.as_micros() {
        us @ 0..1000 => format!("{us} us"),
        us @ 1000..1_000_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        us => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}
