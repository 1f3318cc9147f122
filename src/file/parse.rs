//! Reading the metadata of a snapshot file: everything but the page bytes is checked here, against the length of the
//! file first, then against its checksums, then for sense. The order and every rule are those of `docs/FORMAT.md`.

use std::collections::HashSet;
use std::io;

use ramshot_core::{BlockName, GuestAddr, PageId};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::error::OpenErrorKind;
use super::format::{
    BLOCK_LEN, BlockRecord, HEADER_LEN, HEADER_MAGIC, Header, Kind, MANDATORY, MAX_FILE_BLOCKS, MAX_PAGES,
    MAX_SECTIONS, PAGE_BYTES, SECTION_LEN, Section, TAIL_LEN, TAIL_MAGIC, Tail, VERSION, aligned,
};
use super::index::StateIndex;
use super::trailer::{backing_code, tail_crc, treatment_code};
use super::{FileBlock, PageState, ParentRef, SnapshotId};

/// How much is read at a time, and how far memory may run ahead of what was read.
const STEP: usize = 1 << 20;

/// How far before the end a tail is looked for, to say that something was appended.
const LOOK_BACK: u64 = 64 * 1024;

/// Bytes at offsets: a file, or (in tests) memory.
pub(super) trait Source {
    /// Fills `into` from byte `offset` on.
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
}

/// What a file says, apart from its pages.
#[derive(Debug)]
pub(super) struct Metadata {
    pub(super) id: SnapshotId,
    pub(super) parent: Option<ParentRef>,
    pub(super) checksum: u32,
    pub(super) file_len: u64,
    pub(super) blocks: Vec<FileBlock>,
    pub(super) states: StateIndex,
    /// CRC-32C of each data page, in page order.
    pub(super) crcs: Vec<U32>,
    pub(super) device_state: Vec<u8>,
    pub(super) statistics: Vec<(String, u64)>,
}

type Parsed<T> = Result<T, OpenErrorKind>;

/// Reads and checks the metadata of a file of `len` bytes.
pub(super) fn parse(source: &dyn Source, len: u64) -> Parsed<Metadata> {
    let tail = read_tail(source, len)?;
    let (header, directory) = read_head(source, &tail)?;
    let (pages, default) = check_header(&header, &tail)?;
    check_directory(&directory, &tail)?;

    let trailer = tail.trailer_offset.get();
    let mut reader = Sections { source, directory: &directory };
    let blocks = parse_blocks(reader.load(Kind::Blocks)?, pages)?;
    let states = parse_states(&mut reader, pages, default)?;
    let data_pages = header.data_pages.get();
    if states.data_pages() != data_pages {
        return Err(invalid(
            Kind::States.name(),
            trailer,
            format!("{} pages with data, the header says {data_pages}", states.data_pages()),
        ));
    }
    let parent = parse_parent(&header, &states, trailer)?;
    let crcs = reader.load_crcs(data_pages)?;
    let device_state = reader.load_optional(Kind::Device)?;
    let statistics = parse_statistics(&reader.load_optional(Kind::Statistics)?, reader.offset(Kind::Statistics))?;
    reader.check_unknown()?;
    Ok(Metadata {
        id: SnapshotId(header.id),
        parent,
        checksum: tail.trailer_crc.get(),
        file_len: len,
        blocks,
        states,
        crcs,
        device_state,
        statistics,
    })
}

fn invalid(section: &str, offset: u64, what: impl Into<String>) -> OpenErrorKind {
    OpenErrorKind::Invalid { section: section.to_owned(), offset, what: what.into() }
}

fn damaged(section: &str, offset: u64, stated: u32, found: u32) -> OpenErrorKind {
    OpenErrorKind::Damaged { section: section.to_owned(), offset, stated, found }
}

fn read(source: &dyn Source, what: &str, into: &mut [u8], offset: u64) -> Parsed<()> {
    source.read_exact_at(into, offset).map_err(|source| OpenErrorKind::Io {
        what: format!("its {what} cannot be read ({} bytes at byte {offset})", into.len()),
        source,
    })
}

