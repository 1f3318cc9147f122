//! The `ramshot` command, each subcommand through the binary, bad input included.
#![allow(clippy::unwrap_used)] // A test that panics has failed, and says where.

mod demo;
mod diff;
mod export;
mod forge;
mod import;
mod inspect;
mod map;
mod merge;
mod shell;
mod support;
mod verify;
