//! The command line.

use std::path::PathBuf;

use clap::Parser;
use ramshot_tests::snapshot_run::RestoreMode;
use ramshot_tests::{Accel, Backing, Workload};

/// Boots a guest, snapshots it live while it writes, verifies every page of the file against a copy of guest RAM taken
/// at T0, restores it into a fresh VM, lets that run and check itself.
#[derive(Parser, Clone, Debug)]
#[command(name = "cargo xtask e2e", version)]
pub(crate) struct Options {
    /// A guest under KVM, or threads of this process as the guest. Without KVM the default falls back to threads, and
    /// says so.
    #[arg(long, value_name = "kvm|threads")]
    pub(crate) accel: Option<Accel>,
    /// Guest RAM (K, M, G).
    #[arg(long, default_value = "512M", value_parser = size)]
    pub(crate) mem: u64,
    /// vCPUs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) vcpus: u32,
    /// What the guest does.
    #[arg(long, value_name = "idle|seq|random", default_value = "random")]
    pub(crate) workload: Workload,
    /// Memory it writes to (K, M, G).
    #[arg(long, default_value = "64M", value_parser = size)]
    pub(crate) working_set: u64,
    /// Writes a second and vCPU, or `max`.
    #[arg(long, default_value = "max", value_parser = rate)]
    pub(crate) rate: Rate,
    /// What guest RAM is made of.
    #[arg(long, value_name = "anon|thp|memfd|hugetlb", default_value = "anon")]
    pub(crate) backing: Backing,
    /// How many times.
    #[arg(long, default_value_t = 1)]
    pub(crate) runs: u32,
    /// Where the snapshot files go; they are removed unless this is given.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// One JSON object per run is appended to this file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
    /// Seed of the first run; the next ones count up.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Scan workers.
    #[arg(long, default_value_t = 1)]
    pub(crate) workers: usize,
    /// Image writers.
    #[arg(long, default_value_t = 1)]
    pub(crate) writers: usize,
    /// When memory is protected: ahead of the pause as far as that pays, or all of it inside the pause.
    #[arg(long, value_enum, default_value = "ahead")]
    pub arm: Arm,
    /// A full snapshot; a full one with increments on it (`--chain`); or one by pre-copy: everything is copied ahead, and
    /// what was written meanwhile once more.
    #[arg(long, value_enum, default_value = "full")]
    pub(crate) mode: Mode,
    /// Increments, each verified against its own T0, each restored and run. With `--mode incremental`; 1 unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) chain: Option<u32>,
    /// How the snapshot is given back.
    #[arg(long, value_name = "eager|mapped|lazy", default_value = "eager")]
    pub(crate) restore: RestoreMode,
    /// How often it is given back; a lazy restore records what the guest touches first, the next one reads that first.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) restores: u32,
    /// Takes a snapshot of the restored guest at once, while its pages come in, and restores that into a guest, too. With
    /// `--restore lazy`.
    #[arg(long)]
    pub(crate) again: bool,
    /// Pool size (K, M, G).
    #[arg(long, default_value = "64M", value_parser = size)]
    pub(crate) pool: u64,
}

/// Writes a second and vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rate(pub(crate) Option<u64>);

/// `64M` and the like.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "" => 1,
        "K" | "k" => 1 << 10,
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        other => return Err(format!("unit {other:?} is not K, M or G")),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    match bytes {
        Some(bytes) if bytes > 0 && bytes.is_multiple_of(4096) => Ok(bytes),
        _ => Err("must be a positive multiple of 4096 bytes".to_owned()),
    }
}

fn rate(text: &str) -> Result<Rate, String> {
    if text == "max" {
        return Ok(Rate(None));
    }
    match text.parse() {
        Ok(n) if n > 0 => Ok(Rate(Some(n))),
        _ => Err("must be `max` or a positive number of writes a second".to_owned()),
    }
}

/// When memory is protected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Arm {
    Ahead,
    Pause,
}

/// Which pages a snapshot takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Mode {
    Full,
    Incremental,
    Precopy,
}

impl Mode {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Precopy => "precopy",
        }
    }
}

impl Options {
    /// What does not go together.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.again && self.restore != RestoreMode::Lazy {
            return Err(format!("--again goes with --restore lazy, not with --restore {}", self.restore));
        }
        self.increments().map(drop)
    }

    /// How many increments follow the first snapshot.
    pub(crate) fn increments(&self) -> Result<u32, String> {
        match (self.mode, self.chain) {
            (Mode::Incremental, given) => Ok(given.unwrap_or(1)),
            (_, None) => Ok(0),
            (mode, Some(n)) => {
                Err(format!("--chain {n} goes with --mode incremental, not with --mode {}", mode.name()))
            }
        }
    }
}
