//! An ELF64 core file of guest-physical memory.
//!
//! ```text
//! 0        64             64 + 56 * (1 + blocks)       ram_offset, a multiple of 4096
//! ┌────────┬──────────────┬───────────────────────┬───┬──────────────────────────────────┐
//! │ header │ PT_NOTE,     │ note: VMCOREINFO of a │   │ the blocks back to back, as they │
//! │        │ PT_LOAD ...  │ Linux guest, or empty │   │ lie in the snapshot              │
//! └────────┴──────────────┴───────────────────────┴───┴──────────────────────────────────┘
//! ```
//! Virtual and physical address of a PT_LOAD are both the guest-physical one: gdb goes by the former, crash and drgn
//! translate by the latter.

use ramshot::file::FileBlock;

use super::{Machine, in_image};
use crate::chain::PAGE_BYTES;
use crate::outcome::Failure;

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
/// Room for the note: what a Linux guest keeps is at most a page.
const NOTE_ROOM: u64 = 4096;

const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable, executable.
const PF_RWX: u32 = 7;
/// From this number of program headers on, ELF counts them elsewhere.
const PN_XNUM: u16 = 0xffff;

/// Where what lies in the core file.
#[derive(Debug)]
pub(super) struct Core {
    machine: u16,
    /// Guest address, offset in the flat RAM and length of each block.
    loads: Vec<(u64, u64, u64)>,
    count: u16,
    ram_offset: u64,
}

impl Core {
    pub(super) fn new(machine: Machine, blocks: &[FileBlock]) -> Result<Self, Failure> {
        let load = |block: &FileBlock| (block.guest.0, block.first_page.0 * PAGE_BYTES, block.pages() * PAGE_BYTES);
        let loads: Vec<_> = in_image(blocks).map(load).collect();
        let count = u16::try_from(loads.len() + 1).ok().filter(|&count| count < PN_XNUM).ok_or_else(|| {
            Failure::says(format!("{} RAM blocks are more than an ELF file's program headers can name", loads.len()))
        })?;
        let notes = HEADER + PROGRAM_HEADER * u64::from(count);
        let machine = match machine {
            Machine::X86_64 => 62,
            Machine::Aarch64 => 183,
            Machine::Riscv64 => 243,
        };
        Ok(Self { machine, loads, count, ram_offset: (notes + NOTE_ROOM).next_multiple_of(PAGE_BYTES) })
    }

    /// Where the flat RAM starts in the core file.
    pub(super) const fn ram_offset(&self) -> u64 {
        self.ram_offset
    }

    /// What stands before the RAM.
    pub(super) fn headers(&self, note: Option<&[u8]>) -> Vec<u8> {
        let note = note.filter(|note| note.len() as u64 <= NOTE_ROOM).unwrap_or_default();
        let mut out = Bytes(Vec::new());
        // Class 64, little-endian, version 1, System V.
        out.raw(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        out.u16(ET_CORE).u16(self.machine).u32(1);
        // No entry; program headers behind this one; no sections, no flags.
        out.u64(0).u64(HEADER).u64(0).u32(0);
        out.u16(64).u16(56).u16(self.count).u16(0).u16(0).u16(0);

        let notes = HEADER + PROGRAM_HEADER * u64::from(self.count);
        out.u32(PT_NOTE).u32(0).u64(notes).u64(0).u64(0).u64(note.len() as u64).u64(note.len() as u64).u64(4);
        for &(guest, offset, len) in &self.loads {
            out.u32(PT_LOAD).u32(PF_RWX).u64(self.ram_offset + offset).u64(guest).u64(guest);
            out.u64(len).u64(len).u64(PAGE_BYTES);
        }
        out.raw(note);
        out.0
    }
}

/// Little-endian numbers one behind the other.
struct Bytes(Vec<u8>);

impl Bytes {
    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }
}
