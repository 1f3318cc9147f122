//! Memory of this process: as it is.

/// Does nothing.
pub fn prefer_huge_pages(_bytes: &mut [u8]) {}
