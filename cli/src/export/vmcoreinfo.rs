//! The note that a Linux guest keeps in its memory for those who read its dumps: kernel release, page table roots, offset
//! of address randomisation. crash and drgn look for it in the core file.
//!
//! The kernel (built with CONFIG_VMCORE_INFO) prepares it at boot at the start of a page: an ELF note named `VMCOREINFO`
//! of type 0 whose description is lines of text.

use crate::chain::PAGE;

const NAME: &[u8; 11] = b"VMCOREINFO\0";
/// Name length, description length, type; the name, padded to a multiple of 4.
const DESCRIPTION_AT: usize = 12 + 12;
/// The first line of every description.
const FIRST_LINE: &[u8] = b"OSRELEASE=";

/// The note, if one of these pages starts with it.
pub(super) fn find(bytes: &[u8]) -> Option<Vec<u8>> {
    bytes.as_chunks::<PAGE>().0.iter().find_map(|page| note(page)).map(<[u8]>::to_vec)
}

fn note(page: &[u8; PAGE]) -> Option<&[u8]> {
    let word = |at: usize| page.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    if word(0)? != 11 || word(8)? != 0 || page.get(12..12 + NAME.len())? != NAME {
        return None;
    }
    let len = usize::try_from(word(4)?).ok()?;
    let end = DESCRIPTION_AT.checked_add(len)?;
    let description = page.get(DESCRIPTION_AT..end)?;
    let padded = end.checked_next_multiple_of(4)?;
    description.starts_with(FIRST_LINE).then(|| page.get(..padded)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(len: u32, text: &[u8]) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        page[..4].copy_from_slice(&11u32.to_le_bytes());
        page[4..8].copy_from_slice(&len.to_le_bytes());
        page[12..23].copy_from_slice(NAME);
        page[24..24 + text.len()].copy_from_slice(text);
        page
    }

    #[test]
    fn a_note_is_found_among_pages_and_cut_to_its_length() {
        let text = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n";
        let bytes = [vec![7; PAGE], page(30, text)].concat();
        let note = find(&bytes);
        assert!(note.is_some_and(|note| note.len() == 24 + 32 && note[24..54] == *text));
    }

    #[test]
    fn what_only_looks_like_one_is_not_taken() {
        assert_eq!(find(&page(30, b"something else")), None);
        for len in [4073, u32::MAX - 3, u32::MAX] {
            assert_eq!(find(&page(len, b"OSRELEASE=")), None, "{len}");
        }
        assert!(find(&page(4072, b"OSRELEASE=")).is_some());
    }
}
