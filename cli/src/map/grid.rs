//! The cells of a picture, and their colours.

use ramshot::SnapshotFile;
use ramshot::file::{FileBlock, PageState};

use crate::outcome::Failure;

/// Most cells of a picture: 192 MiB of pixels.
const MAX_CELLS: u64 = 1 << 26;

/// Red, green, blue.
pub(super) type Colour = [u8; 3];

pub(super) const DATA: Colour = [0x0b, 0x5e, 0x99];
pub(super) const ZERO: Colour = [0xe3, 0xe7, 0xea];
pub(super) const IN_PARENT: Colour = [0xf0, 0xa0, 0x30];
/// Where there is no page.
pub(super) const NOTHING: Colour = [0xff, 0xff, 0xff];

/// One block's cells.
#[derive(Debug)]
pub(super) struct Panel {
    /// Which block of the file.
    pub(super) block: usize,
    pub(super) cells: Vec<Colour>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Grid {
    pub(super) width: usize,
    pub(super) pages_per_cell: u64,
    pub(super) panels: Vec<Panel>,
}

impl Grid {
    pub(super) fn new(file: &SnapshotFile, width: u32, pages_per_cell: Option<u64>) -> Result<Self, Failure> {
        let square = u64::from(width) * u64::from(width);
        let pages_per_cell = pages_per_cell.unwrap_or_else(|| file.pages().div_ceil(square).max(1).next_power_of_two());
        let shown = || file.blocks().iter().enumerate().filter(|(_, block)| block.pages() > 0);
        // Each block ends in a line that may be nearly empty, and a gap of one.
        let lines = |block: &FileBlock| block.pages().div_ceil(pages_per_cell).div_ceil(u64::from(width)) + 1;
        let cells = shown().map(|(_, block)| lines(block) * u64::from(width)).sum::<u64>();
        if cells > MAX_CELLS {
            return Err(Failure::says(format!(
                "the picture would have {cells} cells, more than {MAX_CELLS}: use a larger --pages-per-cell"
            )));
        }
        let panel =
            |(index, block): (usize, &FileBlock)| Panel { block: index, cells: colours(file, block, pages_per_cell) };
        Ok(Self { width: usize::try_from(width).unwrap_or(256), pages_per_cell, panels: shown().map(panel).collect() })
    }
}

/// The colours of a block's cells.
fn colours(file: &SnapshotFile, block: &FileBlock, pages_per_cell: u64) -> Vec<Colour> {
    let run = block.run();
    let cells = usize::try_from(run.pages.div_ceil(pages_per_cell)).unwrap_or(0);
    // Pages with data, zero, in the parent.
    let mut counts = vec![[0u64; 3]; cells];
    for part in file.state_runs_from(run.first).take_while(|part| part.run.first < run.end()) {
        let kind = match part.state {
            PageState::Data => 0,
            PageState::Zero => 1,
            PageState::InParent => 2,
        };
        let mut page = part.run.first.max(run.first).0 - run.first.0;
        let end = part.run.end().min(run.end()).0 - run.first.0;
        while page < end {
            let cell = page / pages_per_cell;
            let upto = ((cell + 1) * pages_per_cell).min(end);
            let count = usize::try_from(cell).ok().and_then(|cell| counts.get_mut(cell));
            if let Some(count) = count.and_then(|counts| counts.get_mut(kind)) {
                *count += upto - page;
            }
            page = upto;
        }
    }
    counts.into_iter().map(mixture).collect()
}

/// Colours in proportion. A single page with data among many is to be seen, so it never falls under an eighth.
fn mixture([data, zero, in_parent]: [u64; 3]) -> Colour {
    let others = zero + in_parent;
    let data = if data > 0 { data.max(others / 7) } else { 0 };
    let all = u128::from(data + others).max(1);
    let channel = |n: usize| {
        let part = |colour: &Colour, pages: u64| u128::from(colour.get(n).copied().unwrap_or(0)) * u128::from(pages);
        u8::try_from((part(&DATA, data) + part(&ZERO, zero) + part(&IN_PARENT, in_parent)) / all).unwrap_or(u8::MAX)
    };
    [channel(0), channel(1), channel(2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_mix_and_a_single_data_page_is_seen() {
        assert_eq!(mixture([7, 0, 0]), DATA);
        assert_eq!(mixture([0, 7, 0]), ZERO);
        assert_eq!(mixture([0, 0, 7]), IN_PARENT);
        assert_ne!(mixture([1, 1 << 30, 0]), ZERO);
        assert!(mixture([1, 1 << 30, 0])[0] < ZERO[0] - 20);
    }
}
