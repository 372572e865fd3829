//! Compressed files: gzip (RFC 1952), xz (the .xz file format 1.2.1) and Zstandard (RFC 8878).
//!
//! A disk is read at many places, a compressed file only from its beginning: so it is unpacked once, into a file that
//! the caller supplies. Blocks of zeros become holes there. Memory is bounded whatever the file asks for, and what
//! comes out is bounded by what went in ([`check_expansion`]).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crate::bytes::{to_u64, to_usize};
use crate::detect::check_expansion;
use crate::holes::stored_bytes;
use crate::raw::{HOLE_BYTES, content_ranges};
use crate::{FileReader, FormatError, ReadAt};

/// How a whole file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// RFC 1952, of any number of members.
    Gzip,
    /// The .xz file format, of any number of streams.
    Xz,
    /// RFC 8878, of any number of frames.
    Zstd,
}

impl Packing {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "Zstandard",
        }
    }
}

/// Read and written at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// The window of `zstd --long`; each level up to 19 needs at most 8 MiB.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;
/// The dictionary of `xz -9` is 64 MiB; this leaves room for what the decoder needs beside it.
const MAX_XZ_MEMORY_KIB: u32 = 80 << 10;
/// Compressed bytes have no holes. What may be zeros, padding and frames to skip, is read at the cost of content: in a
/// sparse file, or a sparse member of an archive, it could be terabytes.
const MAX_HOLE_BYTES: u64 = 16 << 20;

/// Unpacks a file into `scratch`, which is emptied first, and returns the content.
///
/// # Errors
/// [`FormatError::Corrupt`] if it does not unpack or is mostly a hole, [`FormatError::TooMuchData`], [`FormatError::Io`] if either file
/// cannot be read or written.
pub(crate) fn unpack(file: &dyn ReadAt, packing: Packing, scratch: &File) -> Result<Arc<dyn ReadAt>, FormatError> {
    let write_failed = |offset_bytes| move |source| FormatError::Io { operation: "unpack", offset_bytes, source };
    let hole_bytes = file.len_bytes().saturating_sub(stored_bytes(file)?);
    if hole_bytes > MAX_HOLE_BYTES {
        return Err(FormatError::corrupt(format!("the {} file has {hole_bytes} bytes of holes", packing.name())));
    }
    scratch.set_len(0).map_err(write_failed(0))?;
    let mut unpacker = Unpacker::new(file, packing)?;
    let mut buf = vec![0; BUFFER_BYTES];
    let mut at = 0;
    loop {
        let piece = unpacker.next_piece(&mut buf)?;
        if piece.is_empty() {
            break;
        }
        for range in content_ranges(piece, HOLE_BYTES) {
            let start = at + to_u64(range.start);
            scratch.write_all_at(piece.get(range).unwrap_or_default(), start).map_err(write_failed(start))?;
        }
        at += to_u64(piece.len());
        check_expansion("a compressed file", at, file.len_bytes())?;
    }
    scratch.set_len(at).map_err(write_failed(at))?;
    let unpacked = scratch.try_clone().map_err(write_failed(0))?;
    Ok(Arc::new(FileReader::new(unpacked)?))
}

struct Unpacker<'a> {
    packing: Packing,
    decoder: Box<dyn Read + 'a>,
}

impl<'a> Unpacker<'a> {
    fn new(file: &'a dyn ReadAt, packing: Packing) -> Result<Self, FormatError> {
        let input = BufReader::with_capacity(BUFFER_BYTES, Sequential { file, at: 0 });
        let decoder: Box<dyn Read + 'a> = match packing {
            Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Packing::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(input, true, MAX_XZ_MEMORY_KIB)),
            Packing::Zstd => Box::new(zstd_decoder(input).map_err(|error| does_not_unpack(packing, &error))?),
        };
        Ok(Self { packing, decoder })
    }

    /// Fills `buf`, except at the end of the content; nothing is left then.
    fn next_piece<'b>(&mut self, buf: &'b mut [u8]) -> Result<&'b [u8], FormatError> {
        let mut len = 0;
        while let Some(rest) = buf.get_mut(len..).filter(|rest| !rest.is_empty()) {
            match self.decoder.read(rest) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(does_not_unpack(self.packing, &error)),
            }
        }
        Ok(buf.get(..len).unwrap_or_default())
    }
}

fn zstd_decoder<R: io::BufRead>(input: R) -> io::Result<zstd::stream::read::Decoder<'static, R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
    decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
    Ok(decoder)
}

fn does_not_unpack(packing: Packing, error: &io::Error) -> FormatError {
    FormatError::corrupt(format!("the {} file does not unpack: {error}", packing.name()))
}

/// Reads a file from its beginning to its end.
struct Sequential<'a> {
    file: &'a dyn ReadAt,
    at: u64,
}

impl Read for Sequential<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let rest = self.file.len_bytes().saturating_sub(self.at);
        let len = to_usize(rest.min(to_u64(buf.len())));
        let part = buf.get_mut(..len).unwrap_or_default();
        self.file.read_exact_at(part, self.at)?;
        self.at += to_u64(len);
        Ok(len)
    }
}
