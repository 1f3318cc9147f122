//! The matrix: guests, and the targets that each is snapshotted to.

use ramshot_tests::{Backing, GuestConfig};

use crate::options::{Load, Options, Target};

/// One guest: booted once, snapshotted to each of its targets.
#[derive(Clone, Debug)]
pub(crate) struct Boot {
    pub(crate) mem: u64,
    pub(crate) backing: Backing,
    pub(crate) load: Load,
    pub(crate) working_set: u64,
    pub(crate) rate: Option<u64>,
    pub(crate) targets: Vec<Target>,
}

impl Boot {
    /// `mem/backing/workload`.
    pub(crate) fn name(&self) -> String {
        let mem = if self.mem.is_multiple_of(1 << 30) {
            format!("{}g", self.mem >> 30)
        } else {
            format!("{}m", self.mem >> 20)
        };
        format!("{mem}/{}/{}", self.backing, self.load.name())
    }

    /// `mem/backing/workload/target`.
    pub(crate) fn case(&self, target: Target) -> String {
        format!("{}/{}", self.name(), target.name())
    }

    /// What the guest is told. All its pages are filled.
    pub(crate) fn config(&self) -> GuestConfig {
        GuestConfig {
            vcpus: 1,
            workload: self.load.workload(),
            working_set: self.working_set,
            rate: self.rate,
            ..GuestConfig::default()
        }
    }
}

/// The guests of this run, without those that no target was asked for.
pub(crate) fn matrix(options: &Options) -> Vec<Boot> {
    let mut boots = Vec::new();
    for &mem in &options.mem {
        for &backing in &options.backing {
            for &load in &options.workload {
                let rate = (load == Load::Slow).then_some(options.slow_rate);
                let working_set = if load == Load::Slow { mem / 4 * 3 } else { options.working_set.min(mem / 4) };
                let mut boot = Boot { mem, backing, load, working_set, rate, targets: Vec::new() };
                let wanted = |target: Target| wanted(options, &boot.case(target));
                let targets = options.target.iter().copied().filter(|&target| wanted(target)).collect();
                boot.targets = targets;
                if !boot.targets.is_empty() {
                    boots.push(boot);
                }
            }
        }
    }
    boots
}

fn wanted(options: &Options, case: &str) -> bool {
    options.case.is_empty() || options.case.iter().any(|filter| filter.split('+').all(|word| case.contains(word)))
}
