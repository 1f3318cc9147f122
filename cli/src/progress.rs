//! A line on the terminal for what takes longer than a second.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::size;

/// Silence before the line appears.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two updates.
const EVERY: Duration = Duration::from_millis(100);
/// Characters of the bar.
const BAR: u64 = 30;

/// How far something is, on standard error: quiet for the first second, and always if that is no terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    what: &'static str,
    started: Instant,
    /// When the line is to be drawn again; never, if nobody looks.
    next: Option<Instant>,
    drawn: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str) -> Self {
        let started = Instant::now();
        let next = io::stderr().is_terminal().then(|| started + PATIENCE);
        Self { what, started, next, drawn: false }
    }

    /// `done` bytes of `total` are done.
    pub(crate) fn bytes(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if self.next.is_none_or(|next| now < next) {
            return;
        }
        self.next = Some(now + EVERY);
        let full = share(done, total, BAR);
        let bar: String = (0..BAR).map(|at| if at < full { '#' } else { '.' }).collect();
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = size::rate(done, seconds);
        let line = format!(
            "{} [{bar}] {:3} %  {} of {}  {rate}",
            self.what,
            share(done, total, 100),
            size::bytes(done),
            size::bytes(total)
        );
        self.draw(&line);
    }

    /// A line of the caller's own making.
    pub(crate) fn line(&mut self, text: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.next.is_some_and(|next| now >= next) {
            self.next = Some(now + EVERY);
            let line = format!("{}: {}", self.what, text());
            self.draw(&line);
        }
    }

    fn draw(&mut self, line: &str) {
        self.drawn = true;
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[K{line}");
        let _ = stderr.flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn {
            self.draw("");
        }
    }
}

/// `of` times `done / total`, rounded down; all of it if there is nothing to do.
fn share(done: u64, total: u64, of: u64) -> u64 {
    let share = u128::from(done.min(total)) * u128::from(of);
    u64::try_from(share.checked_div(u128::from(total)).unwrap_or(u128::from(of))).unwrap_or(of)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_neither_overflow_nor_divide_by_zero() {
        assert_eq!(share(u64::MAX, u64::MAX, 100), 100);
        assert_eq!(share(0, 0, 100), 100);
        assert_eq!(share(999, 1000, 100), 99);
        assert_eq!(share(7, 3, 30), 30);
    }
}
