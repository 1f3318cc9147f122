//! `cargo xtask test`: everything CI runs, in the order in which it is cheapest to fail.

use std::time::Instant;

use xshell::{Shell, cmd};

use crate::{Outcome, cross, e2e, fuzz, miri, setup};

/// The oldest compiler that must build this: `rust-version` in Cargo.toml, where the reason stands.
const MSRV: &str = "1.89";

pub(crate) fn run() -> Outcome {
    let shell = setup::shell()?;
    setup::c_compiler(&shell)?;
    let features = userfaultfd_feature(&shell);
    step("format", || Ok(cmd!(shell, "cargo fmt --all --check").run()?))?;
    step("lints", || lints(&shell, features))?;
    step("tests", || {
        cmd!(shell, "cargo test --workspace --all-targets --quiet").run()?;
        Ok(cmd!(shell, "cargo test --workspace --doc --quiet").run()?)
    })?;
    step("examples", || examples(&shell))?;
    step("threads under a systematic scheduler", || shuttle(&shell))?;
    step("tests with all features of the Linux shim", || shim_features(&shell, features))?;
    step("what fuzzing found before", || fuzz::replay(&shell))?;
    step("Miri", miri::run)?;
    step("cross builds", cross::run)?;
    step("oldest compiler", || oldest_compiler(&shell))?;
    step("end to end", matrix)
}

pub(crate) fn step(name: &str, body: impl FnOnce() -> Outcome) -> Outcome {
    println!("\n==== {name}");
    let start = Instant::now();
    body().map_err(|error| format!("{name}: {error}"))?;
    println!("==== {name}: done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn userfaultfd_feature(shell: &Shell) -> bool {
    let there = setup::libclang(shell);
    if !there {
        setup::skipped("the feature `userfaultfd`", "libclang is not installed and could not be");
    }
    there
}

fn lints(shell: &Shell, features: bool) -> Outcome {
    cmd!(shell, "cargo clippy --workspace --all-targets --quiet -- -D warnings").run()?;
    if features {
        cmd!(
            shell,
            "cargo clippy --package ramshot-linux --package ramshot --all-targets --all-features --quiet -- -D warnings"
        )
        .run()?;
    }
    Ok(cmd!(shell, "cargo doc --workspace --no-deps --quiet").env("RUSTDOCFLAGS", "-D warnings").run()?)
}

fn shim_features(shell: &Shell, userfaultfd: bool) -> Outcome {
    let features = if userfaultfd { "handoff,vm-memory,userfaultfd" } else { "handoff,vm-memory" };
    Ok(cmd!(shell, "cargo test --package ramshot-linux --features {features} --quiet").run()?)
}

/// Every example runs to its end.
fn examples(shell: &Shell) -> Outcome {
    for name in ["embed", "tokio"] {
        cmd!(shell, "cargo run --quiet --features vm-memory --example {name}").run()?;
    }
    Ok(())
}

/// The engine's threads, with the kernel simulated, under shuttle. Release: the scheduler runs thousands of schedules.
fn shuttle(shell: &Shell) -> Outcome {
    // A target directory of its own: the flag changes every crate.
    let dir = "target/shuttle";
    Ok(cmd!(shell, "cargo test --release --package ramshot --lib --target-dir {dir} --quiet shuttle")
        .env("RUSTFLAGS", "--cfg ramshot_shuttle")
        .run()?)
}

fn oldest_compiler(shell: &Shell) -> Outcome {
    if !setup::rust_toolchain(shell, MSRV) {
        setup::skipped(&format!("build with Rust {MSRV}"), "rustup cannot add that toolchain here");
        return Ok(());
    }
    // A target directory of its own, or the two compilers throw each other's work away.
    let dir = "target/oldest";
    Ok(cmd!(shell, "cargo +{MSRV} check --workspace --quiet --locked --target-dir {dir}").run()?)
}

/// Small, but every accelerator, workload, backing, mode and way of restoring at least once.
fn matrix() -> Outcome {
    let cases = [
        "--mem 256M --vcpus 2 --workload random --backing anon",
        "--mem 256M --vcpus 1 --workload seq --backing thp --restore lazy --again",
        "--mem 256M --vcpus 2 --workload random --backing memfd --restore lazy --again",
        "--mem 256M --vcpus 1 --workload random --backing hugetlb --restore lazy --again",
        "--mem 128M --vcpus 1 --workload idle --backing anon --restore mapped",
        "--mem 256M --vcpus 2 --workload random --backing anon --accel threads --restore lazy --restores 2 --again",
        "--mem 256M --vcpus 1 --workload seq --working-set 128M --backing memfd --accel threads --pool 4M",
        "--mem 256M --vcpus 2 --workload random --backing anon --mode precopy --restore mapped --pool 4M",
        "--mem 256M --vcpus 1 --workload seq --backing memfd --mode precopy --pool 4M",
        "--mem 128M --vcpus 2 --workload random --working-set 32M --backing anon --mode incremental --pool 4M --chain 10 --restore lazy --again",
        "--mem 128M --vcpus 1 --workload seq --working-set 32M --backing anon --mode incremental --pool 4M --chain 10 --restore mapped",
        "--mem 128M --vcpus 1 --workload random --working-set 32M --backing anon --mode incremental --pool 4M --chain 10",
        "--mem 128M --vcpus 1 --workload seq --working-set 32M --backing memfd --mode incremental --pool 4M --chain 2 --restore lazy",
        "--mem 128M --vcpus 1 --workload random --working-set 32M --backing thp --mode incremental --pool 4M --chain 2 --restore mapped",
        "--mem 128M --vcpus 1 --workload random --working-set 32M --backing thp --mode incremental --pool 4M --chain 1",
        "--mem 128M --vcpus 1 --workload random --working-set 32M --backing hugetlb --mode incremental --pool 4M --chain 2",
    ];
    // A small pool and a working set of many times that: the scan, which takes it first, cannot be through before the guest has
    // written, and a run without a fault proves nothing.
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    for case in cases {
        println!("-- e2e {case}");
        if !kvm && case.contains("--mode") {
            setup::skipped("this case", "only KVM has a dirty log, and /dev/kvm cannot be opened here");
            continue;
        }
        let runs = if case.contains("--chain") { "1" } else { "2" };
        let args: Vec<String> = case.split(' ').map(str::to_owned).chain(["--runs".into(), runs.into()]).collect();
        e2e::run(&args)?;
    }
    Ok(())
}
