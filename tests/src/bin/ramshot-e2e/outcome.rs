//! What one run showed, as a row and as JSON.

use ramshot_tests::Accel;
use serde::Serialize;

use crate::options::Options;

/// One run. The keys are stable.
#[derive(Serialize, Default)]
pub struct Outcome {
    pub ok: bool,
    pub problems: Vec<String>,
    pub accel: String,
    pub seed: u64,
    pub mem_bytes: u64,
    pub vcpus: u32,
    pub workload: String,
    pub backing: String,
    pub pages_total: u64,
    pub pages_captured: u64,
    pub pages_zero: u64,
    pub pages_verified: u64,
    pub pages_mismatched: u64,
    pub guest_writes_during: u64,
    pub write_faults: u64,
    pub pages_by_fault: u64,
    /// vCPUs stopped to vCPUs running, without the time in which the test makes its own copy of guest RAM.
    pub pause_us: u64,
    pub arm_us: u64,
    /// `begin` to the image committed.
    pub total_ms: f64,
    /// `begin` to the last page released.
    pub capture_ms: f64,
    pub bytes_written: u64,
    pub stall_us: Stall,
    /// Writes a second.
    pub guest_rate: GuestRate,
    pub restore_ms: f64,
    pub guest_self_check: SelfCheck,
    /// The guest that was snapshotted checked itself, too.
    pub source_self_check: SelfCheck,
}

/// Gaps between the guest's own writes, from T0 to the last page captured, by the guest's clock.
#[derive(Serialize, Default)]
pub struct Stall {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

#[derive(Serialize, Default)]
pub struct GuestRate {
    pub before: f64,
    pub during: f64,
    pub after: f64,
}

#[derive(Serialize, Default)]
pub struct SelfCheck {
    pub ok: bool,
    pub pages: u64,
    pub errors: u64,
}

impl Outcome {
    pub const HEADER: &str = " run  ok    pages  mism.   faults by fault | pause us   arm us total ms | stall p50    p99      max us \
         | writes/s before  during   after | restore ms  self check";

    /// What is known before a run.
    pub fn new(options: &Options, accel: Accel, seed: u64) -> Self {
        Self {
            accel: accel.to_string(),
            seed,
            mem_bytes: options.mem,
            vcpus: options.vcpus,
            workload: options.workload.to_string(),
            backing: options.backing.to_string(),
            ..Self::default()
        }
    }

    pub fn failed(options: &Options, accel: Accel, problem: String) -> Self {
        Self { problems: vec![problem], ..Self::new(options, accel, options.seed) }
    }

    pub fn row(&self, run: u32) -> String {
        format!(
            "{run:4} {:>3} {:8} {:6} {:8} {:8} | {:8} {:8} {:8.1} | {:9.1} {:6.1} {:11.1} | {:15.0} {:7.0} {:7.0} | {:10.1}  {}",
            if self.ok { "ok" } else { "NO" },
            self.pages_verified,
            self.pages_mismatched,
            self.write_faults,
            self.pages_by_fault,
            self.pause_us,
            self.arm_us,
            self.total_ms,
            self.stall_us.p50,
            self.stall_us.p99,
            self.stall_us.max,
            self.guest_rate.before,
            self.guest_rate.during,
            self.guest_rate.after,
            self.restore_ms,
            if self.guest_self_check.ok { "ok" } else { "FAILED" },
        )
    }
}
