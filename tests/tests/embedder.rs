//! The second embedder, under its seccomp filter: a whole live snapshot with exactly the system calls that ramshot says it
//! needs, compared byte for byte; and the lists as files.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use ramshot::SnapshotFile;
use ramshot::core::PageId;
use ramshot::seccomp::{PREPARE, RUNNING, Rule};

fn run(dir: &Path, when: &str, more: &[&str]) -> Output {
    let path = dir.join("vm.ramshot");
    Command::new(env!("CARGO_BIN_EXE_ramshot-embedder")).arg(path).arg(when).args(more).output().unwrap()
}

#[test]
fn a_live_snapshot_under_exactly_this_filter_is_memory_at_t0() {
    for when in ["none", "after", "before"] {
        let dir = tempfile::tempdir().unwrap();
        let output = run(dir.path(), when, &[]);
        assert!(output.status.success(), "filter {when}: {output:?}");
        let t0 = std::fs::read(dir.path().join("vm.ramshot.t0")).unwrap();
        let file = SnapshotFile::open(dir.path().join("vm.ramshot")).unwrap();
        file.verify(2, &mut |_, _| {}).unwrap();
        let names: Vec<_> = file.blocks().iter().map(|block| (block.guest.0, block.used)).collect();
        assert_eq!(names, [(0, 48 << 20), (4 << 30, 16 << 20)]);
        assert_eq!(file.ram_bytes(), t0.len() as u64);
        let mut bytes = [0; 4096];
        for (page, expected) in (0..).zip(t0.chunks(4096)) {
            file.read_page(PageId(page), &mut bytes).unwrap();
            assert!(bytes == expected, "filter {when}: page {page} is not what it was at T0");
        }
        println!("filter {when}: {}", String::from_utf8_lossy(&output.stdout).trim());
    }
}

#[test]
fn the_filter_bites() {
    for (when, code) in [("after", 31), ("before", 31), ("none", 0)] {
        let dir = tempfile::tempdir().unwrap();
        let output = run(dir.path(), when, &["forbidden"]);
        assert_eq!(output.status.code(), Some(code), "filter {when}: {output:?}");
    }
}

/// `docs/seccomp/ARCH.json` is what the lists say, in the form that Firecracker's seccompiler takes. Written anew with
/// `RAMSHOT_WRITE=1`.
#[test]
fn the_filters_as_files_are_the_lists() {
    let arch = std::env::consts::ARCH;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../docs/seccomp/{arch}.json"));
    let text = json(&[("ramshot_running", RUNNING), ("ramshot_prepare", PREPARE)]);
    serde_json::from_str::<serde_json::Value>(&text).unwrap();
    if std::env::var_os("RAMSHOT_WRITE").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    match std::fs::read_to_string(&path) {
        Ok(there) => assert!(there == text, "{path:?} is out of date: RAMSHOT_WRITE=1 writes it anew"),
        Err(_) => println!("==== SKIPPED: there is no {path:?}; RAMSHOT_WRITE=1 on such a machine writes it"),
    }
    // The compiler of such files takes it.
    let filters = seccompiler::compile_from_json(text.as_bytes(), arch.try_into().unwrap()).unwrap();
    assert_eq!(filters.len(), 2);
}

fn json(filters: &[(&str, &[Rule])]) -> String {
    let mut text = "{\n".to_owned();
    for (number, (name, rules)) in (1..).zip(filters) {
        writeln!(text, "    \"{name}\": {{").unwrap();
        text += "        \"mismatch_action\": \"trap\",\n        \"match_action\": \"allow\",\n        \"filter\": [\n";
        for (number, rule) in (1..).zip(*rules) {
            let args = rule.request.map_or(String::new(), |request| {
                format!(", \"args\": [{{ \"index\": 1, \"type\": \"dword\", \"op\": \"eq\", \"val\": {request} }}]")
            });
            let comma = if number == rules.len() { "" } else { "," };
            writeln!(
                text,
                "            {{ \"syscall\": \"{}\"{args}, \"comment\": \"{}\" }}{comma}",
                rule.syscall, rule.why
            )
            .unwrap();
        }
        text += if number == filters.len() { "        ]\n    }\n" } else { "        ]\n    },\n" };
    }
    text + "}\n"
}
