//! The filter: exactly what ramshot names, and what this program itself needs.

use std::collections::BTreeMap;
use std::error::Error;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use ramshot::seccomp::Rule;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// What the program does beside ramshot: it ends, prints, and is told when it does something else. (Its vCPUs need nothing
/// that ramshot does not.)
const OWN: &[i64] = &[libc::SYS_exit_group, libc::SYS_rt_sigreturn];

/// Lets every thread of the process make these system calls and no other: SIGSYS.
pub(crate) fn install(lists: &[&[Rule]]) -> Result<(), Box<dyn Error>> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = OWN.iter().map(|number| (*number, Vec::new())).collect();
    for rule in lists.iter().copied().flatten() {
        let conditions = rules.entry(rule.number).or_default();
        if let Some(request) = rule.request {
            let equals = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(request))?;
            conditions.push(SeccompRule::new(vec![equals])?);
        }
    }
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, arch)?;
    seccompiler::apply_filter_all_threads(&BpfProgram::try_from(filter)?)?;
    Ok(())
}

/// Ends the program with code 31 and the number of the system call that was not allowed.
pub(crate) fn report_violations() -> Result<(), Box<dyn Error>> {
    extern "C" fn report(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel hands out a valid siginfo. `si_syscall` of a SIGSYS lies behind the address of the call.
        let number = unsafe { info.cast::<i32>().add(6).read() };
        let mut text = *b"forbidden system call 0000\n";
        let digits = [1000, 100, 10, 1].map(|unit| b'0' + u8::try_from(number / unit % 10).unwrap_or(0));
        text[22..26].copy_from_slice(&digits);
        // SAFETY: write(2) and _exit(2) may be called in a signal handler.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::_exit(31);
        }
    }
    let action = SigAction::new(SigHandler::SigAction(report), SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler calls nothing but what a signal handler may.
    unsafe { sigaction(Signal::SIGSYS, &action)? };
    Ok(())
}
