//! `cargo xtask bench restore`: how soon a VM is back, and what an increment costs, beside what the machine charges for
//! the same work in the same run.

mod cases;
mod figure;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use ramshot_tests::Scratch;

use self::figure::Figures;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Restores and increments of a KVM guest: each figure beside its floor of the same run, medians of several runs.
///
/// Files are read from the page cache, as they are after a snapshot: what is measured is the way from there to the guest.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask bench restore", version)]
pub(crate) struct Options {
    /// Guest RAM, all of it filled (M, G).
    #[arg(long, value_delimiter = ',', default_values = ["256M", "1G"], value_parser = size)]
    pub(crate) mem: Vec<u64>,
    /// Runs of each case; a first one is not counted.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Increments in a row, whose chain is then restored against one flat file; 0 leaves that out.
    #[arg(long, default_value_t = 100)]
    pub(crate) chain: u32,
    /// Nominal size of the largest case, of which 1 GiB is resident; 0 leaves it out (M, G, T).
    #[arg(long, default_value = "1T", value_parser = size)]
    pub(crate) huge: u64,
    /// Where the files go.
    #[arg(long, default_value = "/dev/shm")]
    pub(crate) out: PathBuf,
    /// One JSON object for each figure goes to this file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match bench(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench restore: {}", ramshot_tests::snapshot_run::causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> Result<()> {
    if let Some(why) = kvm_unavailable() {
        return Err(format!("the figures are of a KVM guest, and there is no KVM here: {why}").into());
    }
    if (1..2 << 30).contains(&options.huge) {
        return Err("--huge is less than 2G, and 1 GiB of it has to be there: more, or 0 to leave the case out".into());
    }
    let folder = Scratch::new_in(&options.out, "ramshot-bench-")?;
    let mut figures = Figures::new(options.json.as_deref())?;
    for &mem in &options.mem {
        cases::guest(options, mem, folder.path(), &mut figures)?;
    }
    if options.huge > 0 {
        cases::huge(options, folder.path(), &mut figures)?;
        cases::huge_snapshot(options, folder.path(), &mut figures)?;
    }
    figures.print();
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn kvm_unavailable() -> Option<String> {
    ramshot_tests::kvm_unavailable()
}

#[cfg(not(target_arch = "x86_64"))]
fn kvm_unavailable() -> Option<String> {
    Some("the guest image is built for x86-64 only".to_owned())
}

/// `64M` and the like, whole huge pages.
fn size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.get(digits.len()..).unwrap_or_default() {
        "" if digits == "0" => return Ok(0),
        "M" | "m" => 1 << 20,
        "G" | "g" => 1 << 30,
        "T" | "t" => 1 << 40,
        other => return Err(format!("unit {other:?} is not M, G or T")),
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(bytes) if bytes.is_multiple_of(2 << 20) => Ok(bytes),
        _ => Err("must be a multiple of 2 MiB".to_owned()),
    }
}
