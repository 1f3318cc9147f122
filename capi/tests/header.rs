//! The committed header is the one that this source makes.
#![allow(clippy::unwrap_used)]

use std::path::Path;

/// `cargo xtask header` sets it: the header is written instead of compared.
const WRITE: &str = "RAMSHOT_WRITE_HEADER";

#[test]
fn the_header_is_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(folder.join("src/lib.rs"))
        .generate()
        .unwrap()
        .write(&mut made);
    let path = folder.join("include/ramshot.h");
    let made = String::from_utf8(made).unwrap();
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((line, (here, there))) = (1..).zip(made.lines().zip(committed.lines())).find(|(_, (a, b))| a != b) {
        panic!("capi/include/ramshot.h:{line} is {there:?} and should be {here:?}: run `cargo xtask header`");
    }
    assert!(made == committed, "capi/include/ramshot.h has another length: run `cargo xtask header`");
}

/// A function that the generator overlooks would be in the library and not in the header.
#[test]
fn every_exported_function_is_declared() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = std::fs::read_to_string(folder.join("include/ramshot.h")).unwrap();
    let mut exported = 0;
    for entry in std::fs::read_dir(folder.join("src")).unwrap() {
        let source = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for part in source.split("extern \"C\" fn ramshot_").skip(1) {
            let name = part.split('(').next().unwrap();
            assert!(header.contains(&format!("ramshot_{name}(")), "ramshot_{name} is not in the header");
            exported += 1;
        }
    }
    assert!(exported >= 20, "{exported} exported functions found");
}
