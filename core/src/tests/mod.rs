//! Tests that see the inside of the crate.
#![allow(clippy::unwrap_used)]

mod blocks;
mod defect;
mod explore;
mod fill;
mod order;
mod pressure;
mod properties;
mod random;
mod rig;

pub(crate) use defect::Defect;
pub(crate) use fill::FillDefect;
