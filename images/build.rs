//! Builds the guest image with the C compiler that the `cc` crate finds.
//!
//! The image is an x86-64 ELF whatever it is built on, but only a compiler for x86-64 Linux is sure to make one; for
//! every other target the crate builds without an image and says so in `IMAGE_MISSING`.

use std::env;
use std::error::Error;
use std::path::PathBuf;

const SOURCES: [&str; 3] = ["boot.S", "main.c", "work.c"];
const OTHERS: [&str; 4] = ["guest.h", "guest.ld", "layout.h", "rule.h"];
const FLAGS: [&str; 15] = [
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mno-red-zone",
    // No SSE or x87: then ring 0 need not enable them.
    "-mgeneral-regs-only",
    "-m64",
    "-g0",
];
const LINK_FLAGS: [&str; 5] = ["-static", "-nostdlib", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"];

fn main() -> Result<(), Box<dyn Error>> {
    let source = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guest");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for file in SOURCES.iter().chain(&OTHERS) {
        println!("cargo::rerun-if-changed=guest/{file}");
    }
    println!("cargo::rustc-check-cfg=cfg(guest_image)");

    let (arch, os) = (env::var("CARGO_CFG_TARGET_ARCH")?, env::var("CARGO_CFG_TARGET_OS")?);
    if arch != "x86_64" || os != "linux" {
        println!(
            "cargo::rustc-env=GUEST_IMAGE_MISSING=built for {arch}-{os}; the guest image is built on x86_64-linux only"
        );
        return Ok(());
    }

    let mut build = cc::Build::new();
    // The compiler, not our Cargo profile, decides about flags: the image is the same in debug and release.
    build.no_default_flags(true).warnings(false).cargo_metadata(false);
    let compiler = build.try_get_compiler()?;
    let image = out.join("guest.elf");
    let mut command = compiler.to_command();
    command.args(FLAGS).args(LINK_FLAGS).arg("-T").arg(source.join("guest.ld"));
    command.args(SOURCES.map(|file| source.join(file))).arg("-o").arg(&image);
    let status = command.status().map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if !status.success() {
        return Err(format!("the guest image was not built ({status}): {command:?}").into());
    }
    println!("cargo::rustc-cfg=guest_image");
    Ok(())
}
