//! What is mapped where in a process, as `/proc/PID/maps` and `smaps` tell it.

use std::fs;
use std::io;

use ramshot_core::{HostAddr, HostRange};

use crate::owner::Owner;

/// One line of `maps`: a virtual memory area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) range: HostRange,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) shared: bool,
    /// Offset in the file behind it.
    pub(crate) offset: u64,
    /// Major and minor number of the file system.
    pub(crate) dev: (u32, u32),
    /// 0: no file behind it.
    pub(crate) inode: u64,
    pub(crate) path: String,
}

/// What `smaps` knows beyond [`Vma`]. Reading it walks the page tables of the whole process: before T0 only, and
/// only where `maps` does not say enough.
#[derive(Clone, Debug)]
pub(crate) struct Detail {
    pub(crate) range: HostRange,
    /// Bytes of the page the kernel maps by default: not 2 MiB for THP.
    pub(crate) page_size: u64,
    flags: String,
}

impl Detail {
    /// Whether a two-letter flag of `VmFlags` is set (proc(5)).
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.split_ascii_whitespace().any(|f| f == flag)
    }

    /// Whether a userfaultfd is registered there: for missing pages, writes or minor faults.
    pub(crate) fn is_registered(&self) -> bool {
        ["um", "uw", "ui"].iter().any(|flag| self.has(flag))
    }
}

/// All areas, ascending.
pub(crate) fn read(owner: &Owner) -> io::Result<Vec<Vma>> {
    Ok(parse(&fs::read_to_string(owner.proc("maps"))?))
}

/// All areas with what smaps knows of them, ascending.
pub(crate) fn read_details(owner: &Owner) -> io::Result<Vec<Detail>> {
    Ok(parse_details(&fs::read_to_string(owner.proc("smaps"))?))
}

/// The parts of `range` that a userfaultfd is registered for.
pub(crate) fn registered_in(owner: &Owner, range: HostRange) -> io::Result<Vec<HostRange>> {
    let details = read_details(owner)?;
    Ok(details.iter().filter(|d| d.is_registered()).filter_map(|d| intersection(d.range, range)).collect())
}

/// What the two have in common.
pub(crate) fn intersection(a: HostRange, b: HostRange) -> Option<HostRange> {
    let start = a.start.max(b.start);
    let end = a.end().min(b.end());
    (start < end).then(|| HostRange::new(start, end.0 - start.0))
}

/// The areas of `vmas` that make up `range`, cut to it; or the first gap.
pub(crate) fn cover(vmas: &[Vma], range: HostRange) -> Result<Vec<Vma>, HostRange> {
    let mut found = Vec::new();
    let mut at = range.start;
    for vma in vmas {
        let Some(common) = intersection(vma.range, range) else { continue };
        if common.start > at {
            return Err(HostRange::new(at, common.start.0 - at.0));
        }
        at = common.end();
        found.push(Vma { range: common, offset: vma.offset + (common.start.0 - vma.range.start.0), ..vma.clone() });
    }
    if at < range.end() { Err(HostRange::new(at, range.end().0 - at.0)) } else { Ok(found) }
}

fn parse(text: &str) -> Vec<Vma> {
    text.lines().filter_map(parse_line).collect()
}

