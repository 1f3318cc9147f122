//! `cargo xtask ci`: everything of `cargo xtask test`, and what a release needs besides: dependencies looked at, the API
//! compared with the release before, packages that build by themselves. It installs two tools, which takes minutes.

use xshell::{Shell, cmd};

use crate::{Outcome, setup, test};

/// The crates that are published, in the order in which they must be.
const PUBLISHED: [&str; 6] =
    ["ramshot-core", "ramshot-linux", "ramshot-stub", "ramshot", "ramshot-cli", "ramshot-capi"];

pub(crate) fn run() -> Outcome {
    test::run()?;
    release()
}

/// What a release needs besides the tests.
pub(crate) fn release() -> Outcome {
    let shell = setup::shell()?;
    test::step("dependencies: licences, advisories, sources", || {
        tool(&shell, "cargo-deny")?;
        cmd!(shell, "cargo deny --all-features check licenses bans sources").run()?;
        advisories(&shell)
    })?;
    test::step("the API against the last release", || api(&shell))?;
    test::step("packages", || packages(&shell))
}

fn tool(shell: &Shell, name: &str) -> Outcome {
    let subcommand = name.strip_prefix("cargo-").unwrap_or(name);
    if cmd!(shell, "cargo {subcommand} --version").quiet().ignore_stdout().ignore_stderr().run().is_ok() {
        return Ok(());
    }
    Ok(cmd!(shell, "cargo install --quiet --locked {name}").run()?)
}

/// Known vulnerabilities, if their list can be had here.
fn advisories(shell: &Shell) -> Outcome {
    if cmd!(shell, "cargo deny --all-features fetch db").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        setup::skipped("known vulnerabilities", "the advisory database cannot be fetched");
        return Ok(());
    }
    Ok(cmd!(shell, "cargo deny --all-features check advisories").run()?)
}

/// Semantic versioning, crate by crate, against the newest tag of a release.
fn api(shell: &Shell) -> Outcome {
    let tags = cmd!(shell, "git tag --list v[0-9]* --sort=-version:refname").quiet().read()?;
    let Some(last) = tags.lines().next() else {
        setup::skipped("comparing the API", "there has been no release (no tag v0.1.0 or later) to compare it with");
        return Ok(());
    };
    tool(shell, "cargo-semver-checks")?;
    for package in PUBLISHED.into_iter().filter(|package| !matches!(*package, "ramshot-cli" | "ramshot-capi")) {
        cmd!(shell, "cargo semver-checks --package {package} --baseline-rev {last}").run()?;
    }
    Ok(())
}

/// Each is built from what would be uploaded, and nothing else.
fn packages(shell: &Shell) -> Outcome {
    let packages = PUBLISHED.iter().flat_map(|package| ["--package", package]);
    Ok(cmd!(shell, "cargo package --quiet --allow-dirty {packages...}").run()?)
}
