//! A part of a file as a file of its own.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use crate::ReadAt;
use crate::bytes::{to_u64, to_usize};

/// A range of content that is stored, in a file with holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// The first byte in the section.
    pub(super) start_bytes: u64,
    pub(super) len_bytes: u64,
    /// Where that byte is in the file around the section.
    pub(super) host_offset: u64,
}

impl Segment {
    fn end_bytes(&self) -> u64 {
        self.start_bytes + self.len_bytes
    }
}

/// Segments of a file, in order; zeros between them.
pub(super) struct Section {
    file: Arc<dyn ReadAt>,
    segments: Vec<Segment>,
    len_bytes: u64,
}

impl Section {
    /// Makes a section of segments that lie in `file`, in order and apart, none empty or past `len_bytes`.
    pub(super) fn new(file: Arc<dyn ReadAt>, segments: Vec<Segment>, len_bytes: u64) -> Self {
        Self { file, segments, len_bytes }
    }

    /// Returns the segments from the one on that holds `offset` or comes next.
    fn segments_from(&self, offset: u64) -> &[Segment] {
        let first = self.segments.partition_point(|segment| segment.end_bytes() <= offset);
        self.segments.get(first..).unwrap_or_default()
    }
}

impl ReadAt for Section {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let end_bytes = offset_bytes.saturating_add(to_u64(buf.len()));
        if end_bytes > self.len_bytes {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let (mut rest, mut offset) = (buf, offset_bytes);
        for segment in self.segments_from(offset_bytes) {
            let hole_bytes = segment.start_bytes.saturating_sub(offset).min(to_u64(rest.len()));
            let (hole, after_hole) = rest.split_at_mut(to_usize(hole_bytes));
            hole.fill(0);
            offset += hole_bytes;
            let stored_bytes = (segment.end_bytes() - offset).min(to_u64(after_hole.len()));
            let (stored, after) = after_hole.split_at_mut(to_usize(stored_bytes));
            if stored.is_empty() {
                return Ok(());
            }
            self.file.read_exact_at(stored, segment.host_offset + (offset - segment.start_bytes))?;
            (rest, offset) = (after, offset + stored_bytes);
        }
        rest.fill(0);
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        for segment in self.segments_from(offset_bytes) {
            let from = offset_bytes.max(segment.start_bytes);
            let host_end = segment.host_offset + segment.len_bytes;
            let to_section = |host: u64| segment.start_bytes + (host - segment.host_offset);
            match self.file.next_data(segment.host_offset + (from - segment.start_bytes))? {
                Some((start, end)) if start < host_end => {
                    return Ok(Some((to_section(start), to_section(end.min(host_end)))));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A large file of which only the beginning is not zeros.
    pub(in crate::archive) struct Zeros {
        pub(in crate::archive) head: Vec<u8>,
        pub(in crate::archive) len_bytes: u64,
    }

    impl ReadAt for Zeros {
        fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
            buf.fill(0);
            let rest = self.head.get(to_usize(offset_bytes)..).unwrap_or_default();
            buf.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            Ok(())
        }

        fn len_bytes(&self) -> u64 {
            self.len_bytes
        }
    }

    #[test]
    fn segments_and_the_holes_between_them_are_read() {
        let file: Arc<dyn ReadAt> = Arc::new((0..=255).collect::<Vec<u8>>());
        let segment = |start_bytes, len_bytes, host_offset| Segment { start_bytes, len_bytes, host_offset };
        let section = Section::new(file, vec![segment(2, 3, 100), segment(5, 2, 200), segment(10, 4, 50)], 16);
        let expected = [0, 0, 100, 101, 102, 200, 201, 0, 0, 0, 50, 51, 52, 53, 0, 0];
        for start in 0..=16 {
            for end in start..=16 {
                let mut buf = vec![0xee; end - start];
                section.read_exact_at(&mut buf, start as u64).unwrap();
                assert_eq!(buf, expected[start..end], "{start}..{end}");
            }
        }
        assert!(section.read_exact_at(&mut [0; 2], 15).is_err());
        let data = |at| section.next_data(at).unwrap();
        assert_eq!([data(0), data(4), data(5), data(7)], [Some((2, 5)), Some((4, 5)), Some((5, 7)), Some((10, 14))]);
        assert_eq!([data(14), data(99)], [None, None]);
    }
}
