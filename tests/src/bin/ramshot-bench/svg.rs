//! Plots of the guest's rate over time: ours and the peers', each alone on the time it takes, and all on one scale.

use std::fmt::Write;

use crate::ours::Trace;

const WIDTH: f64 = 860.0;
const PANEL: f64 = 130.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 46.0;
const GAP: f64 = 48.0;
const COLOURS: [&str; 4] = ["#0b6e99", "#c2571a", "#6a4c93", "#3a7d44"];

/// One plot: a panel for each trace on a common time scale, with the first one enlarged on top if it is much shorter.
pub(crate) fn plot(title: &str, traces: &[(&str, &Trace)]) -> String {
    let seconds = |trace: &Trace| trace.total_ms / 1e3;
    let longest = traces.iter().map(|(_, trace)| seconds(trace)).fold(0.0, f64::max);
    let mut panels: Vec<(String, &Trace, f64, usize)> = Vec::new();
    if let Some((name, trace)) = traces.first()
        && longest > 2.0 * seconds(trace)
    {
        panels.push((format!("{name}, enlarged"), trace, seconds(trace), 0));
    }
    panels.extend(traces.iter().enumerate().map(|(n, (name, trace))| ((*name).to_owned(), *trace, longest, n)));

    let count = u32::try_from(panels.len()).map_or(0.0, f64::from);
    let height = TOP + count * (PANEL + GAP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">{title}</text>\n"
    );
    let mut top = TOP;
    for (name, trace, scale, colour) in panels {
        panel(&mut svg, top, &name, trace, scale, COLOURS.get(colour).unwrap_or(&"#000"));
        top += PANEL + GAP;
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, top: f64, name: &str, trace: &Trace, scale: f64, colour: &str) {
    let (from, to) = (-0.1 * scale.max(0.5), 1.1 * scale + 0.1);
    let x = |s: f64| LEFT + (s.clamp(from, to) - from) / (to - from) * (WIDTH - LEFT - RIGHT);
    let y = |rate: f64| top + PANEL - (rate / trace.before.max(1.0)).clamp(0.0, 1.25) / 1.25 * PANEL;
    let total = trace.total_ms / 1e3;
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\">{name}: image complete after {total:.2} s</text>\n\
         <rect x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{PANEL}\" fill=\"#eef3f6\"/>",
        top - 6.0,
        x(0.0),
        x(total) - x(0.0)
    );
    for percent in [0.0, 50.0, 100.0] {
        let at = y(trace.before * percent / 100.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ccc\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">\
             {percent} %</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
    }
    let step = tick(to - from);
    let mut at = 0.0;
    while at <= to {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
            x(at),
            top + PANEL + 15.0,
            (at * 1000.0).round() / 1000.0
        );
        at += step;
    }
    let mut path = String::new();
    for (start, end, rate) in trace.history.rates(trace.zero) {
        if end < from || start > to {
            continue;
        }
        let letter = if path.is_empty() { 'M' } else { 'L' };
        let _ = write!(path, "{letter}{:.1} {:.1}H{:.1}", x(start), y(rate), x(end));
    }
    let _ = writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.2\"/>");
}

/// A round distance between the marks of an axis of `span` seconds: about eight of them.
fn tick(span: f64) -> f64 {
    let rough = span / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough);
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        for (span, expected) in [(8.0, 1.0), (24.0, 5.0), (1.7, 0.5), (0.9, 0.2)] {
            assert!((tick(span) - expected).abs() < 1e-9, "{span}: {}", tick(span));
        }
    }
}
