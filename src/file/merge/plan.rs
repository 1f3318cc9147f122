//! What has to be done for which pages, decided from the metadata alone.

use ramshot_core::{PageId, Run};

use crate::file::PageSource;
use crate::file::chain::Chain;

/// What becomes of a run in the new file. Pages of no run are as the new file's default: zero, or in the parent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Say that it is zero: the parent has data there.
    Zero,
    /// Copy it: the parent says that it is zero, or there is none.
    Copy,
    /// Both have data, in different files: copy what differs.
    Compare,
}

/// Everything that has data is copied.
pub(super) fn flatten(chain: &Chain, mut each: impl FnMut(Run, Action)) {
    let mut page = PageId(0);
    while page.0 < chain.pages() {
        let (run, file) = chain.locate(page);
        if file.is_some() {
            each(run, Action::Copy);
        }
        page = run.end();
    }
}

/// What differs between the two images, or may.
pub(super) fn rebase(child: &Chain, parent: &Chain, mut each: impl FnMut(Run, Action)) {
    let mut page = PageId(0);
    while page.0 < child.pages() {
        let (ours, child_file) = child.locate(page);
        let (theirs, parent_file) = parent.locate(page);
        let run = Run::new(page, ours.pages.min(theirs.pages));
        match (child_file, parent_file) {
            (None, None) => {}
            (None, Some(_)) => each(run, Action::Zero),
            (Some(_), None) => each(run, Action::Copy),
            // The same page of the same file, or of a copy of it.
            (Some(ours), Some(theirs)) if ours.as_parent() == theirs.as_parent() => {}
            (Some(_), Some(_)) => each(run, Action::Compare),
        }
        page = run.end();
    }
}
