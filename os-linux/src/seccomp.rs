//! What a seccomp filter must allow, as data: the system calls of a snapshot, and of nothing else.
//!
//! The lists have the form of `seccompiler`'s rules and of Firecracker's filters in JSON (`docs/seccomp/` in the
//! repository, a file for each architecture, made of these lists): a system call and, for `ioctl`, its request, which is
//! argument 1 compared as 32 bits. What the VMM's own threads need besides is the VMM's to know.

use crate::uapi;

/// A system call that is to be allowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Rule {
    /// Its name.
    pub syscall: &'static str,
    /// Its number on this architecture.
    pub number: i64,
    /// The only request allowed, if it is `ioctl`: argument 1, 32 bits. There is a rule for each.
    pub request: Option<u32>,
    /// What it is needed for.
    pub why: &'static str,
}

impl Rule {
    const fn ioctl(request: u32, why: &'static str) -> Self {
        Self { syscall: "ioctl", number: libc::SYS_ioctl, request: Some(request), why }
    }
}

macro_rules! rule {
    ($syscall:ident, $number:ident, $why:literal) => {
        Rule { syscall: stringify!($syscall), number: libc::$number, request: None, why: $why }
    };
}

/// From [`prepare`] on: what its threads, `arm_ahead`, `precopy`, `begin`, `finish`, cancelling and dropping call. A filter that
/// is installed on all threads after `prepare` has returned (its threads have set themselves up by then) allows this and
/// what the VMM needs.
///
/// [`prepare`]: https://docs.rs/ramshot/latest/ramshot/fn.prepare.html
pub const RUNNING: &[Rule] = &[
    rule!(futex, SYS_futex, "locks, and threads that wait for each other"),
    Rule::ioctl(uapi::request::UFFDIO_WRITEPROTECT, "UFFDIO_WRITEPROTECT: pages are protected, and released"),
    Rule::ioctl(uapi::request::UFFDIO_WAKE, "UFFDIO_WAKE: whoever waits where nothing is protected any more"),
    Rule::ioctl(
        uapi::request::UFFDIO_UNREGISTER,
        "UFFDIO_UNREGISTER: the end; and a release while mappings change all the time",
    ),
    Rule::ioctl(uapi::request::UFFDIO_REGISTER, "UFFDIO_REGISTER: what was released that way is taken back"),
    Rule::ioctl(uapi::request::PAGEMAP_SCAN, "PAGEMAP_SCAN: what is populated (Linux 6.7)"),
    Rule::ioctl(uapi::request::KVM_GET_DIRTY_LOG, "KVM_GET_DIRTY_LOG: increments and pre-copy with KvmDirtyLog"),
    Rule::ioctl(uapi::request::KVM_RESET_DIRTY_RINGS, "KVM_RESET_DIRTY_RINGS: the same with KvmDirtyRing"),
    rule!(read, SYS_read, "events of the userfaultfd, interrupts"),
    rule!(write, SYS_write, "interrupts of the thread that waits for events (an eventfd)"),
    #[cfg(target_arch = "x86_64")]
    rule!(poll, SYS_poll, "waiting for events"),
    rule!(ppoll, SYS_ppoll, "waiting for events, where there is no poll"),
    rule!(pread64, SYS_pread64, "what is populated, before Linux 6.7 (/proc/self/pagemap)"),
    rule!(lseek, SYS_lseek, "what a memory file holds (SEEK_DATA)"),
    #[cfg(target_arch = "x86_64")]
    rule!(fstat, SYS_fstat, "what a file is"),
    rule!(newfstatat, SYS_newfstatat, "what a file is"),
    #[cfg(target_arch = "x86_64")]
    rule!(stat, SYS_stat, "what a file is (musl)"),
    #[cfg(target_arch = "x86_64")]
    rule!(lstat, SYS_lstat, "what a file is (musl)"),
    rule!(statx, SYS_statx, "what a file is"),
    rule!(pwritev, SYS_pwritev, "pages and the trailer into the image"),
    rule!(pwrite64, SYS_pwrite64, "the same, one piece"),
    rule!(fallocate, SYS_fallocate, "room in the image ahead of its pages, and back what was not needed"),
    rule!(fdatasync, SYS_fdatasync, "commit: the pages"),
    rule!(fsync, SYS_fsync, "commit: the trailer, then the directory"),
    rule!(linkat, SYS_linkat, "commit: the image gets its name"),
    #[cfg(target_arch = "x86_64")]
    rule!(link, SYS_link, "commit: the image gets its name (musl)"),
    #[cfg(target_arch = "x86_64")]
    rule!(rename, SYS_rename, "commit: the image replaces the one before"),
    rule!(renameat, SYS_renameat, "commit: the image replaces the one before"),
    rule!(renameat2, SYS_renameat2, "commit: the image replaces the one before"),
    #[cfg(target_arch = "x86_64")]
    rule!(unlink, SYS_unlink, "commit: the name it had meanwhile; an image that was cancelled"),
    rule!(unlinkat, SYS_unlinkat, "commit: the name it had meanwhile; an image that was cancelled"),
    rule!(openat, SYS_openat, "commit: the directory is opened to be synced; /proc/self/maps if a mapping was changed"),
    #[cfg(target_arch = "x86_64")]
    rule!(open, SYS_open, "commit: the directory is opened to be synced (musl)"),
    rule!(fcntl, SYS_fcntl, "a descriptor is closed on exec (musl)"),
    rule!(flock, SYS_flock, "the lock of the image is given up"),
    rule!(close, SYS_close, "descriptors, at the end"),
    rule!(brk, SYS_brk, "the allocator"),
    rule!(mmap, SYS_mmap, "the allocator"),
    rule!(mremap, SYS_mremap, "the allocator"),
    rule!(munmap, SYS_munmap, "the allocator; a thread's stack, at its end"),
    rule!(mprotect, SYS_mprotect, "the allocator"),
    rule!(madvise, SYS_madvise, "the allocator; a thread's stack, at its end"),
    rule!(getrandom, SYS_getrandom, "the allocator, the first time (glibc)"),
    rule!(sigaltstack, SYS_sigaltstack, "a thread's end"),
    rule!(rt_sigprocmask, SYS_rt_sigprocmask, "a thread's end"),
    rule!(exit, SYS_exit, "a thread's end"),
    rule!(clock_gettime, SYS_clock_gettime, "times, where the kernel has no vDSO for it"),
    rule!(clock_nanosleep, SYS_clock_nanosleep, "mappings are being changed: another try in 10 us"),
    rule!(nanosleep, SYS_nanosleep, "mappings are being changed: another try in 10 us (musl)"),
    rule!(sched_yield, SYS_sched_yield, "threads that make way; the allocator's locks (musl)"),
    rule!(restart_syscall, SYS_restart_syscall, "a wait that was stopped goes on"),
];

