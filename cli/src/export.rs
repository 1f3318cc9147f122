//! `ramshot export`: the memory in a form that other tools open.

mod elf;
mod vmcoreinfo;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use ramshot::core::{PageId, Run};
use ramshot::file::FileBlock;

use crate::chain::{Chain, Origin, PAGE_BYTES, Parents, Take};
use crate::columns::shown;
use crate::out::Out;
use crate::outcome::{Answer, Failure};
use crate::progress::Progress;
use crate::size;
use crate::target::Target;

/// Writes the memory as a raw image or as an ELF core file.
///
/// Every page is checked against its CRC-32C on the way. Zero pages become holes. The file can be read by its owner
/// alone, and has its name only when it is complete.
#[derive(Args, Debug)]
pub(crate) struct Export {
    /// The snapshot file.
    #[arg(value_name = "SNAPSHOT")]
    path: PathBuf,
    /// The file to write.
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    /// What to write.
    #[arg(long, value_enum)]
    format: Format,
    #[command(flatten)]
    parents: Parents,
    /// Processor of the VM, for the ELF header. A snapshot does not say; if it is not given: that of this machine.
    #[arg(long, value_enum)]
    machine: Option<Machine>,
    /// Replace OUTPUT if it exists.
    #[arg(long)]
    replace: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// The RAM blocks back to back, in the snapshot's order: a Firecracker memory file.
    Raw,
    /// An ELF64 core file with a program header for each RAM block, at its guest-physical address: gdb, crash, drgn.
    Elf,
}

/// The machines of the ELF header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Machine {
    #[value(name = "x86-64", alias = "x86_64")]
    X86_64,
    #[value(alias = "arm64")]
    Aarch64,
    Riscv64,
}

impl Machine {
    fn here() -> Result<Self, Failure> {
        match std::env::consts::ARCH {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" => Ok(Self::Aarch64),
            "riscv64" => Ok(Self::Riscv64),
            other => {
                Err(Failure::says(format!("the VM's processor is not known (this machine is {other}): give --machine")))
            }
        }
    }
}

impl Export {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        if self.format == Format::Raw && self.machine.is_some() {
            return Err(Failure::says("--machine is for --format elf: a raw image has no header"));
        }
        let chain = Chain::open(&self.path, &self.parents.files)?;
        chain.complete()?;
        match self.format {
            Format::Raw => self.raw(&chain)?,
            Format::Elf => self.elf(&chain)?,
        }
        let (file, name) = (chain.top(), shown(&self.output.display().to_string()));
        writeln!(
            out,
            "{name}: {} of RAM in {}",
            size::bytes(file.ram_bytes()),
            size::blocks(in_image(file.blocks()).count())
        )?;
        Ok(Answer::Yes)
    }

    fn raw(&self, chain: &Chain) -> Result<(), Failure> {
        let mut target = Target::create(&self.output, self.replace)?;
        target.set_len(chain.top().ram_bytes())?;
        copy(chain, &mut |page, bytes| target.write_at(page.0 * PAGE_BYTES, bytes))?;
        target.commit()
    }

    fn elf(&self, chain: &Chain) -> Result<(), Failure> {
        let machine = self.machine.map_or_else(Machine::here, Ok)?;
        let core = elf::Core::new(machine, chain.top().blocks())?;
        let mut target = Target::create(&self.output, self.replace)?;
        target.set_len(core.ram_offset() + chain.top().ram_bytes())?;
        let mut note = None;
        copy(chain, &mut |page, bytes| {
            note = note.take().or_else(|| vmcoreinfo::find(bytes));
            target.write_at(core.ram_offset() + page.0 * PAGE_BYTES, bytes)
        })?;
        target.write_at(0, &core.headers(note.as_deref()))?;
        target.commit()
    }
}

/// The blocks that have pages in the image.
fn in_image(blocks: &[FileBlock]) -> impl Iterator<Item = &FileBlock> {
    blocks.iter().filter(|block| block.pages() > 0)
}

/// Calls `each` with all data pages in order, some at a time, each of them checked.
fn copy(chain: &Chain, each: &mut Take<'_>) -> Result<(), Failure> {
    let total = chain.top().pages();
    let mut progress = Progress::new("exporting");
    let mut buffer = Vec::new();
    chain.resolve(Run::new(PageId(0), total), &mut |run, origin| {
        if let Origin::Data(depth) = origin {
            chain.read(run, depth, &mut buffer, &mut |page, bytes| {
                progress.bytes(page.0 * PAGE_BYTES, total * PAGE_BYTES);
                each(page, bytes)
            })?;
        }
        Ok(())
    })
}
