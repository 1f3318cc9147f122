//! The lazy restore's decisions.

mod explore;
mod scripted;
mod world;

/// A deliberate mistake, for the exploration to find. The first group sits in the core, the second in the driver.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum FillDefect {
    /// A discard is taken for nothing: the page comes from the image again.
    DiscardForgotten,
    /// What was read is put in whether or not it is still wanted.
    PutInBlindly,
    /// A lost page counts as one that was in and is gone: zeros are put there.
    LostIsZero,
    /// The search passes what is being read, and the end does not wait for it.
    CompleteTooEarly,

    /// What is wanted is asked for in one step and put in in another: a discard can come between.
    PutInLater,
    /// A fault on a page that is in already is taken for one that somebody will wake.
    StaleNotWoken,
    /// When the restore is given up the pages that are missing become ordinary memory.
    CancelJustEnds,
}
