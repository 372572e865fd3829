//! The store and its volumes, beside what others use for the same.
//!
//! | module | what it measures |
//! |---|---|
//! | `images` | four disks one after another into one store: space, time, CPU |

mod images;

use anyhow::Result;

use super::Bed;
use super::report::Report;

pub(crate) fn run(bed: &Bed, report: &mut Report) -> Result<()> {
    images::run(bed, report)
}
