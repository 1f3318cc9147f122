//! The `ramshot` command: looks into snapshot files, checks, compares and converts them, and shows a live snapshot.
//!
//! One file a subcommand (`flatten` and `rebase` share [`merge`]): its arguments and what it does. What they share: [`chain`] (a snapshot and those it builds
//! on), [`outcome`] (exit codes), [`out`] (standard output), [`progress`], [`target`] (files that appear when they are
//! complete), [`size`] (sizes and addresses as people write them).
#![forbid(unsafe_code)]

mod chain;
mod columns;
mod completions;
mod demo;
mod diff;
mod export;
mod import;
mod inspect;
mod man;
mod map;
mod merge;
mod out;
mod outcome;
mod progress;
mod size;
mod target;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use out::Out;
use outcome::{Answer, Failure};

/// What the exit codes mean: in `--help` and on the manual page.
pub(crate) const EXIT_STATUS: &str = "\
0  Done; where the command asks something, the answer is yes.
1  The answer is no, or damage was found: verify found damage, diff found differences, the image of demo is not the \
memory at T0, a snapshot that was to be read is damaged or truncated.
2  Wrong usage, or something cannot be read or written. (diff: damage as well, since 1 says that the two differ.)";

/// Looks into snapshots of running virtual machines: what is in them, whether they are intact, how two differ.
///
/// A snapshot file holds a VM's memory at one instant (T0), made by a hypervisor that embeds the ramshot library while
/// the VM ran on. Its first bytes are the flat RAM; everything else is a trailer.
#[derive(Parser, Debug)]
#[command(name = "ramshot", version, max_term_width = 120)]
#[command(after_long_help = format!("Exit status:\n{EXIT_STATUS}"))]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Inspect(inspect::Inspect),
    Verify(verify::Verify),
    Diff(diff::Diff),
    Flatten(merge::Flatten),
    Rebase(merge::Rebase),
    Export(export::Export),
    Import(import::Import),
    Map(map::Map),
    Demo(demo::Demo),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        match self {
            Self::Inspect(command) => command.run(out),
            Self::Verify(command) => command.run(out),
            Self::Diff(command) => command.run(out),
            Self::Flatten(command) => command.run(out),
            Self::Rebase(command) => command.run(out),
            Self::Export(command) => command.run(out),
            Self::Import(command) => command.run(out),
            Self::Map(command) => command.run(out),
            Self::Demo(command) => command.run(out),
            Self::Completions(command) => command.run(out),
            Self::Man(command) => command.run(out),
        }
    }
}

fn main() -> ExitCode {
    let mut out = Out::new();
    let outcome = Cli::parse().command.run(&mut out);
    // What was said before a failure is said; a failure to say it matters only if there is no other.
    let flushed = out.flush().map_err(Failure::from);
    match outcome.and_then(|answer| flushed.map(|()| answer)) {
        Ok(Answer::Yes) => ExitCode::SUCCESS,
        Ok(Answer::No) => ExitCode::from(1),
        Err(failure) => {
            outcome::complain(&failure);
            failure.code()
        }
    }
}
