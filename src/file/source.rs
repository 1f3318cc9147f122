//! What a restore reads from: the pages of a whole image, wherever they are stored.

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
    /// read. Never [`InParent`](PageState::InParent). None: no such page.
    fn extent(&self, first: PageId) -> Option<StateRun>;

    /// Reads the pages of one data extent (or a part of it) and checks every page's CRC.
    ///
    /// # Errors
    /// No such pages or pages without data, they cannot be read, or one is damaged (`into` holds its bytes then).
    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError>;

    /// The device state of the snapshot itself.
    fn device_state(&self) -> &[u8];
}

/// A snapshot that holds all of its pages. One that has pages in a parent says `None` for them, so it is no whole image: who
/// restores from it without [`check_whole`] finds a gap, never zeros. Its [`Chain`](super::Chain) is whole.
impl PageSource for SnapshotFile {
    fn blocks(&self) -> &[FileBlock] {
        self.blocks()
    }

    fn pages(&self) -> u64 {
        self.pages()
    }

    fn extent(&self, first: PageId) -> Option<StateRun> {
        if first.0 >= self.pages() {
            return None;
        }
        // The first of them may lie wholly before it.
        let mut parts = self.meta().states.runs_from(first).skip_while(|part| part.run.end() <= first);
        let StateRun { run, state } = parts.next().filter(|part| part.state != PageState::InParent)?;
        let last = parts.take(NEIGHBOURS).take_while(|part| part.state == state).last();
        let end = last.map_or(run.end(), |part| part.run.end());
        Some(StateRun { run: Run::new(first, end.0 - first.0), state })
    }

    fn read_run(&self, first: PageId, into: &mut [u8]) -> Result<(), ReadError> {
        self.read_run(first, into)
    }

    fn device_state(&self) -> &[u8] {
        self.device_state()
    }
}

/// Checks that every page of `source` is zero or data: that a restore from it will find them all.
///
/// # Errors
/// [`RestoreError::Incomplete`] with the first page it does not have: it is a lone increment.
pub fn check_whole(source: &dyn PageSource) -> Result<(), RestoreError> {
    extents(source).try_for_each(|extent| extent.map(drop))
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

/// For each block of an image, its block in `table`: the one of that name, which must have the same guest address and length
/// in use. `None` for ignored ones, which count on neither side.
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
