//! Numbers as the tables want them.

use std::time::Duration;

/// Counts and sizes here are far below 2^52.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn float(n: u64) -> f64 {
    n as f64
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

pub(crate) fn mib(bytes: u64) -> f64 {
    float(bytes) / f64::from(1 << 20)
}

/// Cycles of a clock of `khz` as milliseconds.
pub(crate) fn cycles_ms(cycles: u64, khz: u64) -> f64 {
    float(cycles) / float(khz.max(1))
}
