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

/// Has the calling thread make way for the guest and for who serves it: a tenth of an ordinary thread's share where there
/// is not enough for both, in slices of 0.1 ms, and never instead of a thread that runs.
///
/// So a vCPU that wakes up does not wait for the end of an ordinary slice (3 ms), and this thread, which may hold something
/// that a vCPU waits for, does not stand still for long either. Slices need Linux 6.12; before it there is only the share.
pub fn run_behind() {
    let attributes = SchedAttr {
        size: SCHED_ATTR_SIZE,
        policy: libc::SCHED_BATCH.unsigned_abs(),
        flags: 0,
        nice: BEHIND,
        priority: 0,
        runtime: SLICE_NS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: pid 0 is the calling thread; `attributes` is a live sched_attr of the size it states, only read.
    let set = Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) });
    if let Err(refused) = set {
        log::debug!(target: "ramshot::track", "no batch scheduling ({refused}); nice {BEHIND}: {:?}", nice(BEHIND));
    }
}

const BEHIND: i32 = 10;
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of linux/sched/types.h, as Linux 3.14 had it.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// `SCHED_ATTR_SIZE_VER0`.
const SCHED_ATTR_SIZE: u32 = 48;
const _: () = assert!(size_of::<SchedAttr>() == 48);

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
