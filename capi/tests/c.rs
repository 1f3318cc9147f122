//! The C ABI from C: programs built by the system's compiler with warnings as errors, run as they are, under valgrind and
//! with the address sanitizer.
#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// What a Rust library that is linked statically needs of the system.
const SYSTEM: [&str; 4] = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];
/// Exit code of `exercise.c` where there is no userfaultfd.
const NO_USERFAULTFD: i32 = 77;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder with `libramshot_c.a` and `libramshot_c.so`. `cargo test` alone makes them under other names.
fn libraries() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap(), &[]))
}

fn build(target: &Path, args: &[&str]) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", "ramshot-capi"]).args(args).current_dir(here());
    succeed(cargo.arg("--target-dir").arg(target));
    target.join("debug")
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn cc(source: &str, program: &Path) -> Command {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut cc = Command::new(compiler);
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-I"]).arg(here().join("include"));
    cc.arg(here().join(source)).arg("-o").arg(program);
    cc
}

/// Links with the static library in `libraries`.
fn compile(source: &str, program: &Path, libraries: &Path, flags: &[&str]) {
    succeed(cc(source, program).args(flags).arg(libraries.join("libramshot_c.a")).args(SYSTEM));
}

fn skipped(what: &str, why: &str) {
    eprintln!("\n==== SKIPPED: {what}\n==== because {why}\n");
}

/// Runs a program, which may find that there is no userfaultfd.
fn run(program: &mut Command) -> Option<String> {
    let output = program.output().unwrap_or_else(|error| panic!("{program:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NO_USERFAULTFD) {
        skipped(&format!("{program:?}"), &errors);
        return None;
    }
    assert!(output.status.success(), "{program:?}: {}\n{errors}", output.status);
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn userfaultfd() -> bool {
    let there = ramshot::probe().is_available();
    if !there {
        skipped("the C example", "there is no userfaultfd for this process");
    }
    there
}

fn example(program: &Path, folder: &Path) {
    if userfaultfd() {
        let said = run(Command::new(program).arg(folder.join("example.ramshot"))).unwrap();
        assert!(said.contains("the memory is as it was") && said.contains("device state: registers"), "{said}");
    }
}

fn exercise(program: impl AsRef<OsStr>, folder: &Path) {
    let files = tempfile::tempdir_in(folder).unwrap();
    if let Some(said) = run(Command::new(program).arg(files.path())) {
        assert_eq!(said, "all of it\n");
    }
}

#[test]
fn example_and_exercise_run() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("snapshot"), folder.path().join("exercise"));
    compile("examples/snapshot.c", &first, libraries(), &[]);
    compile("tests/exercise.c", &second, libraries(), &[]);
    example(&first, folder.path());
    exercise(&second, folder.path());
}

/// C++ programs include the header, too.
#[test]
fn the_header_is_cpp() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("header.cc");
    std::fs::write(&source, "#include <ramshot.h>\nint main() { return ramshot_version() == nullptr; }\n").unwrap();
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        return skipped("the header in C++", "there is no C++ compiler");
    }
    let mut cxx = Command::new(compiler);
    cxx.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"]).arg(here().join("include"));
    succeed(cxx.arg(source));
}

/// Installed as docs/C.md says, found by pkg-config where there is one.
#[test]
fn the_shared_library_installs() {
    let folder = tempfile::tempdir().unwrap();
    let (lib, program) = (folder.path().join("lib"), folder.path().join("snapshot"));
    std::fs::create_dir_all(lib.join("pkgconfig")).unwrap();
    std::fs::copy(libraries().join("libramshot_c.so"), lib.join("libramshot_c.so.0")).unwrap();
    std::os::unix::fs::symlink("libramshot_c.so.0", lib.join("libramshot_c.so")).unwrap();
    let template = std::fs::read_to_string(here().join("ramshot.pc.in")).unwrap();
    let prefix = folder.path().to_str().unwrap();
    let pc = template.replace("@PREFIX@", prefix).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    std::fs::write(lib.join("pkgconfig/ramshot.pc"), pc).unwrap();
    let mut pkg_config = Command::new("pkg-config");
    pkg_config.args(["--libs", "ramshot"]).env("PKG_CONFIG_PATH", lib.join("pkgconfig"));
    let libs = match pkg_config.output() {
        Ok(found) => {
            assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
            String::from_utf8(found.stdout).unwrap()
        }
        Err(error) => {
            skipped("pkg-config", &error.to_string());
            format!("-L{} -lramshot_c", lib.display())
        }
    };
    succeed(cc("examples/snapshot.c", &program).args(libs.split_whitespace()).arg("-lpthread"));
    if userfaultfd() {
        let mut command = Command::new(&program);
        command.arg(folder.path().join("example.ramshot")).env("LD_LIBRARY_PATH", &lib);
        assert!(run(&mut command).unwrap().contains("the memory is as it was"));
    }
}

#[test]
fn clean_under_the_address_sanitizer() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("snapshot"), folder.path().join("exercise"));
    // A compiler without the sanitizer's runtime cannot link even nothing.
    let empty = folder.path().join("empty.c");
    std::fs::write(&empty, "int main(void) { return 0; }\n").unwrap();
    let mut attempt = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    attempt.arg("-fsanitize=address").arg(&empty).arg("-o").arg(folder.path().join("empty"));
    if !attempt.output().unwrap().status.success() {
        return skipped("the address sanitizer", "this compiler has no runtime for it");
    }
    compile("examples/snapshot.c", &first, libraries(), &["-fsanitize=address"]);
    compile("tests/exercise.c", &second, libraries(), &["-fsanitize=address"]);
    example(&first, folder.path());
    exercise(&second, folder.path());
}

/// The exercise alone: valgrind lets one thread run at a time, so a writer that waits for us in the kernel would wait forever.
#[test]
fn clean_under_valgrind() {
    let folder = tempfile::tempdir().unwrap();
    if Command::new("valgrind").arg("--version").output().is_err() {
        return skipped("valgrind", "it is not installed");
    }
    let program = folder.path().join("exercise");
    compile("tests/exercise.c", &program, libraries(), &[]);
    let mut valgrind = Command::new("valgrind");
    // What is only "possibly" lost is the standard library's record of the main thread, which it keeps to the end.
    valgrind.args(["--quiet", "--error-exitcode=99", "--leak-check=full"]);
    valgrind.args(["--show-leak-kinds=definite,indirect", "--errors-for-leak-kinds=definite,indirect"]);
    if let Some(said) = run(valgrind.arg(&program).arg(folder.path())) {
        assert_eq!(said, "all of it\n");
    }
}

/// A VMM may build everything with `panic=abort`.
#[test]
fn works_with_panic_abort() {
    let folder = tempfile::tempdir().unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("panic-abort");
    let libraries = build(&target, &["--config", "profile.dev.panic=\"abort\""]);
    let program = folder.path().join("exercise");
    compile("tests/exercise.c", &program, &libraries, &[]);
    exercise(&program, folder.path());
}
