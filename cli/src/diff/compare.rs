//! The comparison.

use ramshot::core::{PAGE_SIZE, PageId, Run, Treatment};
use ramshot::file::FileBlock;

use crate::chain::{Chain, Origin, PAGE, PAGE_BYTES};
use crate::outcome::Failure;
use crate::progress::Progress;

/// Pages compared at a time.
const STEP: u64 = 256;

/// What differs.
#[derive(Debug)]
pub(super) struct Differences {
    /// Differences of layout, as sentences.
    pub(super) layout: Vec<String>,
    pub(super) blocks: Vec<BlockDiff>,
    /// Whether the device states are the same, if there are any.
    pub(super) device_state: Option<bool>,
}

impl Differences {
    /// Whether all memory is known to be the same.
    pub(super) fn none(&self) -> bool {
        self.layout.is_empty() && self.blocks.iter().all(|block| block.differ == 0 && block.unknown == 0)
    }
}

/// What differs in a block that both have.
#[derive(Debug)]
pub(super) struct BlockDiff {
    pub(super) name: String,
    pub(super) guest: u64,
    /// Pages compared.
    pub(super) pages: u64,
    pub(super) differ: u64,
    pub(super) unknown: u64,
    /// Those that differ or are unknown, ascending: first page of the block, number of pages.
    pub(super) runs: Vec<DiffRun>,
}

/// Consecutive pages of a block that differ, or are unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct DiffRun {
    pub(super) first: u64,
    pub(super) pages: u64,
    pub(super) known: bool,
}

impl BlockDiff {
    fn note(&mut self, first: u64, pages: u64, known: bool) {
        *(if known { &mut self.differ } else { &mut self.unknown }) += pages;
        match self.runs.last_mut() {
            Some(last) if last.known == known && last.first + last.pages == first => last.pages += pages,
            _ => self.runs.push(DiffRun { first, pages, known }),
        }
    }
}

/// Compares all blocks that have the same name.
pub(super) fn compare(a: &Chain, b: &Chain, checksums: bool) -> Result<Differences, Failure> {
    let mut layout = Vec::new();
    let mut pairs = Vec::new();
    let saved = |block: &&FileBlock| block.treatment != Treatment::Ignored;
    for block in a.top().blocks().iter().filter(saved) {
        match b.top().blocks().iter().filter(saved).find(|other| other.name == block.name) {
            Some(other) => pairs.push((block, other)),
            None => layout.push(format!("block {:?} is in A only", block.name)),
        }
    }
    for block in b.top().blocks().iter().filter(saved) {
        if !a.top().blocks().iter().filter(saved).any(|other| other.name == block.name) {
            layout.push(format!("block {:?} is in B only", block.name));
        }
    }
    let total = pairs.iter().map(|(a, b)| a.pages().min(b.pages())).sum();
    let mut work =
        Work { a, b, checksums, done: 0, total, buffers: Default::default(), progress: Progress::new("comparing") };
    let mut blocks = Vec::new();
    for (in_a, in_b) in pairs {
        if in_a.guest != in_b.guest {
            layout.push(format!("block {:?} is at {} in A and at {} in B", in_a.name, in_a.guest, in_b.guest));
        }
        if in_a.used != in_b.used {
            layout.push(format!("block {:?} has {:#x} bytes in A and {:#x} in B", in_a.name, in_a.used, in_b.used));
        }
        blocks.push(work.block(in_a, in_b)?);
    }
    let states = (a.top().device_state(), b.top().device_state());
    let device_state = (!states.0.is_empty() || !states.1.is_empty()).then_some(states.0 == states.1);
    Ok(Differences { layout, blocks, device_state })
}

struct Work<'a> {
    a: &'a Chain,
    b: &'a Chain,
    checksums: bool,
    done: u64,
    total: u64,
    buffers: [Vec<u8>; 2],
    progress: Progress,
}

