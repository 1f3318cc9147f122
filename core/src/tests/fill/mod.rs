//! The lazy restore's decisions.

/// A deliberate mistake, for the exploration to find.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum FillDefect {
    /// A discard is taken for nothing: the page comes from the image again.
    DiscardForgotten,
    /// What was read is put in whether or not it is still wanted.
    PutInBlindly,
}

mod scripted;