/// `7f12a000-7f12b000 rw-s 00001000 00:01 1045   /memfd:ram (deleted)`
fn parse_line(line: &str) -> Option<Vma> {
    let mut rest = line;
    let mut field = || {
        let (field, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail.trim_start();
        field
    };
    let (start, end) = field().split_once('-')?;
    let (perms, offset, dev, inode) = (field(), field(), field(), field());
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    let (major, minor) = dev.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let has = |at: usize, flag: u8| perms.as_bytes().get(at) == Some(&flag);
    Some(Vma {
        range: HostRange::new(HostAddr(start), end.checked_sub(start)?),
        readable: has(0, b'r'),
        writable: has(1, b'w'),
        shared: has(3, b's'),
        offset: hex(offset)?,
        dev: (number(major)?, number(minor)?),
        inode: inode.parse().ok()?,
        path: rest.to_owned(),
    })
}

fn parse_details(text: &str) -> Vec<Detail> {
    let mut details: Vec<Detail> = Vec::new();
    for line in text.lines() {
        // Header lines start with a lower-case hexadecimal digit, keys with a capital.
        if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) {
            if let Some(vma) = parse_line(line) {
                details.push(Detail { range: vma.range, page_size: 0, flags: String::new() });
            }
        } else if let (Some(detail), Some((key, value))) = (details.last_mut(), line.split_once(':')) {
            match key {
                "KernelPageSize" => {
                    let kib = value.trim().strip_suffix(" kB").and_then(|n| n.trim().parse::<u64>().ok());
                    detail.page_size = kib.unwrap_or(0).saturating_mul(1024);
                }
                "VmFlags" => value.trim().clone_into(&mut detail.flags),
                _ => {}
            }
        }
    }
    details
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55e0c0a00000-55e0c0a21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000200000 rw-s 00100000 00:01 1045                       /memfd:guest ram (deleted)
7f0000200000-7f0000400000 rw-p 00000000 00:00 0 
7f0000500000-7f0000600000 r--p 00002000 fe:00 1311                       /tmp/a b
";

    fn range(start: u64, len: u64) -> HostRange {
        HostRange::new(HostAddr(start), len)
    }

    #[test]
    fn lines_are_taken_apart() {
        let vmas = parse(MAPS);
        assert_eq!(vmas.len(), 4);
        assert_eq!((vmas[0].inode, vmas[0].path.as_str()), (0, "[heap]"));
        assert_eq!(
            vmas[1],
            Vma {
                range: range(0x7f00_0000_0000, 0x20_0000),
                readable: true,
                writable: true,
                shared: true,
                offset: 0x10_0000,
                dev: (0, 1),
                inode: 1045,
                path: "/memfd:guest ram (deleted)".into(),
            }
        );
        assert_eq!(vmas[2].path, "");
        assert_eq!((vmas[3].dev, vmas[3].path.as_str(), vmas[3].writable), ((0xfe, 0), "/tmp/a b", false));
    }

    #[test]
    fn lines_that_are_no_mapping_are_left_out() {
        assert_eq!(parse("\nnot a line\n7f00-7e00 rw-p 0 00:00 0\n7f00-8000\n").len(), 0);
    }

    #[test]
    fn a_range_is_covered_by_cut_areas_or_has_a_first_gap() {
        let vmas = parse(MAPS);
        let found = cover(&vmas, range(0x7f00_0010_0000, 0x20_0000)).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].range, found[0].offset), (range(0x7f00_0010_0000, 0x10_0000), 0x20_0000));
        assert_eq!(found[1].range, range(0x7f00_0020_0000, 0x10_0000));
        assert_eq!(cover(&vmas, range(0x7f00_0030_0000, 0x40_0000)), Err(range(0x7f00_0040_0000, 0x10_0000)));
        assert_eq!(cover(&vmas, range(0x7f00_0050_0000, 0x20_0000)), Err(range(0x7f00_0060_0000, 0x10_0000)));
        assert_eq!(cover(&vmas, range(0x1000, 0x1000)), Err(range(0x1000, 0x1000)));
    }

    #[test]
    fn smaps_gives_page_size_and_flags() {
        let text = "\
7f0000000000-7f0000200000 rw-s 00000000 00:0f 3 /anon_hugepage (deleted)
Size:               2048 kB
KernelPageSize:     2048 kB
VmFlags: rd wr sh mr mw me ms de ht uw sd 
7f0000200000-7f0000400000 rw-p 00000000 00:00 0 
KernelPageSize:        4 kB
VmFlags: rd wr mr mw me ac sd 
";
        let details = parse_details(text);
        assert_eq!(details.len(), 2);
        assert_eq!(details[0].page_size, 2 << 20);
        assert!(details[0].has("ht") && details[0].is_registered());
        assert!(!details[1].is_registered() && details[1].page_size == 4096);
    }

    #[test]
    fn this_process_can_be_read() {
        let here = HostAddr(std::ptr::from_ref(MAPS).addr() as u64);
        assert!(read(&Owner::Us).unwrap().iter().any(|vma| vma.range.contains(here) && vma.readable));
        assert!(read_details(&Owner::Us).unwrap().iter().any(|d| d.range.contains(here) && d.page_size >= 4096));
    }
}
