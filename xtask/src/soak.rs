//! `cargo xtask soak`: guests of random configurations, snapshotted live for as long as you like, each image verified. The
//! program itself is in `tests/`.

use xshell::cmd;

use crate::{Outcome, setup};

pub(crate) fn run(args: &[String]) -> Outcome {
    let shell = setup::shell()?;
    setup::c_compiler(&shell)?;
    cmd!(shell, "cargo build --quiet --release --package ramshot-tests --bin ramshot-soak").quiet().run()?;
    let status = std::process::Command::new(setup::built("ramshot-soak")).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("failed ({status})").into()) }
}
