//! Memory of this process that is not guest RAM.

use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};

/// Has the kernel make `bytes` up of huge pages where it can (`MADV_HUGEPAGE`), as far as whole ones fit. For memory that is
/// not touched yet: what lies together is faster to copy, and to hand to a disk. It is a hint, and what comes of it is
/// not told.
pub fn prefer_huge_pages(bytes: &mut [u8]) {
    const HUGE: usize = 2 << 20;
    let skip = bytes.as_ptr().align_offset(HUGE);
    let whole = bytes.get_mut(skip..).map(|rest| (rest.len() / HUGE * HUGE, NonNull::from(rest).cast()));
    let Some((len, start)) = whole.filter(|(len, _)| *len > 0) else { return };
    // SAFETY: the range lies inside `bytes`, which is ours alone; the advice changes no byte of it.
    if let Err(errno) = unsafe { madvise(start, len, MmapAdvise::MADV_HUGEPAGE) } {
        log::debug!(target: "ramshot::snapshot", "no huge pages for {len:#x} bytes of the pool: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_slice_will_do_and_keeps_what_is_in_it() {
        for len in [0, 1, 4096, (2 << 20) - 1, 5 << 20] {
            let mut bytes = vec![7; len];
            prefer_huge_pages(&mut bytes);
            assert!(bytes.iter().all(|&byte| byte == 7));
        }
    }
}
