//! A small guest, and everything that can happen to it while a snapshot is taken, read from a string of bytes.
//!
//! The core is the real one, driven through its public interface. Memory is a number a page: how often it was written
//! since T0. So the image is right if all its numbers are 0. Everything else is bookkeeping that uses none of
//! the core's.

use std::sync::Arc;

use ramshot::core::{
    Backing, BlockIndex, BlockName, BlockTable, CapturedRun, Cause, Claim, Discard, FaultOutcome, GuestAddr, HostAddr,
    HostRange, Limits, Next, OsError, PAGE_SIZE, PageBitmap, PageId, RamBlock, ReleasedRun, RequestOutcome, Run,
    SetupError, Snapshot, Treatment, WhenFull, Worker,
};

/// Where block `i` is mapped: far apart, with room for an unused tail.
const fn host_of(block: u64) -> u64 {
    0x1000_0000 + block * 0x100_0000
}

const EIO: OsError = OsError::new("simulated", 5);

/// The bytes, one at a time; 0 once there are no more.
struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    fn next(&mut self) -> u64 {
        self.0.next().copied().unwrap_or(0).into()
    }

    fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    /// A number, sometimes an absurd one.
    fn number(&mut self) -> u64 {
        match self.next() {
            small @ 0..=239 => small % 16,
            240 => u64::MAX,
            241 => u64::MAX - 1,
            242 => 1 << 63,
            243 => (1 << 52) - 1,
            order => 1 << (order - 240),
        }
    }

    fn pick(&mut self, len: usize) -> usize {
        usize::try_from(self.next()).expect("a byte") % len
    }
}

/// A run of pages on its way; the numbers are what was read of it so far.
enum Flight {
    Claimed(Claim, Vec<u64>),
    Captured(CapturedRun, Vec<u64>),
    Lifted(CapturedRun, Vec<u64>),
    Job(ReleasedRun, Vec<u64>),
}

impl Flight {
    fn run(&self) -> Run {
        match self {
            Self::Claimed(claim, _) => claim.run(),
            Self::Captured(run, _) | Self::Lifted(run, _) => run.run(),
            Self::Job(job, _) => job.run(),
        }
    }

    fn slots(&self) -> Vec<u16> {
        let slots = match self {
            Self::Claimed(claim, _) => claim.slots(),
            Self::Captured(run, _) | Self::Lifted(run, _) => run.slots(),
            Self::Job(job, _) => job.slots(),
        };
        slots.iter().map(|slot| slot.0).collect()
    }

