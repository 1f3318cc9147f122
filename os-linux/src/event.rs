//! Messages of a userfaultfd: waiting for them, and what they mean.

use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ramshot_core::{Event, HostAddr, HostRange, OsError};

use crate::owner::Owner;
use crate::uapi::{self, UffdMsg};
use crate::uffd::Uffd;

const MSG: usize = size_of::<UffdMsg>();
/// Messages read in one call: 2 KiB of stack. More vCPUs than this fault together rarely.
const BATCH: usize = 64;

/// What one message says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Message {
    /// For the engine.
    Event(Event),
    /// A range was moved; the registration went along to `to`.
    Moved { from: HostRange, to: HostAddr },
    /// The process forked, and the kernel gave us a userfaultfd of the child, which is ours to close.
    Forked { child: RawFd },
    /// Not a message we know.
    Unknown(u8),
}

fn decode(bytes: &[u8; MSG]) -> Message {
    let word = |at: usize| {
        let word = bytes.get(8 + at * 8..16 + at * 8).and_then(|b| b.try_into().ok());
        u64::from_ne_bytes(word.unwrap_or_default())
    };
    let msg = UffdMsg { event: bytes[0], reserved: [0; 7], arg: [word(0), word(1), word(2)] };
    let [first, second, third] = msg.arg;
    let from_to = || HostRange::new(HostAddr(first), second.saturating_sub(first));
    match msg.event {
        uapi::EVENT_PAGEFAULT if first & uapi::PAGEFAULT_FLAG_WP != 0 => {
            Message::Event(Event::WriteFault { at: HostAddr(second) })
        }
        uapi::EVENT_PAGEFAULT => Message::Event(Event::MissingFault { at: HostAddr(second) }),
        uapi::EVENT_REMOVE => Message::Event(Event::Discarded(from_to())),
        uapi::EVENT_UNMAP => Message::Event(Event::Unmapped(from_to())),
        uapi::EVENT_REMAP => Message::Moved { from: HostRange::new(HostAddr(first), third), to: HostAddr(second) },
        uapi::EVENT_FORK => {
            // A 32-bit number at the start of the union.
            let [a, b, c, d, ..] = first.to_ne_bytes();
            Message::Forked { child: RawFd::from_ne_bytes([a, b, c, d]) }
        }
        other => Message::Unknown(other),
    }
}

/// Reads what is there, without waiting, `limit` messages at most; calls `each` for every one. Returns how many.
/// EAGAIN (nothing there) is `Ok(0)`.
pub(crate) fn read_now(uffd: &Uffd, limit: usize, each: &mut dyn FnMut(Message)) -> Result<usize, OsError> {
    let mut bytes = [0u8; MSG * BATCH];
    let into = bytes.get_mut(..MSG * limit.min(BATCH)).unwrap_or_default();
    let got = loop {
        match uffd.read(into) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(0),
            Err(errno) => return Err(OsError::new("read userfaultfd", errno as i32)),
            // No end of file exists; a descriptor that says so is not a userfaultfd.
            Ok(0) => return Err(OsError::new("read userfaultfd", libc::EPIPE)),
            Ok(got) => break got,
        }
    };
    let (messages, _) = into.get(..got).unwrap_or_default().as_chunks::<MSG>();
    for bytes in messages {
        let message = decode(bytes);
        if let Message::Forked { child } = message {
            // SAFETY: the kernel made this descriptor for us when it handed the message out; nobody else knows it.
            // Closing it lifts every registration in the child.
            drop(unsafe { OwnedFd::from_raw_fd(child) });
        }
        each(message);
    }
    Ok(messages.len())
}

/// Waits on a userfaultfd, can be interrupted, and notices when the process whose memory it is about ends.
#[derive(Debug)]
pub(crate) struct Waiter {
    interrupt: EventFd,
    owner: Owner,
}

/// Why waiting ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Woken {
    /// There are messages, or were a moment ago.
    Messages {
        /// There was an interrupt as well, and it is taken.
        interrupted: bool,
    },
    /// By [`Waiter::interrupt`], or the time has passed.
    Empty,
}

