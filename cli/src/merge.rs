//! `ramshot flatten` and `ramshot rebase`: chains of increments made shorter, or put on another parent.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use ramshot::Chain;
use ramshot::file::{FileSinkOptions, MergeOptions, MergeReport};

use crate::chain::{PAGE_BYTES, Parents};
use crate::columns::shown;
use crate::out::Out;
use crate::outcome::{Answer, Failure};
use crate::progress::Progress;
use crate::size;

/// Merges an increment and all it builds on into one full snapshot.
///
/// The files that are read stay as they are, so there is always a whole chain: before the new file has its name, and
/// after. Every page is checked on the way. If this is killed, the same command goes on where it was.
///
/// The new snapshot has an id of its own: increments on the old one go on needing the old one, until `ramshot rebase`
/// moves them onto the new one.
#[derive(Args, Debug)]
pub(crate) struct Flatten {
    /// The snapshot file.
    #[arg(value_name = "SNAPSHOT")]
    path: PathBuf,
    #[command(flatten)]
    to: Output,
    #[command(flatten)]
    parents: Parents,
}

/// Writes a snapshot as an increment on another parent.
///
/// The result has the same memory as SNAPSHOT; what the new parent has with the same bytes is left to it. SNAPSHOT and
/// the parent need not be related, but have the same RAM blocks. The files that are read stay as they are. If this is
/// killed, the same command goes on where it was.
#[derive(Args, Debug)]
pub(crate) struct Rebase {
    /// The snapshot file, an increment or a full snapshot.
    #[arg(value_name = "SNAPSHOT")]
    path: PathBuf,
    #[command(flatten)]
    to: Output,
    /// The new parent.
    #[arg(long, value_name = "FILE")]
    onto: PathBuf,
    #[command(flatten)]
    parents: Parents,
}

/// What is written, and how.
#[derive(Args, Debug)]
struct Output {
    /// The file to write. With --replace it may be SNAPSHOT itself.
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    /// Threads that copy.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Replace OUTPUT if it exists.
    #[arg(long)]
    replace: bool,
}

impl Output {
    fn options(&self) -> MergeOptions {
        let file = FileSinkOptions { replace: self.replace, ..FileSinkOptions::default() };
        MergeOptions { file, threads: usize::from(self.threads) }
    }

    fn say(&self, report: &MergeReport, what: &str, out: &mut Out) -> Result<(), Failure> {
        let name = shown(&self.output.display().to_string());
        let data = size::bytes((report.copied_pages + report.reused_pages) * PAGE_BYTES);
        writeln!(out, "{name}: {what}, {data} of data, id {}", report.snapshot.id)?;
        if report.reused_pages > 0 {
            let reused = size::bytes(report.reused_pages * PAGE_BYTES);
            writeln!(out, "{reused} of it were there already, from a run that was killed")?;
        }
        Ok(())
    }
}

/// How far it is, in pages.
fn shown_as(what: &'static str) -> impl FnMut(u64, u64) {
    let mut progress = Progress::new(what);
    move |done, total| progress.bytes(done.saturating_mul(PAGE_BYTES), total.saturating_mul(PAGE_BYTES))
}

fn open(path: &Path, parents: &Parents) -> Result<Chain, Failure> {
    Ok(Chain::open_with(path, &parents.files)?)
}

impl Flatten {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let chain = open(&self.path, &self.parents)?;
        let mut progress = shown_as("merging");
        let report = ramshot::flatten(&chain, &self.to.output, &self.to.options(), &mut progress)?;
        drop(progress);
        let what = match chain.depth() {
            1 => "1 snapshot copied".to_owned(),
            depth => format!("{depth} snapshots merged into one"),
        };
        self.to.say(&report, &what, out)?;
        Ok(Answer::Yes)
    }
}

impl Rebase {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let (chain, parent) = (open(&self.path, &self.parents)?, open(&self.onto, &self.parents)?);
        let mut progress = shown_as("moving");
        let report = ramshot::rebase(&chain, &parent, &self.to.output, &self.to.options(), &mut progress)?;
        drop(progress);
        let onto = shown(&self.onto.display().to_string());
        self.to.say(&report, &format!("an increment on {onto}"), out)?;
        Ok(Answer::Yes)
    }
}