    /// Not released yet.
    fn is_claim(&self) -> bool {
        !matches!(self, Self::Job(..))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Not part of the snapshot.
    Absent,
    Pending,
    Flying,
    /// In the image, with the number that was captured.
    Saved(u64),
}

struct World<const FAULTS: usize, const CLAIMS: usize> {
    core: Snapshot<Arc<BlockTable>, Vec<u64>, FAULTS, CLAIMS>,
    table: Arc<BlockTable>,
    /// Of each page.
    treatments: Vec<Treatment>,
    limits: Limits,
    slots: u16,
    versions: Vec<u64>,
    protected: Vec<bool>,
    states: Vec<State>,
    /// The page that each vCPU is blocked on.
    vcpus: [Option<usize>; 3],
    unread: Vec<u64>,
    flights: Vec<Flight>,
    /// The vCPUs run.
    resumed: bool,
    /// The first cause, by our own account.
    cause: Option<Cause>,
    handed_in: u64,
    total: u64,
    saved_by_pause: u64,
}

/// Bytes as a layout, a pool and a sequence of events.
pub fn core_events(data: &[u8]) {
    let mut bytes = Bytes(data.iter());
    match bytes.next() % 3 {
        0 => live::<1, 1>(bytes),
        1 => live::<2, 2>(bytes),
        _ => live::<4, 3>(bytes),
    }
}

fn live<const FAULTS: usize, const CLAIMS: usize>(mut bytes: Bytes<'_>) {
    let Some(mut world) = World::<FAULTS, CLAIMS>::new(&mut bytes) else { return };
    while !bytes.is_empty() {
        world.event(&mut bytes);
        world.check();
    }
    world.finish();
}

fn index(page: u64) -> usize {
    usize::try_from(page).expect("a small world")
}

fn bitmap(pages: u64) -> PageBitmap<Vec<u64>> {
    PageBitmap::new(words(pages), pages, true).expect("as many as it asks for")
}

fn words(bits: u64) -> Vec<u64> {
    vec![0; index(PageBitmap::<Vec<u64>>::words_for(bits))]
}

fn read_table(bytes: &mut Bytes<'_>) -> Option<BlockTable> {
    let mut blocks = Vec::new();
    for i in 0..1 + bytes.next() % 3 {
        let kind = bytes.next();
        let page_size = PAGE_SIZE << (kind & 1);
        let used = page_size * (1 + (kind >> 1) % 8);
        let treatments = [Treatment::Tracked, Treatment::ReadOnly, Treatment::InPause, Treatment::Ignored];
        // Two in five are tracked, and the first one mostly.
        let treatment = treatments.get(index(kind >> 4 & 7)).copied().unwrap_or(Treatment::Tracked);
        blocks.push(RamBlock {
            name: BlockName::new(&format!("ram{i}")).expect("a name"),
            guest: GuestAddr(i << 24),
            host: HostAddr(host_of(i) + (kind >> 7) * 3 * page_size),
            len: used + (kind >> 7) * page_size,
            used,
            page_size,
            backing: Backing::Anonymous,
            treatment,
        });
    }
    let mut table = BlockTable::new(&blocks).ok()?;
    let granule = bytes.next();
    if granule & 7 == 7 {
        table.set_granule(BlockIndex(u16::from(granule & 8 != 0)), PAGE_SIZE << ((granule >> 4) % 8));
    }
    Some(table)
}

fn read_limits(bytes: &mut Bytes<'_>) -> Limits {
    Limits {
        slot_pages: bytes.number(),
        reserve_slots: bytes.number(),
        scan_pages: bytes.number(),
        around_min: bytes.number(),
        around_max: bytes.number(),
        when_full: if bytes.next() & 3 == 3 { WhenFull::Cancel } else { WhenFull::Stall },
    }
}

impl<const FAULTS: usize, const CLAIMS: usize> World<FAULTS, CLAIMS> {
    /// T0. `None` if there can be no such snapshot.
    fn new(bytes: &mut Bytes<'_>) -> Option<Self> {
        let table = Arc::new(read_table(bytes)?);
        let limits = read_limits(bytes);
        let slots = u16::try_from(bytes.next() % 40).expect("a few");
        let pages = table.pages();
        // Longer than the image now and then.
        let mut pending = bitmap(pages + (bytes.next() % 3) * 70);
        let mask = bytes.next() | bytes.next() << 8 | bytes.next() << 16;
        let wanted = |page: u64| mask >> (page % 24) & 1 == 0;
        (0..pending.pages()).filter(|&page| wanted(page)).for_each(|page| pending.insert(Run::new(PageId(page), 1)));

        // What the kernel protects: whole host pages.
        let mut states = vec![State::Absent; index(pages)];
        let mut protected = vec![false; index(pages)];
        let mut treatments = vec![Treatment::Tracked; index(pages)];
        for (i, block) in table.iter() {
            let run = table.block_run(i);
            let unit = block.pages_per_host_page();
            for page in run.first.0..run.end().0 {
                treatments[index(page)] = block.treatment;
                let host_page = run.first.0 + (page - run.first.0) / unit * unit;
                if (host_page..host_page + unit).any(wanted) {
                    states[index(page)] = State::Pending;
                    protected[index(page)] = block.treatment == Treatment::Tracked;
                }
            }
        }
        let total = states.iter().filter(|&&state| state == State::Pending).count() as u64;
        let room = u64::from(slots).min(32).saturating_mul(limits.slot_pages);
        let fits = table.blocks().iter().all(|b| b.treatment == Treatment::Ignored || b.pages_per_host_page() <= room);
        let core = match Snapshot::new(Arc::clone(&table), pending, slots, words(slots.into()), limits) {
            Ok(core) => core,
            Err(error) => {
                assert!(matches!(error, SetupError::HostPageTooLarge { .. }) && !fits, "{error}");
                return None;
            }
        };
        assert!(fits);
        assert_eq!((core.pending(), core.counts().total), (total, total));
        let mut world = Self {
            core,
            treatments,
            limits,
            slots,
            versions: vec![0; index(pages)],
            protected,
            states,
            vcpus: [None; 3],
            unread: Vec::new(),
            flights: Vec::new(),
            resumed: false,
            cause: None,
            handed_in: 0,
            total,
            saved_by_pause: 0,
            table,
        };
        let hot = bytes.next();
        if hot & 1 == 1 {
            let mut pages = bitmap((hot >> 1) % 64 + 1);
            (0..64)
                .filter(|page| mask >> (page % 17) & 1 == 1)
                .for_each(|page| pages.insert(Run::new(PageId(page), 1)));
            world.core.scan_first(pages);
        }
        Some(world)
    }