fn read_tail(source: &dyn Source, len: u64) -> Parsed<Tail> {
    let Some(offset) = len.checked_sub(TAIL_LEN) else { return Err(OpenErrorKind::NoTail { len }) };
    let mut tail = Tail::new_zeroed();
    read(source, "tail", tail.as_mut_bytes(), offset)?;
    if tail.magic != TAIL_MAGIC {
        return Err(look_back(source, len));
    }
    let (stated, found) = (tail.tail_crc.get(), tail_crc(&tail));
    if stated != found {
        return Err(damaged("tail", offset, stated, found));
    }
    if tail.version.get() != VERSION {
        return Err(OpenErrorKind::Version { found: tail.version.get(), known: VERSION });
    }
    if tail.file_len.get() != len {
        return Err(OpenErrorKind::Length { stated: tail.file_len.get(), found: len });
    }
    let (start, size) = (tail.trailer_offset.get(), tail.trailer_len.get());
    let fits = start.checked_add(size) == Some(offset) && size >= HEADER_LEN;
    if !fits || !start.is_multiple_of(PAGE_BYTES) || aligned(size) != Some(size) || tail.reserved.get() != 0 {
        return Err(invalid("tail", offset, format!("a trailer of {size} bytes at byte {start}, tail at {offset}")));
    }
    Ok(tail)
}

/// The end is no tail. Whether there is one shortly before it.
fn look_back(source: &dyn Source, len: u64) -> OpenErrorKind {
    let start = len.saturating_sub(LOOK_BACK);
    let mut bytes = vec![0; usize::try_from(len - start).unwrap_or(0)];
    if read(source, "end", &mut bytes, start).is_ok() {
        for (at, window) in (start..).zip(bytes.windows(size_of::<Tail>())) {
            if window.starts_with(&TAIL_MAGIC)
                && let Ok(tail) = Tail::read_from_bytes(window)
                && tail.tail_crc.get() == tail_crc(&tail)
                && Some(tail.file_len.get()) == at.checked_add(TAIL_LEN)
            {
                return OpenErrorKind::Appended { len, end: tail.file_len.get() };
            }
        }
    }
    OpenErrorKind::NoTail { len }
}

/// Header and section directory, after their checksum.
fn read_head(source: &dyn Source, tail: &Tail) -> Parsed<(Header, Vec<Section>)> {
    let offset = tail.trailer_offset.get();
    let mut header = Header::new_zeroed();
    read(source, "trailer", header.as_mut_bytes(), offset)?;
    let count = header.sections.get();
    // Until the checksum is known the count is just a number: bounded, then compared.
    let stated = tail.trailer_crc.get();
    let size = u64::from(count) * SECTION_LEN;
    if count > MAX_SECTIONS || size > tail.trailer_len.get() - HEADER_LEN {
        if header.magic == HEADER_MAGIC {
            return Err(invalid("trailer", offset, format!("it claims {count} sections")));
        }
        return Err(damaged("trailer", offset, stated, crc32c::crc32c(header.as_bytes())));
    }
    let mut directory = vec![Section::new_zeroed(); usize::try_from(count).unwrap_or(0)];
    read(source, "section directory", directory.as_mut_slice().as_mut_bytes(), offset + HEADER_LEN)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(header.as_bytes()), directory.as_slice().as_bytes());
    if stated != found {
        return Err(damaged("trailer header and directory", offset, stated, found));
    }
    Ok((header, directory))
}

/// Number of pages and default state.
fn check_header(header: &Header, tail: &Tail) -> Parsed<(u64, PageState)> {
    let offset = tail.trailer_offset.get();
    let bad = |what: String| Err(invalid("trailer header", offset, what));
    if header.magic != HEADER_MAGIC {
        return bad(format!("it starts with {:?}", String::from_utf8_lossy(&header.magic)));
    }
    if header.version.get() != VERSION {
        return bad(format!("version {}, the tail says {VERSION}", header.version));
    }
    if header.id != tail.id || header.id == [0; 16] {
        return bad(format!("id {}, the tail says {}", SnapshotId(header.id), SnapshotId(tail.id)));
    }
    if u64::from(header.page_size.get()) != PAGE_BYTES {
        return bad(format!("pages of {} bytes", header.page_size));
    }
    if header.flags.get() != 0 || header.reserved != [0; 7] || header.reserved2.get() != 0 {
        return bad(format!("flags {:#x} or reserved bytes that are not zero", header.flags.get()));
    }
    let pages = header.pages.get();
    if pages == 0 || pages > MAX_PAGES || pages.checked_mul(PAGE_BYTES) != Some(offset) {
        return bad(format!("{pages} pages before a trailer at byte {offset}"));
    }
    match PageState::from_code(header.default_state) {
        Some(PageState::Data) | None => bad(format!("default page state {}", header.default_state)),
        Some(default) => Ok((pages, default)),
    }
}

