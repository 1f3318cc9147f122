//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use ramshot_tests::{Backing, Workload};

/// Snapshots a running KVM guest over a matrix of sizes, backings, workloads and targets, and prints what it cost the
/// guest, beside floors measured in the same run and, where asked for, QEMU doing the same.
#[derive(Parser, Clone, Debug)]
#[command(name = "cargo xtask bench", version)]
pub(crate) struct Options {
    /// A small matrix that is through in a few minutes: 256M, 3 runs. For regressions, not for publication.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Only cases whose name (mem/backing/workload/target) contains this; words joined by `+` must all occur. Repeatable.
    #[arg(long, value_name = "FILTER")]
    pub(crate) case: Vec<String>,
    /// Guest RAM [default: 1G,4G].
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = size)]
    pub(crate) mem: Vec<u64>,
    /// What guest RAM is made of: anon, thp, memfd.
    #[arg(long, value_delimiter = ',', default_values = ["anon", "thp", "memfd"])]
    pub(crate) backing: Vec<Backing>,
    /// What the guest does, on one vCPU: nothing, sequential or random writes flat out over the working set, or random
    /// ones at a low rate, so that each fault is alone (`slow`).
    #[arg(long, value_delimiter = ',', default_values = ["idle", "seq", "random", "slow"])]
    pub(crate) workload: Vec<Load>,
    /// Where the image goes.
    #[arg(long, value_delimiter = ',', default_values = ["tmpfs", "disk"])]
    pub(crate) target: Vec<Target>,
    /// Working set of the busy workloads; at most a quarter of RAM. That of `slow` is three quarters of RAM, so that
    /// there are faults until the end.
    #[arg(long, default_value = "256M", value_parser = size)]
    pub(crate) working_set: u64,
    /// Writes a second of the `slow` workload.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(crate) slow_rate: u64,
    /// Snapshots of each case [default: 5]; a first one is not counted.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: Option<u32>,
    /// One JSON object per case and metric goes to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// The tables, as Markdown, go to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) markdown: Option<PathBuf>,
    /// Plots of the guest's rate over time go to this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) svg: Option<PathBuf>,
    /// Compare with another hypervisor, on tmpfs.
    #[arg(long)]
    pub(crate) peer: Option<Peer>,
    /// The folder on a disk that images are written to (`disk`).
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) out: PathBuf,
    /// The folder on a tmpfs (`tmpfs`).
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub(crate) tmpfs: PathBuf,
    /// Before each run, wait at most so many seconds until other processes leave the machine to us.
    #[arg(long, default_value_t = 5)]
    pub(crate) wait_idle: u64,
    /// Protect all memory inside the pause, none of it ahead.
    #[arg(long)]
    pub(crate) arm_inside: bool,
    /// Copy everything ahead of the pause (pre-copy), and protect only what was written meanwhile.
    #[arg(long, conflicts_with = "arm_inside")]
    pub(crate) precopy: bool,
    /// Scan workers, instead of the library's default.
    #[arg(long)]
    pub(crate) workers: Option<usize>,
    /// Image writers, instead of the library's default.
    #[arg(long)]
    pub(crate) writers: Option<usize>,
    /// Pool size, instead of the library's default.
    #[arg(long, value_parser = size)]
    pub(crate) pool: Option<u64>,
}

impl Options {
    /// With what was not given filled in.
    pub(crate) fn resolved(mut self) -> Self {
        if self.mem.is_empty() {
            self.mem = if self.quick { vec![256 << 20] } else { vec![1 << 30, 4 << 30] };
        }
        if self.quick {
            self.runs.get_or_insert(3);
            if self.case.is_empty() {
                self.case = ["anon/idle", "anon/random", "anon/slow/tmpfs", "thp/random/tmpfs", "memfd/random/tmpfs"]
                    .map(str::to_owned)
                    .to_vec();
            }
        }
        self
    }

    /// Snapshots of each case that count.
    pub(crate) fn runs(&self) -> u32 {
        self.runs.unwrap_or(5)
    }

    /// Settings of the library.
    pub(crate) fn snapshot(&self) -> ramshot::Options {
        let mut options = ramshot::Options::default();
        self.workers.into_iter().for_each(|n| options.workers = n);
        self.writers.into_iter().for_each(|n| options.writers = n);
        self.pool.into_iter().for_each(|n| options.pool_bytes = n);
        options
    }
}

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Load {
    Idle,
    Seq,
    Random,
    Slow,
}

impl Load {
    pub(crate) const fn workload(self) -> Workload {
        match self {
            Self::Idle => Workload::Idle,
            Self::Seq => Workload::Seq,
            Self::Random | Self::Slow => Workload::Random,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Seq => "seq",
            Self::Random => "random",
            Self::Slow => "slow",
        }
    }
}

/// Where the image goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Target {
    /// Memory: no device in the way.
    Tmpfs,
    /// A disk; the image is synced before it counts as written.
    Disk,
}

impl Target {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }
}

/// Whom to compare with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Peer {
    Qemu,
}

/// `64M` and the like, whole huge pages.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        other => return Err(format!("unit {other:?} is not M or G")),
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(bytes) if bytes > 0 && bytes.is_multiple_of(2 << 20) => Ok(bytes),
        _ => Err("must be a positive multiple of 2 MiB".to_owned()),
    }
}
