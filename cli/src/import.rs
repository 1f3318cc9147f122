//! `ramshot import`: a memory file of another hypervisor as a snapshot.

mod layout;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use ramshot::core::PageId;
use ramshot::file::{FileSink, FileSinkOptions, next_data};
use ramshot::sink::{ImageMeta, ImageSink, PageDigest, Piece, SinkError};

use crate::chain::{PAGE, PAGE_BYTES};
use crate::columns::shown;
use crate::out::Out;
use crate::outcome::{Answer, Failure};
use crate::progress::Progress;
use crate::size;
use layout::{Layout, Region};

/// Bytes read at a time.
const STEP: usize = 1 << 20;

const EXAMPLE: &str = "\
A Firecracker guest of 4 GiB on x86-64, where RAM leaves out the last GiB below 4 GiB:
  ramshot import vm.mem vm.ramshot --region 0+3G --region 4G+1G --device-state vm.vmstate";

/// Makes a snapshot of a raw memory file, such as Firecracker's, whose layout is given.
///
/// The memory file must be a full one: in Firecracker's "Diff" snapshots a hole means "as before", which nothing in the
/// file tells from zero.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLE)]
pub(crate) struct Import {
    /// The memory file.
    #[arg(value_name = "MEMORY")]
    memory: PathBuf,
    /// The snapshot to write.
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    #[command(flatten)]
    layout: LayoutFrom,
    /// A file with the state of vCPUs and devices, to be kept as it is.
    #[arg(long, value_name = "FILE")]
    device_state: Option<PathBuf>,
    /// Leave out what the memory file has beyond the regions.
    #[arg(long)]
    ignore_rest: bool,
    /// Replace OUTPUT if it exists.
    #[arg(long)]
    replace: bool,
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct LayoutFrom {
    /// A RAM block: guest-physical address and length, and if need be a name (ram0, ram1 ... if not) and where it starts
    /// in the file (where the one before it ends, if not). Several, in the order of the file.
    #[arg(long = "region", value_name = "[NAME=]ADDRESS+LENGTH[@OFFSET]", value_parser = layout::parse_region)]
    regions: Vec<Region>,
    /// The blocks as JSON: [{"guest_address": "0x0", "used": 3221225472, "name": "ram0", "offset": 0}, ...]; name and
    /// offset may be left out. The output of `ramshot inspect --json` will do.
    #[arg(long, value_name = "FILE")]
    layout: Option<PathBuf>,
}

impl Import {
    pub(crate) fn run(&self, out: &mut Out) -> Result<Answer, Failure> {
        let regions = match &self.layout.layout {
            Some(path) => layout::read(path)?,
            None => self.layout.regions.clone(),
        };
        let layout = Layout::new(&regions)?;
        let (mut memory, len) = self.open_memory()?;
        self.check_length(&layout, len)?;
        let device_state = match &self.device_state {
            Some(path) => {
                fs::read(path).map_err(|source| Failure::io(format!("cannot read device state {path:?}"), source))?
            }
            None => Vec::new(),
        };
        let options = FileSinkOptions { replace: self.replace, ..FileSinkOptions::default() };
        let sink = FileSink::create(&self.output, &layout.table, &options)
            .map_err(|error| Failure::Refused(Box::new(error)))?;
        let mut copy = Copy::new(&self.memory, &sink, layout.table.pages());
        for piece in &layout.pieces {
            copy.region(&mut memory, piece.offset, piece.first, piece.bytes)?;
        }
        let data = copy.data;
        drop(copy);
        let meta = ImageMeta { device_state, statistics: Vec::new() };
        Box::new(sink).commit(&meta).map_err(not_written)?;
        let name = shown(&self.output.display().to_string());
        let (pages, data) = (size::bytes(layout.table.pages() * PAGE_BYTES), size::bytes(data * PAGE_BYTES));
        writeln!(out, "{name}: {pages} of RAM in {}, {data} of it data", size::blocks(layout.pieces.len()))?;
        Ok(Answer::Yes)
    }

