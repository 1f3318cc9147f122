//! Differences for people and for programs.

use std::io::Write;

use serde::Serialize;

use super::compare::{BlockDiff, Differences};
use crate::chain::PAGE_BYTES;
use crate::columns::{Columns, shown};
use crate::inspect::print_json;
use crate::out::Out;
use crate::outcome::Failure;
use crate::size;

/// Characters in a line of the map, and most lines for a block.
const WIDTH: u64 = 64;
const LINES: u64 = 16;

pub(super) fn text(differences: &Differences, pages: bool, out: &mut Out) -> Result<(), Failure> {
    for sentence in &differences.layout {
        writeln!(out, "layout: {}", shown(sentence))?;
    }
    let mut columns = Columns::new(["block", ">guest address", ">pages", ">differ", ">unknown", ">share"]);
    for block in &differences.blocks {
        columns.row([
            shown(&block.name),
            format!("{:#x}", block.guest),
            block.pages.to_string(),
            block.differ.to_string(),
            block.unknown.to_string(),
            format!("{:.2} %", size::percent(block.differ, block.pages)),
        ]);
    }
    columns.write(out)?;
    match differences.device_state {
        Some(true) => writeln!(out, "device state: the same")?,
        Some(false) => writeln!(out, "device state: differs")?,
        None => {}
    }
    for block in differences.blocks.iter().filter(|block| !block.runs.is_empty()) {
        map(block, out)?;
        if pages {
            list(block, out)?;
        }
    }
    Ok(())
}

/// A character for some pages: `.` all the same, `+` some differ, `#` most do, `?` none known to differ and some unknown.
fn map(block: &BlockDiff, out: &mut Out) -> Result<(), Failure> {
    let pages_each = block.pages.div_ceil(WIDTH * LINES).max(1).next_power_of_two();
    writeln!(
        out,
        "\n{}: a character is {} (. same, + some differ, # most differ, ? unknown)",
        shown(&block.name),
        size::bytes(pages_each * PAGE_BYTES)
    )?;
    let cells = usize::try_from(block.pages.div_ceil(pages_each)).unwrap_or(0);
    let mut counts = vec![(0u64, 0u64); cells];
    for run in &block.runs {
        let end = run.first + run.pages;
        let mut page = run.first;
        while page < end {
            let cell = page / pages_each;
            let upto = ((cell + 1) * pages_each).min(end);
            if let Some(count) = usize::try_from(cell).ok().and_then(|cell| counts.get_mut(cell)) {
                *(if run.known { &mut count.0 } else { &mut count.1 }) += upto - page;
            }
            page = upto;
        }
    }
    let mut address = block.guest;
    for line in counts.chunks(usize::try_from(WIDTH).unwrap_or(64)) {
        let text: String = line.iter().map(|&count| character(count, pages_each)).collect();
        writeln!(out, "  {address:#014x}  {text}")?;
        address = address.saturating_add(WIDTH * pages_each * PAGE_BYTES);
    }
    Ok(())
}

fn character((differ, unknown): (u64, u64), of: u64) -> char {
    match (differ, unknown) {
        (0, 0) => '.',
        (0, _) => '?',
        (differ, _) if differ * 2 > of => '#',
        _ => '+',
    }
}

fn list(block: &BlockDiff, out: &mut Out) -> Result<(), Failure> {
    for run in &block.runs {
        let (first, pages) = (block.guest.saturating_add(run.first * PAGE_BYTES), run.pages);
        let word = if run.known { "differ" } else { "unknown" };
        writeln!(out, "  {first:#x}+{:#x} {word} ({pages} pages)", pages * PAGE_BYTES)?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Json<'a> {
    same: bool,
    layout: &'a [String],
    device_state_same: Option<bool>,
    blocks: Vec<JsonBlock<'a>>,
}

#[derive(Serialize)]
struct JsonBlock<'a> {
    name: &'a str,
    guest_address: String,
    pages: u64,
    differ: u64,
    unknown: u64,
    runs: Vec<JsonRun>,
}

#[derive(Serialize)]
struct JsonRun {
    guest_address: String,
    pages: u64,
    known: bool,
}

pub(super) fn json(differences: &Differences, out: &mut Out) -> Result<(), Failure> {
    let block = |block: &'_ BlockDiff| -> Vec<JsonRun> {
        let run = |run: &super::compare::DiffRun| JsonRun {
            guest_address: format!("{:#x}", block.guest.saturating_add(run.first * PAGE_BYTES)),
            pages: run.pages,
            known: run.known,
        };
        block.runs.iter().map(run).collect()
    };
    let blocks = differences.blocks.iter().map(|diff| JsonBlock {
        name: &diff.name,
        guest_address: format!("{:#x}", diff.guest),
        pages: diff.pages,
        differ: diff.differ,
        unknown: diff.unknown,
        runs: block(diff),
    });
    let json = Json {
        same: differences.none(),
        layout: &differences.layout,
        device_state_same: differences.device_state,
        blocks: blocks.collect(),
    };
    print_json(&json, out)
}