/// What `prepare` calls on top of [`RUNNING`]: for a VMM whose filters are on long before it is asked for a snapshot. Its
/// thread that prepares needs both; threads inherit its filter.
pub const PREPARE: &[Rule] = &[
    Rule::ioctl(uapi::request::USERFAULTFD_IOC_NEW, "USERFAULTFD_IOC_NEW: a userfaultfd of /dev/userfaultfd"),
    rule!(userfaultfd, SYS_userfaultfd, "a userfaultfd, where there is no such device"),
    Rule::ioctl(uapi::request::UFFDIO_API, "UFFDIO_API: which features there are, and which are used"),
    rule!(eventfd2, SYS_eventfd2, "interrupts"),
    rule!(memfd_create, SYS_memfd_create, "which device the kernel keeps shared memory on"),
    #[cfg(target_arch = "x86_64")]
    rule!(readlink, SYS_readlink, "the name of the image (through a link)"),
    rule!(readlinkat, SYS_readlinkat, "the name of the image (through a link)"),
    rule!(ftruncate, SYS_ftruncate, "the image gets its length"),
    rule!(fchmod, SYS_fchmod, "the permissions of the image it replaces"),
    rule!(clone3, SYS_clone3, "threads"),
    rule!(clone, SYS_clone, "threads (musl; before Linux 5.3)"),
    rule!(set_robust_list, SYS_set_robust_list, "a thread's beginning"),
    rule!(rseq, SYS_rseq, "a thread's beginning"),
    rule!(prctl, SYS_prctl, "a thread's name; names of the allocator's memory"),
    rule!(getpid, SYS_getpid, "the id of the snapshot"),
    rule!(gettid, SYS_gettid, "a thread's beginning"),
    rule!(sched_getaffinity, SYS_sched_getaffinity, "a thread's beginning (its stack)"),
    rule!(sched_setscheduler, SYS_sched_setscheduler, "the fault thread runs as soon as it is woken"),
    rule!(sched_setattr, SYS_sched_setattr, "the others make way"),
    rule!(setpriority, SYS_setpriority, "both, where the former is not allowed"),
    rule!(prlimit64, SYS_prlimit64, "the size of a thread's stack"),
    rule!(rt_sigaction, SYS_rt_sigaction, "a thread's beginning (glibc)"),
];
