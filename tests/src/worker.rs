//! The workload of the guest image, once more, for threads of this process (`images/guest/work.c` is the other one). The
//! pages look the same, the statistics look the same; only the clock differs (nanoseconds instead of TSC cycles).

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ramshot_images::layout::{
    BAD_FILL, BAD_LATE, BAD_ORDER, BAD_STAMP, BAD_SUM, BAD_TORN, BUCKETS, CHECK_UNTOUCHED_LATE, COMMAND_QUIESCE,
    CONTROL_ADDRESS, Control, Counters, Header, PAGE, SLOT_MS, SLOTS, STATE_CHECKING, STATE_QUIESCED, STATE_RUNNING,
    WORKLOAD_IDLE, WORKLOAD_RANDOM, WORKLOAD_SEQ, bucket_of, buckets_address, counters_address, slots_address,
};
use ramshot_images::rule::{FILL_STEP, STAMP, WORDS, check_of, fill_base, stamp_of};

use crate::gate::Gate;
use crate::memory::Memory;

/// The clock of thread guests, in kHz: nanoseconds.
pub(crate) const CLOCK_KHZ: u64 = 1_000_000;

/// A page, as words that other threads may read meanwhile.
type Page = [AtomicU64; WORDS];

/// Guest RAM by guest-physical address.
#[derive(Clone, Debug)]
pub(crate) struct Ram {
    memory: Arc<Memory>,
}

impl Ram {
    pub(crate) const fn new(memory: Arc<Memory>) -> Self {
        Self { memory }
    }

    /// The page at `address`, which the caller took from the layout of this very RAM.
    fn page(&self, address: u64) -> &Page {
        let region = self.memory.regions().iter().find(|r| address >= r.guest && address - r.guest < r.len);
        let region = region.expect("an address from the guest's own layout");
        let host = (region.host + (address - region.guest) / PAGE * PAGE) as *const Page;
        // SAFETY: a whole page of a mapping that lives as long as `self.memory`; everybody in this process uses it
        // through atomics or through vm-memory's volatile accesses.
        unsafe { &*host }
    }

    fn word(&self, address: u64) -> &AtomicU64 {
        let index = usize::try_from(address % PAGE / 8).expect("less than 512");
        &self.page(address)[index]
    }
}

/// The field of the counters at that offset.
macro_rules! counter {
    ($worker:expr, $field:ident) => {
        $worker.counters[offset_of!(Counters, $field) / 8]
    };
}

fn get(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

fn set(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Relaxed);
}

/// One thread of the guest.
pub(crate) struct Worker<'a> {
    ram: &'a Ram,
    gate: &'a Gate,
    header: Header,
    me: u64,
    counters: &'a Page,
    clock: Instant,
}

/// The thread was told to end.
pub(crate) struct Ended;

impl<'a> Worker<'a> {
    pub(crate) fn new(ram: &'a Ram, gate: &'a Gate, header: Header, me: u64, clock: Instant) -> Self {
        Self { ram, gate, header, me, counters: ram.page(counters_address(me)), clock }
    }

