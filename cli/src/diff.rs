//! `ramshot diff`: which pages of two snapshots differ.

mod compare;
mod show;

use std::path::PathBuf;

use clap::Args;

use crate::chain::Chain;
use crate::out::Out;
use crate::outcome::{Answer, Failure};

/// Compares the memory of two snapshots: which pages differ, block by block, with a small map.
///
/// Blocks are matched by name. A page that is in a parent which was not given is unknown, unless both have it from
/// there; each of the two may itself be the other's parent. Exit code 0 if all memory is the same, 1 if not (a page that
/// is unknown may differ), 2 if that cannot be said because something is damaged or cannot be read. Device state is
/// mentioned and does not count.
#[derive(Args, Debug)]
pub(crate) struct Diff {
    /// A snapshot.
    #[arg(value_name = "A")]
    a: PathBuf,
    /// Another.
    #[arg(value_name = "B")]
    b: PathBuf,
    /// A snapshot that A or B builds on. May be given several times, in any order: they are found by their ids.
    #[arg(long = "parent", value_name = "FILE")]
    parents: Vec<PathBuf>,
    /// Take pages with equal checksums for equal, without reading them: one in 2^32 different pages has the same.
    #[arg(long)]
    checksums: bool,
    /// List the pages that differ, as guest-physical ranges.
    #[arg(long)]
    pages: bool,
    /// As JSON, ranges included.
    #[arg(long, conflicts_with = "pages")]
    json: bool,
}

impl Diff {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        // 1 says that they differ, so damage has to be 2.
        let differences = self.compare().map_err(Failure::refused)?;
        if self.json {
            show::json(&differences, out)?;
        } else {
            show::text(&differences, self.pages, out)?;
        }
        Ok(if differences.none() { Answer::Yes } else { Answer::No })
    }

    fn compare(&self) -> Result<compare::Differences, Failure> {
        let with = |other: &PathBuf| [self.parents.as_slice(), std::slice::from_ref(other)].concat();
        let a = Chain::open(&self.a, &with(&self.b))?;
        let b = Chain::open(&self.b, &with(&self.a))?;
        compare::compare(&a, &b, self.checksums)
    }
}
