//! As a drawing, with a legend and the blocks' names.

use std::fmt::Write;

use ramshot::SnapshotFile;

use super::grid::{Colour, DATA, Grid, IN_PARENT, ZERO};
use crate::chain::PAGE_BYTES;
use crate::columns::shown;
use crate::size;

/// Width and height of a cell.
const CELL: usize = 3;
const LEFT: usize = 10;
const LINE: usize = 18;

pub(super) fn draw(grid: &Grid, file: &SnapshotFile) -> String {
    let mut body = String::new();
    let mut y = LINE;
    let name = file.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    text(&mut body, LEFT, y, &format!("{name}: a cell is {}", size::bytes(grid.pages_per_cell * PAGE_BYTES)));
    y += LINE;
    legend(&mut body, y, file);
    y += LINE / 2;
    for panel in &grid.panels {
        let Some(block) = file.blocks().get(panel.block) else { continue };
        y += LINE;
        text(&mut body, LEFT, y, &format!("{} at {}, {}", block.name, block.guest, size::bytes(block.used)));
        y += 6;
        for row in panel.cells.chunks(grid.width) {
            let mut x = LEFT;
            for same in row.chunk_by(|a, b| a == b) {
                let width = same.len() * CELL;
                if let Some(colour) = same.first() {
                    rect(&mut body, (x, y), (width, CELL), *colour);
                }
                x += width;
            }
            y += CELL;
        }
    }
    let (width, height) = ((grid.width * CELL).max(460) + 2 * LEFT, y + LEFT);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\" shape-rendering=\"crispEdges\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn legend(body: &mut String, y: usize, file: &SnapshotFile) {
    let entries = [
        (DATA, "data", file.data_pages()),
        (ZERO, "zero", file.zero_pages()),
        (IN_PARENT, "in parent", file.in_parent_pages()),
    ];
    for ((colour, word, pages), x) in entries.into_iter().zip((LEFT..).step_by(150)) {
        rect(body, (x, y - 10), (12, 12), colour);
        text(body, x + 18, y, &format!("{word} {:.1} %", size::percent(pages, file.pages())));
    }
}

fn rect(body: &mut String, (x, y): (usize, usize), (width, height): (usize, usize), [r, g, b]: Colour) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        body,
        "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"#{r:02x}{g:02x}{b:02x}\"/>"
    );
}

/// Text may come out of the file.
fn text(body: &mut String, x: usize, y: usize, text: &str) {
    let safe = shown(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, "<text x=\"{x}\" y=\"{y}\">{safe}</text>");
}
