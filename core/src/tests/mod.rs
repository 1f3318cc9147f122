//! Tests that see the inside of the crate.
#![allow(clippy::unwrap_used)]

mod ahead;
mod blocks;
mod defect;
mod dirty;
mod during;
mod explore;
mod fill;
mod order;
mod pressure;
mod properties;
mod random;
pub(crate) mod rig;

pub(crate) use defect::Defect;
pub(crate) use fill::FillDefect;
