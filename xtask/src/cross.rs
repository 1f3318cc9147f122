//! The cross builds: core for bare metal, the library for systems that get the Linux shim or the stub.

use xshell::{Shell, cmd};

use crate::{Outcome, setup};

/// Target and the packages that must build for it.
///
/// The command needs files and threads, so not where there are none (wasm).
const TARGETS: [(&str, &[&str]); 5] = [
    ("x86_64-unknown-none", &["ramshot-core"]),
    ("aarch64-unknown-linux-gnu", &["ramshot", "ramshot-linux", "ramshot-stub", "ramshot-cli"]),
    ("aarch64-apple-darwin", &["ramshot", "ramshot-stub", "ramshot-cli"]),
    ("x86_64-pc-windows-gnu", &["ramshot", "ramshot-stub", "ramshot-cli"]),
    ("wasm32-unknown-unknown", &["ramshot", "ramshot-stub"]),
];

pub(crate) fn run() -> Outcome {
    let shell = setup::shell()?;
    for (target, packages) in TARGETS {
        check(&shell, target, packages)?;
    }
    Ok(())
}

fn check(shell: &Shell, target: &str, packages: &[&str]) -> Outcome {
    if !setup::rust_target(shell, target) {
        setup::skipped(&format!("cross build for {target}"), "rustup cannot add that target here");
        return Ok(());
    }
    let packages: Vec<String> = packages.iter().flat_map(|p| ["--package".to_owned(), (*p).to_owned()]).collect();
    cmd!(shell, "cargo check --quiet --target {target} {packages...}").run()?;
    if target != "x86_64-unknown-none" && target != "aarch64-unknown-linux-gnu" {
        // A stub build must not even name what only Linux has.
        let tree =
            cmd!(shell, "cargo tree --quiet --package ramshot --edges normal --target {target}").quiet().read()?;
        for forbidden in ["libc v", "nix v", "userfaultfd v"] {
            if tree.contains(forbidden) {
                return Err(format!("a build for {target} links {forbidden:?}").into());
            }
        }
    }
    Ok(())
}
