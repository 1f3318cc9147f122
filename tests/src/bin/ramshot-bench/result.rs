//! What a case showed, as JSON: one object a line for each case, metric and peer.

use std::io::Write;

use serde::Serialize;

use crate::metric::{METRICS, Sample, Summary, summary};
use crate::ours::Trace;
use crate::stats::Result;

/// Everything measured of one case.
pub(crate) struct CaseResult {
    pub(crate) case: String,
    pub(crate) ours: Vec<Sample>,
    /// By metric: what the machine charges for the same.
    pub(crate) floor: Sample,
    pub(crate) peers: Vec<PeerResult>,
    /// The last run of ours.
    pub(crate) trace: Option<Trace>,
}

/// What a peer showed.
pub(crate) struct PeerResult {
    pub(crate) name: &'static str,
    pub(crate) samples: Vec<Sample>,
    pub(crate) trace: Option<Trace>,
}

#[derive(Serialize)]
struct Line<'a> {
    case: &'a str,
    metric: &'a str,
    ours: Option<f64>,
    ours_min: Option<f64>,
    ours_max: Option<f64>,
    runs: usize,
    floor: Option<f64>,
    peer: Option<f64>,
    peer_min: Option<f64>,
    peer_max: Option<f64>,
    peer_runs: Option<usize>,
    peer_name: Option<&'a str>,
    ratio_floor: Option<f64>,
    ratio_peer: Option<f64>,
    /// Load average when the runs of the case began, the highest of them.
    load: f64,
}

/// `a / b`, where that is a number.
pub(crate) fn ratio(a: f64, b: Option<f64>) -> Option<f64> {
    b.map(|b| a / b).filter(|ratio| ratio.is_finite())
}

impl CaseResult {
    /// What a metric has to be held against: its floor, or for what should not change, what it was before.
    pub(crate) fn floor(&self, key: &str) -> Option<f64> {
        let before = |key| summary(&self.ours, key).map(|s| s.median);
        match key {
            "rate_during" | "rate_after" => before("rate_before"),
            "huge_after_mib" => before("huge_before_mib"),
            _ => self.floor.get(key).copied(),
        }
    }

    pub(crate) fn write_json(&self, to: &mut impl Write) -> Result<()> {
        let load = summary(&self.ours, "load").map_or(f64::NAN, |s| s.max);
        for metric in METRICS {
            let (ours, floor) = (summary(&self.ours, metric.key), self.floor(metric.key));
            if ours.is_none() && floor.is_none() {
                continue;
            }
            let over = |other: Option<f64>| ours.and_then(|ours| ratio(ours.median, other));
            let line = |peer: Option<(&'static str, Summary)>| Line {
                case: &self.case,
                metric: metric.key,
                ours: ours.map(|s| s.median),
                ours_min: ours.map(|s| s.min),
                ours_max: ours.map(|s| s.max),
                runs: ours.map_or(0, |s| s.runs),
                floor,
                peer: peer.map(|(_, s)| s.median),
                peer_min: peer.map(|(_, s)| s.min),
                peer_max: peer.map(|(_, s)| s.max),
                peer_runs: peer.map(|(_, s)| s.runs),
                peer_name: peer.map(|(name, _)| name),
                ratio_floor: over(floor),
                ratio_peer: over(peer.map(|(_, s)| s.median)),
                load,
            };
            let peers = self.peers.iter().filter_map(|p| Some((p.name, summary(&p.samples, metric.key)?)));
            let mut lines: Vec<_> = peers.map(|peer| line(Some(peer))).collect();
            if lines.is_empty() {
                lines.push(line(None));
            }
            for line in lines {
                writeln!(to, "{}", serde_json::to_string(&line)?)?;
            }
        }
        Ok(())
    }
}
