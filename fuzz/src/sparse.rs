//! A file in memory that is mostly holes.

use std::io::{self, ErrorKind};

use bulbil_format::ReadAt;

/// Longer files cost time and show nothing more: the tables of an image are in its first MiB.
const MAX_FILE_BYTES: u64 = 16 << 20;
const CHUNK_HEADER_BYTES: usize = 6;

/// A file of chunks; the rest are zeros.
#[derive(Debug, Clone, Default)]
pub struct SparseFile {
    len_bytes: u64,
    /// In the order they were written: a later one lies over those before it.
    chunks: Vec<(u64, Vec<u8>)>,
}

impl SparseFile {
    /// Makes a file of what an input says after its options; `None` if that is less than a length.
    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let (len, mut rest) = data.split_first_chunk()?;
        let mut file = Self::default();
        while let Some((header, after)) = rest.split_first_chunk::<CHUNK_HEADER_BYTES>() {
            let [o0, o1, o2, o3, l0, l1] = *header;
            let offset_bytes = u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
            let (content, after) = after.split_at(usize::from(u16::from_le_bytes([l0, l1])).min(after.len()));
            file.write(offset_bytes, content);
            rest = after;
        }
        if let len @ 1.. = u64::from(u32::from_le_bytes(*len)) {
            file.len_bytes = len;
        }
        file.len_bytes = file.len_bytes.min(MAX_FILE_BYTES);
        Some(file)
    }

    /// Describes a file as an input; of zeros, nothing is kept.
    pub fn describe(options: u8, image: &[u8]) -> Vec<u8> {
        const UNIT: usize = 64;
        let mut input = vec![options];
        input.extend(u32::try_from(image.len()).unwrap().to_le_bytes());
        let is_zero = |unit: &[u8]| unit.iter().all(|byte| *byte == 0);
        let mut at = 0;
        while at < image.len() {
            let rest = &image[at..];
            let units = |rest: &[u8], zero: bool| {
                let same = rest.chunks(UNIT).take_while(|unit| is_zero(unit) == zero).count();
                (same * UNIT).min(rest.len())
            };
            at += units(rest, true);
            let chunk = &image[at..(at + units(&image[at..], false)).min(at + 0xffc0)];
            if !chunk.is_empty() {
                input.extend(u32::try_from(at).unwrap().to_le_bytes());
                input.extend(u16::try_from(chunk.len()).unwrap().to_le_bytes());
                input.extend(chunk);
            }
            at += chunk.len();
        }
        input
    }

    /// Writes over what is there; the file grows as needed.
    pub(crate) fn write(&mut self, offset_bytes: u64, content: &[u8]) {
        self.chunks.push((offset_bytes, content.to_vec()));
        self.len_bytes = self.len_bytes.max(offset_bytes + content.len() as u64);
    }

    /// Makes two files of one.
    pub(crate) fn split_at(self, offset_bytes: u64) -> (Self, Self) {
        let (mut first, mut second) = (Self::default(), Self::default());
        for (at, content) in &self.chunks {
            let in_first = offset_bytes.saturating_sub(*at).min(content.len() as u64);
            let (before, after) = content.split_at(usize::try_from(in_first).unwrap());
            first.write(*at, before);
            second.write((at + in_first).saturating_sub(offset_bytes), after);
        }
        first.len_bytes = self.len_bytes.min(offset_bytes);
        second.len_bytes = self.len_bytes.saturating_sub(offset_bytes);
        (first, second)
    }

    /// Reads what is there; zeros past the end.
    pub(crate) fn read<const N: usize>(&self, offset_bytes: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.copy_to(&mut bytes, offset_bytes);
        bytes
    }

    pub(crate) fn copy_to(&self, buf: &mut [u8], offset_bytes: u64) {
        buf.fill(0);
        let end_bytes = offset_bytes.saturating_add(buf.len() as u64);
        for (at, content) in &self.chunks {
            let (start, end) = (offset_bytes.max(*at), end_bytes.min(at + content.len() as u64));
            if start < end {
                let index = |offset: u64, origin: u64| usize::try_from(offset - origin).unwrap();
                let target = &mut buf[index(start, offset_bytes)..index(end, offset_bytes)];
                target.copy_from_slice(&content[index(start, *at)..index(end, *at)]);
            }
        }
    }
}

impl ReadAt for SparseFile {
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        // Nothing can be read anywhere.
        if buf.is_empty() {
            return Ok(());
        }
        let end_bytes = offset_bytes.checked_add(buf.len() as u64).filter(|end_bytes| *end_bytes <= self.len_bytes);
        end_bytes.ok_or(ErrorKind::UnexpectedEof)?;
        self.copy_to(buf, offset_bytes);
        Ok(())
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn next_data(&self, offset_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        let ends = |(at, content): &(u64, Vec<u8>)| (*at, (at + content.len() as u64).min(self.len_bytes));
        let after = self.chunks.iter().map(ends).filter(|(start, end)| *end > offset_bytes.max(*start));
        Ok(after.map(|(start, end)| (start.max(offset_bytes), end)).min())
    }
}
