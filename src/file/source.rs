//! What a restore reads from: a whole image, whether it is one file or a chain of them.

use ramshot_core::{BlockIndex, BlockTable, PageId, Run, Treatment};

use super::error::{LayoutMismatch, ReadError, RestoreError};
use super::{FileBlock, PageState, SnapshotFile, StateRun, place};

/// How many neighbouring records of one state are looked at for one extent: 1 TiB if each is as long as it can be, and a
/// bound for a file that has a record a page.
const NEIGHBOURS: usize = 64;

/// Pages of a whole image, resolved: what a restore reads from.
pub trait PageSource: Send + Sync {
    /// The RAM blocks of the image, in file order.
    fn blocks(&self) -> &[FileBlock];

    /// Pages of the image.
    fn pages(&self) -> u64;

    /// The longest run from `first` on whose pages are all zero, or all data that one [`read_run`](Self::read_run) can
    /// read. Never [`InParent`](PageState::InParent). `None`: no such page.
    fn extent(&self, first: PageId) -> Option<StateRun>;

    /// Reads the pages of one data extent (or a part of it) and checks every page's CRC.
    ///
    /// # Errors
    /// The first page that cannot be read or is damaged; what `into` holds then is of no use.
    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError>;

    /// The device state of the snapshot itself.
    fn device_state(&self) -> &[u8];

    /// Whether it has every page. A single file that has a parent does not: open the chain.
    ///
    /// # Errors
    /// [`RestoreError::NeedsParent`].
    fn check_whole(&self) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// A file without a parent is a whole image. Of one with a parent, [`check_whole`](PageSource::check_whole) says what is
/// missing, and the pages that the parent has are not there: its [`Chain`](super::Chain) has them.
impl PageSource for SnapshotFile {
    fn blocks(&self) -> &[FileBlock] {
        Self::blocks(self)
    }

    fn pages(&self) -> u64 {
        Self::pages(self)
    }

    fn extent(&self, first: PageId) -> Option<StateRun> {
        if first.0 >= Self::pages(self) {
            return None;
        }
        let mut parts = self.state_runs_from(first);
        let StateRun { run, state } = parts.next().filter(|part| part.state != PageState::InParent)?;
        let last = parts.take(NEIGHBOURS).take_while(|part| part.state == state).last();
        let end = last.map_or(run.end(), |part| part.run.end());
        Some(StateRun { run: Run::new(first, end.0.checked_sub(first.0)?), state })
    }

    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        Self::read_run(self, first, into)
    }

    fn device_state(&self) -> &[u8] {
        Self::device_state(self)
    }

    fn check_whole(&self) -> Result<(), RestoreError> {
        match self.parent() {
            Some(parent) if self.in_parent_pages() > 0 => Err(RestoreError::NeedsParent {
                path: self.path().to_owned(),
                parent: parent.id,
                pages: self.in_parent_pages(),
            }),
            _ => Ok(()),
        }
    }
}

/// All extents of `source`, one behind the other; ends with the first page it does not have.
pub(super) fn extents(source: &dyn PageSource) -> impl Iterator<Item = Result<StateRun, RestoreError>> {
    let mut page = PageId(0);
    std::iter::from_fn(move || {
        if page.0 >= source.pages() {
            return None;
        }
        // Any implementation, so that none can have us restore a page that is not there or go round for ever.
        let sound = |extent: &StateRun| {
            let run = extent.run;
            run.first == page && run.pages > 0 && run.end().0 <= source.pages() && extent.state != PageState::InParent
        };
        let Some(extent) = source.extent(page).filter(sound) else {
            let missing = RestoreError::Incomplete { page, place: place(source.blocks(), page) };
            page = PageId(u64::MAX);
            return Some(Err(missing));
        };
        page = extent.run.end();
        Some(Ok(extent))
    })
}

/// For each of the image's `blocks`, its block in `table`: the same name, at the same guest address, with the same length in
/// use, in any order. `None` for ignored ones, which count on neither side.
///
/// # Errors
/// The first difference, with both values.
pub fn match_blocks(blocks: &[FileBlock], table: &BlockTable) -> Result<Vec<Option<BlockIndex>>, LayoutMismatch> {
    let in_image = |treatment| treatment != Treatment::Ignored;
    let mut matched = Vec::with_capacity(blocks.len());
    for block in blocks {
        if !in_image(block.treatment) {
            matched.push(None);
            continue;
        }
        let found = table.iter().find(|(_, other)| other.name == block.name && in_image(other.treatment));
        let Some((index, other)) = found else {
            return Err(LayoutMismatch::Missing { block: block.name });
        };
        if other.guest != block.guest {
            let (snapshot, vm) = (block.guest, other.guest);
            return Err(LayoutMismatch::GuestAddress { block: block.name, snapshot, vm });
        }
        if other.used != block.used {
            let (snapshot, vm) = (block.used, other.used);
            return Err(LayoutMismatch::UsedLength { block: block.name, snapshot, vm });
        }
        matched.push(Some(index));
    }
    let unknown = table.iter().find(|(index, other)| in_image(other.treatment) && !matched.contains(&Some(*index)));
    match unknown {
        Some((_, other)) => Err(LayoutMismatch::Unknown { block: other.name }),
        None => Ok(matched),
    }
}
