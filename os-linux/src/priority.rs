//! Who runs first when cores are scarce.

use nix::errno::Errno;

/// Has the calling thread run as soon as it is woken: whoever it serves is blocked until then. Real-time priority where
/// that is allowed (CAP_SYS_NICE, RLIMIT_RTPRIO), otherwise a better nice value where that is, otherwise as it was.
pub fn run_at_once() {
    // The lowest real-time priority is enough: it is above every ordinary thread.
    let parameters = libc::sched_param { sched_priority: 1 };
    // A thread started from this one is an ordinary one again.
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: pid 0 is the calling thread; `parameters` is a live sched_param that the call only reads.
    let scheduled = Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) });
    if let Err(refused) = scheduled {
        let niced = nice(-10);
        log::debug!(target: "ramshot::track", "no real-time priority ({refused}); nice -10: {niced:?}");
    }
}

/// Has the calling thread make way for the guest and for who serves it.
pub fn run_behind() {
    // A tenth of an ordinary thread's share where there is not enough for both: it falls behind, but never stands still.
    let _ = nice(10);
}

fn nice(value: libc::c_int) -> nix::Result<()> {
    // SAFETY: takes numbers only; 0 is the calling thread (on Linux the nice value is a thread's own).
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) }).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn neither_harms_a_thread_that_may_not() {
        std::thread::spawn(|| {
            super::run_at_once();
            super::run_behind();
        })
        .join()
        .unwrap();
    }
}
