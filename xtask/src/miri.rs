//! `cargo xtask miri`: the interpreter that finds undefined behaviour, over the core and the file code.
//!
//! It is a thousand times slower than the machine, so what tries very many cases is left out: the exhaustive explorations
//! and the property tests of the core, and of the file code what needs files.

use xshell::{Shell, cmd};

use crate::{Outcome, setup};

/// Tests of the core that are left out, by a part of their name.
const CORE_LEFT_OUT: [&str; 9] = [
    "explore::",
    "tests::ahead::",
    "tests::during::",
    "tests::dirty::",
    "dirty::tests::every",
    "properties::",
    "random::",
    "behaves_like_a_vector_of_bools",
    "whole_bitmaps_are_combined",
];

/// Tests of the file code that are run: those that read from memory. Writing ends in system calls, about which Miri knows
/// little, and takes it minutes.
const FILE: &str = "file::tests_memory::";

pub(crate) fn run() -> Outcome {
    let shell = setup::shell()?;
    if !setup::rust_toolchain(&shell, "nightly") {
        setup::skipped("Miri", "it needs a nightly compiler, and rustup cannot add one here");
        return Ok(());
    }
    let there = || cmd!(shell, "cargo +nightly miri --version").quiet().ignore_stdout().ignore_stderr().run().is_ok();
    if !there() {
        // It says itself what went wrong.
        let _ = cmd!(shell, "rustup +nightly component add miri rust-src").run();
    }
    if !there() {
        setup::skipped("Miri", "this nightly compiler has no such component, and rustup cannot add it here");
        return Ok(());
    }
    let left_out = CORE_LEFT_OUT.iter().flat_map(|name| ["--skip", name]).map(str::to_owned);
    let core = tests(&shell, "ramshot-core", left_out.collect())?;
    let file = tests(&shell, "ramshot", vec![FILE.to_owned()])?;
    println!("Miri: {core} tests of the core and {file} of the file code, no undefined behaviour");
    // Tests that were renamed would otherwise be missed by nobody.
    if core == 0 || file == 0 { Err("the filters leave no test".into()) } else { Ok(()) }
}

/// Runs tests of a package; returns how many passed.
fn tests(shell: &Shell, package: &str, args: Vec<String>) -> Result<usize, Box<dyn std::error::Error>> {
    println!("==== Miri: {package}");
    // Without isolation: the test harness asks for the time and the working directory.
    let run = cmd!(shell, "cargo +nightly miri test --quiet --package {package} --lib -- {args...}")
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .quiet()
        .ignore_status()
        .output()?;
    let said = String::from_utf8_lossy(&run.stdout);
    if !run.status.success() {
        return Err(format!("{package}:\n{said}\n{}", String::from_utf8_lossy(&run.stderr)).into());
    }
    let passed = said.lines().filter_map(|line| {
        let (_, figures) = line.split_once("test result: ok. ")?;
        figures.split(' ').next()?.parse::<usize>().ok()
    });
    Ok(passed.sum())
}
