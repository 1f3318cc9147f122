//! What a snapshot may leave behind in a process, and must not.

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::RegionInfo;

/// What this process has open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Residue {
    /// What its descriptors refer to, sorted.
    pub descriptors: Vec<String>,
    /// Threads of the engine, and threads that the calling thread started without giving them a name.
    pub threads: Vec<String>,
}

impl Residue {
    /// Of now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn now() -> io::Result<Self> {
        let mut descriptors = Vec::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            // Gone already: it is the one that reads the folder.
            let Ok(link) = fs::read_link(entry?.path()) else { continue };
            let link = link.to_string_lossy().into_owned();
            if !(link.starts_with("/proc/") && link.ends_with("/fd")) {
                descriptors.push(link);
            }
        }
        descriptors.sort();
        Ok(Self { descriptors, threads: engine_threads()? })
    }
}

/// Names of the engine's threads in this process, and of threads that inherited the calling thread's name from it.
///
/// # Errors
/// `/proc` cannot be read.
pub fn engine_threads() -> io::Result<Vec<String>> {
    let me = fs::read_to_string("/proc/thread-self/comm")?;
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        // Gone already: it has ended.
        let Ok(name) = fs::read_to_string(entry?.path().join("comm")) else { continue };
        if name.starts_with("ramshot-") || name == me {
            threads.push(name.trim_end().to_owned());
        }
    }
    threads.sort();
    Ok(threads)
}

/// Mappings of `regions` that a userfaultfd is registered for: each with its flags.
///
/// # Errors
/// `/proc/self/smaps` cannot be read.
pub fn registered(regions: &[RegionInfo]) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut current = None;
    for line in fs::read_to_string("/proc/self/smaps")?.lines() {
        if let Some((start, end)) = range_of(line) {
            let ours = regions.iter().any(|r| start < r.host + r.len && r.host < end);
            current = ours.then(|| line.to_owned());
        } else if let (Some(mapping), Some(flags)) = (&current, line.strip_prefix("VmFlags:"))
            && flags.split_ascii_whitespace().any(|flag| ["uw", "um", "ui"].contains(&flag))
        {
            found.push(format!("{mapping} ({})", flags.trim()));
        }
    }
    Ok(found)
}

/// Start and end of the mapping that a line of `maps` or `smaps` is about.
fn range_of(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// How many pages of `regions` are write-protected by a userfaultfd (bit 57 of the page map).
///
/// # Errors
/// `/proc/self/pagemap` cannot be read.
pub fn protected_pages(regions: &[RegionInfo]) -> io::Result<u64> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut protected = 0;
    let mut entries = vec![0; 512 * 8];
    for region in regions {
        let (mut page, end) = (region.host / 4096, (region.host + region.len) / 4096);
        while page < end {
            let count = usize::try_from((end - page).min(512)).unwrap_or(512);
            let entries = entries.get_mut(..count * 8).unwrap_or_default();
            pagemap.read_exact_at(entries, page * 8)?;
            protected +=
                entries.as_chunks::<8>().0.iter().filter(|e| u64::from_le_bytes(**e) >> 57 & 1 == 1).count() as u64;
            page += count as u64;
        }
    }
    Ok(protected)
}

/// Buffers inside `regions` that this process has registered with an io_uring: their pages are pinned, and what the kernel
/// writes there is not seen by a snapshot.
///
/// # Errors
/// `/proc` cannot be read.
pub fn registered_buffers(regions: &[RegionInfo]) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        if !fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy() == "anon_inode:[io_uring]") {
            continue;
        }
        // "UserBufs:    1", then a line for each: "    0: 0x7f5b83e00000/4096".
        let info = fs::read_to_string(std::path::Path::new("/proc/self/fdinfo").join(entry.file_name()))?;
        for line in info.lines().skip_while(|line| !line.starts_with("UserBufs:")).skip(1) {
            let Some((start, len)) = line.split_once(": 0x").and_then(|(_, buffer)| buffer.split_once('/')) else {
                break;
            };
            let (Ok(start), Ok(len)) = (u64::from_str_radix(start, 16), len.trim().parse::<u64>()) else { break };
            if regions.iter().any(|r| start < r.host + r.len && r.host < start + len) {
                found.push(line.trim().to_owned());
            }
        }
    }
    Ok(found)
}
