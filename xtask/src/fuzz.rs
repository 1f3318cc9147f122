//! `cargo xtask fuzz`: the targets in `fuzz/` under libFuzzer, each for a fixed time; or, with `--replay`, the corpus
//! kept there once more, which any compiler can do.
//!
//! What a run finds new lands in `fuzz/target/corpus/`. To keep it: `cargo +nightly fuzz run TARGET
//! corpus/TARGET target/corpus/TARGET -- -merge=1` in `fuzz/`, which takes only what covers something new.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use xshell::{Shell, cmd};

use crate::{Outcome, setup};

/// The targets, and the longest input that makes sense for each, in bytes.
const TARGETS: [(&str, u32); 3] = [("core_events", 1024), ("reader", 2048), ("reader_mutated", 1024)];

/// How long each target runs if nothing is said.
const SECONDS: u64 = 60;

/// Lines of a failed run that are shown, from the first on that says what went wrong.
const SHOWN: usize = 150;

pub(crate) fn run(args: &[String]) -> Outcome {
    let options = Options::parse(args)?;
    let shell = setup::shell()?;
    if options.replay {
        return replay(&shell);
    }
    if let Err(why) = tools(&shell) {
        setup::skipped("fuzzing", &why);
        return Ok(());
    }
    let targets = TARGETS.iter().filter(|(name, _)| options.target.as_deref().is_none_or(|only| only == *name));
    let runs =
        targets.map(|&(target, len)| fuzz(&shell, target, len, options.seconds)).collect::<Result<Vec<_>, _>>()?;
    println!("\n{:<16} {:>12} {:>9} {:>10} {:>8}", "target", "executions", "covered", "inputs", "result");
    for run in &runs {
        let result = if run.failed { "FAILED" } else { "ok" };
        println!("{:<16} {:>12} {:>9} {:>10} {result:>8}", run.target, run.executions, run.covered, run.inputs);
    }
    let failed: Vec<&str> = runs.iter().filter(|run| run.failed).map(|run| run.target).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("{} failed", failed.join(", ")).into()) }
}

/// The corpus as a plain test: no nightly compiler, no sanitizer, no libFuzzer.
pub(crate) fn replay(shell: &Shell) -> Outcome {
    let dir = shell.push_dir("fuzz");
    let output =
        cmd!(shell, "cargo test --release --quiet --no-default-features --lib -- --nocapture").quiet().read()?;
    drop(dir);
    output.lines().filter(|line| line.ends_with("replayed")).for_each(|line| println!("{line}"));
    Ok(())
}

struct Options {
    seconds: u64,
    target: Option<String>,
    replay: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self { seconds: SECONDS, target: None, replay: false };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--replay" => options.replay = true,
                "--seconds" => {
                    let given = args.next().ok_or("--seconds needs a number")?;
                    let seconds = given.parse().ok().filter(|&seconds| seconds > 0);
                    // To libFuzzer 0 means for ever.
                    options.seconds = seconds.ok_or_else(|| format!("--seconds {given}: not a number above 0"))?;
                }
                name if TARGETS.iter().any(|(target, _)| *target == name) => options.target = Some(name.to_owned()),
                other => {
                    let names = TARGETS.map(|(target, _)| target).join(", ");
                    return Err(format!("{other:?} is neither --seconds N, --replay nor a target ({names})"));
                }
            }
        }
        Ok(options)
    }
}

/// Makes sure that everything is there that fuzzing needs, or says what is missing.
fn tools(shell: &Shell) -> Result<(), String> {
    if !setup::rust_toolchain(shell, "nightly") {
        return Err("sanitizers need a nightly compiler, and rustup cannot add one here".to_owned());
    }
    let has = |program: &str| cmd!(shell, "{program} --version").quiet().ignore_stdout().ignore_stderr().run().is_ok();
    if !["c++", "g++", "clang++"].iter().any(|name| has(name)) && !setup::debian_package(shell, "g++") {
        return Err("libFuzzer needs a C++ compiler, and none could be installed".to_owned());
    }
    let installed = || cmd!(shell, "cargo fuzz --version").quiet().ignore_stdout().ignore_stderr().run().is_ok();
    if !installed() {
        println!("installing cargo-fuzz");
        // It says itself what went wrong.
        let _ = cmd!(shell, "cargo install --quiet --locked cargo-fuzz").run();
    }
    if installed() { Ok(()) } else { Err("cargo-fuzz is not installed and could not be".to_owned()) }
}

