//! `cargo xtask image`: the guest image as a file.

use xshell::cmd;

use crate::{Outcome, setup};

pub(crate) fn run(to: Option<&str>) -> Outcome {
    let shell = setup::shell()?;
    setup::c_compiler(&shell)?;
    let file = to.unwrap_or("target/ramshot-guest.elf");
    // Relative to where the user stands, not to the repository.
    let file = std::env::current_dir()?.join(file);
    cmd!(shell, "cargo run --quiet --release --package ramshot-images --bin ramshot-image -- {file}").quiet().run()?;
    Ok(())
}
