//! The C ABI of ramshot. C programs see it as `ramshot.h`, which is generated from this crate; docs/C.md is its guide.
//!
//! Nothing is decided here: each function checks what it was given, calls the public Rust API, and turns the outcome into
//! an errno and a sentence. No panic leaves it, no Rust type with a layout of its own crosses it.
//!
//! # Unsafe
//! This crate is allowed unsafe code because every pointer of a C caller is one. What a caller promises is written once, at the
//! head of the header; a `SAFETY` comment says "the caller's promise" where that is what it rests on. Enumerations and
//! booleans are integers at the boundary, because a C program can put any number there.
//!
//! # Growing
//! Every structure is passed with the size that the caller knows (`pass`): new fields are added at the end, and 0 in a
//! field always means the default. So programs keep working with newer libraries, and newer programs with older libraries
//! unless they use what those do not have.
// The rules are the same for every function; they stand in the header.
#![allow(clippy::missing_safety_doc)]

mod dirty;
mod error;
mod file;
mod options;
mod pass;
mod probe;
mod ram;
mod report;
mod snapshot;

pub use dirty::*;
pub use error::ramshot_last_error;
pub use file::*;
pub use options::*;
pub use probe::*;
pub use ram::*;
pub use report::*;
pub use snapshot::*;
