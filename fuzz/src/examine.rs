//! Opens a file and uses it in every way there is: nothing may panic, and all that it says must fit together.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Mutex;

use ramshot::SnapshotFile;
use ramshot::core::{
    BlockName, BlockTable, GuestAddr, HostAddr, OsError, PAGE_SIZE, PageId, RamBlock, RamTarget, Run, Treatment,
};
use ramshot::file::{PageState, RestoreError, StateRun};

use crate::memory::peak_of;

/// Allocated while opening, beside a multiple of what was read: buffers of fixed size (1 MiB steps) and texts.
const FIXED: usize = 5 << 19;
/// The costliest thing to keep is a statistic: 10 bytes in the file, 33 in memory, thrice that while the list grows.
const MULTIPLE: usize = 16;
/// Beyond so many pages nobody waits for a verification: it looks at every 64 MiB.
const VERIFIED: u64 = 1 << 22;
/// Restored only if the memory is no larger than this.
const RESTORED: u64 = 256;

/// A file in memory.
pub struct Disk {
    file: File,
}

impl Disk {
    pub fn new() -> Self {
        let fd: OwnedFd = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd_create");
        Self { file: fd.into() }
    }

    /// Empty again, `len` bytes of nothing.
    pub fn begin(&mut self, len: u64) {
        self.file.set_len(0).expect("truncating a memfd");
        self.file.set_len(len).expect("a sparse memfd");
    }

    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset).expect("writing a memfd");
    }

    pub fn resize(&mut self, len: u64) {
        self.file.set_len(len).expect("a memfd");
    }

    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// What became of it.
#[derive(PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It does not open.
    Refused,
    /// It opens, and a page of it is damaged.
    Damaged,
    /// All is well.
    Good,
    /// It opens, and is too large to be verified here.
    Unknown,
}

/// Opens what is on `disk`, of which `bytes` bytes are not a hole, and looks at all of it.
pub fn examine(disk: &Disk, bytes: u64) -> (Verdict, Option<SnapshotFile>) {
    let allowed = usize::try_from(bytes).expect("it is in memory") * MULTIPLE + FIXED;
    let (opened, peak) = peak_of(|| SnapshotFile::open(disk.path()));
    assert!(peak <= allowed, "opening took {peak} bytes of memory, for {bytes} bytes of file");
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            sentence(&error);
            return (Verdict::Refused, None);
        }
    };
    check_accessors(&file);
    check_states(&file);
    check_layouts(&file);
    let all_read = read_pages(&file);
    if file.pages() > VERIFIED {
        return (Verdict::Unknown, Some(file));
    }
    let (verified, peak) = peak_of(|| {
        let mut last = (0, 0);
        let report = file.verify(1, &mut |done, of| last = (done, of));
        report.inspect(|_| assert_eq!(last, (file.pages(), file.pages())))
    });
    assert!(peak < 1 << 20, "verifying took {peak} bytes of memory");
    let verdict = match verified {
        Ok(report) => {
            assert_eq!(report.data_pages, file.data_pages());
            assert_eq!(report.data_pages + report.other_pages, file.pages());
            assert!(all_read, "it verifies, and a page cannot be read");
            Verdict::Good
        }
        Err(error) => {
            sentence(&error);
            Verdict::Damaged
        }
    };
    restore(&file, &verdict, all_read);
    (verdict, Some(file))
}

/// An error is a sentence, down to its source.
fn sentence(error: &dyn Error) {
    let text = error.to_string();
    assert!(text.len() > 20, "no sentence: {text:?}");
    assert!(text.len() < 2000, "a sentence of {} bytes", text.len());
    let _ = (format!("{error:?}"), error.source().map(ToString::to_string));
}

fn check_accessors(file: &SnapshotFile) {
    let sum = file.data_pages() + file.zero_pages() + file.in_parent_pages();
    assert_eq!(sum, file.pages());
    assert_eq!(file.ram_bytes(), file.pages() * PAGE_SIZE);
    assert!(file.image_bytes() > file.ram_bytes());
    assert_ne!(file.default_state(), PageState::Data);
    assert!(file.parent().is_some() || file.in_parent_pages() == 0);
    assert_ne!(Some(file.id()), file.parent().map(|parent| parent.id));
    assert!(file.statistics().iter().all(|(key, _)| !key.is_empty() && key.len() < 256));
    let _ = (file.checksum(), file.device_state().len(), file.path(), format!("{file:?}"));
    let mut next = 0;
    for block in file.blocks() {
        assert_eq!(block.first_page.0, next);
        assert!(!block.name.as_str().is_empty());
        assert!(block.used > 0 && block.used <= block.len && block.page_size.is_power_of_two());
        next = block.run().end().0;
    }
    assert_eq!(next, file.pages());
}

/// The runs cover all pages, without gaps, and agree with the states page by page.
fn check_states(file: &SnapshotFile) {
    let mut next = 0;
    let mut of = [0u64; 3];
    for StateRun { run, state } in file.state_runs() {
        assert_eq!(run.first.0, next);
        assert_ne!(run.pages, 0);
        for page in [run.first, PageId(run.first.0 + run.pages / 2), PageId(run.end().0 - 1)] {
            assert_eq!(file.page_state(page), Some(state));
        }
        of[state as usize] += run.pages;
        next = run.end().0;
    }
    assert_eq!(next, file.pages());
    assert_eq!(of[PageState::Zero as usize], file.zero_pages());
    assert_eq!(of[PageState::Data as usize], file.data_pages());
    assert_eq!(of[PageState::InParent as usize], file.in_parent_pages());
    assert_eq!(file.page_state(PageId(file.pages())), None);
    assert_eq!(file.page_state(PageId(u64::MAX)), None);
}

