//! As pixels.

use super::grid::{Grid, NOTHING};
use crate::outcome::Failure;

/// A PNG file: the blocks one below the other, a white line between them.
pub(super) fn draw(grid: &Grid) -> Result<Vec<u8>, Failure> {
    let mut pixels = Vec::new();
    for (number, panel) in grid.panels.iter().enumerate() {
        if number > 0 {
            pixels.extend(std::iter::repeat_n(NOTHING, grid.width));
        }
        pixels.extend_from_slice(&panel.cells);
        let whole = pixels.len().next_multiple_of(grid.width);
        pixels.resize(whole, NOTHING);
    }
    let failed = |error: png::EncodingError| Failure::Refused(format!("the picture cannot be made: {error}").into());
    let number = |count: usize| {
        u32::try_from(count).map_err(|_| Failure::says(format!("a picture of {count} lines is too large")))
    };
    let (width, height) = (number(grid.width)?, number(pixels.len() / grid.width)?);
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let legend = "pages of a ramshot snapshot: blue data, grey zero, orange in parent";
    encoder.add_text_chunk("Description".to_owned(), legend.to_owned()).map_err(failed)?;
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(pixels.as_flattened()).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}
