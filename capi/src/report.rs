//! What a snapshot says of itself.

use std::time::Duration;

use crate::pass::Plain;

/// How far a snapshot is.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Progress {
    /// Pages (of 4096 bytes) that belong to the snapshot; 0 before ramshot_begin.
    pub pages_total: u64,
    /// Of those, captured and released: the guest writes there freely again.
    pub pages_captured: u64,
    /// Of those, captured because a writer waited.
    pub pages_by_fault: u64,
    /// Write faults so far.
    pub write_faults: u64,
    /// 1 when every page is captured; writing the image may go on. Else 0.
    pub captured: u32,
    /// 1 when the snapshot has ended without an image; ramshot_finish says why. Else 0.
    pub ended: u32,
}

// SAFETY: integers.
unsafe impl Plain for Progress {}

impl From<ramshot::Progress> for Progress {
    fn from(progress: ramshot::Progress) -> Self {
        Self {
            pages_total: progress.pages_total,
            pages_captured: progress.pages_captured,
            pages_by_fault: progress.pages_by_fault,
            write_faults: progress.write_faults,
            captured: progress.captured.into(),
            ended: progress.ended.into(),
        }
    }
}

/// A finished snapshot, in figures. Pages have 4096 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Report {
    /// Id of the snapshot, 128 bits.
    pub id: [u8; 16],
    /// The whole call of ramshot_begin, in nanoseconds: what ramshot adds to the pause.
    pub begin_ns: u64,
    /// The part of it that found and protected the pages, in nanoseconds.
    pub arm_ns: u64,
    /// From ramshot_begin to the last page released, in nanoseconds.
    pub capture_ns: u64,
    /// From ramshot_begin to the image committed, in nanoseconds.
    pub total_ns: u64,
    /// Pages that belonged to the snapshot at T0. Memory that was never touched is not among them.
    pub pages_total: u64,
    /// Of those, captured because a writer waited for them or their neighbours.
    pub pages_by_fault: u64,
    /// Of those, captured by ramshot_before_discard.
    pub pages_by_discard: u64,
    /// Of those, captured inside the pause.
    pub pages_in_pause: u64,
    /// Of those, all zeros: they take no place in the file.
    pub pages_zero: u64,
    /// Write faults.
    pub write_faults: u64,
    /// Faults that waited until the image writer had made room in the pool.
    pub faults_held: u64,
    /// Faults at addresses of no region; released at once.
    pub foreign_faults: u64,
    /// Longest time from a fault read to its writer released, in microseconds.
    pub fault_max_us: u64,
    /// The time that half of the faults do not exceed, in microseconds.
    pub fault_p50_us: u64,
    /// The time that 99 % of the faults do not exceed, in microseconds.
    pub fault_p99_us: u64,
    /// Apparent size of the file in bytes.
    pub image_bytes: u64,
    /// Bytes written to it.
    pub written_bytes: u64,
    /// How often pages were copied ahead by ramshot_precopy.
    pub precopy_passes: u64,
    /// Pages copied then, all passes together.
    pub precopy_pages: u64,
}

// SAFETY: integers.
unsafe impl Plain for Report {}

impl From<&ramshot::Report> for Report {
    fn from(report: &ramshot::Report) -> Self {
        Self {
            id: report.image.snapshot.map(|snapshot| snapshot.id.0).unwrap_or_default(),
            begin_ns: nanos(report.begin),
            arm_ns: nanos(report.arm),
            capture_ns: nanos(report.capture),
            total_ns: nanos(report.total),
            pages_total: report.counts.total,
            pages_by_fault: report.counts.by_fault,
            pages_by_discard: report.counts.by_discard,
            pages_in_pause: report.counts.by_pause,
            pages_zero: report.pages_zero,
            write_faults: report.counts.faults,
            faults_held: report.counts.faults_held,
            foreign_faults: report.foreign_faults,
            fault_max_us: report.fault_service.max_us(),
            fault_p50_us: report.fault_service.percentile_us(50.0),
            fault_p99_us: report.fault_service.percentile_us(99.0),
            image_bytes: report.image.image_bytes,
            written_bytes: report.image.written_bytes,
            precopy_passes: report.drafts.passes.into(),
            precopy_pages: report.drafts.pages,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
