//! `ramshot map`: a picture of a snapshot.

mod grid;
mod png_file;
mod svg;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::chain::PAGE_BYTES;
use crate::columns::shown;
use crate::out::Out;
use crate::outcome::{Answer, Failure, open};
use crate::size;
use crate::target::Target;
use grid::Grid;

/// Draws a picture of the image: which pages have data, which are zero, which are in the parent.
///
/// Each RAM block starts a line of its own, lowest page first. A cell that stands for several pages has the mixture of
/// their colours: blue for data, light grey for zero, orange for in the parent.
#[derive(Args, Debug)]
pub(crate) struct Map {
    /// The snapshot file.
    #[arg(value_name = "SNAPSHOT")]
    path: PathBuf,
    /// The picture to write.
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    /// What to write; if it is not given, the ending of OUTPUT says.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Cells in a line.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=4096))]
    width: u32,
    /// Pages in a cell; as few as make about as many lines as cells in a line, if it is not given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pages_per_cell: Option<u64>,
    /// Replace OUTPUT if it exists.
    #[arg(long)]
    replace: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// Pixels, a cell each.
    Png,
    /// With a legend and the blocks' names.
    Svg,
}

impl Map {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let format = self.format()?;
        let file = open(&self.path)?;
        let grid = Grid::new(&file, self.width, self.pages_per_cell)?;
        let bytes = match format {
            Format::Png => png_file::draw(&grid)?,
            Format::Svg => svg::draw(&grid, &file).into_bytes(),
        };
        let mut target = Target::create(&self.output, self.replace)?;
        target.write_at(0, &bytes)?;
        target.commit()?;
        let name = shown(&self.output.display().to_string());
        writeln!(
            out,
            "{name}: a cell is {} ({} pages)",
            size::bytes(grid.pages_per_cell * PAGE_BYTES),
            grid.pages_per_cell
        )?;
        Ok(Answer::Yes)
    }

    fn format(&self) -> Result<Format, Failure> {
        let ending = self.output.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        match (self.format, ending.to_ascii_lowercase().as_str()) {
            (Some(format), _) => Ok(format),
            (None, "png") => Ok(Format::Png),
            (None, "svg") => Ok(Format::Svg),
            _ => Err(Failure::says(format!("{:?} ends neither in .png nor in .svg: give --format", self.output))),
        }
    }
}
