//! The tasks of this repository. `cargo xtask` lists them.

mod bench;
mod ci;
mod cross;
mod e2e;
mod fuzz;
mod header;
mod image;
mod miri;
mod setup;
mod soak;
mod test;

use std::process::ExitCode;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const HELP: &str = "\
cargo xtask e2e [OPTIONS]    live snapshot of a running guest, verified byte for byte, restored (--help: options)
cargo xtask test             format, lints, all tests, cross builds, a small e2e matrix: what CI runs
cargo xtask ci               the same, and what a release needs besides: dependencies, API, packages
cargo xtask release          what a release needs besides, alone
cargo xtask bench [OPTIONS]  the figures, beside floors measured in the same run (--help: options)
cargo xtask bench restore    restores and increments, beside their floors (--help: options)
cargo xtask soak [OPTIONS]   guests of random configurations, snapshotted live for --minutes N, each image verified
cargo xtask image [FILE]     builds the guest image and says where it is, or copies it to FILE
cargo xtask cross            the cross builds alone
cargo xtask header           writes capi/include/ramshot.h, the C header
cargo xtask fuzz [OPTIONS]   fuzzes the file reader and the core (--seconds N, --replay, TARGET)
cargo xtask miri             core and file code in the interpreter that finds undefined behaviour
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let task = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let outcome = match task.as_str() {
        "e2e" => e2e::run(&rest),
        "test" => test::run(),
        "ci" => ci::run(),
        "release" => ci::release(),
        "bench" => bench::run(&rest),
        "image" => image::run(rest.first().map(String::as_str)),
        "soak" => soak::run(&rest),
        "cross" => cross::run(),
        "fuzz" => fuzz::run(&rest),
        "header" => header::run(),
        "miri" => miri::run(),
        "" | "help" | "--help" | "-h" => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        other => {
            eprintln!("xtask: there is no task {other:?}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {task}: {error}");
            ExitCode::FAILURE
        }
    }
}
