//! `ramshot inspect`: what a snapshot says of itself.

mod json;
mod table;

use std::path::PathBuf;

use clap::Args;
use ramshot::SnapshotFile;
use ramshot::core::{Run, Treatment};
use ramshot::file::{FileBlock, PageState};

use crate::chain::{Chain, Parents};
pub(crate) use json::print as print_json;

use crate::out::Out;
use crate::outcome::{Answer, Failure};

/// Shows what is in a snapshot: RAM layout, page states, what it builds on, statistics.
///
/// Reads and checks the trailer, not the pages: `ramshot verify` does that.
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The snapshot file.
    #[arg(value_name = "SNAPSHOT")]
    path: PathBuf,
    #[command(flatten)]
    parents: Parents,
    /// As JSON instead of tables. Addresses and ids are strings, sizes are bytes. `ramshot import --layout` takes it.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let chain = Chain::open(&self.path, &self.parents.files)?;
        if self.json {
            json::write(&chain, out)?;
        } else {
            table::write(&chain, out)?;
        }
        Ok(Answer::Yes)
    }
}

/// How many pages of a block are in which state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct States {
    data: u64,
    zero: u64,
    in_parent: u64,
}

/// The states of each block's pages, in the order of the blocks: one pass over the runs.
fn states_by_block(file: &SnapshotFile) -> Vec<States> {
    let count = |block: &FileBlock| {
        let mut states = States::default();
        let run = block.run();
        for part in file.state_runs_from(run.first).take_while(|part| part.run.first < run.end()) {
            let pages = common(part.run, run);
            match part.state {
                PageState::Data => states.data += pages,
                PageState::Zero => states.zero += pages,
                PageState::InParent => states.in_parent += pages,
            }
        }
        states
    };
    file.blocks().iter().map(count).collect()
}

/// Pages that two runs have in common.
fn common(a: Run, b: Run) -> u64 {
    a.end().0.min(b.end().0).saturating_sub(a.first.0.max(b.first.0))
}

/// The word for a treatment.
const fn treatment(of: Treatment) -> &'static str {
    match of {
        Treatment::Tracked => "tracked",
        Treatment::ReadOnly => "read-only",
        Treatment::InPause => "in pause",
        Treatment::Ignored => "ignored",
    }
}
