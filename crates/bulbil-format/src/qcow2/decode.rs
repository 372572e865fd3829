//! Compressed clusters: bytes in, exactly one cluster out.
//!
//! Output goes straight into the caller's buffer of one cluster, in one call. No window is ever allocated, whatever
//! size a Zstandard frame asks for, and nothing can be written past the cluster.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use libdeflater::{DecompressionError, Decompressor as Inflate};
use zstd::bulk::Decompressor;

use crate::Compression;

/// Decoders at rest, at most one for each thread that ever decoded at the same time.
pub(super) struct DecoderPool {
    compression: Compression,
    idle: Mutex<Vec<Decoder>>,
}

impl fmt::Debug for DecoderPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecoderPool").field("compression", &self.compression).finish_non_exhaustive()
    }
}

impl DecoderPool {
    pub(super) fn new(compression: Compression) -> Self {
        Self { compression, idle: Mutex::new(Vec::new()) }
    }

    /// Runs `work` with a decoder that no other thread uses.
    ///
    /// # Errors
    /// Those of `work`, and of making a decoder.
    pub(super) fn with<T, E: From<io::Error>>(&self, work: impl FnOnce(&mut Decoder) -> Result<T, E>) -> Result<T, E> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut decoder = match idle {
            Some(decoder) => decoder,
            None => Decoder::new(self.compression)?,
        };
        let result = work(&mut decoder);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
        result
    }
}

/// The state of one decoder and a buffer for its input.
pub(super) struct Decoder {
    engine: Engine,
    /// The compressed bytes; the caller fills it before [`Decoder::decode`].
    pub(super) input: Vec<u8>,
}

enum Engine {
    Zlib(Inflate),
    Zstd(Decompressor<'static>),
}

impl Decoder {
    fn new(compression: Compression) -> io::Result<Self> {
        let engine = match compression {
            Compression::Zlib => Engine::Zlib(Inflate::new()),
            Compression::Zstd => Engine::Zstd(Decompressor::new()?),
        };
        Ok(Self { engine, input: Vec::new() })
    }

    /// Decodes `input`, which may go on after the compressed bytes, into all of `output`.
    pub(super) fn decode(&mut self, output: &mut [u8]) -> Result<(), String> {
        match &mut self.engine {
            Engine::Zlib(inflate) => decode_zlib(inflate, &self.input, output),
            Engine::Zstd(zstd) => decode_zstd(zstd, &self.input, output),
        }
    }
}

fn decode_zlib(inflate: &mut Inflate, input: &[u8], output: &mut [u8]) -> Result<(), String> {
    match inflate.deflate_decompress(input, output) {
        Ok(len) if len == output.len() => Ok(()),
        Ok(len) => Err(format!("it has {len} bytes instead of {}", output.len())),
        Err(DecompressionError::InsufficientSpace) => Err("it is longer than a cluster".to_owned()),
        Err(DecompressionError::BadData) => Err("it is damaged or does not end".to_owned()),
    }
}

fn decode_zstd(zstd: &mut Decompressor<'static>, input: &[u8], output: &mut [u8]) -> Result<(), String> {
    let frame_bytes = zstd::zstd_safe::find_frame_compressed_size(input)
        .map_err(|code| zstd::zstd_safe::get_error_name(code).to_owned())?;
    let frame = input.get(..frame_bytes).ok_or_else(|| "it does not end".to_owned())?;
    let len = zstd.decompress_to_buffer(frame, output).map_err(|error| error.to_string())?;
    if len == output.len() { Ok(()) } else { Err(format!("it has {len} bytes instead of {}", output.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn check(compression: Compression, input: Vec<u8>, cluster_bytes: usize) -> Result<Vec<u8>, String> {
        let mut decoder = Decoder::new(compression).unwrap();
        decoder.input = input;
        let mut output = vec![0; cluster_bytes];
        decoder.decode(&mut output)?;
        Ok(output)
    }

    #[test]
    fn only_a_whole_cluster_is_accepted() {
        let content: Vec<u8> = (0..4096_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        for compression in [Compression::Zlib, Compression::Zstd] {
            let encode = |bytes: &[u8]| match compression {
                Compression::Zlib => deflate(bytes),
                Compression::Zstd => zstd::bulk::compress(bytes, 3).unwrap(),
            };
            let mut padded = encode(&content);
            padded.extend([0xa5; 511]);
            assert_eq!(check(compression, padded, 4096).unwrap(), content, "{compression}");
            for bytes in [&content[..4095], &content[..0], &[content.as_slice(), &[0]].concat()] {
                assert!(check(compression, encode(bytes), 4096).is_err(), "{compression} {}", bytes.len());
            }
            let mut cut = encode(&content);
            cut.truncate(cut.len() - 1);
            assert!(check(compression, cut, 4096).is_err(), "{compression} cut");
            assert!(check(compression, vec![], 4096).is_err(), "{compression} empty");
            assert!(check(compression, vec![0xff; 600], 4096).is_err(), "{compression} garbage");
        }
    }
}