    fn event(&mut self, bytes: &mut Bytes<'_>) {
        let pages = self.table.pages();
        let kind = bytes.next();
        match kind % 16 {
            0 | 1 => self.write(bytes.pick(3), bytes.next() % pages),
            2 | 3 => self.read_fault(bytes),
            4 => self.request(bytes.number()),
            5 => self.discard(Run::new(PageId(bytes.number()), 1 + bytes.next() % 4)),
            6 | 7 => self.claim(Worker::Scan),
            8 => self.claim([Worker::Faults, Worker::Pause, Worker::Faults, Worker::Scan][bytes.pick(4)]),
            9..=12 if !self.flights.is_empty() => {
                let at = bytes.pick(self.flights.len());
                (0..=kind / 128).for_each(|_| self.advance(at));
            }
            13 => self.resume(),
            14 => match kind >> 4 {
                0..=3 => self.write_by_device(bytes.next() % pages),
                4 | 5 => self.stray_fault(bytes),
                6 | 7 => self.discarded(bytes),
                8 | 9 => self.discard(Run::new(PageId(bytes.number()), bytes.number())),
                _ => self.request(bytes.next() % pages),
            },
            15 => self.trouble(bytes),
            _ => {}
        }
    }

    fn treatment(&self, page: usize) -> Treatment {
        self.treatments[page]
    }

    // ---- what the guest and its devices do

    fn resume(&mut self) {
        // The embedder resumes whatever begin() said; begin() returns when this is so.
        if self.core.is_pause_captured() || self.cause.is_some() {
            self.resumed = true;
        }
    }

    fn write(&mut self, vcpu: usize, page: u64) {
        let page = index(page);
        if !self.resumed || self.vcpus[vcpu].is_some() || self.treatment(page) != Treatment::Tracked {
            return;
        }
        if self.protected[page] {
            self.vcpus[vcpu] = Some(page);
            self.unread.push(page as u64);
        } else {
            self.versions[page] += 1;
        }
    }

    /// Writes that no fault tells of.
    fn write_by_device(&mut self, page: u64) {
        if self.resumed && self.treatment(index(page)) == Treatment::InPause {
            self.versions[index(page)] += 1;
        }
    }

    /// The VMM asks before it discards, as it must.
    fn discard(&mut self, run: Run) {
        let inside = |page: usize| run.contains(PageId(page as u64));
        match self.core.claim_for_discard(run) {
            Discard::Claim(claim) => self.take(claim, None),
            Discard::Wait => assert!(
                self.cause.is_none()
                    && (0..self.states.len())
                        .any(|p| inside(p) && matches!(self.states[p], State::Pending | State::Flying)),
                "{run:?}: there is nothing to wait for"
            ),
            Discard::Clear => {
                for page in (0..self.states.len()).filter(|&page| inside(page)) {
                    assert!(
                        self.cause.is_some() || !self.protected[page] && self.states[page] != State::Pending,
                        "page {page} may be discarded, and is not captured"
                    );
                    self.versions[page] += 1;
                }
            }
        }
    }

