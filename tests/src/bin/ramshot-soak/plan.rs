//! What one run does: all of it follows from its seed.

use std::fmt;
use std::time::Duration;

use ramshot::{Options, WhenFull};
use ramshot_tests::chaos::{SinkFault, TrackerFault};
use ramshot_tests::snapshot_run::RestoreMode;
use ramshot_tests::{Accel, Backing, GuestConfig, Workload};

use crate::dice::Dice;

const MIB: u64 = 1 << 20;

/// A guest and what happens to it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) accel: Accel,
    pub(crate) size: u64,
    pub(crate) backing: Backing,
    pub(crate) config: GuestConfig,
    /// Its writes are followed from snapshot to snapshot: there are increments and pre-copies.
    pub(crate) dirty: bool,
    pub(crate) acts: Vec<Act>,
}

/// One snapshot.
#[derive(Debug)]
pub(crate) struct Act {
    pub(crate) options: Options,
    /// Protect ahead of T0.
    pub(crate) ahead: bool,
    /// Every write of the image takes this long.
    pub(crate) slow: Option<Duration>,
    /// What it takes, if writes are followed.
    pub(crate) kind: Kind,
    /// Restored afterwards, if there is an image: how.
    pub(crate) restore: Option<RestoreMode>,
    /// A guest that is restored lazily is snapshotted while its pages come in, and restored from that, too.
    pub(crate) again: bool,
    pub(crate) trouble: Trouble,
}

/// Which pages a snapshot takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Full,
    /// On the snapshot before, if there is one.
    Increment,
    /// Full, by pre-copy of so many passes.
    Precopy(u32),
}

/// What is done to a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Trouble {
    None,
    /// Cancelled this long after T0.
    Cancel(Duration),
    /// Dropped this long after T0.
    Drop(Duration),
    /// The n-th write of the image fails.
    Sink(u64, SinkFault),
    Commit(SinkFault),
    /// The n-th read of guest RAM fails or panics.
    Ram(u64, bool),
    /// The n-th call of that kind.
    Tracker(u64, TrackerFault),
}

impl Plan {
    /// The plan of that seed. `accel`: the only one, or `None` for KVM mostly and threads now and then.
    pub(crate) fn new(seed: u64, accel: Option<Accel>, kvm: bool) -> Self {
        let mut dice = Dice::new(seed);
        // Thrown in any case, so that everything else follows from the seed alone.
        let threads = dice.percent(12);
        let accel = accel.unwrap_or(if threads || !kvm { Accel::Threads } else { Accel::Kvm });
        // Small ones more often: they get through more.
        let size = dice.magnitude(64 * MIB, 1024 * MIB).min(dice.magnitude(64 * MIB, 1024 * MIB));
        let size = size / (2 * MIB) * (2 * MIB);
        let backing = dice.one_of([Backing::Anon, Backing::Thp, Backing::Memfd, Backing::HugeTlb]);
        let late = if dice.percent(70) { dice.magnitude(MIB, 16 * MIB) / 4096 * 4096 } else { 0 };
        let room = size - 8 * MIB - late;
        let config = GuestConfig {
            vcpus: u32::try_from(dice.between(1, 2)).unwrap_or(1),
            workload: if dice.percent(10) { Workload::Idle } else { dice.one_of([Workload::Seq, Workload::Random]) },
            working_set: dice.magnitude(MIB, room.min(256 * MIB)) / 4096 * 4096,
            rate: dice.percent(50).then(|| dice.magnitude(1000, 500_000)),
            fill: dice.percent(40).then(|| dice.between(MIB, room) / 4096 * 4096),
            late,
            seed,
        };
        // Only KVM has a dirty log.
        let dirty = dice.percent(60) && accel == Accel::Kvm;
        let acts = (0..dice.between(2, 6)).map(|_| Act::new(&mut dice, backing)).collect();
        Self { seed, accel, size, backing, config, dirty, acts }
    }
}

impl Act {
    fn new(dice: &mut Dice, backing: Backing) -> Self {
        // A pool has to hold a few huge pages.
        let least = if matches!(backing, Backing::Thp | Backing::HugeTlb) { 16 * MIB } else { MIB };
        let modes = match backing {
            Backing::Anon | Backing::Thp => [RestoreMode::Eager, RestoreMode::Mapped, RestoreMode::Lazy],
            // A private mapping cannot stand for them.
            Backing::Memfd | Backing::HugeTlb => [RestoreMode::Eager, RestoreMode::Lazy, RestoreMode::Lazy],
        };
        let around_min = dice.one_of([4096, 4096, 64 << 10, 64 << 10, 256 << 10]);
        // The rest is nothing at present; whatever options come will do.
        #[allow(clippy::needless_update)]
        let options = Options {
            pool_bytes: dice.magnitude(least, 128 * MIB),
            workers: usize::try_from(dice.between(1, 4)).unwrap_or(1),
            writers: usize::try_from(dice.between(1, 3)).unwrap_or(1),
            when_full: if dice.percent(15) { WhenFull::Cancel } else { WhenFull::Stall },
            around_min,
            around_max: dice.magnitude(around_min, 4 * MIB),
            replace: dice.percent(60),
            sync: dice.percent(20),
            ..Options::default()
        };
        let moment = |dice: &mut Dice| Duration::from_micros(dice.magnitude(10, 500_000));
        let sink =
            |dice: &mut Dice| dice.one_of([SinkFault::NoSpace, SinkFault::Io, SinkFault::Short, SinkFault::Panic]);
        let trouble = match dice.between(0, 99) {
            0..55 => Trouble::None,
            55..70 => Trouble::Cancel(moment(dice)),
            70..75 => Trouble::Drop(moment(dice)),
            75..85 => Trouble::Sink(dice.magnitude(1, 64), sink(dice)),
            85..88 => Trouble::Commit(dice.one_of([SinkFault::NoSpace, SinkFault::Io])),
            88..93 => Trouble::Ram(dice.magnitude(1, 1024), dice.percent(50)),
            _ => Trouble::Tracker(
                dice.magnitude(1, 512),
                dice.one_of([
                    TrackerFault::Protect,
                    TrackerFault::Release,
                    TrackerFault::ReleasePanics,
                    TrackerFault::ReleaseAgain,
                    TrackerFault::Events,
                    TrackerFault::EventsPanic,
                    TrackerFault::Disarm,
                ]),
            ),
        };
        Self {
            options,
            ahead: dice.percent(50),
            slow: dice.percent(20).then(|| Duration::from_micros(dice.magnitude(50, 5000))),
            kind: match dice.between(0, 9) {
                0..4 => Kind::Full,
                4..8 => Kind::Increment,
                _ => Kind::Precopy(u32::try_from(dice.between(1, 3)).unwrap_or(1)),
            },
            restore: dice.percent(40).then(|| dice.one_of(modes)),
            again: dice.percent(50),
            trouble,
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        let rate = config.rate.map_or("max".to_owned(), |rate| rate.to_string());
        write!(
            f,
            "seed {}: {} {} MiB {} x{}, {} over {} MiB at {rate}/s, {} snapshots{}",
            self.seed,
            self.accel,
            self.size / MIB,
            self.backing,
            config.vcpus,
            config.workload,
            config.working_set / MIB,
            self.acts.len(),
            if self.dirty { ", writes followed" } else { "" },
        )
    }
}