/// Reads the ends of every run, and whole short runs. Whether all of it could be read.
fn read_pages(file: &SnapshotFile) -> bool {
    let mut page = [0xa5; 4096];
    let mut good = true;
    for StateRun { run, state } in file.state_runs().take(4096) {
        for id in [run.first.0, run.first.0 + run.pages / 2, run.end().0 - 1] {
            page.fill(0xa5);
            match file.read_page(PageId(id), &mut page) {
                Ok(found) => {
                    assert_eq!(found, state);
                    assert!(found != PageState::Zero || page == [0; 4096]);
                    assert!(found != PageState::InParent || page == [0xa5; 4096]);
                }
                Err(error) => {
                    assert_eq!(state, PageState::Data, "{error}");
                    sentence(&error);
                    good = false;
                }
            }
        }
        let mut bytes = vec![0; usize::try_from(run.pages.min(4)).expect("at most 4") * 4096];
        match file.read_run(run.first, &mut bytes) {
            Ok(()) => assert_eq!(state, PageState::Data),
            Err(error) => {
                sentence(&error);
                good &= state != PageState::Data;
            }
        }
    }
    for beyond in [file.pages(), file.pages() + 1, 1 << 52, u64::MAX] {
        sentence(&file.read_page(PageId(beyond), &mut page).expect_err("there is no such page"));
        sentence(&file.read_run(PageId(beyond), &mut page).expect_err("there is no such page"));
    }
    sentence(&file.read_run(PageId(file.pages() - 1), &mut [0; 8192]).expect_err("one page too many"));
    sentence(&file.read_run(PageId(0), &mut [0; 4095]).expect_err("not whole pages"));
    let _ = file.read_run(PageId(0), &mut []);
    good
}

/// The RAM of a VM that fits, if there can be one: this process maps each block where the one before ends.
fn fitting(file: &SnapshotFile) -> Option<BlockTable> {
    let mut host = 1u64 << 40;
    let blocks: Vec<RamBlock> = file
        .blocks()
        .iter()
        .map(|block| {
            let at = host;
            host = host.checked_add(block.used)?;
            Some(RamBlock {
                name: block.name,
                guest: block.guest,
                host: HostAddr(at),
                len: block.used,
                used: block.used,
                page_size: PAGE_SIZE,
                backing: block.backing,
                treatment: block.treatment,
            })
        })
        .collect::<Option<_>>()?;
    BlockTable::new(&blocks).ok()
}

fn check_layouts(file: &SnapshotFile) {
    let Some(table) = fitting(file) else { return };
    file.check_layout(&table).expect("its own layout");
    let others: [fn(&mut RamBlock); 4] = [
        |block| block.name = BlockName::new("another name, long enough").expect("a name"),
        |block| block.guest = GuestAddr(block.guest.0 ^ PAGE_SIZE),
        |block| (block.len, block.used) = (block.len + PAGE_SIZE, block.used + PAGE_SIZE),
        |block| block.treatment = Treatment::Ignored,
    ];
    for change in others {
        let mut blocks = table.blocks().to_vec();
        let Some(last) = blocks.iter_mut().rfind(|block| block.treatment != Treatment::Ignored) else { return };
        if last.name.as_str() == "another name, long enough" || last.host.0 > 1 << 62 {
            return;
        }
        change(last);
        if let Ok(other) = BlockTable::new(&blocks) {
            sentence(&file.check_layout(&other).expect_err("another layout"));
        }
    }
}

/// Guest RAM, all of it.
struct Ram {
    table: BlockTable,
    flat: Mutex<Vec<u8>>,
}

impl RamTarget for Ram {
    fn with_mut(&self, at: HostAddr, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), OsError> {
        let fault = OsError::new("with_mut", 14);
        let page = self.table.page_at(at).ok_or(fault)?;
        let run = Run::new(page, (len as u64).div_ceil(PAGE_SIZE));
        self.table.host_range(run).ok_or(fault)?;
        let from = usize::try_from(page.0 * PAGE_SIZE).map_err(|_| fault)?;
        let mut flat = self.flat.lock().expect("one thread at a time");
        fill(flat.get_mut(from..from + len).ok_or(fault)?);
        Ok(())
    }
}

fn restore(file: &SnapshotFile, verdict: &Verdict, all_read: bool) {
    let Some(table) = fitting(file).filter(|table| table.pages() <= RESTORED) else { return };
    let size = usize::try_from(table.pages() * PAGE_SIZE).expect("it is small");
    let ram = Ram { table, flat: Mutex::new(vec![0; size]) };
    match file.restore_into(&ram.table, &ram, 1) {
        Ok(report) => {
            assert!(all_read);
            assert_eq!((report.data_pages, report.zero_pages), (file.data_pages(), file.zero_pages()));
            let flat = ram.flat.into_inner().expect("nobody panicked");
            let mut page = [0; 4096];
            for (id, bytes) in (0..).zip(flat.as_chunks::<4096>().0) {
                let _ = file.read_page(PageId(id), &mut page).expect("it was restored");
                assert!(*bytes == page, "page {id} was restored wrongly");
            }
        }
        Err(error) => {
            sentence(&error);
            let needs_parent = matches!(error, RestoreError::NeedsParent { .. });
            assert_eq!(needs_parent, file.in_parent_pages() > 0);
            assert!(needs_parent || *verdict == Verdict::Damaged);
        }
    }
}
