//! A file with patches: what its log would write.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;

use crate::ReadAt;
use crate::bytes::{to_u64, to_usize};

/// What takes the place of a range.
#[derive(Debug, Clone, Copy)]
enum Content {
    Zeros,
    /// Bytes of the log, from here on.
    Log(usize),
}

#[derive(Debug, Clone, Copy)]
struct Patch {
    end: u64,
    content: Content,
}

impl Patch {
    /// Returns the part from `skip` bytes after the beginning on.
    fn after(self, skip: u64) -> Self {
        let content = match self.content {
            Content::Zeros => Content::Zeros,
            Content::Log(at) => Content::Log(at.saturating_add(to_usize(skip))),
        };
        Self { content, ..self }
    }
}

/// Ranges of a file that are replaced, by their first byte; no two overlap.
#[derive(Debug, Default)]
pub(super) struct Patches {
    patches: BTreeMap<u64, Patch>,
}

impl Patches {
    /// Replaces a range by zeros.
    pub(super) fn zero(&mut self, range: Range<u64>) {
        self.insert(range, Content::Zeros);
    }

    /// Replaces a range by bytes of the log.
    pub(super) fn copy(&mut self, range: Range<u64>, log_position: usize) {
        self.insert(range, Content::Log(log_position));
    }

    /// The later patch wins.
    fn insert(&mut self, range: Range<u64>, content: Content) {
        if range.is_empty() {
            return;
        }
        self.split_at(range.start);
        self.split_at(range.end);
        while let Some((start, _)) = self.patches.range(range.clone()).next() {
            let start = *start;
            self.patches.remove(&start);
        }
        self.patches.insert(range.start, Patch { end: range.end, content });
    }

    /// Makes two of the patch that reaches over `at`, if there is one.
    fn split_at(&mut self, at: u64) {
        let Some((start, patch)) = self.patches.range_mut(..at).next_back() else { return };
        if patch.end <= at {
            return;
        }
        let rest = patch.after(at - *start);
        patch.end = at;
        self.patches.insert(at, rest);
    }

    /// Lists the patches that touch a range, each cut to it.
    fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Content)> {
        let before = self.patches.range(..range.start).next_back().filter(|(_, patch)| patch.end > range.start);
        before.into_iter().chain(self.patches.range(range.clone())).map(move |(start, patch)| {
            let cut = range.start.max(*start);
            (cut..patch.end.min(range.end), patch.after(cut - *start).content)
        })
    }

    /// Returns the first range at or after `offset` that is not replaced by zeros.
    fn next_copied(&self, offset: u64) -> Option<Range<u64>> {
        self.within(offset..u64::MAX).find(|(_, content)| matches!(content, Content::Log(_))).map(|(range, _)| range)
    }
}

/// A file, the patches over it, and zeros behind its end.
pub(super) struct Overlay {
    file: Arc<dyn ReadAt>,
    len_bytes: u64,
    log: Vec<u8>,
    patches: Patches,
}

impl Overlay {
    /// `len_bytes` is no less than the length of the file, and no patch ends behind it or the end of `log`.
    pub(super) fn new(file: Arc<dyn ReadAt>, len_bytes: u64, log: Vec<u8>, patches: Patches) -> Self {
        Self { file, len_bytes, log, patches }
    }
}

impl ReadAt for Overlay {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let end_bytes = offset_bytes.checked_add(to_u64(buf.len())).filter(|end| *end <= self.len_bytes);
        let range = offset_bytes..end_bytes.ok_or(ErrorKind::UnexpectedEof)?;
        let in_file = self.file.len_bytes().saturating_sub(offset_bytes).min(to_u64(buf.len()));
        let (stored, added) = buf.split_at_mut(to_usize(in_file));
        added.fill(0);
        if !stored.is_empty() {
            self.file.read_exact_at(stored, offset_bytes)?;
        }
        for (part, content) in self.patches.within(range) {
            let place = to_usize(part.start - offset_bytes)..to_usize(part.end - offset_bytes);
            let place = buf.get_mut(place).unwrap_or_default();
            match content {
                Content::Zeros => place.fill(0),
                Content::Log(at) => {
                    place.copy_from_slice(self.log.get(at..at + place.len()).ok_or(ErrorKind::UnexpectedEof)?);
                }
            }
        }
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        let stored = self.file.next_data(offset_bytes)?;
        let copied = self.patches.next_copied(offset_bytes).map(|range| (range.start, range.end));
        Ok(stored.into_iter().chain(copied).min_by_key(|(start, _)| *start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes the same into plain bytes.
    fn check(file: &[u8], len: usize, patches: &[(Range<u64>, Option<usize>)]) {
        let log: Vec<u8> = (0..=255).collect();
        let mut expected = file.to_vec();
        expected.resize(len, 0);
        let mut list = Patches::default();
        for (range, position) in patches {
            let place = &mut expected[to_usize(range.start)..to_usize(range.end)];
            match position {
                None => place.fill(0),
                Some(at) => place.copy_from_slice(&log[*at..at + place.len()]),
            }
            match position {
                None => list.zero(range.clone()),
                Some(at) => list.copy(range.clone(), *at),
            }
        }
        let overlay = Overlay::new(Arc::new(file.to_vec()), to_u64(len), log, list);
        for start in 0..=len {
            for end in start..=len {
                let mut buf = vec![0xee; end - start];
                overlay.read_exact_at(&mut buf, to_u64(start)).unwrap();
                assert_eq!(buf, expected[start..end], "{start}..{end} of {patches:?}");
            }
            let data = overlay.next_data(to_u64(start)).unwrap();
            let zeros_end = data.map_or(len, |(from, _)| to_usize(from));
            assert!(zeros_end >= start && expected[start..zeros_end].iter().all(|byte| *byte == 0));
        }
        assert!(overlay.read_exact_at(&mut [0], to_u64(len)).is_err());
        assert!(overlay.read_exact_at(&mut [0], u64::MAX).is_err());
    }

    #[test]
    fn later_patches_win_over_earlier_ones_and_the_file() {
        let file: Vec<u8> = (200..232).collect();
        check(&file, 32, &[]);
        check(&file, 32, &[(4..12, None), (6..8, Some(10)), (7..20, Some(50)), (0..1, None)]);
        check(&file, 32, &[(4..8, Some(1)), (8..12, Some(9)), (2..30, None)]);
        check(&file, 32, &[(4..28, Some(1)), (8..12, None), (10..11, Some(100)), (12..12, None)]);
        check(&file, 32, &[(4..8, Some(1)), (4..8, Some(9)), (4..6, None), (6..8, Some(7))]);
    }

    #[test]
    fn a_file_that_becomes_longer_has_zeros_there() {
        check(&[1, 2, 3], 24, &[(2..5, Some(9)), (20..24, Some(0)), (21..22, None)]);
        check(&[], 4, &[]);
    }
}