    /// Somebody discards or unmaps without asking.
    fn discarded(&mut self, bytes: &mut Bytes<'_>) {
        let range = match bytes.next() {
            wild @ 0..=15 => HostRange::new(HostAddr(if wild & 1 == 0 { u64::MAX } else { 0 }), bytes.number()),
            page => {
                let page = PageId(page % self.table.pages());
                let start = self.table.host_range(Run::new(page, 1)).expect("a page").start;
                HostRange::new(HostAddr(start.0 + bytes.next()), bytes.next() * 512)
            }
        };
        let touched: Vec<usize> = (0..self.states.len())
            .filter(|&page| {
                let page = self.table.host_range(Run::new(PageId(page as u64), 1)).expect("a page");
                page.overlaps(range) && range.len > 0
            })
            .collect();
        let unsaved = |world: &Self, page: usize| {
            let claimed =
                |flight: &Flight| matches!(flight, Flight::Claimed(..)) && flight.run().contains(PageId(page as u64));
            world.states[page] == State::Pending || world.flights.iter().any(claimed)
        };
        let loses = touched.iter().any(|&page| unsaved(self, page));
        let unmapped = bytes.next() & 1 == 1;
        let lost = if unmapped { self.core.handle_unmapped(range) } else { self.core.handle_discarded(range) };
        assert_eq!(lost, loses, "{range} touches {touched:?}");
        if lost {
            let found = self.core.cause().expect("it has ended");
            match found {
                Cause::Discarded(run) | Cause::Unmapped(run) if self.cause.is_none() => {
                    assert_eq!(matches!(found, Cause::Unmapped(_)), unmapped);
                    assert!(touched.iter().any(|&page| run.contains(PageId(page as u64))));
                }
                _ => assert!(self.cause.is_some()),
            }
            self.cause.get_or_insert(found);
        }
        touched.iter().for_each(|&page| self.versions[page] += 1);
    }

    // ---- what the fault thread does

    fn read_fault(&mut self, bytes: &mut Bytes<'_>) {
        if self.unread.is_empty() {
            return;
        }
        let how = bytes.next();
        let at = index(how) % self.unread.len();
        // Late, out of order, and twice.
        let page = if how >= 192 { self.unread[at] } else { self.unread.remove(at) };
        let host = self.table.host_range(Run::new(PageId(page), 1)).expect("a page").start;
        if self.fault(HostAddr(host.0 + how * 16)) == FaultOutcome::QueueFull {
            self.unread.push(page);
        }
    }

    fn stray_fault(&mut self, bytes: &mut Bytes<'_>) {
        let at = match bytes.next() {
            0 => u64::MAX,
            1 => 0,
            2 => host_of(0) - 1,
            other => host_of(other % 3) + bytes.next() * 1021,
        };
        let _ = self.fault(HostAddr(at));
    }

    fn fault(&mut self, at: HostAddr) -> FaultOutcome {
        let outcome = self.core.handle_fault(at);
        let page = self.table.page_at(at).map(|page| index(page.0));
        let state = page.map(|page| self.states[page]);
        let tracked = page.is_some_and(|page| self.treatment(page) == Treatment::Tracked);
        let alive = self.cause.is_none();
        let claimed = |page: usize| self.flights.iter().any(|f| f.is_claim() && f.run().contains(PageId(page as u64)));
        match outcome {
            FaultOutcome::Queued | FaultOutcome::QueueFull => {
                assert!(alive && tracked && state == Some(State::Pending), "{at} is {outcome:?}");
            }
            FaultOutcome::Waits => assert!(alive && tracked && page.is_some_and(claimed), "{at} waits for nobody"),
            FaultOutcome::NotOurs => assert_eq!(self.table.block_at(at), None),
            FaultOutcome::Stale(range) => {
                let block = self.table.block_at(at).and_then(|i| self.table.block(i)).expect("a block");
                assert!(range.contains(at) && range.len == block.page_size && range.start.is_aligned(range.len));
                self.lift(range);
            }
        }
        self.handed_in += u64::from(!matches!(outcome, FaultOutcome::QueueFull | FaultOutcome::NotOurs));
        outcome
    }