    /// Nanoseconds; never 0, which means "none".
    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX) + 1
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        let whole = &self.counters[offset / 8];
        // SAFETY: half of a word of the page, aligned to 4; every access to that half is one of 4 bytes.
        unsafe { &*whole.as_ptr().cast::<AtomicU32>().add(offset % 8 / 4) }
    }

    fn set_state(&self, state: u32) {
        self.half(offset_of!(Counters, state)).store(state, Ordering::Release);
    }

    fn control(&self, offset: usize) -> u64 {
        self.ram.word(CONTROL_ADDRESS + offset as u64).load(Ordering::Acquire)
    }

    /// `command` in the low half, `late_go` in the high one: little-endian or not, the VMM wrote two u32.
    fn command(&self) -> (u32, u32) {
        let bytes = self.control(offset_of!(Control, command)).to_ne_bytes();
        let half = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        (half(0), half(4))
    }

    /// A place where the thread can be stopped.
    fn safe_point(&self) -> Result<(), Ended> {
        if self.gate.is_closed() && !self.gate.pass() { Err(Ended) } else { Ok(()) }
    }

    fn nap(&self) -> Result<(), Ended> {
        std::thread::sleep(Duration::from_millis(1));
        self.safe_point()
    }

    /// Page numbers of usable RAM in `from..to` that this thread owns.
    fn owned(&self, from: u64, to: u64) -> impl Iterator<Item = u64> + use<> {
        let n = u64::from(self.header.vcpus);
        (from + (self.me + n - from % n) % n..to).step_by(usize::try_from(n).unwrap_or(1))
    }

    fn page_at(&self, index: u64) -> (u64, &'a Page) {
        let address = self.header.page_address(index).expect("a page number from the header");
        (address / PAGE, self.ram.page(address))
    }

    pub(crate) fn fill(&self) -> Result<(), Ended> {
        let (seed, mut sum) = (self.header.seed, 0u64);
        for index in self.owned(0, self.header.fill_pages) {
            self.safe_point()?;
            let (number, page) = self.page_at(index);
            let mut value = fill_base(number, seed);
            for word in page {
                set(word, value);
                value = value.wrapping_add(FILL_STEP);
            }
            if index < self.header.ws_pages {
                put_stamp(page, number, 0, seed);
                sum = sum.wrapping_add(check_of(number, 0, seed));
            }
        }
        set(&counter!(self, stamp_sum), sum);
        self.half(offset_of!(Counters, filled)).store(1, Ordering::Release);
        Ok(())
    }

    /// The workload, until the gate says to end.
    pub(crate) fn work(&self) -> Result<(), Ended> {
        let header = &self.header;
        let n = u64::from(header.vcpus);
        let owned = header.ws_pages.saturating_sub(self.me).div_ceil(n);
        let workload = if owned == 0 { WORKLOAD_IDLE } else { header.workload };
        let period = (CLOCK_KHZ * 1000).checked_div(header.rate).unwrap_or(0);
        // Whatever was asked before a restore and not done yet is done first.
        self.serve()?;
        loop {
            self.safe_point()?;
            if get(&counter!(self, doorbell_seen)) != self.control(0) {
                self.serve()?;
            }
            let late = get(&counter!(self, late_next));
            if late < header.pages && self.command().1 != 0 {
                let (number, page) = self.page_at(late);
                put_stamp(page, number, 1, header.seed);
                set(&counter!(self, late_next), late + n);
            } else if workload == WORKLOAD_IDLE {
                self.nap()?;
            }
            if workload == WORKLOAD_IDLE || (period > 0 && !self.wait_due(period)?) {
                continue;
            }
            self.write(workload, owned, n);
        }
    }

    fn write(&self, workload: u32, owned: u64, n: u64) {
        let mut index = get(&counter!(self, position));
        if workload == WORKLOAD_RANDOM {
            let mut x = get(&counter!(self, random));
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            set(&counter!(self, random), x);
            let scaled = (u128::from(x) * u128::from(owned)) >> 64;
            index = u64::try_from(scaled).unwrap_or(0) * n + self.me;
        }
        let (number, page) = self.page_at(index);
        let old = get(&page[2]);
        let count = get(&page[1]).wrapping_add(1);
        put_stamp(page, number, count, self.header.seed);
        let change = check_of(number, count, self.header.seed).wrapping_sub(old);
        set(&counter!(self, stamp_sum), get(&counter!(self, stamp_sum)).wrapping_add(change));
        set(&counter!(self, writes), get(&counter!(self, writes)) + 1);
        if workload == WORKLOAD_SEQ {
            index += n;
            if index >= self.header.ws_pages {
                index = self.me;
                set(&counter!(self, pass), get(&counter!(self, pass)) + 1);
            }
            set(&counter!(self, position), index);
        }
        self.account();
    }

    /// A write ended: into the histogram and the ring of rates.
    fn account(&self) {
        let now = self.now();
        let (last, due) = (get(&counter!(self, last_tsc)), get(&counter!(self, due_tsc)));
        if last != 0 && now >= last {
            let gap = now.saturating_sub(last.max(due));
            let bucket = self.ram.word(buckets_address(self.me) + bucket_of(gap) as u64 * 8);
            set(bucket, get(bucket) + 1);
            set(&counter!(self, gaps), get(&counter!(self, gaps)) + 1);
            if gap > get(&counter!(self, max_gap)) {
                set(&counter!(self, max_gap), gap);
            }
        }
        set(&counter!(self, last_tsc), now);
        let length = SLOT_MS * CLOCK_KHZ;
        let end = get(&counter!(self, slot_end));
        let ring = self.half(offset_of!(Counters, slot));
        let mut slot = u64::from(ring.load(Ordering::Relaxed));
        if now >= end || now + 2 * length < end {
            slot = (slot + 1) % SLOTS as u64;
            ring.store(u32::try_from(slot).unwrap_or(0), Ordering::Relaxed);
            set(self.ram.word(slots_address(self.me) + slot * 16), now);
            set(self.ram.word(slots_address(self.me) + slot * 16 + 8), 0);
            set(&counter!(self, slot_end), now + length);
        }
        let writes = self.ram.word(slots_address(self.me) + slot * 16 + 8);
        set(writes, get(writes) + 1);
    }

    /// Waits until the next write is due; `false`: the doorbell rang.
    fn wait_due(&self, period: u64) -> Result<bool, Ended> {
        let (due, now) = (get(&counter!(self, due_tsc)), self.now());
        let afresh = due == 0 || now > due + 100 * CLOCK_KHZ || due > now + 2 * period + 100 * CLOCK_KHZ;
        let due = if afresh { now } else { due + period };
        set(&counter!(self, due_tsc), due);
        loop {
            let now = self.now();
            if now >= due {
                return Ok(true);
            }
            if get(&counter!(self, doorbell_seen)) != self.control(0) {
                return Ok(false);
            }
            if due - now > 2 * CLOCK_KHZ {
                self.nap()?;
            } else {
                std::hint::spin_loop();
                self.safe_point()?;
            }
        }
    }

    /// Does what the control page asks, until it asks to run.
    fn serve(&self) -> Result<(), Ended> {
        loop {
            let bell = self.control(0);
            set(&counter!(self, doorbell_seen), bell);
            let reset = self.control(offset_of!(Control, reset_request));
            if get(&counter!(self, reset_done)) != reset {
                for bucket in 0..BUCKETS as u64 {
                    set(self.ram.word(buckets_address(self.me) + bucket * 8), 0);
                }
                set(&counter!(self, max_gap), 0);
                set(&counter!(self, gaps), 0);
                set(&counter!(self, last_tsc), 0);
                counter!(self, reset_done).store(reset, Ordering::Release);
            }
            let check = self.control(offset_of!(Control, check_request));
            if get(&counter!(self, check_done)) != check {
                self.set_state(STATE_CHECKING);
                self.check(self.control(offset_of!(Control, check_flags)))?;
                counter!(self, check_done).store(check, Ordering::Release);
            }
            set(&counter!(self, last_tsc), 0);
            if self.command().0 != COMMAND_QUIESCE {
                set(&counter!(self, due_tsc), 0);
                self.set_state(STATE_RUNNING);
                return Ok(());
            }
            self.set_state(STATE_QUIESCED);
            while self.control(0) == bell {
                self.nap()?;
            }
        }
    }

    fn bad(&self, kind: u32, address: u64) {
        let errors = get(&counter!(self, check_errors));
        if errors == 0 {
            self.half(offset_of!(Counters, bad_kind)).store(kind, Ordering::Relaxed);
            set(&counter!(self, bad_address), address);
        }
        set(&counter!(self, check_errors), errors + 1);
    }

    fn check(&self, flags: u64) -> Result<(), Ended> {
        let header = &self.header;
        let (mut sum, mut count, mut pages) = (0u64, 0u64, 0u64);
        set(&counter!(self, check_errors), 0);
        self.half(offset_of!(Counters, bad_kind)).store(0, Ordering::Relaxed);
        set(&counter!(self, bad_address), 0);
        for index in self.owned(0, header.fill_pages) {
            self.safe_point()?;
            pages += 1;
            let (number, page) = self.page_at(index);
            let stamped = index < header.ws_pages;
            let words = if stamped { STAMP..WORDS - STAMP } else { 0..WORDS };
            if let Some(word) = misfilled(page, number, words, header.seed) {
                self.bad(BAD_FILL, number * PAGE + word);
            }
            if stamped {
                if let Some(kind) = bad_stamp(page, number, header.seed) {
                    self.bad(kind, number * PAGE);
                }
                sum = sum.wrapping_add(get(&page[2]));
                count = count.wrapping_add(get(&page[1]));
                let passed = u64::from(index >= get(&counter!(self, position)));
                if header.workload == WORKLOAD_SEQ && get(&page[1]) != get(&counter!(self, pass)) - passed {
                    self.bad(BAD_ORDER, number * PAGE);
                }
            }
        }
        if sum != get(&counter!(self, stamp_sum)) || count != get(&counter!(self, writes)) {
            self.bad(BAD_SUM, counters_address(self.me));
        }
        for index in self.owned(header.pages - header.late_pages, header.pages) {
            self.safe_point()?;
            let written = index < get(&counter!(self, late_next));
            if !written && flags & CHECK_UNTOUCHED_LATE == 0 {
                break;
            }
            pages += 1;
            let (number, page) = self.page_at(index);
            let stamp_is_bad = written && (bad_stamp(page, number, header.seed).is_some() || get(&page[1]) != 1);
            let zeros = if written { STAMP..WORDS - STAMP } else { 0..WORDS };
            if stamp_is_bad || page[zeros].iter().any(|word| get(word) != 0) {
                self.bad(BAD_LATE, number * PAGE);
            }
        }
        set(&counter!(self, check_pages), pages);
        set(&counter!(self, checks), get(&counter!(self, checks)) + 1);
        Ok(())
    }
}

/// One write to a page: front before back.
fn put_stamp(page: &Page, number: u64, count: u64, seed: u64) {
    let stamp = stamp_of(number, count, seed);
    for (word, value) in page.iter().zip(stamp) {
        set(word, value);
    }
    for (word, value) in page[WORDS - STAMP..].iter().zip(stamp.iter().rev()) {
        set(word, *value);
    }
}

/// Offset of the first byte of a word that is not as filled.
fn misfilled(page: &Page, number: u64, words: std::ops::Range<usize>, seed: u64) -> Option<u64> {
    let base = fill_base(number, seed);
    words
        .map(|w| (w as u64, &page[w]))
        .find(|(w, word)| get(word) != base.wrapping_add(w.wrapping_mul(FILL_STEP)))
        .map(|(w, _)| w * 8)
}

fn bad_stamp(page: &Page, number: u64, seed: u64) -> Option<u32> {
    let front: [u64; STAMP] = std::array::from_fn(|w| get(&page[w]));
    let back: [u64; STAMP] = std::array::from_fn(|w| get(&page[WORDS - 1 - w]));
    if front != back {
        return Some(BAD_TORN);
    }
    (front != stamp_of(number, front[1], seed)).then_some(BAD_STAMP)
}
