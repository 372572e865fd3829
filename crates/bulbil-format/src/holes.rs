//! What of a file is holes: a table or a block there says nothing, and need not be read.
//!
//! Without this a file that takes a few MiB on its disk can have millions of tables to look at, and terabytes to read.

use std::ops::Range;

use crate::{ExtentKind, FormatError, ReadAt};

/// Counts the bytes of a file that are not in holes.
pub(crate) fn stored_bytes(file: &dyn ReadAt) -> Result<u64, FormatError> {
    let (mut offset_bytes, mut stored) = (0, 0);
    loop {
        let data = file.next_data(offset_bytes);
        let data = data.map_err(|source| FormatError::Io { operation: "map", offset_bytes, source })?;
        let Some((start, end)) = data else { return Ok(stored) };
        stored += end - start;
        offset_bytes = end;
    }
}

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
        self.look_at(range.start)?;
        Ok(range.end <= self.zeros_end)
    }

    /// Returns the kind of what is at a byte of the file, and how far it goes at least.
    pub(crate) fn kind_at(&mut self, offset_bytes: u64) -> Result<(u64, ExtentKind), FormatError> {
        // What is not in the file is no hole: reading it fails.
        if offset_bytes >= self.file.len_bytes() {
            return Ok((u64::MAX, ExtentKind::Data));
        }
        self.look_at(offset_bytes)?;
        match self.zeros_end.checked_sub(offset_bytes) {
            None | Some(0) => Ok((self.known.end.saturating_sub(offset_bytes), ExtentKind::Data)),
            Some(len_bytes) => Ok((len_bytes, ExtentKind::Zero)),
        }
    }

    /// Makes what is at a byte of the file known.
    fn look_at(&mut self, offset_bytes: u64) -> Result<(), FormatError> {
        if !self.known.contains(&offset_bytes) {
            let len_bytes = self.file.len_bytes();
            let data = self.file.next_data(offset_bytes);
            let failed = |source| FormatError::Io { operation: "map", offset_bytes, source };
            let (start, end) = data.map_err(failed)?.unwrap_or((len_bytes, len_bytes));
            (self.known, self.zeros_end) = (offset_bytes..end, start);
        }
        Ok(())
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
                let kind_of = |at| (20..30).contains(&at) || (50..80).contains(&at);
                let next = (start..=100).find(|at| kind_of(*at) != kind_of(start) || *at == 100).unwrap();
                let kind = if kind_of(start) { ExtentKind::Data } else { ExtentKind::Zero };
                let found = if start == 100 { (u64::MAX, ExtentKind::Data) } else { (next - start, kind) };
                assert_eq!(asked.kind_at(start).unwrap(), found, "{start}, pass {pass}");
            }
        }
    }

    #[test]
    fn what_is_not_in_holes_is_counted() {
        assert_eq!(stored_bytes(&Sparse).unwrap(), 40);
    }
}
