//! What is measured: the columns of the tables, the metrics of the JSON.

use std::collections::BTreeMap;

/// One run: metric to value, in the unit that the metric's name ends with. What does not apply is not there.
pub(crate) type Sample = BTreeMap<&'static str, f64>;

/// A metric and how it is shown.
pub(crate) struct Metric {
    /// Its name in the JSON and in a [`Sample`].
    pub(crate) key: &'static str,
    /// Its column in table 0 or 1; none: JSON only.
    pub(crate) column: Option<(usize, &'static str)>,
    /// Shown divided by this.
    pub(crate) scale: f64,
    /// Digits behind the point.
    pub(crate) digits: usize,
}

const fn shown(key: &'static str, table: usize, head: &'static str, scale: f64, digits: usize) -> Metric {
    Metric { key, column: Some((table, head)), scale, digits }
}

const fn hidden(key: &'static str) -> Metric {
    Metric { key, column: None, scale: 1.0, digits: 3 }
}

/// All of them, in the order of the columns.
pub(crate) const METRICS: &[Metric] = &[
    // vCPUs stopped to vCPUs running, by the VMM's clock.
    shown("pause_ms", 0, "pause ms", 1.0, 2),
    shown("arm_ms", 0, "arm ms", 1.0, 2),
    // The longest time between two writes of the guest, by its own clock, the pause included.
    shown("gap_ms", 0, "gap ms", 1.0, 2),
    shown("capture_ms", 0, "capt. ms", 1.0, 0),
    shown("total_ms", 0, "total ms", 1.0, 0),
    shown("gb_per_s", 0, "GB/s", 1.0, 2),
    shown("faults", 0, "faults", 1.0, 0),
    // Gaps of `stats::STALL_US` and more after the resume, by the guest's clock.
    shown("stall_p50_us", 0, "p50 us", 1.0, 0),
    shown("stall_p99_us", 0, "p99 us", 1.0, 0),
    shown("stall_p999_us", 0, "p99.9 us", 1.0, 0),
    shown("stall_max_us", 0, "max us", 1.0, 0),
    shown("rate_before", 1, "kw/s before", 1e3, 2),
    shown("rate_during", 1, "during", 1e3, 2),
    shown("rate_after", 1, "after", 1e3, 2),
    // vCPU time for which the guest did not work, from the first call to 100 ms after the image was complete.
    shown("lost_ms", 1, "lost ms", 1.0, 1),
    // Of it, what the guest stood still after the resume: stalls, and gaps from `stats::SHORT_US` to `stats::STALL_US`, which are
    // second-level faults that KVM serves alone. A rate that drifts by itself does not move them.
    shown("stalled_ms", 1, "stalled", 1.0, 1),
    shown("short_ms", 1, "short", 1.0, 1),
    // A floor only: the same when all is protected and released at once, no page by page, nothing copied.
    shown("refault_ms", 1, "refault", 1.0, 1),
    // A floor only: the same while the bytes are written beside it by one thread, with nothing protected.
    shown("beside_ms", 1, "beside", 1.0, 1),
    shown("huge_before_mib", 1, "huge MiB", 1.0, 0),
    shown("huge_after_mib", 1, "after", 1.0, 0),
    shown("cpu_ms", 1, "CPU ms", 1.0, 0),
    shown("pool_peak_mib", 1, "pool MiB", 1.0, 1),
    shown("memory_peak_mib", 1, "peak MiB", 1.0, 1),
    shown("load", 1, "load", 1.0, 1),
    // CPU time used by other processes during the run, in percent of one CPU.
    shown("others_percent", 1, "others %", 1.0, 0),
    hidden("stalls"),
    // Gaps from `stats::SHORT_US` to `stats::STALL_US`: second-level faults, which KVM serves alone.
    hidden("short_gaps"),
    hidden("all_p50_us"),
    hidden("all_p99_us"),
    hidden("all_p999_us"),
    hidden("pages_by_fault"),
    hidden("begin_ms"),
    // All that happens before the pause; and the longest gap in it.
    hidden("prepare_ms"),
    hidden("arming_gap_ms"),
    hidden("service_p50_us"),
    hidden("service_p99_us"),
    hidden("service_max_us"),
    // How much the rate of the guest changed by itself before the snapshot: half a second against the next, in percent.
    hidden("drift_percent"),
];

/// Several runs of one metric.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

/// Of those runs that have the metric.
pub(crate) fn summary(samples: &[Sample], key: &str) -> Option<Summary> {
    let mut values: Vec<f64> = samples.iter().filter_map(|sample| sample.get(key).copied()).collect();
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    let median = if values.len() % 2 == 1 { upper } else { f64::midpoint(*values.get(middle - 1)?, upper) };
    Some(Summary { median, min, max, runs: values.len() })
}

/// Medians of all metrics.
pub(crate) fn medians(samples: &[Sample]) -> Sample {
    let keys: std::collections::BTreeSet<&'static str> = samples.iter().flat_map(|s| s.keys().copied()).collect();
    keys.into_iter().filter_map(|key| Some((key, summary(samples, key)?.median))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_of_those_that_have_it() {
        let samples: Vec<Sample> = [3.0, 1.0, 2.0, 10.0].map(|v| Sample::from([("faults", v)])).to_vec();
        let s = summary(&samples, "faults").unwrap();
        assert_eq!((s.median, s.min, s.max, s.runs), (2.5, 1.0, 10.0, 4));
        assert!(summary(&samples, "pause_ms").is_none());
    }
}