impl Work<'_> {
    fn block(&mut self, in_a: &FileBlock, in_b: &FileBlock) -> Result<BlockDiff, Failure> {
        let pages = in_a.pages().min(in_b.pages());
        let mut diff = BlockDiff {
            name: in_a.name.as_str().to_owned(),
            guest: in_a.guest.0,
            pages,
            differ: 0,
            unknown: 0,
            runs: Vec::new(),
        };
        // Where each side has its pages, walked along side by side.
        let (chain_a, chain_b) = (self.a, self.b);
        let (first_a, first_b) = (in_a.first_page.0, in_b.first_page.0);
        chain_a.resolve(Run::new(PageId(first_a), pages), &mut |run_a, origin_a| {
            let at = run_a.first.0 - first_a;
            chain_b.resolve(Run::new(PageId(first_b + at), run_a.pages), &mut |run_b, origin_b| {
                let at = run_b.first.0 - first_b;
                let pair = Pair { a: (PageId(first_a + at), origin_a), b: (run_b.first, origin_b) };
                self.pair(&pair, at, run_b.pages, &mut diff)
            })
        })?;
        Ok(diff)
    }

    /// Compares `pages` pages, page `at` of the block and those that follow, each side's from one place.
    fn pair(&mut self, pair: &Pair, at: u64, pages: u64, diff: &mut BlockDiff) -> Result<(), Failure> {
        match (pair.a.1, pair.b.1) {
            (Origin::Zero, Origin::Zero) => {}
            (Origin::Missing, Origin::Missing) if self.a.missing() == self.b.missing() && pair.same_page() => {}
            (Origin::Missing, _) | (_, Origin::Missing) => diff.note(at, pages, false),
            (Origin::Data(a), Origin::Data(b)) if self.same_file(a, b) && pair.same_page() => {}
            _ => self.read(pair, at, pages, diff)?,
        }
        self.done += pages;
        self.progress.bytes(self.done * PAGE_BYTES, self.total * PAGE_BYTES);
        Ok(())
    }

    fn same_file(&self, a: usize, b: usize) -> bool {
        let named = |chain: &Chain, depth| chain.file(depth).map(|file| (file.id(), file.checksum()));
        named(self.a, a) == named(self.b, b)
    }

    /// Page by page: by checksum where that decides, else by what is there.
    fn read(&mut self, pair: &Pair, at: u64, pages: u64, diff: &mut BlockDiff) -> Result<(), Failure> {
        let mut done = 0;
        while done < pages {
            let (page_a, page_b) = (PageId(pair.a.0.0 + done), PageId(pair.b.0.0 + done));
            let (sum_a, sum_b) = (checksum(self.a, page_a, pair.a.1), checksum(self.b, page_b, pair.b.1));
            if sum_a != sum_b || self.checksums {
                if sum_a != sum_b {
                    diff.note(at + done, 1, true);
                }
                done += 1;
                continue;
            }
            // As far as the checksums are the same, at most a piece.
            let alike = |n: &u64| {
                let (a, b) = (PageId(page_a.0 + n), PageId(page_b.0 + n));
                checksum(self.a, a, pair.a.1) == checksum(self.b, b, pair.b.1)
            };
            let count = (0..STEP.min(pages - done)).take_while(alike).count() as u64;
            let [buffer_a, buffer_b] = &mut self.buffers;
            bytes(self.a, page_a, pair.a.1, count, buffer_a)?;
            bytes(self.b, page_b, pair.b.1, count, buffer_b)?;
            let both = buffer_a.as_chunks::<PAGE>().0.iter().zip(buffer_b.as_chunks::<PAGE>().0);
            for (n, _) in (0..).zip(both).filter(|(_, (a, b))| a != b) {
                diff.note(at + done + n, 1, true);
            }
            done += count;
            self.progress.bytes((self.done + done) * PAGE_BYTES, self.total * PAGE_BYTES);
        }
        Ok(())
    }
}

/// A page of each side and where its bytes are.
struct Pair {
    a: (PageId, Origin),
    b: (PageId, Origin),
}

impl Pair {
    /// Whether the two lie at the same place of the image.
    fn same_page(&self) -> bool {
        self.a.0 == self.b.0
    }
}

/// CRC-32C of a page of zeros. (That of a page with other bytes may be the same: a test makes one.)
const ZERO_CRC: u32 = 0x98f9_4189;

fn checksum(chain: &Chain, page: PageId, origin: Origin) -> Option<u32> {
    match origin {
        Origin::Zero => Some(ZERO_CRC),
        Origin::Data(depth) => chain.file(depth)?.page_checksum(page),
        Origin::Missing => None,
    }
}

/// The bytes of `count` pages.
fn bytes(chain: &Chain, first: PageId, origin: Origin, count: u64, into: &mut Vec<u8>) -> Result<(), Failure> {
    into.clear();
    into.resize(usize::try_from(count * PAGE_SIZE).unwrap_or(0), 0);
    match origin {
        Origin::Data(depth) => match chain.file(depth) {
            Some(file) => Ok(file.read_run(first, into)?),
            None => Ok(()),
        },
        Origin::Zero | Origin::Missing => Ok(()),
    }
}
