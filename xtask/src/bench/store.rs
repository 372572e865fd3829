//! The store and its volumes, beside what others use for the same.
//!
//! | module | what it measures |
//! |---|---|
//! | `images` | four disks one after another into one store: space, time, CPU |
//! | `clones` | clones of volumes of any size, after many writes, and many of them |
//! | `guest` | a volume inside a guest, by vhost-user-blk and by NBD |
//! | `cold_boot` | a boot from S3 behind a network, beside a download and local disks |
//! | `memory` | idle volumes, and what runs beside a machine |

mod clones;
mod cold_boot;
mod guest;
mod images;
mod memory;

use anyhow::Result;
use clap::ValueEnum;

use super::Bed;
use super::report::Report;

/// A part that can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Images,
    Clones,
    Guest,
    ColdBoot,
    Memory,
}

pub(crate) fn run(bed: &Bed, parts: &[Part], report: &mut Report) -> Result<()> {
    for part in if parts.is_empty() { Part::value_variants() } else { parts } {
        match part {
            Part::Images => images::run(bed, report)?,
            Part::Clones => clones::run(bed, report)?,
            Part::Guest => guest::run(bed, report)?,
            Part::ColdBoot => cold_boot::run(bed, report)?,
            Part::Memory => memory::run(bed, report)?,
        }
    }
    Ok(())
}