    /// Lifts the protection of a range and wakes its writers.
    fn lift(&mut self, range: HostRange) {
        for run in self.table.runs_in(range) {
            for page in index(run.first.0)..index(run.end().0) {
                // What is not tracked is not protected, and a stray fault there harms nobody.
                let captured = match self.states[page] {
                    _ if self.treatment(page) != Treatment::Tracked => true,
                    State::Absent | State::Saved(_) => true,
                    State::Pending => false,
                    State::Flying => self.flights.iter().all(|flight| {
                        !matches!(flight, Flight::Claimed(..)) || !flight.run().contains(PageId(page as u64))
                    }),
                };
                assert!(captured || self.cause.is_some(), "page {page} is released and was not captured");
                self.protected[page] = false;
                self.vcpus.iter_mut().filter(|blocked| **blocked == Some(page)).for_each(|blocked| *blocked = None);
            }
        }
    }

    fn request(&mut self, page: u64) {
        let outcome = self.core.handle_request(PageId(page));
        let state = usize::try_from(page).ok().and_then(|page| self.states.get(page));
        match (outcome, state) {
            (RequestOutcome::NoSuchPage, None) | (RequestOutcome::Claimed, Some(State::Flying | State::Pending)) => {}
            (RequestOutcome::Queued | RequestOutcome::QueueFull, Some(State::Pending)) => {}
            (RequestOutcome::NotPending, Some(State::Absent | State::Saved(_) | State::Flying)) => {}
            _ => panic!("page {page} is {outcome:?}, it is {state:?}"),
        }
    }

    // ---- what workers and writers do

    fn claim(&mut self, who: Worker) {
        let claims = self.flights.iter().filter(|flight| flight.is_claim()).count();
        let next = self.core.next_claim(who);
        let waits = |page: usize| self.states[page] == State::Pending;
        let of_pause = |page: usize| self.treatment(page) == Treatment::InPause;
        match next {
            Next::Claim(claim) => self.take(claim, Some(who)),
            Next::Idle => {
                let mut left = (0..self.states.len()).filter(|&page| waits(page));
                assert!(who == Worker::Faults || left.all(of_pause), "{who:?} is idle, and pages wait");
            }
            Next::Done => {
                let mut left = (0..self.states.len()).filter(|&page| waits(page));
                assert!(!left.any(|page| who != Worker::Pause || of_pause(page)), "done, and pages wait");
            }
            Next::Full => assert!(
                claims == CLAIMS || self.flights.iter().any(|flight| !flight.slots().is_empty()),
                "the pool is full, and nobody has a slot"
            ),
            Next::Ended => {
                if self.cause.is_none() {
                    assert_eq!((self.limits.when_full, self.core.cause()), (WhenFull::Cancel, Some(Cause::PoolFull)));
                    self.cause = Some(Cause::PoolFull);
                }
            }
        }
    }

    /// A claim that was handed out.
    fn take(&mut self, claim: Claim, who: Option<Worker>) {
        assert_eq!(self.cause, None, "a claim after the end");
        let run = claim.run();
        let block = self.table.block_of(run.first).expect("in a block");
        let whole = self.table.block_run(block);
        let block = self.table.block(block).expect("there is one");
        let unit = block.pages_per_host_page();
        assert!(run.pages > 0 && run.end() <= whole.end(), "{run:?} is not in one block");
        assert_eq!(((run.first.0 - whole.first.0) % unit, run.pages % unit), (0, 0), "{run:?} is not whole host pages");
        assert_eq!(Some(claim.range()), self.table.host_range(run));
        assert_eq!(claim.is_protected(), block.treatment == Treatment::Tracked);
        if let Some(who) = who {
            assert_eq!(block.treatment == Treatment::InPause, who == Worker::Pause);
        }
        assert_eq!(claim.slots().len() as u64, run.pages.div_ceil(self.limits.slot_pages));
        for page in index(run.first.0)..index(run.end().0) {
            assert_eq!(self.states[page], State::Pending, "page {page} is claimed");
            self.states[page] = State::Flying;
        }
        self.flights.push(Flight::Claimed(claim, Vec::new()));
    }

