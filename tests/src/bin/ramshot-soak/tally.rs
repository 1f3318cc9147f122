//! What the runs came to.

use std::time::Duration;

use serde::Serialize;

/// All runs together. The keys are stable.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Tally {
    pub(crate) ok: bool,
    /// Committed, and compared with T0 byte for byte.
    pub(crate) snapshots: u64,
    pub(crate) pages_verified: u64,
    /// Pages that differ from T0, in a file or after a restore.
    pub(crate) mismatches: u64,
    pub(crate) write_faults: u64,
    /// Snapshots that were cancelled or dropped in time.
    pub(crate) cancels: u64,
    /// Calls that were made to fail.
    pub(crate) injected_errors: u64,
    /// Snapshots that ended by themselves because the pool was full, as they were told to.
    pub(crate) pool_full: u64,
    pub(crate) restores: u64,
    /// Of those: mapped, lazy.
    pub(crate) restores_mapped: u64,
    pub(crate) restores_lazy: u64,
    /// Snapshots of guests whose pages were still coming in, each restored and checked by its guest.
    pub(crate) snapshots_while_lazy: u64,
    /// Of the snapshots: increments, each verified together with what it builds on; pre-copies.
    pub(crate) increments: u64,
    pub(crate) precopies: u64,
    pub(crate) self_checks: u64,
    /// vCPUs that did not write, answer or pause any more.
    pub(crate) stuck_vcpus: u64,
    /// Longest gap between two writes of a vCPU from T0 to the last page captured, by the guest's clock, whoever caused it
    /// (a busy host, too).
    pub(crate) stall_us_max: u64,
    /// Longest time from a fault read by the engine to its writer released, copying included.
    pub(crate) fault_service_us_max: u64,
    /// Longest pause.
    pub(crate) pause_us_max: u64,
    pub(crate) runs: u64,
    pub(crate) seconds: u64,
    /// Of the first run; the next ones count up.
    pub(crate) seed: u64,
    /// Everything that should not have happened.
    pub(crate) problems: Vec<String>,
}

impl Tally {
    pub(crate) fn stall(&mut self, gap: Duration) {
        self.stall_us_max = self.stall_us_max.max(micros(gap));
    }

    pub(crate) fn pause(&mut self, pause: Duration) {
        self.pause_us_max = self.pause_us_max.max(micros(pause));
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.mismatches == 0 && self.stuck_vcpus == 0 && self.problems.is_empty() && self.snapshots > 0
    }

    pub(crate) fn summary(&self) -> String {
        format!(
            "{}: {} snapshots ({} increments, {} pre-copies) in {} runs, {} pages verified, {} write faults, {} mismatches, {} stuck vCPUs, {} cancels, \
             {} injected errors, {} full pools, {} restores ({} mapped, {} lazy, {} snapshotted meanwhile), worst stall {:.1} ms, {} s, seed {}",
            if self.is_ok() { "ok" } else { "FAILED" },
            self.snapshots,
            self.increments,
            self.precopies,
            self.runs,
            self.pages_verified,
            self.write_faults,
            self.mismatches,
            self.stuck_vcpus,
            self.cancels,
            self.injected_errors,
            self.pool_full,
            self.restores,
            self.restores_mapped,
            self.restores_lazy,
            self.snapshots_while_lazy,
            Duration::from_micros(self.stall_us_max).as_secs_f64() * 1e3,
            self.seconds,
            self.seed,
        )
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
