//! What a task needs that a fresh machine may not have, and the shell all tasks run in.

use xshell::{Shell, cmd};

/// A shell in the root of the repository.
pub(crate) fn shell() -> Result<Shell, xshell::Error> {
    let shell = Shell::new()?;
    shell.change_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    Ok(shell)
}

/// Says that something was left out, so that nobody overlooks it.
pub(crate) fn skipped(what: &str, why: &str) {
    eprintln!("\n==== SKIPPED: {what}\n==== because {why}\n");
}

/// Makes sure that there is a C compiler for the guest image.
pub(crate) fn c_compiler(shell: &Shell) -> Result<(), String> {
    let found = ["cc", "gcc", "clang"].iter().any(|name| cmd!(shell, "{name} --version").quiet().run_quietly());
    if found || debian_package(shell, "gcc") {
        return Ok(());
    }
    Err("no C compiler (cc, gcc, clang) for the guest image, and none could be installed".to_owned())
}

/// Whether libclang is there, or could be installed: the `userfaultfd` crate needs it.
pub(crate) fn libclang(shell: &Shell) -> bool {
    let listed = cmd!(shell, "ldconfig -p").quiet().ignore_stderr().read().unwrap_or_default();
    // bindgen loads libclang.so or libclang-N.so; a libclang-cpp alone is not it.
    let found = listed.lines().any(|line| {
        let name = line.trim_start();
        name.starts_with("libclang.so") || name.starts_with("libclang-") && !name.starts_with("libclang-cpp")
    });
    found || debian_package(shell, "libclang-dev")
}

/// Installs a Debian package, if this is a system and a user that can.
pub(crate) fn debian_package(shell: &Shell, package: &str) -> bool {
    let update = cmd!(shell, "apt-get update");
    let install = cmd!(shell, "apt-get install -y --no-install-recommends {package}");
    update.quiet().run_quietly() && install.env("DEBIAN_FRONTEND", "noninteractive").quiet().run_quietly()
}

/// Adds a rustup target; false if that cannot be done here.
pub(crate) fn rust_target(shell: &Shell, target: &str) -> bool {
    let installed = cmd!(shell, "rustup target list --installed").quiet().ignore_stderr().read().unwrap_or_default();
    installed.lines().any(|line| line == target) || cmd!(shell, "rustup target add {target}").quiet().run_quietly()
}

/// Adds a rustup toolchain; false if that cannot be done here.
pub(crate) fn rust_toolchain(shell: &Shell, version: &str) -> bool {
    let installed = cmd!(shell, "rustup toolchain list").quiet().ignore_stderr().read().unwrap_or_default();
    installed.lines().any(|line| line.starts_with(version))
        || cmd!(shell, "rustup toolchain install {version} --profile minimal").quiet().run_quietly()
}

trait RunQuietly {
    /// Runs it without output; true if it succeeded.
    fn run_quietly(self) -> bool;
}

impl RunQuietly for xshell::Cmd<'_> {
    fn run_quietly(self) -> bool {
        self.ignore_stdout().ignore_stderr().run().is_ok()
    }
}

/// Where cargo puts a release binary of this workspace.
pub(crate) fn built(name: &str) -> std::path::PathBuf {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
    target.join("release").join(name)
}
