//! Random choices that follow from a seed.

use ramshot_images::rule::mix;

/// Numbers from a seed: the same seed, the same numbers.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// From `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True in `n` of 100 cases.
    pub(crate) fn percent(&mut self, n: u64) -> bool {
        self.next() % 100 < n
    }

    /// From `low` to `high`, every doubling as likely as the next.
    pub(crate) fn magnitude(&mut self, low: u64, high: u64) -> u64 {
        let bottom = low << self.between(0, u64::from((high / low).ilog2()));
        self.between(bottom, (bottom * 2 - 1).min(high))
    }

    /// One of them.
    pub(crate) fn one_of<T: Copy, const N: usize>(&mut self, choices: [T; N]) -> T {
        let index = usize::try_from(self.between(0, N as u64 - 1)).unwrap_or(0);
        choices[index]
    }
}
