//! `ramshot completions`: for a shell.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::Cli;
use crate::out::Out;
use crate::outcome::{Answer, Failure};

/// Writes completions for a shell to standard output.
///
/// For example: ramshot completions bash > /etc/bash_completion.d/ramshot
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        // Into memory first: the generator takes a writer that fails for a bug.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "ramshot", &mut script);
        out.write_all(&script)?;
        Ok(Answer::Yes)
    }
}