/// The sections fill the trailer, one behind the other, and none is there twice.
fn check_directory(directory: &[Section], tail: &Tail) -> Parsed<()> {
    let trailer = tail.trailer_offset.get();
    let end = trailer + tail.trailer_len.get();
    let entries = trailer + HEADER_LEN;
    let mut next = entries + directory.len() as u64 * SECTION_LEN;
    for (at, section) in (entries..).step_by(size_of::<Section>()).zip(directory) {
        let (offset, len) = (section.offset.get(), section.len.get());
        let stop = offset.checked_add(len).and_then(aligned).filter(|&stop| stop <= end);
        let (Some(stop), true) = (stop, offset == next) else {
            let what = format!("section {} has {len} bytes at byte {offset}, not at {next}", tag(section));
            return Err(invalid("section directory", at, what));
        };
        if section.flags.get() & !MANDATORY != 0 || section.reserved.get() != 0 {
            return Err(invalid(
                "section directory",
                at,
                format!("section {} has flags {}", tag(section), section.flags),
            ));
        }
        next = stop;
    }
    if next != end {
        return Err(invalid(
            "section directory",
            entries,
            format!("sections end at byte {next}, the trailer at {end}"),
        ));
    }
    let mut tags: HashSet<[u8; 4]> = HashSet::new();
    if let Some(twice) = directory.iter().find(|section| !tags.insert(section.tag)) {
        return Err(invalid("section directory", entries, format!("section {} is there twice", tag(twice))));
    }
    Ok(())
}

fn tag(section: &Section) -> String {
    section.tag.escape_ascii().to_string()
}

/// Loads sections, each against its checksum.
struct Sections<'a> {
    source: &'a dyn Source,
    directory: &'a [Section],
}

impl Sections<'_> {
    fn find(&self, kind: Kind) -> Option<Section> {
        self.directory.iter().find(|section| section.tag == kind.tag()).copied()
    }

    fn required(&self, kind: Kind) -> Parsed<Section> {
        self.find(kind).ok_or_else(|| invalid("section directory", 0, format!("there is no {}", kind.name())))
    }

    fn offset(&self, kind: Kind) -> u64 {
        self.find(kind).map_or(0, |section| section.offset.get())
    }

    /// A section that must be there.
    fn load(&mut self, kind: Kind) -> Parsed<(Section, Vec<u8>)> {
        let section = self.required(kind)?;
        Ok((section, self.load_section(kind, section)?))
    }

    /// A section that is empty if it is not there.
    fn load_optional(&mut self, kind: Kind) -> Parsed<Vec<u8>> {
        self.find(kind).map_or(Ok(Vec::new()), |section| self.load_section(kind, section))
    }

    fn load_section(&mut self, kind: Kind, section: Section) -> Parsed<Vec<u8>> {
        let mut bytes = Vec::new();
        reserve(&mut bytes, kind, section.len.get())?;
        self.stream(kind.name(), section, |step| bytes.extend_from_slice(step))?;
        Ok(bytes)
    }

    /// The page checksums, `count` of them.
    fn load_crcs(&mut self, count: u64) -> Parsed<Vec<U32>> {
        let kind = Kind::Checksums;
        let section = self.required(kind)?;
        if count.checked_mul(4) != Some(section.len.get()) {
            let what = format!("{} bytes for {count} pages with data", section.len);
            return Err(invalid(kind.name(), section.offset.get(), what));
        }
        let mut crcs = Vec::new();
        reserve(&mut crcs, kind, count)?;
        self.stream(kind.name(), section, |step| {
            let (words, _) = step.as_chunks::<4>();
            crcs.extend(words.iter().map(|word| U32::from_bytes(*word)));
        })?;
        Ok(crcs)
    }

    /// Sections of later versions: optional ones must be whole, mandatory ones are refused.
    fn check_unknown(&mut self) -> Parsed<()> {
        let directory = self.directory;
        for section in directory.iter().filter(|section| Kind::from_tag(section.tag).is_none()) {
            if section.flags.get() & MANDATORY != 0 {
                return Err(OpenErrorKind::UnknownSection { tag: tag(section), offset: section.offset.get() });
            }
            self.stream(&format!("section {}", tag(section)), *section, |_| {})?;
        }
        Ok(())
    }

    /// Hands the bytes of a section to `each`, [`STEP`] at a time, so that nobody allocates for bytes that are not there;
    /// then compares the checksum, and the padding behind the section with zero.
    fn stream(&self, name: &str, section: Section, mut each: impl FnMut(&[u8])) -> Parsed<()> {
        let (offset, len) = (section.offset.get(), section.len.get());
        let mut buffer = vec![0; usize::try_from(len).map_or(STEP, |len| len.min(STEP))];
        let mut crc = 0;
        let mut done = 0;
        while done < len {
            let step = usize::try_from(len - done).map_or(buffer.len(), |left| left.min(buffer.len()));
            let bytes = buffer.get_mut(..step).unwrap_or_default();
            read(self.source, name, bytes, offset + done)?;
            crc = crc32c::crc32c_append(crc, bytes);
            each(bytes);
            done += step as u64;
        }
        if crc != section.crc.get() {
            return Err(damaged(name, offset, section.crc.get(), crc));
        }
        let end = offset + len;
        let mut padding = [0; 8];
        let padding =
            padding.get_mut(..usize::try_from(aligned(end).unwrap_or(end) - end).unwrap_or(0)).unwrap_or_default();
        read(self.source, name, padding, end)?;
        if padding.iter().any(|&byte| byte != 0) {
            return Err(invalid(name, end, "the padding behind it is not zero"));
        }
        Ok(())
    }
}

