//! What all subcommands share: help, exit codes, closed output; completions and manual pages.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Command, Stdio};

use super::support::{Ran, World, command, fails, installed, skipped, yes};

const SUBCOMMANDS: [&str; 9] = ["inspect", "verify", "diff", "export", "import", "map", "demo", "completions", "man"];

#[test]
fn help_names_subcommands_and_exit_codes() {
    let world = World::new();
    let dir = world.dir.path();
    let help = yes(dir, &["--help"]);
    assert!(help.contains("Exit status") && help.contains("damage was found"), "{help}");
    for subcommand in SUBCOMMANDS {
        assert!(help.contains(&format!("  {subcommand}")), "{subcommand}");
        assert!(yes(dir, &[subcommand, "--help"]).contains("Usage: ramshot"), "{subcommand}");
        fails(dir, 2, &["--no-such-option"], &[subcommand, "--no-such-option"]);
    }
    assert!(yes(dir, &["--version"]).starts_with("ramshot "));
    fails(dir, 2, &["Usage"], &[]);
    fails(dir, 2, &["flaten"], &["flaten"]);
}

#[test]
fn a_closed_output_is_no_error() {
    let world = World::new();
    for (code, args) in [
        (0, &["inspect", "snap"][..]),
        (0, &["inspect", "--json", "snap"]),
        (0, &["verify", "snap"]),
        (1, &["diff", "--pages", "snap", "other"]),
        (0, &["export", "--format", "raw", "snap", "out"]),
        (0, &["map", "snap", "map.png"]),
        (0, &["completions", "zsh"]),
        (0, &["man"]),
        (0, &["--help"]),
    ] {
        let other = super::support::memory(64, 0x66);
        super::support::snapshot(&world.path("other"), &super::support::two_blocks(), &other);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(world.dir.path(), args).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let ran = Ran::from(output);
        assert_eq!((ran.code, ran.err.as_str()), (code, ""), "{args:?}");
    }
    assert!(world.path("out").exists() && world.path("map.png").exists(), "the work is done all the same");
}

#[test]
fn closed_standard_error_is_survived_too() {
    let world = World::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = command(world.dir.path(), &["verify", "nowhere"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn a_full_output_is_an_error() {
    let world = World::new();
    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
        skipped("this system has no /dev/full");
        return;
    };
    let output = command(world.dir.path(), &["inspect", "snap"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    let ran = Ran::from(output);
    assert!(ran.code == 2 && ran.err.contains("cannot write to standard output: No space"), "{ran:?}");
}

#[test]
fn completions_know_every_subcommand() {
    let world = World::new();
    let dir = world.dir.path();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = yes(dir, &["completions", shell]);
        for subcommand in SUBCOMMANDS {
            assert!(script.contains(subcommand), "{shell}: {subcommand}");
        }
    }
    if installed("bash") {
        let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().unwrap();
        bash.stdin.take().unwrap().write_all(yes(dir, &["completions", "bash"]).as_bytes()).unwrap();
        assert!(bash.wait().unwrap().success());
    }
    fails(dir, 2, &["tcsh"], &["completions", "tcsh"]);
}

#[test]
fn manual_pages_say_the_exit_codes() {
    let world = World::new();
    let dir = world.dir.path();
    let page = yes(dir, &["man"]);
    assert!(
        page.contains(".TH ramshot 1") && page.contains(".SH \"EXIT STATUS\"") && page.contains("damage"),
        "{page}"
    );
    std::fs::create_dir(world.path("man1")).unwrap();
    yes(dir, &["man", "--dir", "man1"]);
    for subcommand in SUBCOMMANDS {
        let page = std::fs::read_to_string(world.path(&format!("man1/ramshot-{subcommand}.1"))).unwrap();
        assert!(page.contains(&format!("ramshot\\-{subcommand}")) && page.contains("EXIT STATUS"), "{page}");
    }
    assert!(world.path("man1/ramshot.1").exists());
    fails(dir, 2, &["No such file"], &["man", "--dir", "none"]);
}
