//! A world: the real core, and around it all that it can meet, small enough to be explored completely.
//!
//! Memory is one bit a page (what it was at T0, or something else), the kernel one bit a page (protected, or not) and
//! a list of unread messages. The threads are those of an embedder, each cut into the steps between which others run.

use core::hash::{Hash, Hasher};

use heapless::Vec;

use crate::tests::Defect;
use crate::*;

/// Most pages of a world.
pub(super) const PAGES: usize = 8;
/// Where the blocks of all worlds lie, one every [`STRIDE`].
const BASE: u64 = 0x10_0000;
const STRIDE: u64 = 0x10_0000;

/// One block of a world.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) pages: u64,
    pub(super) page_size: u64,
    pub(super) treatment: Treatment,
}

pub(super) const fn tracked(pages: u64) -> Part {
    Part { pages, page_size: PAGE_SIZE, treatment: Treatment::Tracked }
}

/// What somebody does to memory behind the snapshot's back, or after asking.
#[derive(Clone, Copy)]
pub(super) struct DiscardPlan {
    pub(super) run: Run,
    /// Through `claim_for_discard` first, as it should be.
    pub(super) announced: bool,
}

/// What counts as wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Judge {
    /// A state in which an invariant does not hold, however it ends.
    Invariants,
    /// Only what others can see: a wrong image, or somebody who waits for ever.
    Outcome,
}

/// Answers of the core. Each must have been seen in some world, or the worlds prove less than they seem to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    FaultQueued,
    FaultWaits,
    FaultStale,
    FaultNotOurs,
    FaultQueueFull,
    NextIdle,
    NextFull,
    NextDone,
    NextEnded,
    ClaimedForRequest,
    ClaimedForFault,
    ClaimedForScan,
    ClaimedForDiscard,
    ClaimedInPause,
    RequestQueued,
    RequestClaimed,
    RequestNotPending,
    RequestQueueFull,
    DiscardWait,
    DiscardClear,
    EndedByCancel,
    EndedByCapture,
    EndedByRelease,
    EndedBySink,
    EndedByFullPool,
    EndedByDiscard,
}

impl Seen {
    /// All of them; the last one closes the list.
    pub(super) const LAST: Self = Self::EndedByDiscard;

    pub(super) fn origin(origin: Origin) -> Self {
        match origin {
            Origin::Request => Self::ClaimedForRequest,
            Origin::Fault => Self::ClaimedForFault,
            Origin::Scan => Self::ClaimedForScan,
            Origin::Discard => Self::ClaimedForDiscard,
            Origin::Pause => Self::ClaimedInPause,
        }
    }
}

/// What is the same in all states of a world.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) name: &'static str,
    pub(super) parts: &'static [Part],
    /// Pages pending at T0, one bit each; all others belong to the parent image.
    pub(super) members: u64,
    /// Pages that are protected although they are not pending: gaps between dirty runs that were not worth a call.
    pub(super) gaps: u64,
    /// Pages in a granule of every block: what the scan takes whole if it can.
    pub(super) granule: u64,
    /// Pages that the scan takes first; 0: it was not told.
    pub(super) hot: u64,
    /// The pages that each vCPU writes, in order.
    pub(super) programs: [&'static [u64]; 2],
    pub(super) workers: usize,
    pub(super) slots: u16,
    pub(super) limits: Limits,
    pub(super) requests: &'static [u64],
    pub(super) discard: Option<DiscardPlan>,
    /// Addresses that were reported before the first step, relative to the first block: unknown, stale, in a tail.
    pub(super) odd: &'static [u64],
    /// How often a blocked vCPU wakes for no reason, or a message comes twice.
    pub(super) spurious: u8,
    /// How often the kernel says EAGAIN for no visible reason.
    pub(super) again: u8,
    /// Whether captures, releases and writes can fail, and somebody can cancel.
    pub(super) errors: bool,
    pub(super) defect: Option<Defect>,
    pub(super) judge: Judge,
}

impl Setup {
    /// Two pages, two vCPUs, two workers, two slots, nothing special.
    pub(super) const PLAIN: Self = Self {
        name: "plain",
        parts: &[tracked(2)],
        members: u64::MAX,
        gaps: 0,
        granule: 1,
        hot: 0,
        programs: [&[0, 1, 0], &[1]],
        workers: 2,
        slots: 2,
        limits: Limits {
            slot_pages: 1,
            reserve_slots: 1,
            scan_pages: 1,
            around_min: 1,
            around_max: 1,
            when_full: WhenFull::Stall,
        },
        requests: &[],
        discard: None,
        odd: &[],
        spurious: 0,
        again: 0,
        errors: true,
        defect: None,
        judge: Judge::Invariants,
    };

