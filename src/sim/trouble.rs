//! What goes wrong in a simulation, and when.

use std::ops::Range;

use ramshot_core::OsError;

/// A call that can go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// `WriteTracker::populated`
    Populated,
    /// `WriteTracker::protect`
    Protect,
    /// `WriteTracker::release`
    Release,
    /// `WriteTracker::next_events`
    NextEvents,
    /// `WriteTracker::disarm`; with an error it disarms all the same.
    Disarm,
    /// `RamSource::read`
    Read,
    /// `ImageSink::write`
    Write,
    /// `ImageSink::commit`
    Commit,
    /// `ImageSink::make_room`, if room can be made
    Room,
}

const CALLS: usize = 9;

/// How it goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mishap {
    /// It fails with this error number.
    Error(i32),
    /// `release` answers "again" and does nothing; elsewhere it is error 11 (EAGAIN).
    Again,
    /// `next_events` returns at once with nothing, as after EINTR; elsewhere nothing happens.
    Early,
    /// The thread that calls panics (quietly: the panic hook is not run).
    Panic,
}

/// A plan of what goes wrong. The default: nothing.
///
/// ```
/// use ramshot::sim::{Call, Mishap, Trouble};
/// // The first three releases have to be repeated, the tenth fails with EIO; every event comes twice.
/// let trouble = Trouble::default()
///     .on(Call::Release, 0..3, Mishap::Again)
///     .on(Call::Release, 9..10, Mishap::Error(5))
///     .events_twice();
/// ```
#[derive(Clone, Debug, Default)]
pub struct Trouble {
    rules: Vec<(Call, Range<u64>, Mishap)>,
    pub(super) newest_first: bool,
    pub(super) one_by_one: bool,
    pub(super) twice: bool,
}

impl Trouble {
    /// The calls of `call` numbered `which` (from 0) go wrong like that. The first rule that fits counts.
    #[must_use]
    pub fn on(mut self, call: Call, which: Range<u64>, how: Mishap) -> Self {
        self.rules.push((call, which, how));
        self
    }

    /// Events are read newest first.
    #[must_use]
    pub fn newest_first(self) -> Self {
        Self { newest_first: true, ..self }
    }

    /// Events are read one at a time, however much room there is.
    #[must_use]
    pub fn one_by_one(self) -> Self {
        Self { one_by_one: true, ..self }
    }

    /// Every write fault is reported a second time, after what was queued meanwhile: mostly stale then.
    #[must_use]
    pub fn events_twice(self) -> Self {
        Self { twice: true, ..self }
    }
}

/// A plan under way.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) trouble: Trouble,
    counts: [u64; CALLS],
}

impl Plan {
    pub(super) fn new(trouble: Trouble) -> Self {
        Self { trouble, counts: [0; CALLS] }
    }

    /// Counts a call; says what goes wrong with it.
    pub(super) fn next(&mut self, call: Call) -> Option<Mishap> {
        let count = self.counts.get_mut(call as usize)?;
        let number = *count;
        *count += 1;
        let rule = self.trouble.rules.iter().find(|(c, which, _)| *c == call && which.contains(&number));
        rule.map(|&(.., how)| how)
    }
}

/// Lets `mishap` happen to a call for which `Again` and `Early` mean nothing special.
pub(super) fn happen(mishap: Option<Mishap>, call: Call) -> Result<(), OsError> {
    const EAGAIN: i32 = 11;
    let op = match call {
        Call::Populated => "sim populated",
        Call::Protect => "sim protect",
        Call::Release => "sim release",
        Call::NextEvents => "sim next_events",
        Call::Disarm => "sim disarm",
        Call::Read => "sim read",
        Call::Write => "sim write",
        Call::Room => "sim make_room",
        Call::Commit => "sim commit",
    };
    match mishap {
        None | Some(Mishap::Early) => Ok(()),
        Some(Mishap::Error(errno)) => Err(OsError::new(op, errno)),
        Some(Mishap::Again) => Err(OsError::new(op, EAGAIN)),
        Some(Mishap::Panic) => std::panic::resume_unwind(Box::new(op)),
    }
}
