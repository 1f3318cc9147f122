//! `cargo xtask e2e`: the test VM, snapshotted live, verified byte for byte, restored. The program itself is in `tests/`.

use xshell::cmd;

use crate::{Outcome, setup};

pub(crate) fn run(args: &[String]) -> Outcome {
    let shell = setup::shell()?;
    setup::c_compiler(&shell)?;
    cmd!(shell, "cargo build --quiet --release --package ramshot-tests --bin ramshot-e2e").quiet().run()?;
    let program = setup::built("ramshot-e2e");
    // From where the user stands: --out and --json are relative to that.
    let status = std::process::Command::new(program).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("failed ({status})").into()) }
}