    pub(super) fn table(&self) -> &'static BlockTable {
        let mut at = BASE;
        let blocks: std::vec::Vec<RamBlock> = (0u64..)
            .zip(self.parts)
            .map(|(i, part)| {
                let host = HostAddr(at);
                at += STRIDE;
                let used = part.pages * PAGE_SIZE;
                RamBlock {
                    name: BlockName::new(&std::format!("ram{i}")).unwrap(),
                    guest: GuestAddr(i * STRIDE),
                    host,
                    // With an unused tail.
                    len: used + part.page_size,
                    used,
                    page_size: part.page_size,
                    backing: Backing::Anonymous,
                    treatment: part.treatment,
                }
            })
            .collect();
        let mut table = BlockTable::new(&blocks).unwrap();
        for (index, _) in (0u16..).zip(self.parts) {
            table.set_granule(BlockIndex(index), self.granule * PAGE_SIZE);
        }
        std::boxed::Box::leak(std::boxed::Box::new(table))
    }
}

/// What a thread has in hand.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    Idle,
    /// A claim, `copied` pages of which are in their slots.
    Claimed(Claim, u64),
    Captured(CapturedRun),
    /// The kernel has lifted the protection, core does not know yet.
    Lifted(CapturedRun),
    /// A discard event, read but not handed in.
    Event,
    /// The thread has ended.
    Gone,
}

/// How far the discard is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum DiscardStage {
    Asking,
    Allowed,
    /// The event is unread, and the caller blocked; the kernel says EAGAIN to every release.
    Posted,
    /// Somebody has read the event: the memory can go at any moment.
    Read,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Vcpu {
    /// Writes done.
    pub(super) writes: usize,
    pub(super) blocked: bool,
}

/// A message: the page of a write fault, [`ODD`] plus an index into [`Setup::odd`], or [`DISCARD`].
pub(super) type Message = u8;
pub(super) const ODD: Message = 0x40;
pub(super) const DISCARD: Message = 0xff;

/// What lies in one page of a slot: nothing, or a page, as it was at T0 or not.
pub(super) type Cell = Option<(u8, bool)>;

pub(super) const FAULT_THREAD: usize = 0;
/// The thread of the VMM that holds the guest stopped, or discards.
pub(super) const VMM: usize = 3;

#[derive(Clone)]
pub(super) struct World<const F: usize, const C: usize> {
    pub(super) core: Snapshot<&'static BlockTable, [u64; 2], F, C>,
    /// Pages whose content is not that of T0.
    pub(super) changed: u64,
    pub(super) protected: u64,
    pub(super) vcpus: [Vcpu; 2],
    pub(super) unread: Vec<Message, 8>,
    /// The fault thread, two workers, the VMM.
    pub(super) threads: [Stage; 4],
    /// Pages to be released for stale faults.
    pub(super) stale: u64,
    /// Captured runs whose release the kernel put off.
    pub(super) retries: Vec<CapturedRun, 3>,
    pub(super) jobs: Vec<ReleasedRun, 3>,
    pub(super) slots: [[Cell; 2]; 3],
    /// For each page: in the image or not, and if it is, whether as it was at T0.
    pub(super) image: [Option<bool>; PAGES],
    pub(super) requested: usize,
    pub(super) discard: DiscardStage,
    pub(super) spurious: u8,
    pub(super) again: u8,
    pub(super) paused: bool,
    pub(super) committed: bool,
    pub(super) disarmed: bool,
    /// What the core answered on the way here, one bit each of [`Seen`]. Not part of the state.
    pub(super) seen: u32,
}

