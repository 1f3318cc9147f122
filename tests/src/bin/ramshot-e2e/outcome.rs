//! What one run showed, as a row and as JSON.

use ramshot_tests::Accel;
use serde::Serialize;

use crate::options::Options;

/// One run. The keys are stable.
#[derive(Serialize, Default)]
pub(crate) struct Outcome {
    pub(crate) ok: bool,
    pub(crate) problems: Vec<String>,
    pub(crate) accel: String,
    pub(crate) seed: u64,
    pub(crate) mem_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) workload: String,
    pub(crate) backing: String,
    pub(crate) mode: String,
    pub(crate) pages_total: u64,
    pub(crate) pages_captured: u64,
    /// Pages that T0 took: all that were there, or what was written since the base or the last draft.
    pub(crate) dirty_pages: u64,
    /// Pages copied before T0, and how often all of them were gone through (pre-copy).
    pub(crate) draft_pages: u64,
    pub(crate) draft_passes: u32,
    /// What it costs in each mode: the one it was made in measured, the others estimated.
    pub(crate) costs: Costs,
    /// The increments on this snapshot.
    pub(crate) chain: Vec<Increment>,
    pub(crate) pages_zero: u64,
    pub(crate) pages_verified: u64,
    pub(crate) pages_mismatched: u64,
    pub(crate) guest_writes_during: u64,
    pub(crate) write_faults: u64,
    pub(crate) pages_by_fault: u64,
    /// vCPUs stopped to vCPUs running, without the time in which the test makes its own copy of guest RAM.
    pub(crate) pause_us: u64,
    pub(crate) arm_us: u64,
    /// `begin` to the image committed.
    pub(crate) total_ms: f64,
    /// `begin` to the last page released.
    pub(crate) capture_ms: f64,
    pub(crate) bytes_written: u64,
    pub(crate) stall_us: Stall,
    /// Writes a second.
    pub(crate) guest_rate: GuestRate,
    pub(crate) restore_ms: f64,
    /// The last restore into a guest that runs.
    pub(crate) restore: Restore,
    pub(crate) guest_self_check: SelfCheck,
    /// The guest that was snapshotted checked itself, too.
    pub(crate) source_self_check: SelfCheck,
}

/// As in the report of a snapshot.
#[derive(Serialize, Default)]
pub(crate) struct Costs {
    pub(crate) stopped: Cost,
    pub(crate) background: Cost,
    pub(crate) precopy: Cost,
}

#[derive(Serialize, Default)]
pub(crate) struct Cost {
    pub(crate) pause_us: u64,
    pub(crate) waiting_us: u64,
    pub(crate) pages: u64,
}

/// One increment, verified against its own T0.
#[derive(Serialize, Default)]
pub(crate) struct Increment {
    pub(crate) dirty_pages: u64,
    pub(crate) pages_verified: u64,
    pub(crate) pages_mismatched: u64,
    pub(crate) pause_us: u64,
    pub(crate) total_ms: f64,
    pub(crate) bytes_written: u64,
    pub(crate) write_faults: u64,
    pub(crate) restore_ms: f64,
    /// This increment and all below it.
    pub(crate) restore: Restore,
    pub(crate) guest_self_check: SelfCheck,
}

/// Gaps between the guest's own writes, from T0 to the last page captured, by the guest's clock.
#[derive(Serialize, Default)]
pub(crate) struct Stall {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// How the snapshot was given back.
#[derive(Serialize, Default)]
pub(crate) struct Restore {
    pub(crate) mode: String,
    /// From the call that restores to the first write of the guest that can be seen, which is later than its first instruction.
    pub(crate) first_instruction_us: u64,
    /// The call alone.
    pub(crate) call_us: u64,
    /// From the call to the last page in; for a mapped restore there is no such moment.
    pub(crate) all_in_ms: f64,
    /// Missing faults.
    pub(crate) faults: u64,
    /// Pages read before anybody asked.
    pub(crate) prefetched: u64,
    /// A snapshot of the guest while its pages came in (`--again`).
    pub(crate) again: Option<Again>,
}

/// A snapshot of a guest whose pages come in.
#[derive(Serialize)]
pub(crate) struct Again {
    pub(crate) pause_us: u64,
    pub(crate) total_ms: f64,
    pub(crate) pages_captured: u64,
    pub(crate) write_faults: u64,
    /// How many pages of the restore had come in before the snapshot began.
    pub(crate) in_before: u64,
    /// Of the guest restored from it.
    pub(crate) guest_self_check: SelfCheck,
}

#[derive(Serialize, Default)]
pub(crate) struct GuestRate {
    pub(crate) before: f64,
    pub(crate) during: f64,
    pub(crate) after: f64,
}

#[derive(Serialize, Default)]
pub(crate) struct SelfCheck {
    pub(crate) ok: bool,
    pub(crate) pages: u64,
    pub(crate) errors: u64,
}

impl Outcome {
    pub(crate) const HEADER: &str = " run  ok    pages  mism.   faults by fault | pause us   arm us total ms | stall p50    p99      max us \
         | writes/s before  during   after | restore first us  all in ms faults | self check";

    /// What is known before a run.
    pub(crate) fn new(options: &Options, accel: Accel, seed: u64) -> Self {
        Self {
            accel: accel.to_string(),
            seed,
            mem_bytes: options.mem,
            vcpus: options.vcpus,
            workload: options.workload.to_string(),
            backing: options.backing.to_string(),
            mode: options.mode.name().to_owned(),
            ..Self::default()
        }
    }

    pub(crate) fn failed(options: &Options, accel: Accel, problem: String) -> Self {
        Self { problems: vec![problem], ..Self::new(options, accel, options.seed) }
    }

    /// A line for each increment.
    pub(crate) fn chain_rows(&self) -> impl Iterator<Item = String> {
        self.chain.iter().zip(1..).map(|(increment, number)| {
            format!(
                "     + {number}: {} dirty of {} pages, {} mismatched, {} faults, pause {} us, total {:.1} ms, {:.1} MiB \
                 written; restored {} in {:.1} ms, first write after {} us, self check {}",
                increment.dirty_pages,
                increment.pages_verified,
                increment.pages_mismatched,
                increment.write_faults,
                increment.pause_us,
                increment.total_ms,
                mib(increment.bytes_written),
                increment.restore.mode,
                increment.restore_ms,
                increment.restore.first_instruction_us,
                if increment.guest_self_check.ok { "ok" } else { "FAILED" },
            )
        })
    }

    /// A line for the snapshot of the restored guest.
    pub(crate) fn again_row(&self) -> Option<String> {
        let again = self.restore.again.as_ref()?;
        Some(format!(
            "     again, {} of {} pages in: {} pages, {} faults, pause {} us, total {:.1} ms; restored, self check {}",
            again.in_before,
            self.pages_total,
            again.pages_captured,
            again.write_faults,
            again.pause_us,
            again.total_ms,
            if again.guest_self_check.ok { "ok" } else { "FAILED" },
        ))
    }

    pub(crate) fn row(&self, run: u32) -> String {
        format!(
            "{run:4} {:>3} {:8} {:6} {:8} {:8} | {:8} {:8} {:8.1} | {:9.1} {:6.1} {:11.1} | {:15.0} {:7.0} {:7.0} | {:>7} {:8} {:10.1} {:6} | {}",
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
            self.restore.mode,
            self.restore.first_instruction_us,
            self.restore.all_in_ms,
            self.restore.faults,
            if self.guest_self_check.ok { "ok" } else { "FAILED" },
        )
    }
}

// Sizes of files are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
