//! What of a file is holes: a table there says nothing, and need not be read.
//!
//! Without this a file that takes a few MiB on its disk can have millions of tables to look at.

use std::ops::Range;

use crate::{FormatError, ReadAt};

/// Says what lies in holes of a file, and asks again only about what was not asked before.
pub(crate) struct Holes<'a> {
    file: &'a dyn ReadAt,
    known: Range<u64>,
    /// The known range is zeros up to here, and perhaps content from here on.
    zeros_end: u64,
}

impl<'a> Holes<'a> {
    pub(crate) fn new(file: &'a dyn ReadAt) -> Self {
        Self { file, known: 0..0, zeros_end: 0 }
    }

    /// Whether a range of the file, in bytes, is nothing but a hole.
    pub(crate) fn cover(&mut self, range: Range<u64>) -> Result<bool, FormatError> {
        if !self.known.contains(&range.start) {
            let len_bytes = self.file.len_bytes();
            let data = self.file.next_data(range.start);
            let failed = |source| FormatError::Io { operation: "map", offset_bytes: range.start, source };
            let (start, end) = data.map_err(failed)?.unwrap_or((len_bytes, len_bytes));
            (self.known, self.zeros_end) = (range.start..end, start);
        }
        Ok(range.end <= self.zeros_end)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// 100 bytes of which 20 to 29 and 50 to 79 are not in holes.
    struct Sparse;

    impl ReadAt for Sparse {
        fn read_exact_at(&self, _buf: &mut [u8], _offset_bytes: u64) -> io::Result<()> {
            unreachable!("holes are found without reading")
        }

        fn len_bytes(&self) -> u64 {
            100
        }

        fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
            let data = [(20, 30), (50, 80)].into_iter().find(|(_, end)| *end > offset_bytes);
            Ok(data.map(|(start, end): (u64, u64)| (start.max(offset_bytes), end)))
        }
    }

    #[test]
    fn a_range_is_a_hole_whatever_was_asked_before() {
        let mut asked = Holes::new(&Sparse);
        for pass in 0..2 {
            for start in (0..100).chain((0..100).rev()) {
                for end in start + 1..=100 {
                    let is_hole = (start..end).all(|at| !(20..30).contains(&at) && !(50..80).contains(&at));
                    assert_eq!(asked.cover(start..end).unwrap(), is_hole, "{start}..{end}, pass {pass}");
                }
            }
        }
    }
}
