//! `ramshot man`: the manual pages.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;
use clap_mangen::roff::{Roff, bold, roman};

use crate::out::Out;
use crate::outcome::{Answer, Failure};
use crate::{Cli, EXIT_STATUS};

/// Writes the manual page to standard output, or one for each subcommand to a directory.
///
/// For example: ramshot man | man -l -
#[derive(Args, Debug)]
pub(crate) struct Man {
    /// Write ramshot.1, ramshot-inspect.1 ... into this directory, replacing what has these names.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let Some(dir) = &self.dir else {
            out.write_all(&page(command).map_err(|source| Failure::io("cannot make the manual page", source))?)?;
            return Ok(Answer::Yes);
        };
        for sub in command.get_subcommands() {
            write_page(dir, sub.clone())?;
        }
        write_page(dir, command)?;
        Ok(Answer::Yes)
    }
}

fn write_page(dir: &Path, command: Command) -> Result<(), Failure> {
    let path = dir.join(format!("{}.1", command.get_display_name().unwrap_or_else(|| command.get_name())));
    let written = page(command).and_then(|text| fs::write(&path, text));
    written.map_err(|source| Failure::io(format!("cannot write {path:?}"), source))
}

/// One page. The exit codes get the section that manual pages have for them.
fn page(command: Command) -> io::Result<Vec<u8>> {
    let (subcommands, version) = (command.has_subcommands(), command.get_version().is_some());
    let page = Page::new(command);
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if subcommands {
        page.render_subcommands_section(&mut text)?;
    }
    let mut exit = Roff::new();
    exit.control("SH", ["EXIT STATUS"]);
    for line in EXIT_STATUS.lines() {
        let (code, meaning) = line.split_once(' ').unwrap_or((line, ""));
        exit.control("TP", []);
        exit.text([bold(code)]);
        exit.text([roman(meaning.trim_start())]);
    }
    exit.to_writer(&mut text)?;
    if version {
        page.render_version_section(&mut text)?;
    }
    Ok(text)
}
