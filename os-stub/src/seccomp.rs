//! What a seccomp filter must allow: there is none here.

/// A system call that is to be allowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Rule {
    /// Its name.
    pub syscall: &'static str,
    /// Its number on this architecture.
    pub number: i64,
    /// The only request allowed, if it is `ioctl`.
    pub request: Option<u32>,
    /// What it is needed for.
    pub why: &'static str,
}

/// Nothing.
pub const RUNNING: &[Rule] = &[];

/// Nothing.
pub const PREPARE: &[Rule] = &[];
