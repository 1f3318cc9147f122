//! `ramshot verify`: every byte against its checksum.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::chain::PAGE_BYTES;
use crate::columns::shown;
use crate::out::Out;
use crate::outcome::{Answer, Failure, complain, open};
use crate::progress::Progress;
use crate::size;

/// Reads all of a snapshot and checks it: every page against its CRC-32C, and that what has no data reads as zeros.
///
/// Each file is checked by itself; what an increment leaves in its parent is the parent's to verify. Exit code 1 if one
/// is damaged, 2 if one cannot be read.
#[derive(Args, Debug)]
pub(crate) struct Verify {
    /// Snapshot files.
    #[arg(value_name = "SNAPSHOT", required = true)]
    paths: Vec<PathBuf>,
    /// Threads that read and check; one for each processor if it is not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

impl Verify {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let threads = match self.threads {
            Some(threads) => usize::from(threads),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let (mut damaged, mut refused) = (0, 0);
        for path in &self.paths {
            let failure = match verify(path, threads, out) {
                Ok(()) => continue,
                Err(failure) => failure,
            };
            match failure {
                Failure::Damaged(_) => damaged += 1,
                Failure::Refused(_) => refused += 1,
            }
            if self.paths.len() == 1 {
                return Err(failure);
            }
            complain(&failure);
        }
        match (damaged, refused) {
            (0, 0) => Ok(Answer::Yes),
            (_, 0) => Ok(Answer::No),
            _ => Err(Failure::says(format!("{refused} of {} files could not be verified", self.paths.len()))),
        }
    }
}

fn verify(path: &Path, threads: usize, out: &mut Out) -> Result<(), Failure> {
    let file = open(path)?;
    let mut progress = Progress::new("verifying");
    let outcome = file.verify(threads, &mut |done, total| {
        progress.bytes(done.saturating_mul(PAGE_BYTES), total.saturating_mul(PAGE_BYTES));
    });
    drop(progress);
    let report = outcome?;
    let name = shown(&path.display().to_string());
    write!(
        out,
        "{name}: intact, {} pages with data ({})",
        report.data_pages,
        size::bytes(report.data_pages * PAGE_BYTES)
    )?;
    write!(out, ", {} without", report.other_pages)?;
    match file.parent() {
        Some(parent) => writeln!(out, "; {} of them are in its parent {}", file.in_parent_pages(), parent.id)?,
        None => writeln!(out)?,
    }
    Ok(())
}