/// Reserves exactly, but no more than is there: pages of a reservation cost memory only as they are filled.
fn reserve<T>(into: &mut Vec<T>, kind: Kind, count: u64) -> Parsed<()> {
    let len = count.saturating_mul(size_of::<T>() as u64);
    let refused = || OpenErrorKind::OutOfMemory { section: kind.name().to_owned(), len };
    into.try_reserve_exact(usize::try_from(count).map_err(|_| refused())?).map_err(|_| refused())
}

fn parse_blocks((section, bytes): (Section, Vec<u8>), pages: u64) -> Parsed<Vec<FileBlock>> {
    let kind = Kind::Blocks.name();
    let offset = section.offset.get();
    let count = bytes.len() as u64 / BLOCK_LEN;
    if !(bytes.len() as u64).is_multiple_of(BLOCK_LEN) || count > MAX_FILE_BLOCKS {
        return Err(invalid(kind, offset, format!("{} bytes", bytes.len())));
    }
    let records = <[BlockRecord]>::ref_from_bytes(&bytes).map_err(|_| invalid(kind, offset, "its length"))?;
    let mut blocks: Vec<FileBlock> = Vec::with_capacity(records.len());
    let mut next_page = 0;
    for (at, record) in (offset..).step_by(size_of::<BlockRecord>()).zip(records) {
        let block = parse_block(record).map_err(|what| invalid(kind, at, what))?;
        if block.first_page.0 != next_page {
            let what = format!("block {:?} starts at {}, not at page {next_page}", block.name, block.first_page);
            return Err(invalid(kind, at, what));
        }
        // Each is less than 2^52, and there are at most 2^16 of them: no overflow below MAX_PAGES.
        next_page += block.pages();
        if next_page > pages {
            return Err(invalid(kind, at, format!("block {:?} ends at page {next_page} of {pages}", block.name)));
        }
        blocks.push(block);
    }
    if next_page != pages {
        return Err(invalid(kind, offset, format!("its blocks have {next_page} pages, the header says {pages}")));
    }
    let mut names = HashSet::with_capacity(blocks.len());
    if let Some(twice) = blocks.iter().find(|block| !names.insert(block.name)) {
        return Err(invalid(kind, offset, format!("two blocks are called {:?}", twice.name)));
    }
    let mut ranges: Vec<&FileBlock> = blocks.iter().collect();
    ranges.sort_unstable_by_key(|block| block.guest.0);
    let overlap = |pair: &&[&FileBlock]| matches!(pair, [a, b] if b.guest.0 - a.guest.0 < a.len);
    if let Some([a, b]) = ranges.windows(2).find(overlap) {
        return Err(invalid(kind, offset, format!("blocks {:?} and {:?} overlap", a.name, b.name)));
    }
    Ok(blocks)
}

