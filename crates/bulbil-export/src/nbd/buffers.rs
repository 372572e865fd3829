//! Buffers for requests that run on workers, kept between requests.

use std::sync::Mutex;

use super::lock;

/// Smallest buffer handed out, so that buffers of common request sizes are interchangeable.
const MIN_BUFFER_BYTES: usize = 64 << 10;
/// Added to every size for a reply's header in front of a round number of bytes.
const HEADER_ROOM_BYTES: usize = 64;
/// Largest buffer that is kept; larger ones come from and go back to the allocator.
const MAX_KEPT_BUFFER_BYTES: usize = (1 << 20) + HEADER_ROOM_BYTES;
/// The most bytes kept: a few large requests or a full set of small ones, within an instance's
/// memory budget.
const MAX_KEPT_BYTES: usize = 4 * MAX_KEPT_BUFFER_BYTES;

/// A set of initialised byte buffers.
#[derive(Debug, Default)]
pub(super) struct BufferPool {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

impl BufferPool {
    /// Returns a buffer of at least `len` bytes, whose content is arbitrary.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        let mut kept = lock(&self.kept);
        if let Some(index) = kept.buffers.iter().rposition(|buffer| buffer.len() >= len) {
            let buffer = kept.buffers.swap_remove(index);
            kept.bytes -= buffer.len();
            return buffer;
        }
        drop(kept);
        vec![0; round_up(len)]
    }

    /// Takes a buffer back, or frees it when enough is kept.
    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut kept = lock(&self.kept);
        if buffer.len() <= MAX_KEPT_BUFFER_BYTES && kept.bytes + buffer.len() <= MAX_KEPT_BYTES {
            kept.bytes += buffer.len();
            kept.buffers.push(buffer);
        }
    }

    /// Frees everything that is kept.
    pub(super) fn clear(&self) {
        *lock(&self.kept) = Kept::default();
    }
}

/// Steps of a power of two and room for a header, up to the size that is kept.
fn round_up(len: usize) -> usize {
    if len > MAX_KEPT_BUFFER_BYTES {
        return len;
    }
    len.saturating_sub(HEADER_ROOM_BYTES).next_power_of_two().max(MIN_BUFFER_BYTES) + HEADER_ROOM_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_the_kept_bytes_are_bounded() {
        let pool = BufferPool::default();
        let buffer = pool.take(4096);
        assert_eq!(buffer.len(), MIN_BUFFER_BYTES + HEADER_ROOM_BYTES);
        let address = buffer.as_ptr() as usize;
        pool.give(buffer);
        let again = pool.take(10);
        assert_eq!(again.as_ptr() as usize, address, "reused");
        for _ in 0..100 {
            pool.give(vec![0; MAX_KEPT_BUFFER_BYTES]);
        }
        assert_eq!(lock(&pool.kept).bytes, MAX_KEPT_BYTES);
        pool.give(pool.take(MAX_KEPT_BUFFER_BYTES + 1));
        pool.clear();
        assert_eq!(lock(&pool.kept).bytes, 0);
    }
}
