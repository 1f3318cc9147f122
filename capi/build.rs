//! Names the version of the C ABI in the shared library, as ELF systems expect it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // The number changes with every change that breaks a compiled program; see docs/C.md.
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libramshot_c.so.0");
    }
}
