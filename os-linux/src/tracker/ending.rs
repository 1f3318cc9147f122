//! Ending registrations: when disarming, when mappings go away, and to get a release through a storm of changes.

use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use ramshot_core::{Done, HostAddr, HostRange, OsError, PAGE_SIZE};

use super::{Registration, Tracker};
use crate::storm::cut;
use crate::{maps, uapi};

/// How much is unregistered in one call when disarming: at 4 KiB pages 0.1 to 0.2 ms.
const END_STEP: u64 = 4 << 20;
/// The same where calls are short, and how short that is.
const MOST_STEP: u64 = 1 << 30;
const SHORT: Duration = Duration::from_micros(50);

fn unregister_failed(range: HostRange, errno: Errno) -> OsError {
    OsError::new("UFFDIO_UNREGISTER", errno as i32).on(range)
}

impl Tracker {
    /// Lifts and ends one registration, and wakes everybody in it.
    pub(super) fn disarm_one(&self, registration: Registration) -> Result<(), OsError> {
        let range = registration.range;
        let mut result = self.lift_and_end(registration);
        if result.is_err() && self.ram.owner().has_ended() {
            return Ok(());
        }
        if let Err(error) = result {
            // Part of the block may have been unmapped, or something else mapped there. Whatever is still registered
            // is disarmed piece by piece; if that is nothing, nothing is protected either.
            let pieces = maps::registered_in(self.ram.owner(), range).map_err(|_| error)?;
            let disarm = |range| self.lift_and_end(Registration { range, ..registration });
            result = pieces.into_iter().map(disarm).fold(Ok(()), Result::and);
        }
        // Ending a registration wakes nobody who waits to write, nor does unmapping.
        result.and(self.uffd.wake(range).map_err(|errno| OsError::new("UFFDIO_WAKE", errno as i32).on(range)))
    }

    fn lift_and_end(&self, registration: Registration) -> Result<(), OsError> {
        let Registration { range, prior, .. } = registration;
        if prior == 0 && self.ending_lifts {
            return self.end(registration);
        }
        // Whoever changes the mappings waits for its event to be read, and the reader may be gone: read it here.
        let lifted = self.insist(range, || self.write_protect(range, false), || self.drain());
        lifted.and(if prior == 0 { self.end(registration) } else { Ok(()) })
    }

    /// Ends a registration in steps: the kernel walks the page tables under the lock that every page fault of the
    /// process needs, some 25 to 40 ms per GiB mapped by 4 KiB pages. And it is the fault thread that does it, at its
    /// real-time priority: at one go a vCPU on its processor would stand still for as long.
    fn end(&self, Registration { range, page_size, .. }: Registration) -> Result<(), OsError> {
        let mut step = END_STEP;
        let mut at = range.start;
        while at < range.end() {
            // At multiples of the step, so that no huge page is cut.
            let unit = step.max(page_size);
            let next = HostAddr((at.0 | (unit - 1)).saturating_add(1)).min(range.end());
            let part = HostRange::new(at, next.0 - at.0);
            let rest = HostRange::new(at, range.end().0 - at.0);
            let begun = Instant::now();
            match self.uffd.unregister(part) {
                Ok(()) => at = next,
                // A step splits a mapping for a moment: no more mappings to be had. At once, then.
                Err(Errno::ENOMEM) if rest != part => {
                    return self.uffd.unregister(rest).map_err(|errno| unregister_failed(rest, errno));
                }
                Err(errno) => return Err(unregister_failed(part, errno)),
            }
            // Nobody who waits to write there waits for the rest. (An error would be the descriptor's, and shows up elsewhere.)
            let _ = self.uffd.wake(part);
            let took = begun.elapsed();
            if took < SHORT {
                // Little is mapped there.
                step = (step * 2).min(MOST_STEP);
            } else {
                step = END_STEP;
                thread::sleep(took);
            }
        }
        Ok(())
    }

    /// Releases `range` by ending its registration, which no change of mappings holds up. It has been captured, so it
    /// needs no tracking any more. (It splits a mapping in three, so it is not the way for every release.)
    pub(super) fn give_up(&self, range: HostRange) -> Done {
        for part in self.storm.without_given_up(range).unwrap_or_else(|| vec![range]) {
            let ours = |r: &Registration| maps::intersection(r.range, part) == Some(part) && r.prior == 0;
            if !self.list().iter().any(ours) || self.uffd.unregister(part).is_err() {
                return Done::Again;
            }
            log::debug!(target: "ramshot::track", "mappings change all the time: {part} is released by unregistering it");
            self.storm.give_up(part);
            self.gone(part, None);
        }
        // Wakes. (An error would be the descriptor's, and shows up elsewhere.)
        let _ = self.uffd.wake(range);
        Done::Yes
    }

    /// Registers again what was given up in `range`; whether there was anything.
    pub(super) fn take_back(&self, range: HostRange) -> Result<bool, OsError> {
        let given_up = self.storm.take_back(range);
        for &range in &given_up {
            self.uffd
                .register(range, uapi::REGISTER_MODE_WP)
                .map_err(|errno| OsError::new("UFFDIO_REGISTER", errno as i32).on(range))?;
            let page_size = self.ram.table().block_at(range.start).and_then(|at| self.ram.table().block(at));
            let page_size = page_size.map_or(PAGE_SIZE, |block| block.page_size);
            self.list().push(Registration { range, prior: 0, page_size });
        }
        Ok(!given_up.is_empty())
    }

    /// `range` is registered no more, but `moved` to another place if that is given (the kernel takes a registration
    /// along). Another thread may map and register the old addresses anew, so they must not be touched when disarming.
    pub(super) fn gone(&self, range: HostRange, moved: Option<HostAddr>) {
        let mut list = self.list();
        let mut changed = Vec::with_capacity(list.len() + 2);
        for registration in list.drain(..) {
            let with = |range| Registration { range, ..registration };
            changed.extend(cut(registration.range, range).into_iter().flatten().map(with));
            let went = maps::intersection(registration.range, range).zip(moved);
            changed.extend(went.and_then(|(common, to)| {
                Some(with(HostRange::new(to.checked_add(common.start.0 - range.start.0)?, common.len)))
            }));
        }
        *list = changed;
        drop(list);
        // Unmapping wakes nobody who is blocked there. It must find out; the descriptor's errors show up elsewhere.
        let _ = self.uffd.wake(range);
    }
}
