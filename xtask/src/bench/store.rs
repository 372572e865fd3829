//! The store and its volumes, beside what others use for the same.
//!
//! | module | what it measures |
//! |---|---|
//! | `images` | four disks one after another into one store: space, time, CPU |
//! | `guest` | a volume inside a guest, by vhost-user-blk and by NBD |

mod guest;
mod images;

use anyhow::Result;
use clap::ValueEnum;

use super::Bed;
use super::report::Report;

/// A part that can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Images,
    Guest,
}

pub(crate) fn run(bed: &Bed, parts: &[Part], report: &mut Report) -> Result<()> {
    for part in if parts.is_empty() { Part::value_variants() } else { parts } {
        match part {
            Part::Images => images::run(bed, report)?,
            Part::Guest => guest::run(bed, report)?,
        }
    }
    Ok(())
}
