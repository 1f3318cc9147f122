//! Tests that see the inside of the crate.
#![allow(clippy::unwrap_used)]

mod defect;

pub(crate) use defect::Defect;