struct Run {
    target: &'static str,
    executions: u64,
    covered: u64,
    inputs: u64,
    failed: bool,
}

fn fuzz(shell: &Shell, target: &'static str, len: u32, seconds: u64) -> Result<Run, Box<dyn std::error::Error>> {
    println!("==== fuzz {target}: building, then {seconds} s");
    let dir = shell.current_dir().join("fuzz");
    let found = dir.join("target/corpus").join(target);
    fs::create_dir_all(&found)?;
    let kept = PathBuf::from("corpus").join(target);
    cmd!(shell, "cargo +nightly fuzz build --fuzz-dir {dir} {target}").quiet().ignore_stderr().run().or_else(|_| {
        // Once more, for what it has to say.
        cmd!(shell, "cargo +nightly fuzz build --fuzz-dir {dir} {target}").run()
    })?;
    let mut child = Command::new("cargo")
        .args(["+nightly", "fuzz", "run", "--fuzz-dir", ".", target])
        .args([&found, &kept])
        .arg("--")
        .args([format!("-max_total_time={seconds}"), format!("-max_len={len}")])
        .args(["-print_final_stats=1", "-timeout=10", "-rss_limit_mb=4096"])
        .current_dir(&dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut run = Run { target, executions: 0, covered: 0, inputs: 0, failed: false };
    let mut lines = Vec::new();
    for line in BufReader::new(child.stderr.take().ok_or("no stderr")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        run.note(&line);
        lines.push(line);
    }
    run.failed = !child.wait()?.success();
    if run.failed {
        let wrong = |line: &String| line.contains("panicked at") || line.contains("ERROR: ");
        let from = lines.iter().position(wrong).unwrap_or(lines.len().saturating_sub(SHOWN));
        lines.iter().skip(from).take(SHOWN).for_each(|line| eprintln!("{line}"));
        let found = lines.iter().filter(|line| line.contains("artifacts/"));
        found.for_each(|line| eprintln!("{}", line.trim_start()));
    }
    Ok(run)
}

impl Run {
    /// Takes the figures from what libFuzzer prints:
    /// `#4096 pulse cov: 1654 ft: 2499 corp: 212/286Kb ...` and `stat::number_of_executed_units: 4096`.
    fn note(&mut self, line: &str) {
        let after = |key: &str| {
            let rest = line.split_once(key)?.1.trim_start();
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok()
        };
        if line.starts_with('#') {
            self.executions = after("#").unwrap_or(self.executions);
            self.covered = after(" cov: ").unwrap_or(self.covered);
            self.inputs = after(" corp: ").unwrap_or(self.inputs);
        }
        self.executions = after("stat::number_of_executed_units:").unwrap_or(self.executions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_of_libfuzzer_are_read() {
        let mut run = Run { target: "reader", executions: 0, covered: 0, inputs: 0, failed: false };
        run.note("#208770\tREDUCE cov: 1654 ft: 2499 corp: 212/286Kb lim: 9074 exec/s: 1054 rss: 416Mb");
        assert_eq!((run.executions, run.covered, run.inputs), (208_770, 1654, 212));
        run.note("INFO: seed corpus: files: 3");
        run.note("stat::number_of_executed_units: 300000");
        assert_eq!((run.executions, run.covered, run.inputs), (300_000, 1654, 212));
    }

    #[test]
    fn options_that_are_none_are_refused() {
        let parse = |args: &[&str]| Options::parse(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>());
        assert!(parse(&["--seconds", "5", "reader"]).is_ok_and(|o| o.seconds == 5 && o.target.is_some() && !o.replay));
        for bad in [&["--seconds"][..], &["--seconds", "0"], &["--seconds", "x"], &["nothing"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
