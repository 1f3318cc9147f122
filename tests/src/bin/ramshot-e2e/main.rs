//! `cargo xtask e2e`: boots a guest, snapshots it live, verifies the file byte for byte, restores it, has the guest check
//! itself. Says what it sees as a table, and as JSON.

mod options;
mod outcome;
mod run;

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use ramshot_tests::snapshot_run::causes;
use ramshot_tests::{Accel, kvm_unavailable};

use self::options::Options;
use self::outcome::Outcome;

fn main() -> ExitCode {
    let options = Options::parse();
    match run_all(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("e2e: {}", causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// True if every run is ok.
fn run_all(options: &Options) -> Result<bool, Box<dyn Error>> {
    let accel = options.accel.unwrap_or_else(|| match kvm_unavailable() {
        None => Accel::Kvm,
        Some(why) => {
            eprintln!("==== no KVM: {why}\n==== threads of this process are the guest instead (--accel threads)");
            Accel::Threads
        }
    });
    options.check()?;
    let mut json = options.json.as_ref().map(|path| {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.map_err(|error| format!("--json {}: {error}", path.display()))
    });
    let mut json = match &mut json {
        Some(Ok(file)) => Some(file),
        Some(Err(error)) => return Err(error.clone().into()),
        None => None,
    };
    println!(
        "{} guest, {} MiB {}, {} vCPU, {} over {} MiB",
        accel,
        options.mem >> 20,
        options.backing,
        options.vcpus,
        options.workload,
        options.working_set >> 20
    );
    println!("{}", Outcome::HEADER);
    let mut ok = true;
    for run in 0..options.runs {
        let outcome = run::run(options, accel, options.seed + u64::from(run));
        let outcome = outcome.unwrap_or_else(|error| Outcome::failed(options, accel, causes(error.as_ref())));
        println!("{}", outcome.row(run + 1));
        outcome.again_row().into_iter().chain(outcome.chain_rows()).for_each(|row| println!("{row}"));
        for problem in &outcome.problems {
            println!("     NOT OK: {problem}");
        }
        if let Some(file) = &mut json {
            writeln!(file, "{}", serde_json::to_string(&outcome)?)?;
        }
        ok &= outcome.ok;
    }
    println!("{}", if ok { "all ok" } else { "FAILED" });
    Ok(ok)
}
