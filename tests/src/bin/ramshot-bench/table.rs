//! The tables a person reads: one about time, one about the guest's work and our costs. As text and as Markdown.

use std::fmt::Write;

use crate::metric::{METRICS, Metric, Sample, summary};
use crate::result::{CaseResult, ratio};

const TITLES: [&str; 2] =
    ["Time, and what the guest saw (stalls: gaps of 25 us and more)", "The guest's work, and costs"];

struct Row {
    case: String,
    who: &'static str,
    cells: Vec<String>,
}

fn columns(table: usize) -> impl Iterator<Item = (&'static Metric, &'static str)> {
    METRICS.iter().filter_map(move |metric| match metric.column {
        Some((of, head)) if of == table => Some((metric, head)),
        _ => None,
    })
}

/// `digits` behind the point, fewer of large numbers: three figures count.
fn number(value: f64, metric: &Metric) -> String {
    let value = value / metric.scale;
    if value.abs() >= 9999.5 {
        return format!("{:.1}k", value / 1000.0);
    }
    let most = if value.abs() >= 99.95 {
        0
    } else if value.abs() >= 9.995 {
        1
    } else {
        2
    };
    let digits = metric.digits.min(most);
    format!("{value:.digits$}")
}

fn cells(table: usize, cell: impl Fn(&Metric) -> Option<String>) -> Vec<String> {
    columns(table).map(|(metric, _)| cell(metric).unwrap_or_else(|| "-".to_owned())).collect()
}

fn median(samples: &[Sample], metric: &Metric) -> Option<String> {
    Some(number(summary(samples, metric.key)?.median, metric))
}

fn spread(samples: &[Sample], metric: &Metric) -> Option<String> {
    let s = summary(samples, metric.key)?;
    Some(format!("{}-{}", number(s.min, metric), number(s.max, metric)))
}

fn times(samples: &[Sample], metric: &Metric, of: impl Fn(&str) -> Option<f64>) -> Option<String> {
    if matches!(metric.key, "rate_before" | "huge_before_mib" | "load" | "others_percent") {
        return None;
    }
    let ratio = ratio(summary(samples, metric.key)?.median, of(metric.key))?;
    Some(if ratio >= 100.0 { format!("{ratio:.0}x") } else { format!("{ratio:.2}x") })
}

fn rows(table: usize, results: &[CaseResult]) -> Vec<Row> {
    let mut rows = Vec::new();
    for result in results {
        let mut push = |who, cells: Vec<String>| {
            if cells.iter().any(|cell| cell != "-") {
                let case = if who == "ours" { result.case.clone() } else { String::new() };
                rows.push(Row { case, who, cells });
            }
        };
        push("ours", cells(table, |m| median(&result.ours, m)));
        push("min-max", cells(table, |m| spread(&result.ours, m)));
        let floor = |m: &Metric| result.floor.get(m.key).map(|&value| number(value, m));
        push("floor", cells(table, floor));
        push("/ floor", cells(table, |m| times(&result.ours, m, |key| result.floor(key))));
        for peer in &result.peers {
            push(peer.name, cells(table, |m| median(&peer.samples, m)));
            push("min-max", cells(table, |m| spread(&peer.samples, m)));
            let of = |key: &str| summary(&peer.samples, key).map(|s| s.median);
            push("/ it", cells(table, |m| times(&result.ours, m, of)));
        }
    }
    rows
}

/// Both tables, at most 140 columns wide.
pub(crate) fn text(results: &[CaseResult]) -> String {
    let mut out = String::new();
    for (table, title) in TITLES.iter().enumerate() {
        let rows = rows(table, results);
        let heads: Vec<&str> = columns(table).map(|(_, head)| head).collect();
        let widest = |n: usize| rows.iter().filter_map(|row| row.cells.get(n)).map(String::len).max();
        let widths: Vec<usize> =
            heads.iter().enumerate().map(|(n, h)| widest(n).unwrap_or(0).max(h.len()) + 1).collect();
        let case = rows.iter().map(|row| row.case.len()).max().unwrap_or(0).max(4);
        let line = |out: &mut String, case_cell: &str, who: &str, cells: &[&str]| {
            let _ = write!(out, "{case_cell:case$} {who:8}");
            cells.iter().zip(&widths).for_each(|(cell, width)| {
                let _ = write!(out, "{cell:>width$}");
            });
            out.push('\n');
        };
        let _ = writeln!(out, "\n{title}");
        line(&mut out, "case", "", &heads);
        for row in &rows {
            let cells: Vec<&str> = row.cells.iter().map(String::as_str).collect();
            line(&mut out, &row.case, row.who, &cells);
        }
    }
    out
}

/// Both tables.
pub(crate) fn markdown(results: &[CaseResult]) -> String {
    let mut out = String::new();
    for (table, title) in TITLES.iter().enumerate() {
        let heads: Vec<&str> = columns(table).map(|(_, head)| head).collect();
        let _ = writeln!(out, "**{title}**\n\n| case | | {} |", heads.join(" | "));
        let _ = writeln!(out, "|---|---|{}", "---:|".repeat(heads.len()));
        for row in rows(table, results) {
            let _ = writeln!(out, "| {} | {} | {} |", row.case, row.who, row.cells.join(" | "));
        }
        out.push('\n');
    }
    out
}