fn parse_block(record: &BlockRecord) -> Result<FileBlock, String> {
    let (used_name, rest) =
        record.name.split_at_checked(usize::from(record.name_len)).ok_or("a name longer than 47 bytes")?;
    let name = std::str::from_utf8(used_name)
        .ok()
        .and_then(BlockName::new)
        .filter(|_| rest.iter().all(|&byte| byte == 0))
        .ok_or_else(|| format!("the name {:?}", used_name.escape_ascii().to_string()))?;
    let (guest, len, used) = (record.guest.get(), record.len.get(), record.used.get());
    let page_size = record.page_size.get();
    if !page_size.is_power_of_two() || page_size < PAGE_BYTES {
        return Err(format!("block {name:?} has host pages of {page_size} bytes"));
    }
    let aligned = |value: u64, to: u64| value.is_multiple_of(to);
    if !aligned(guest, PAGE_BYTES) || !aligned(len, page_size) || !aligned(used, page_size) {
        return Err(format!("block {name:?} at {guest:#x} with {used:#x} of {len:#x} bytes is not aligned"));
    }
    if used == 0 || used > len || guest.checked_add(len).is_none() {
        return Err(format!("block {name:?} at {guest:#x} has {used:#x} of {len:#x} bytes"));
    }
    if record.reserved != [0; 5] {
        return Err(format!("block {name:?} has reserved bytes that are not zero"));
    }
    use ramshot_core::{Backing, Treatment};
    let treatments = [Treatment::Tracked, Treatment::ReadOnly, Treatment::InPause, Treatment::Ignored];
    let backings = [Backing::Anonymous, Backing::Shmem, Backing::HugeTlb, Backing::File, Backing::Foreign];
    Ok(FileBlock {
        name,
        guest: GuestAddr(guest),
        len,
        used,
        page_size,
        first_page: PageId(record.first_page.get()),
        treatment: treatments
            .into_iter()
            .find(|&t| treatment_code(t) == record.treatment)
            .ok_or_else(|| format!("block {name:?} has treatment {}", record.treatment))?,
        backing: backings
            .into_iter()
            .find(|&b| backing_code(b) == record.backing)
            .ok_or_else(|| format!("block {name:?} has backing {}", record.backing))?,
    })
}

fn parse_states(reader: &mut Sections<'_>, pages: u64, default: PageState) -> Parsed<StateIndex> {
    let kind = Kind::States;
    let section = reader.required(kind)?;
    let (offset, len) = (section.offset.get(), section.len.get());
    if !len.is_multiple_of(8) || len / 8 > pages {
        return Err(invalid(kind.name(), offset, format!("{len} bytes for {pages} pages")));
    }
    let too_many = || OpenErrorKind::OutOfMemory { section: kind.name().to_owned(), len };
    let mut index = usize::try_from(len / 8)
        .ok()
        .and_then(|records| StateIndex::new(pages, default, records))
        .ok_or_else(too_many)?;
    let mut at = offset;
    let mut wrong = None;
    reader.stream(kind.name(), section, |step| {
        for record in step.as_chunks::<8>().0 {
            if wrong.is_none()
                && let Err(what) = index.push(u64::from_le_bytes(*record))
            {
                wrong = Some((at, what));
            }
            at += 8;
        }
    })?;
    wrong.map_or(Ok(index), |(at, what)| Err(invalid(kind.name(), at, what)))
}

/// The parent, which must be named if a page is in it.
fn parse_parent(header: &Header, states: &StateIndex, offset: u64) -> Parsed<Option<ParentRef>> {
    let checksum = header.parent_crc.get();
    if header.parent_id != [0; 16] {
        let id = SnapshotId(header.parent_id);
        if header.parent_id == header.id {
            return Err(invalid("trailer header", offset, format!("it is its own parent ({id})")));
        }
        return Ok(Some(ParentRef { id, checksum }));
    }
    if checksum != 0 || states.in_parent_pages() != 0 || states.default_state() == PageState::InParent {
        let what = format!("{} pages in a parent that is not named", states.in_parent_pages());
        return Err(invalid("trailer header", offset, what));
    }
    Ok(None)
}

fn parse_statistics(mut bytes: &[u8], start: u64) -> Parsed<Vec<(String, u64)>> {
    let mut statistics = Vec::new();
    let total = bytes.len();
    while let Some((&key_len, rest)) = bytes.split_first() {
        let at = start + (total - bytes.len()) as u64;
        let entry = rest.split_at_checked(usize::from(key_len)).and_then(|(key, rest)| {
            let (value, rest) = rest.split_first_chunk()?;
            Some((std::str::from_utf8(key).ok().filter(|key| !key.is_empty())?, u64::from_le_bytes(*value), rest))
        });
        let Some((key, value, rest)) = entry else {
            return Err(invalid(Kind::Statistics.name(), at, format!("an entry with a key of {key_len} bytes")));
        };
        statistics.push((key.to_owned(), value));
        bytes = rest;
    }
    Ok(statistics)
}
