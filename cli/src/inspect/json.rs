//! The same for programs.

use std::io::Write;

use ramshot::file::{PageState, ParentRef};
use serde::Serialize;

use super::{states_by_block, treatment};
use crate::chain::{Chain, PAGE_BYTES};
use crate::out::Out;
use crate::outcome::Failure;

#[derive(Serialize)]
struct Snapshot<'a> {
    path: String,
    id: String,
    checksum: String,
    parent: Option<Parent>,
    /// Those of the chain that were given, newest first.
    chain: Vec<Link>,
    file_bytes: u64,
    ram_bytes: u64,
    pages: u64,
    data_pages: u64,
    zero_pages: u64,
    in_parent_pages: u64,
    default_state: &'static str,
    device_state_bytes: usize,
    blocks: Vec<Block<'a>>,
    /// Pairs rather than a map: a writer may give a key twice, and the order is its own.
    statistics: Vec<Statistic<'a>>,
}

#[derive(Serialize)]
struct Parent {
    id: String,
    checksum: String,
}

impl From<ParentRef> for Parent {
    fn from(parent: ParentRef) -> Self {
        Self { id: parent.id.to_string(), checksum: format!("{:#010x}", parent.checksum) }
    }
}

#[derive(Serialize)]
struct Link {
    path: String,
    id: String,
    parent: Option<Parent>,
}

#[derive(Serialize)]
struct Block<'a> {
    name: &'a str,
    guest_address: String,
    size: u64,
    used: u64,
    host_page_size: u64,
    backing: String,
    treatment: &'static str,
    /// Where it lies in the file.
    offset: u64,
    pages: u64,
    data_pages: u64,
    zero_pages: u64,
    in_parent_pages: u64,
}

#[derive(Serialize)]
struct Statistic<'a> {
    key: &'a str,
    value: u64,
}

pub(super) fn write(chain: &Chain, out: &mut Out) -> Result<(), Failure> {
    let file = chain.top();
    let blocks = file.blocks().iter().zip(states_by_block(file)).map(|(block, states)| Block {
        name: block.name.as_str(),
        guest_address: block.guest.to_string(),
        size: block.len,
        used: block.used,
        host_page_size: block.page_size,
        backing: format!("{:?}", block.backing).to_lowercase(),
        treatment: treatment(block.treatment),
        offset: block.first_page.0 * PAGE_BYTES,
        pages: block.pages(),
        data_pages: states.data,
        zero_pages: states.zero,
        in_parent_pages: states.in_parent,
    });
    let links = chain.ancestors().iter().map(|file| Link {
        path: file.path().display().to_string(),
        id: file.id().to_string(),
        parent: file.parent().map(Parent::from),
    });
    let snapshot = Snapshot {
        path: file.path().display().to_string(),
        id: file.id().to_string(),
        checksum: format!("{:#010x}", file.checksum()),
        parent: file.parent().map(Parent::from),
        chain: links.collect(),
        file_bytes: file.image_bytes(),
        ram_bytes: file.ram_bytes(),
        pages: file.pages(),
        data_pages: file.data_pages(),
        zero_pages: file.zero_pages(),
        in_parent_pages: file.in_parent_pages(),
        default_state: match file.default_state() {
            PageState::Zero => "zero",
            PageState::Data => "data",
            PageState::InParent => "in parent",
        },
        device_state_bytes: file.device_state().len(),
        blocks: blocks.collect(),
        statistics: file.statistics().iter().map(|(key, value)| Statistic { key, value: *value }).collect(),
    };
    print(&snapshot, out)
}

/// One value as JSON, and a line's end.
pub(crate) fn print(value: &impl Serialize, out: &mut Out) -> Result<(), Failure> {
    // An error of the writer comes back as what it was; ours have no other: all keys are strings.
    serde_json::to_writer_pretty(&mut *out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
