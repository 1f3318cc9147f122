//! Puts the guest image and the PVH start info into guest memory.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::guest::GuestError;
use crate::memory::Memory;

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// RAM between here and 1 MiB is where PCs have other things.
const LOW_END: u64 = 0xa_0000;
const HIGH_START: u64 = 0x10_0000;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const PVH_MAGIC: u32 = 0x336e_c578;
const PVH_RAM: u32 = 1;

/// The ELF header of a 64-bit file.
#[repr(C)]
#[derive(FromBytes, KnownLayout, Immutable)]
struct ElfHeader {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers: u64,
    section_headers: u64,
    flags: u32,
    size: u16,
    program_header_size: u16,
    program_header_count: u16,
    rest: [u16; 3],
}

#[repr(C)]
#[derive(FromBytes, KnownLayout, Immutable)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// `hvm_start_info` of Xen's public headers, version 1.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_address: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Where a vCPU begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Instruction pointer, 32-bit protected mode.
    pub(crate) rip: u64,
    /// Guest-physical address of the start info, for `ebx`.
    pub(crate) start_info: u64,
}

/// Loads `image` and tells it `command_line` and the memory map.
pub(crate) fn load(memory: &Memory, image: &[u8], command_line: &str) -> Result<Entry, GuestError> {
    let (header, _) =
        ElfHeader::read_from_prefix(image).map_err(|_| GuestError::Image("shorter than an ELF header"))?;
    if header.ident.get(..6) != Some(b"\x7fELF\x02\x01") || header.machine != 62 {
        return Err(GuestError::Image("not an ELF file for x86-64"));
    }
    let mut rip = None;
    for index in 0..u64::from(header.program_header_count) {
        let at = header.program_headers + index * u64::from(header.program_header_size);
        let rest = slice(image, at, size_of::<ProgramHeader>() as u64)?;
        let segment =
            ProgramHeader::read_from_bytes(rest).map_err(|_| GuestError::Image("a damaged program header"))?;
        let bytes = slice(image, segment.offset, segment.file_size)?;
        match segment.kind {
            // What goes beyond the file is zero already: RAM is fresh.
            PT_LOAD if !bytes.is_empty() => memory.write(segment.physical_address, bytes)?,
            PT_NOTE => rip = rip.or_else(|| entry_note(bytes)),
            _ => {}
        }
    }
    let rip = rip.ok_or(GuestError::Image("no PVH entry note"))?;

    let map = memory_map(memory);
    let info = StartInfo {
        magic: PVH_MAGIC,
        version: 1,
        flags: 0,
        modules: 0,
        modules_address: 0,
        command_line: COMMAND_LINE,
        rsdp: 0,
        memory_map: MEMORY_MAP,
        memory_map_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    memory.write(START_INFO, info.as_bytes())?;
    memory.write(MEMORY_MAP, map.as_bytes())?;
    memory.write(COMMAND_LINE, command_line.as_bytes())?;
    memory.write(COMMAND_LINE + command_line.len() as u64, &[0])?;
    Ok(Entry { rip, start_info: START_INFO })
}

fn memory_map(memory: &Memory) -> Vec<MemoryMapEntry> {
    let ram = |from: u64, to: u64| MemoryMapEntry { address: from, size: to - from, kind: PVH_RAM, reserved: 0 };
    let mut map = vec![ram(0, LOW_END)];
    for region in memory.regions() {
        map.push(ram(region.guest.max(HIGH_START), region.guest + region.len));
    }
    map
}

fn slice(image: &[u8], offset: u64, len: u64) -> Result<&[u8], GuestError> {
    let range = || {
        let start = usize::try_from(offset).ok()?;
        Some(start..start.checked_add(usize::try_from(len).ok()?)?)
    };
    range().and_then(|range| image.get(range)).ok_or(GuestError::Image("truncated"))
}

/// The PVH entry among the notes of a segment.
fn entry_note(mut notes: &[u8]) -> Option<u64> {
    loop {
        let (head, rest) = <[u32; 3]>::read_from_prefix(notes).ok()?;
        let [name_len, len, kind] = head;
        let padded = |n: u32| usize::try_from(n.next_multiple_of(4)).ok();
        let (name, rest) = rest.split_at_checked(padded(name_len)?)?;
        let (desc, rest) = rest.split_at_checked(padded(len)?)?;
        if name.starts_with(b"Xen\0") && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return match len {
                4 => Some(u64::from(u32::from_le_bytes(desc.try_into().ok()?))),
                8 => Some(u64::from_le_bytes(desc.try_into().ok()?)),
                _ => None,
            };
        }
        notes = rest;
    }
}
