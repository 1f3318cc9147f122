//! Tests that see the inside of the crate.
#![allow(clippy::unwrap_used)]

mod blocks;
mod defect;
mod explore;
mod order;
mod pressure;
mod properties;
mod random;
pub(crate) mod rig;

pub(crate) use defect::Defect;
