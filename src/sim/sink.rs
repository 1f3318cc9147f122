//! An image in memory that watches over the sink's contract.

use ramshot_core::{BlockTable, PageId, Run};

use super::PAGE;
use super::trouble::{Call, Plan, Trouble, happen};
use crate::file::{PageState, ParentRef, SnapshotId};
use crate::sink::{Committed, ImageMeta, ImageSink, PageDigest, Piece, SinkError};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait};

/// An [`ImageSink`] that keeps the image in memory. What becomes of it is seen, and steered, from its [`MemoryImage`].
#[derive(Debug)]
pub struct MemorySink {
    shared: Arc<Shared>,
}

/// The other end of a [`MemorySink`].
#[derive(Clone, Debug)]
pub struct MemoryImage {
    shared: Arc<Shared>,
}

/// What became of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Neither committed nor aborted yet.
    Open,
    /// There is an image.
    Committed,
    /// There is none.
    Aborted,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    given: Vec<bool>,
    /// It builds on another.
    child: bool,
    held: bool,
    waiting: usize,
    /// What room was made for, if it can be made.
    room: Option<Vec<Run>>,
    outcome: Outcome,
    meta: ImageMeta,
    violations: Vec<String>,
    plan: Plan,
}

impl MemorySink {
    /// A sink for images of this layout, and the image.
    #[must_use]
    pub fn new(table: &BlockTable) -> (Self, MemoryImage) {
        let pages = usize::try_from(table.pages()).unwrap_or(0);
        let state = State {
            bytes: vec![0; pages * PAGE],
            given: vec![false; pages],
            child: false,
            held: false,
            waiting: 0,
            room: None,
            outcome: Outcome::Open,
            meta: ImageMeta::default(),
            violations: Vec::new(),
            plan: Plan::default(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        (Self { shared: Arc::clone(&shared) }, MemoryImage { shared })
    }

    /// A sink for an increment on `parent`, which was committed.
    #[must_use]
    pub fn child(table: &BlockTable, parent: &MemoryImage) -> (Self, MemoryImage) {
        let (sink, image) = Self::new(table);
        {
            let bytes = lock(&parent.shared.state).bytes.clone();
            let mut state = sink.lock();
            (state.bytes, state.child) = (bytes, true);
        }
        (sink, image)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn call(&self, call: Call) -> Result<MutexGuard<'_, State>, SinkError> {
        let mut state = self.lock();
        while state.held {
            state.waiting += 1;
            state = wait(&self.shared.changed, state);
            state.waiting -= 1;
        }
        let mishap = state.plan.next(call);
        drop(state);
        happen(mishap, call).map_err(|error| SinkError {
            what: error.to_string(),
            source: std::io::Error::from_raw_os_error(error.errno),
        })?;
        Ok(self.lock())
    }
}

impl MemoryImage {
    /// From now on this goes wrong ([`Call::Write`], [`Call::Commit`]); calls are counted anew.
    pub fn trouble(&self, trouble: Trouble) {
        lock(&self.shared.state).plan = Plan::new(trouble);
    }

    /// From now on every write waits, as on a disk that hangs, until [`let_go`](Self::let_go).
    pub fn hold(&self) {
        lock(&self.shared.state).held = true;
    }

    /// Ends [`hold`](Self::hold).
    pub fn let_go(&self) {
        lock(&self.shared.state).held = false;
        self.shared.changed.notify_all();
    }

    /// From now on room can be made for pages ahead of T0 ([`Call::Room`]).
    pub fn take_room(&self) {
        lock(&self.shared.state).room = Some(Vec::new());
    }

    /// What room was made for.
    #[must_use]
    pub fn room(&self) -> Vec<Run> {
        lock(&self.shared.state).room.clone().unwrap_or_default()
    }

    /// How many writers wait because of [`hold`](Self::hold).
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.shared.state).waiting
    }