    /// One step of one run.
    fn advance(&mut self, at: usize) {
        if at >= self.flights.len() {
            return;
        }
        let next = match self.flights.swap_remove(at) {
            Flight::Claimed(claim, mut read) if (read.len() as u64) < claim.run().pages => {
                read.push(self.versions[index(claim.run().first.0) + read.len()]);
                Flight::Claimed(claim, read)
            }
            Flight::Claimed(claim, read) => Flight::Captured(self.core.captured(claim), read),
            Flight::Captured(run, read) => {
                if run.is_protected() {
                    let range = run.range();
                    let flight = Flight::Lifted(run, read);
                    self.flights.push(flight);
                    self.lift(range);
                    return;
                }
                Flight::Lifted(run, read)
            }
            Flight::Lifted(run, read) => Flight::Job(self.core.released(run), read),
            Flight::Job(job, read) => {
                self.save(job.run(), &read);
                self.core.written(job);
                return;
            }
        };
        self.flights.push(next);
    }

    fn save(&mut self, run: Run, read: &[u64]) {
        for (page, &version) in (index(run.first.0)..).zip(read) {
            assert_eq!(self.states[page], State::Flying, "page {page} is saved twice");
            assert!(version == 0 || self.cause.is_some(), "page {page} is saved as it was after T0");
            self.states[page] = State::Saved(version);
        }
        if self.treatment(index(run.first.0)) == Treatment::InPause {
            self.saved_by_pause += run.pages;
        }
    }

    // ---- what goes wrong

    fn trouble(&mut self, bytes: &mut Bytes<'_>) {
        let what = bytes.next();
        if what >= 64 {
            // Most bytes are harmless, or hardly a snapshot would live.
            if what >= 160 {
                self.core.handle_lull();
            }
            return;
        }
        let at = bytes.pick(self.flights.len().max(1));
        match what % 8 {
            0 => self.end(Cause::Cancelled),
            1 => self.end(Cause::Sink),
            2 => self.end(Cause::Arm(EIO)),
            3 => self.end(Cause::Events(EIO)),
            4 => self.end(Cause::ThreadDied),
            5 | 6 if at < self.flights.len() => self.fail(at),
            _ => self.disarm(),
        }
    }

    fn end(&mut self, cause: Cause) {
        assert_eq!(self.core.cancel(cause), self.cause.is_none());
        self.cause.get_or_insert(cause);
    }

    /// A capture or a release fails, whichever is next for that run.
    fn fail(&mut self, at: usize) {
        match self.flights.swap_remove(at) {
            Flight::Claimed(claim, _) => {
                self.cause.get_or_insert(Cause::Capture(EIO));
                self.core.capture_failed(claim, EIO);
            }
            Flight::Captured(run, _) | Flight::Lifted(run, _) => {
                self.cause.get_or_insert(Cause::Release(EIO));
                self.core.release_failed(run, EIO);
            }
            job @ Flight::Job(..) => {
                self.flights.push(job);
                self.end(Cause::Sink);
            }
        }
    }

    /// What an embedder does once a snapshot has ended.
    fn disarm(&mut self) {
        if self.cause.is_some() {
            self.protected.fill(false);
            self.vcpus = [None; 3];
        }
    }

    // ---- what must be