    fn open_memory(&self) -> Result<(File, u64), Failure> {
        let failed = |source| Failure::io(format!("cannot read memory file {:?}", self.memory), source);
        // Before it is opened: a pipe would wait for its writer.
        let metadata = fs::metadata(&self.memory).map_err(failed)?;
        if !metadata.is_file() {
            return Err(Failure::says(format!("cannot read memory file {:?}: it is no regular file", self.memory)));
        }
        Ok((File::open(&self.memory).map_err(failed)?, metadata.len()))
    }

    fn check_length(&self, layout: &Layout, len: u64) -> Result<(), Failure> {
        let path = &self.memory;
        let end = layout.end();
        if end > len {
            return Err(Failure::says(format!(
                "the regions end at byte {end:#x} and {path:?} at {len:#x}: the layout is not that of this file"
            )));
        }
        let rest = len - end;
        if rest > 0 && !self.ignore_rest {
            return Err(Failure::says(format!(
                "{path:?} has {rest:#x} bytes beyond the regions, which end at byte {end:#x}: give the region they belong \
                 to, or --ignore-rest"
            )));
        }
        Ok(())
    }
}

fn not_written(error: SinkError) -> Failure {
    Failure::Refused(Box::new(error))
}

/// The way of the bytes, some at a time.
struct Copy<'a> {
    path: &'a Path,
    sink: &'a FileSink,
    /// Aligned from `aligned` on, as direct I/O wants it.
    buffer: Vec<u8>,
    aligned: usize,
    digests: Vec<PageDigest>,
    /// Pages gone by, of all.
    done: u64,
    total: u64,
    /// Pages with data.
    data: u64,
    progress: Progress,
}

impl<'a> Copy<'a> {
    fn new(path: &'a Path, sink: &'a FileSink, total: u64) -> Self {
        let buffer = vec![0; STEP + PAGE];
        let aligned = buffer.as_ptr().align_offset(PAGE).min(PAGE);
        let progress = Progress::new("importing");
        Self { path, sink, buffer, aligned, digests: Vec::new(), done: 0, total, data: 0, progress }
    }

    /// `len` bytes at `offset` of the memory file are the pages from `first` on. Holes are not read.
    fn region(&mut self, memory: &mut File, offset: u64, first: PageId, len: u64) -> Result<(), Failure> {
        let mut at = 0;
        while at < len {
            let next = next_data(memory, offset + at).map_err(|source| self.unreadable(offset + at, source))?;
            let next = next.unwrap_or(u64::MAX).saturating_sub(offset).min(len);
            // A page that starts in the hole may end in data.
            let next = (next - next % PAGE_BYTES).max(at);
            self.done += (next - at) / PAGE_BYTES;
            at = next;
            let step = (STEP as u64).min(len - at);
            if step > 0 {
                self.step(memory, offset + at, PageId(first.0 + at / PAGE_BYTES), step)?;
                at += step;
            }
        }
        Ok(())
    }

    fn step(&mut self, memory: &mut File, offset: u64, first: PageId, len: u64) -> Result<(), Failure> {
        let end = self.aligned + usize::try_from(len).unwrap_or(STEP);
        let bytes = self.buffer.get_mut(self.aligned..end).unwrap_or_default();
        let read = memory.seek(SeekFrom::Start(offset)).and_then(|_| memory.read_exact(bytes));
        if let Err(source) = read {
            return Err(self.unreadable(offset, source));
        }
        self.digests.clear();
        self.digests.extend(bytes.as_chunks::<PAGE>().0.iter().map(PageDigest::of));
        self.data += self.digests.iter().filter(|digest| **digest != PageDigest::Zero).count() as u64;
        self.sink.write(&[Piece { first, bytes, digests: &self.digests }]).map_err(not_written)?;
        self.done += len / PAGE_BYTES;
        self.progress.bytes(self.done * PAGE_BYTES, self.total * PAGE_BYTES);
        Ok(())
    }

    fn unreadable(&self, offset: u64, source: std::io::Error) -> Failure {
        let what = match source.kind() {
            ErrorKind::UnexpectedEof => "it was cut off while it was read",
            _ => "it cannot be read",
        };
        Failure::io(format!("memory file {:?}: {what} at byte {offset:#x}", self.path), source)
    }
}