    /// What became of it.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        lock(&self.shared.state).outcome
    }

    /// The bytes of all pages, if it was committed.
    #[must_use]
    pub fn memory(&self) -> Option<Vec<u8>> {
        let state = lock(&self.shared.state);
        (state.outcome == Outcome::Committed).then(|| state.bytes.clone())
    }

    /// What was committed with it.
    #[must_use]
    pub fn meta(&self) -> ImageMeta {
        lock(&self.shared.state).meta.clone()
    }

    /// How the contract of [`ImageSink`] was violated: a page given twice, a digest that is wrong, a call after the end.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        lock(&self.shared.state).violations.clone()
    }
}

impl State {
    fn take(&mut self, page: PageId, bytes: &[u8], digest: PageDigest) {
        let index = usize::try_from(page.0).unwrap_or(usize::MAX);
        let (Some(given), Some(home)) = (self.given.get_mut(index), self.bytes.chunks_exact_mut(PAGE).nth(index))
        else {
            self.violations.push(format!("{page} is not in the image"));
            return;
        };
        if std::mem::replace(given, true) {
            self.violations.push(format!("{page} was given twice"));
        }
        home.copy_from_slice(bytes);
        let zero = bytes.iter().all(|&byte| byte == 0);
        let right = if zero { PageDigest::Zero } else { PageDigest::Data(crc32c::crc32c(bytes)) };
        if digest != right {
            self.violations.push(format!("{page} came with digest {digest:?}, not {right:?}"));
        }
    }

    fn end(&mut self, outcome: Outcome) {
        if self.outcome != Outcome::Open {
            self.violations.push(format!("{outcome:?} after {:?}", self.outcome));
        }
        self.outcome = outcome;
    }
}

impl ImageSink for MemorySink {
    fn write(&self, pieces: &[Piece<'_>]) -> Result<(), SinkError> {
        let mut state = self.call(Call::Write)?;
        for piece in pieces {
            if piece.bytes.len() != piece.digests.len() * PAGE {
                state.violations.push(format!("{}: {} bytes", piece.first, piece.bytes.len()));
            }
            for ((page, bytes), digest) in (piece.first.0..).zip(piece.bytes.chunks_exact(PAGE)).zip(piece.digests) {
                state.take(PageId(page), bytes, *digest);
            }
        }
        Ok(())
    }

    fn commit(self: Box<Self>, meta: &ImageMeta) -> Result<Committed, SinkError> {
        let mut state = self.call(Call::Commit)?;
        state.end(Outcome::Committed);
        state.meta = meta.clone();
        let written = state.given.iter().filter(|given| **given).count();
        let snapshot = Some(ParentRef { id: SnapshotId([1; 16]), checksum: crc32c::crc32c(&state.bytes) });
        Ok(Committed { image_bytes: state.bytes.len() as u64, written_bytes: (written * PAGE) as u64, snapshot })
    }

    fn make_room(&self, run: Run) -> bool {
        if run.pages == 0 {
            return self.lock().room.is_some();
        }
        let Ok(mut state) = self.call(Call::Room) else { return false };
        let twice = state.room.iter().flatten().any(|made| made.first < run.end() && run.first < made.end());
        if twice {
            state.violations.push(format!("room for {run:?} twice"));
        }
        state.room.get_or_insert_default().push(run);
        true
    }

    fn omitted(&self) -> PageState {
        if self.lock().child { PageState::InParent } else { PageState::Zero }
    }

    fn again(&self) -> Result<(), SinkError> {
        self.lock().given.fill(false);
        Ok(())
    }

    fn abort(self: Box<Self>) {
        self.lock().end(Outcome::Aborted);
    }
}

impl Drop for MemorySink {
    fn drop(&mut self) {
        // Dropping is aborting.
        let mut state = self.lock();
        if state.outcome == Outcome::Open {
            state.outcome = Outcome::Aborted;
        }
    }
}
