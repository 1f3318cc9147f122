//! Figures, with their floors: a table, and JSON.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde::Serialize;

use crate::Result;

/// One figure and what it is held against.
#[derive(Serialize)]
struct Line<'a> {
    case: &'a str,
    metric: &'a str,
    ours: f64,
    ours_min: f64,
    ours_max: f64,
    runs: usize,
    floor: Option<f64>,
    floor_of: Option<&'a str>,
    ratio_floor: Option<f64>,
}

/// All of them.
pub(crate) struct Figures {
    json: Option<File>,
    rows: Vec<String>,
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figures {
    pub(crate) fn new(json: Option<&Path>) -> Result<Self> {
        let create = |path: &Path| File::create(path).map_err(|error| format!("--json {}: {error}", path.display()));
        Ok(Self { json: json.map(create).transpose()?, rows: Vec::new() })
    }

    /// Notes a figure; the unit is at the end of the metric's name.
    pub(crate) fn note(&mut self, case: &str, metric: &str, ours: &[f64], floor: Option<(&str, &[f64])>) -> Result<()> {
        let (low, high) =
            ours.iter().fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), v| (low.min(*v), high.max(*v)));
        let line = Line {
            case,
            metric,
            ours: median(ours),
            ours_min: low,
            ours_max: high,
            runs: ours.len(),
            floor: floor.map(|(_, values)| median(values)),
            floor_of: floor.map(|(what, _)| what),
            ratio_floor: floor.map(|(_, values)| median(ours) / median(values)),
        };
        let floor = match (line.floor, line.floor_of, line.ratio_floor) {
            (Some(floor), Some(of), Some(ratio)) => format!("{floor:10.2} {ratio:7.2}  {of}"),
            _ => String::new(),
        };
        let row = format!("{case:<34} {metric:<22} {:10.2} ({low:.2} to {high:.2}) {floor}", line.ours);
        eprintln!("{row}");
        self.rows.push(row);
        if let Some(file) = &mut self.json {
            writeln!(file, "{}", serde_json::to_string(&line)?)?;
        }
        Ok(())
    }

    pub(crate) fn print(&self) {
        println!("{:<34} {:<22} {:>10} (min to max) {:>10} {:>7}", "case", "figure", "ours", "floor", "ratio");
        self.rows.iter().for_each(|row| println!("{row}"));
    }
}