impl Waiter {
    pub(crate) fn new(owner: &Owner) -> Result<Self, OsError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let interrupt = EventFd::from_flags(flags).map_err(|errno| OsError::new("eventfd", errno as i32))?;
        Ok(Self { interrupt, owner: owner.clone() })
    }

    /// Makes the running or the next [`wait`](Self::wait) return.
    pub(crate) fn interrupt(&self) {
        // The only failure is a full counter (2^64 - 2 interruptions nobody took): then it is readable already.
        let _ = self.interrupt.write(1);
    }

    /// Waits for an interrupt only; whether there was one.
    pub(crate) fn wait_alone(&self, deadline: Option<Instant>) -> Result<bool, OsError> {
        let [interrupted, _] = self.poll(None, deadline)?;
        Ok(interrupted.intersects(PollFlags::POLLIN) && self.interrupt.read().is_ok())
    }

    pub(crate) fn wait(&self, uffd: &Uffd, deadline: Option<Instant>) -> Result<Woken, OsError> {
        let [interrupt, uffd] = self.poll(Some(uffd), deadline)?;
        let interrupted = interrupt.intersects(PollFlags::POLLIN);
        if interrupted {
            let _ = self.interrupt.read(); // back to zero; EAGAIN if another took it
        }
        if uffd.contains(PollFlags::POLLIN) {
            Ok(Woken::Messages { interrupted })
        } else if uffd.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL | PollFlags::POLLHUP) {
            Err(OsError::new("poll userfaultfd", libc::EBADF))
        } else {
            Ok(Woken::Empty)
        }
    }

    /// What there is on the interrupt and on the userfaultfd; nothing, once the time has passed.
    fn poll(&self, uffd: Option<&Uffd>, deadline: Option<Instant>) -> Result<[PollFlags; 2], OsError> {
        let interrupt = self.interrupt.as_fd();
        let uffd = uffd.map_or(interrupt, AsFd::as_fd);
        let ending = self.owner.ending();
        // One that is not there is polled twice instead, which costs next to nothing.
        let mut fds = [interrupt, uffd, ending.unwrap_or(interrupt)].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        loop {
            match poll(&mut fds, timeout(deadline)) {
                Ok(0) if deadline.is_some_and(|end| Instant::now() < end) => {} // a timeout longer than poll takes
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(OsError::new("poll userfaultfd", errno as i32)),
            }
        }
        let [interrupt, uffd, ended] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR));
        if ending.is_some() && !ended.is_empty() {
            return Err(OsError::new("waiting for faults of a process that has ended", libc::ESRCH));
        }
        Ok([interrupt, uffd])
    }
}

/// Waits for messages and puts what `take` makes of them into `events`, as many as there are and fit; see
/// `WriteTracker::next_events`.
pub(crate) fn next_events(
    waiter: &Waiter,
    uffd: &Uffd,
    events: &mut [Event],
    timeout_ms: Option<u32>,
    take: &mut dyn FnMut(Message) -> Option<Event>,
) -> Result<usize, OsError> {
    let deadline = deadline(timeout_ms);
    while let Woken::Messages { interrupted } = waiter.wait(uffd, deadline)? {
        let limit = events.len();
        if limit == 0 {
            return Ok(0);
        }
        let mut free = events.iter_mut();
        let mut count = 0;
        read_now(uffd, limit, &mut |message| {
            if let Some(event) = take(message)
                && let Some(place) = free.next()
            {
                *place = event;
                count += 1;
            }
        })?;
        // None: another thread's call has settled it since, or the message was not for the caller.
        if count > 0 || interrupted {
            return Ok(count);
        }
    }
    Ok(0)
}

/// When `timeout_ms` from now is (`None`: never).
pub(crate) fn deadline(timeout_ms: Option<u32>) -> Option<Instant> {
    timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(u64::from(ms))))
}

fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else { return PollTimeout::NONE };
    // Rounded up: waking a moment early would only poll again.
    let left = deadline.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u8, arg: [u64; 3]) -> [u8; MSG] {
        let mut bytes = [0; MSG];
        bytes[0] = event;
        for (at, word) in arg.iter().enumerate() {
            bytes[8 + at * 8..16 + at * 8].copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn messages_are_decoded() {
        let range = HostRange::new(HostAddr(0x7000), 0x2000);
        let fault = |flags| decode(&message(0x12, [flags, 0x7000, 5]));
        let write = Event::WriteFault { at: HostAddr(0x7000) };
        assert_eq!(fault(3), Message::Event(write));
        assert_eq!(fault(2), Message::Event(write));
        assert_eq!(fault(1), Message::Event(Event::MissingFault { at: HostAddr(0x7000) }));
        assert_eq!(fault(0), Message::Event(Event::MissingFault { at: HostAddr(0x7000) }));
        assert_eq!(decode(&message(0x15, [0x7000, 0x9000, 0])), Message::Event(Event::Discarded(range)));
        assert_eq!(decode(&message(0x16, [0x7000, 0x9000, 0])), Message::Event(Event::Unmapped(range)));
        assert_eq!(
            decode(&message(0x14, [0x7000, 0xa000, 0x2000])),
            Message::Moved { from: range, to: HostAddr(0xa000) }
        );
        assert_eq!(decode(&message(0x13, [9, 0, 0])), Message::Forked { child: 9 });
        assert_eq!(decode(&message(0x77, [0; 3])), Message::Unknown(0x77));
        // A range that ends before it starts cannot wrap.
        assert_eq!(
            decode(&message(0x16, [0x9000, 0x7000, 0])),
            Message::Event(Event::Unmapped(HostRange::new(HostAddr(0x9000), 0)))
        );
    }
}
