//! For people.

use std::io::Write;

use ramshot::SnapshotFile;
use ramshot::core::Treatment;

use super::{states_by_block, treatment};
use crate::chain::{Chain, PAGE_BYTES};
use crate::columns::{Columns, shown};
use crate::out::Out;
use crate::outcome::Failure;
use crate::size;

pub(super) fn write(chain: &Chain, out: &mut Out) -> Result<(), Failure> {
    let file = chain.top();
    writeln!(out, "snapshot      {}", shown(&file.path().display().to_string()))?;
    writeln!(out, "id            {}", file.id())?;
    writeln!(out, "checksum      {:#010x}", file.checksum())?;
    write_chain(chain, out)?;
    writeln!(
        out,
        "file          {} ({} bytes), of which RAM {}",
        size::bytes(file.image_bytes()),
        file.image_bytes(),
        size::bytes(file.ram_bytes())
    )?;
    for (state, pages) in
        [("data", file.data_pages()), ("zero", file.zero_pages()), ("in parent", file.in_parent_pages())]
    {
        let label = if state == "data" { "pages" } else { "" };
        let share = size::percent(pages, file.pages());
        writeln!(out, "{label:<13} {pages:>12} {state:<9} {share:5.1} %  {}", size::bytes(pages * PAGE_BYTES))?;
    }
    writeln!(out, "device state  {}", size::bytes(file.device_state().len() as u64))?;
    write_blocks(file, out)?;
    write_statistics(file, out)
}

fn write_chain(chain: &Chain, out: &mut Out) -> Result<(), Failure> {
    let mut label = "parent";
    for link in chain.ancestors() {
        writeln!(out, "{label:<13} {} ({})", link.id(), shown(&link.path().display().to_string()))?;
        label = "its parent";
    }
    match chain.missing() {
        Some(parent) => writeln!(out, "{label:<13} {} (not found: --parent FILE)", parent.id)?,
        None => writeln!(out, "{label:<13} none")?,
    }
    Ok(())
}

fn write_blocks(file: &SnapshotFile, out: &mut Out) -> Result<(), Failure> {
    writeln!(out, "\nRAM blocks")?;
    let mut columns = Columns::new([
        "name",
        ">guest address",
        ">in use",
        ">size",
        ">host page",
        "backing",
        "treatment",
        ">data",
        ">zero",
        ">in parent",
        ">offset in file",
    ]);
    for (block, states) in file.blocks().iter().zip(states_by_block(file)) {
        let offset = match block.treatment {
            Treatment::Ignored => "-".to_owned(),
            _ => format!("{:#x}", block.first_page.0 * PAGE_BYTES),
        };
        columns.row([
            shown(block.name.as_str()),
            block.guest.to_string(),
            size::bytes(block.used),
            size::bytes(block.len),
            size::bytes(block.page_size),
            format!("{:?}", block.backing).to_lowercase(),
            treatment(block.treatment).to_owned(),
            states.data.to_string(),
            states.zero.to_string(),
            states.in_parent.to_string(),
            offset,
        ]);
    }
    columns.write(out)?;
    Ok(())
}

fn write_statistics(file: &SnapshotFile, out: &mut Out) -> Result<(), Failure> {
    if file.statistics().is_empty() {
        return Ok(());
    }
    writeln!(out, "\nstatistics")?;
    let mut columns = Columns::new(["key", ">value"]);
    for (key, value) in file.statistics() {
        columns.row([shown(key), value.to_string()]);
    }
    columns.write(out)?;
    Ok(())
}
