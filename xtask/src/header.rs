//! `cargo xtask header`: the C header, made of the declarations in `capi/src`.
//!
//! The generator is a dependency of that crate's tests, which compare the header with what it makes; here they are told to
//! write it. So the tasks stay quick to build.

use xshell::cmd;

use crate::{Outcome, setup};

pub(crate) fn run() -> Outcome {
    let shell = setup::shell()?;
    cmd!(shell, "cargo test --quiet --package ramshot-capi --test header the_header_is_up_to_date")
        .env("RAMSHOT_WRITE_HEADER", "1")
        .quiet()
        .ignore_stdout()
        .run()?;
    println!("capi/include/ramshot.h");
    Ok(())
}
