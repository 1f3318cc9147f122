//! `cargo xtask bench`: the figures, beside floors measured in the same run. The program itself is in `tests/`.

use xshell::cmd;

use crate::{Outcome, setup};

pub(crate) fn run(args: &[String]) -> Outcome {
    let shell = setup::shell()?;
    setup::c_compiler(&shell)?;
    let (program, args) = match args {
        [first, rest @ ..] if first == "restore" => ("ramshot-bench-restore", rest),
        all => ("ramshot-bench", all),
    };
    cmd!(shell, "cargo build --quiet --release --package ramshot-tests --bin {program}").quiet().run()?;
    let status = std::process::Command::new(setup::built(program)).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("failed ({status})").into()) }
}
