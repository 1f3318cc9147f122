//! `cargo xtask miri`: the interpreter that finds undefined behaviour, over the core and the file code.
//!
//! It is a thousand times slower than the machine, so what tries very many cases is left out: the exhaustive exploration
//! and the property tests of the core; of the file code all but what a file of a few pages shows.

use xshell::{Shell, cmd};

use crate::{Outcome, setup};

/// Tests of the core that are left out, by a part of their name.
const CORE_LEFT_OUT: [&str; 4] = ["explore::", "properties::", "random::", "behaves_like_a_vector_of_bools"];

/// Tests of the file code that are run.
const FILE: [&str; 8] = [
    "file::tests_attack::the_forge_is_faithful",
    "file::tests_attack::statistics_must_make_sense",
    "file::tests_attack::identity_must_make_sense",
    "file::tests_attack::sections_of_the_future",
    "file::tests_read::the_example_of_the_specification",
    "file::tests_read::an_increment_does_not_restore_without_its_parent",
    "file::tests_read::a_damaged_page_is_named",
    "file::tests_read::bytes_in_a_hole_are_found",
];

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
    let exactly = ["--exact"].into_iter().chain(FILE).map(str::to_owned);
    let file = tests(&shell, "ramshot", exactly.collect())?;
    println!("Miri: {core} tests of the core and {file} of the file code, no undefined behaviour");
    // A test that was renamed would otherwise be missed by nobody.
    if file == FILE.len() {
        Ok(())
    } else {
        Err(format!("{} tests of the file code were asked for", FILE.len()).into())
    }
}

/// Runs tests of a package; returns how many passed.
fn tests(shell: &Shell, package: &str, args: Vec<String>) -> Result<usize, Box<dyn std::error::Error>> {
    println!("==== Miri: {package}");
    // The files are real ones: without isolation they can be reached.
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