    fn check(&self) {
        assert_eq!(self.core.cause(), self.cause, "the first cause is kept");
        let mut slots = vec![false; usize::from(self.slots)];
        let mut claims = 0;
        for flight in &self.flights {
            claims += usize::from(flight.is_claim());
            for slot in flight.slots() {
                assert!(!std::mem::replace(&mut slots[usize::from(slot)], true), "slot {slot} belongs to two runs");
            }
        }
        assert!(claims <= CLAIMS);
        let count = |of: State| self.states.iter().filter(|&&state| state == of).count() as u64;
        assert_eq!(self.core.pending(), count(State::Pending));
        let captured = self.cause.is_none() && count(State::Pending) == 0 && claims == 0;
        assert_eq!(self.core.is_captured(), captured);
        assert_eq!(self.core.is_written(), captured && self.flights.is_empty());
        let of_pause = |page: u64| self.treatment(index(page)) == Treatment::InPause;
        let pause_waits = (0..self.table.pages()).any(|p| of_pause(p) && self.states[index(p)] == State::Pending);
        let pause_flies = self.flights.iter().any(|flight| flight.is_claim() && of_pause(flight.run().first.0));
        assert_eq!(self.core.is_pause_captured(), !pause_waits && !pause_flies);
        assert!(self.core.search().page.0 <= self.table.pages());
        if self.cause.is_none() {
            for (page, state) in self.states.iter().enumerate() {
                let tracked = self.treatment(page) == Treatment::Tracked;
                assert!(*state != State::Pending || !tracked || self.protected[page], "page {page} lies open");
                assert!(!matches!(state, State::Absent | State::Saved(_)) || !self.protected[page]);
            }
        }
    }

    /// No more events: everything comes to its end by itself.
    fn finish(mut self) {
        let mut rounds = 0;
        while self.cause.is_none() && !self.core.is_written() {
            rounds += 1;
            assert!(rounds < 2000, "it does not end: {} pages pending", self.core.pending());
            self.claim(Worker::Pause);
            self.claim(Worker::Scan);
            self.read_all();
            self.advance(0);
            self.check();
        }
        if self.cause.is_some() {
            self.finish_ended();
            return;
        }
        self.resume();
        assert!(self.resumed);
        self.read_all();
        assert_eq!(self.vcpus, [None; 3], "blocked for ever");
        assert!(self.unread.is_empty() && !self.protected.contains(&true));
        let right = |state: &State| matches!(state, State::Absent | State::Saved(0));
        assert!(self.states.iter().all(right), "the image is not memory at T0: {:?}", self.states);
        for who in [Worker::Scan, Worker::Faults, Worker::Pause] {
            assert!(matches!(self.core.next_claim(who), Next::Done));
        }
        let counts = self.core.counts();
        assert_eq!((counts.total, counts.released, counts.faults), (self.total, self.total, self.handed_in));
        // A discard may have claimed them first.
        assert!(counts.by_pause <= self.saved_by_pause);
        assert!(counts.by_fault + counts.by_request + counts.by_discard + counts.by_pause <= counts.released);
        assert!(counts.slots_peak <= u64::from(self.slots) && counts.stale_faults <= counts.faults);
    }

    /// The snapshot has ended: the runs on their way end somehow, and nobody stays blocked.
    fn finish_ended(mut self) {
        let cause = self.cause;
        while !self.flights.is_empty() {
            // What is already on its way into the image cannot fail any more.
            match self.flights[0] {
                Flight::Job(..) => self.advance(0),
                _ if self.flights.len() % 2 == 0 => self.fail(0),
                _ => self.advance(0),
            }
            self.check();
        }
        self.disarm();
        self.read_all();
        assert!(self.unread.is_empty(), "a fault is refused after the end");
        for who in [Worker::Scan, Worker::Faults, Worker::Pause] {
            assert!(matches!(self.core.next_claim(who), Next::Ended));
        }
        assert!(matches!(self.core.claim_for_discard(Run::new(PageId(0), u64::MAX)), Discard::Clear));
        assert!(!self.core.is_written() && !self.core.is_captured());
        assert!(!self.core.cancel(Cause::Cancelled));
        assert_eq!(self.core.cause(), cause);
    }

    fn read_all(&mut self) {
        for page in std::mem::take(&mut self.unread) {
            let at = self.table.host_range(Run::new(PageId(page), 1)).expect("a page").start;
            if self.fault(at) == FaultOutcome::QueueFull {
                self.unread.push(page);
            }
        }
    }
}