impl<const F: usize, const C: usize> World<F, C> {
    pub(super) fn new(setup: &Setup) -> Self {
        let table = setup.table();
        let bitmap = |bits: u64| {
            let mut map = PageBitmap::new([0; 2], table.pages(), true).unwrap();
            let set = (0..table.pages()).filter(|page| bits >> page & 1 == 1);
            set.for_each(|page| map.insert(Run::new(PageId(page), 1)));
            map
        };
        let mut core = Snapshot::new(table, bitmap(setup.members), setup.slots, [0; 2], setup.limits).unwrap();
        if setup.hot != 0 {
            core.scan_first(bitmap(setup.hot));
        }
        if let Some(defect) = setup.defect {
            core.break_with(defect);
        }
        let protected =
            pages_where(table, |page, block| block.treatment == Treatment::Tracked && core.is_pending(page));
        let paused = table.blocks().iter().any(|b| b.treatment == Treatment::InPause);
        let discard = match setup.discard {
            None => DiscardStage::Done,
            Some(plan) if plan.announced => DiscardStage::Asking,
            Some(_) => DiscardStage::Allowed,
        };
        let mut unread = Vec::new();
        (ODD..).zip(setup.odd).for_each(|(message, _)| unread.push(message).unwrap());
        Self {
            core,
            changed: 0,
            protected: protected | setup.gaps,
            vcpus: [Vcpu { writes: 0, blocked: false }; 2],
            unread,
            threads: [const { Stage::Idle }; 4],
            stale: 0,
            retries: Vec::new(),
            jobs: Vec::new(),
            slots: [[None; 2]; 3],
            image: [None; PAGES],
            requested: 0,
            discard,
            spurious: setup.spurious,
            again: setup.again,
            paused,
            committed: false,
            disarmed: false,
            seen: 0,
        }
    }

    pub(super) fn see(&mut self, what: Seen) {
        self.seen |= 1 << what as u32;
    }

    /// The page that `vcpu` writes next.
    pub(super) fn target(&self, setup: &Setup, vcpu: usize) -> Option<u64> {
        setup.programs[vcpu].get(self.vcpus[vcpu].writes).copied()
    }

    /// Where `message` says the write was.
    pub(super) fn address(&self, setup: &Setup, message: Message) -> HostAddr {
        match setup.odd.get(usize::from(message.wrapping_sub(ODD))) {
            Some(offset) => HostAddr(BASE + offset),
            None => self.core.table().host_range(Run::new(PageId(u64::from(message)), 1)).unwrap().start,
        }
    }

    /// Feeds everything that the future depends on to `hasher`. Workers are interchangeable, and so is the order in
    /// which jobs and retries lie.
    pub(super) fn key<H: Hasher + Clone + Default>(&self, hasher: &mut H) {
        self.core.key(hasher);
        (self.changed, self.protected, self.vcpus, self.stale, self.slots, self.image).hash(hasher);
        (self.requested, self.discard, self.spurious, self.again).hash(hasher);
        (self.paused, self.committed, self.disarmed, &*self.unread).hash(hasher);
        let hashed = |stage: &Stage| {
            let mut own = H::default();
            stage.key(&mut own);
            own.finish()
        };
        let [faults, one, two, vmm] = [0, 1, 2, 3].map(|i| hashed(&self.threads[i]));
        (faults, one.min(two), one.max(two), vmm).hash(hasher);
        (self.retries.len(), self.jobs.len()).hash(hasher);
        self.retries.iter().for_each(|run| (run.run(), run.slots()).hash(hasher));
        self.jobs.iter().for_each(|run| (run.run(), run.slots()).hash(hasher));
    }
}

impl Stage {
    fn key<H: Hasher>(&self, hasher: &mut H) {
        match self {
            Self::Idle => 0.hash(hasher),
            Self::Claimed(claim, copied) => (1, claim.run(), claim.slots(), copied).hash(hasher),
            Self::Captured(run) => (2, run.run(), run.slots()).hash(hasher),
            Self::Lifted(run) => (3, run.run(), run.slots()).hash(hasher),
            Self::Event => 4.hash(hasher),
            Self::Gone => 5.hash(hasher),
        }
    }

    /// The run in hand, while core counts it as claimed.
    pub(super) fn in_hand(&self) -> Option<(Run, &[SlotId])> {
        match self {
            Self::Claimed(claim, _) => Some((claim.run(), claim.slots())),
            Self::Captured(run) | Self::Lifted(run) => Some((run.run(), run.slots())),
            Self::Idle | Self::Event | Self::Gone => None,
        }
    }
}

/// The pages of `run`, one bit each.
pub(super) fn mask(run: Run) -> u64 {
    (run.first.0..run.end().0).map(|page| 1 << page).sum()
}

/// The pages that satisfy `is`, one bit each.
pub(super) fn pages_where(table: &BlockTable, is: impl Fn(PageId, &RamBlock) -> bool) -> u64 {
    (0..table.pages())
        .filter(|&page| {
            let block = table.block_of(PageId(page)).and_then(|b| table.block(b)).unwrap();
            is(PageId(page), block)
        })
        .map(|page| 1 << page)
        .sum()
}
