//! Frames between QEMU's stream and the link, without an allocation per frame.

use std::sync::Arc;

use crate::codec::ethernet::{self, FrameTooLong, HEADER_BYTES, Mac, PREFIX_BYTES, TYPE_IPV4};
use crate::limits::{MAX_FRAME_BYTES, OUTPUT_HIGH_WATER_BYTES, READ_BATCH_BYTES};
use crate::stats::Counters;

/// Frames on their way to QEMU, each with its length prefix, written together.
#[derive(Debug)]
pub(crate) struct FrameQueue {
    bytes: Vec<u8>,
    sent: usize,
    guest_header: [u8; HEADER_BYTES],
    counters: Arc<Counters>,
}

impl FrameQueue {
    pub(crate) fn new(guest_mac: Mac, counters: Arc<Counters>) -> Self {
        let guest_header = ethernet::header(guest_mac, TYPE_IPV4);
        Self { bytes: Vec::new(), sent: 0, guest_header, counters }
    }

    /// Appends an IPv4 packet of `len` bytes to the guest, written by `write`.
    pub(crate) fn push_ip<R>(&mut self, len: usize, write: impl FnOnce(&mut [u8]) -> R) -> R {
        let header = self.guest_header;
        self.push(&header, len, write)
    }

    /// Appends a frame made of `header` and `payload`.
    pub(crate) fn push_frame(&mut self, header: &[u8; HEADER_BYTES], payload: &[u8]) {
        self.push(header, payload.len(), |out| out.copy_from_slice(payload));
    }

    fn push<R>(&mut self, header: &[u8; HEADER_BYTES], len: usize, write: impl FnOnce(&mut [u8]) -> R) -> R {
        let frame_len = HEADER_BYTES + len;
        // No packet is longer than 65535 bytes: the MTU and the UDP writer see to it.
        let prefix = u32::try_from(frame_len).unwrap_or(0);
        self.bytes.extend_from_slice(&prefix.to_be_bytes());
        self.bytes.extend_from_slice(header);
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        self.counters.frames_out.one();
        self.counters.bytes_out.add(frame_len);
        write(&mut self.bytes[start..])
    }

    /// Whether so much waits that flows should hold back.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes.len() - self.sent >= OUTPUT_HIGH_WATER_BYTES
    }

    /// What is to be written to QEMU.
    pub(crate) fn unsent(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Marks the first `count` unsent bytes as written.
    pub(crate) fn consume(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent >= OUTPUT_HIGH_WATER_BYTES {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// Bytes read from QEMU, cut into frames in place.
#[derive(Debug)]
pub(crate) struct FrameReader {
    bytes: Vec<u8>,
    filled: usize,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; READ_BATCH_BYTES + PREFIX_BYTES + MAX_FRAME_BYTES], filled: 0 }
    }

    /// A reader without memory, to stand in while the real one is in use.
    pub(crate) fn empty() -> Self {
        Self { bytes: Vec::new(), filled: 0 }
    }

    /// Room to read into; never empty once [`Self::each_frame`] took out the whole frames.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// Hands every whole frame among the bytes held and the `count` just read to `take`.
    ///
    /// # Errors
    ///
    /// A length that no frame can have; the frames before it were handed over.
    pub(crate) fn each_frame(&mut self, count: usize, mut take: impl FnMut(&[u8])) -> Result<(), FrameTooLong> {
        self.filled += count;
        let mut at = 0;
        while let Some((frame, used)) = ethernet::split_frame(&self.bytes[at..self.filled])? {
            take(frame);
            at += used;
        }
        self.bytes.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }
}

/// The longest datagram payload that fits one packet of `mtu` bytes.
pub(crate) fn max_datagram(mtu: u16) -> usize {
    usize::from(mtu) - crate::codec::udp::OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_cut_anywhere_come_out_whole() {
        let stream: Vec<u8> = (1..=20u8).flat_map(|len| [vec![0, 0, 0, len], vec![len; len.into()]].concat()).collect();
        for step in [1, 3, 7, stream.len()] {
            let mut reader = FrameReader::new();
            let mut seen = Vec::new();
            for part in stream.chunks(step) {
                reader.room()[..part.len()].copy_from_slice(part);
                reader.each_frame(part.len(), |frame| seen.push(frame.to_vec())).unwrap();
            }
            let expected: Vec<Vec<u8>> = (1..=20u8).map(|len| vec![len; len.into()]).collect();
            assert_eq!(seen, expected, "in steps of {step}");
        }
    }

    #[test]
    fn queue_keeps_what_was_not_written() {
        let mut queue = FrameQueue::new([2; 6], Arc::default());
        queue.push_ip(3, |out| out.copy_from_slice(b"abc"));
        let all = queue.unsent().to_vec();
        assert_eq!(all[..4], [0, 0, 0, 17]);
        queue.consume(5);
        assert_eq!(queue.unsent(), &all[5..]);
        queue.consume(all.len() - 5);
        assert!(queue.unsent().is_empty());
    }
}
