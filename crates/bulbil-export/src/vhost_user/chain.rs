//! Descriptor chains: from a head to the pieces of memory it names.
//!
//! The walk is this crate's own: virtio-queue's iterator ends silently where a chain is broken, and can only start at
//! heads of the available ring, not at those that an earlier process has left unanswered.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::memory::{Memory, Segment};

/// The most descriptors in a chain, direct or indirect: QEMU's own bound, and eight times what is advertised.
pub(super) const MAX_DESCRIPTORS: u16 = 1024;
const DESCRIPTOR_BYTES: u64 = 16;

/// A chain that no driver makes. The queue it is in is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainFault {
    #[error("a descriptor's number is outside its table")]
    OutsideTable,
    #[error("a descriptor table is not in the guest's memory")]
    TableAddress,
    #[error("an indirect table inside another one, followed by more, or of odd or excessive length")]
    Indirect,
    #[error("a loop, or more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    #[error("a descriptor for reading behind one for writing")]
    Order,
    #[error("more than 4 GiB in one chain")]
    TooLarge,
}

/// The memory of one request, reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device may read.
    pub(super) readable: Vec<Segment>,
    pub(super) readable_bytes: u32,
    /// What the device may write.
    pub(super) writable: Vec<Segment>,
    pub(super) writable_bytes: u32,
}

impl Chain {
    /// Reads the chain at `head` of a table of `size` descriptors.
    pub(super) fn walk(
        &mut self,
        memory: &Memory,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<(), ChainFault> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        let mut table = Table { address: table, size, is_indirect: false };
        let (mut index, mut left) = (head, MAX_DESCRIPTORS.min(size));
        loop {
            let descriptor = table.descriptor(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = table.indirect(&descriptor)?;
                (index, left) = (0, table.size);
                continue;
            }
            left = left.checked_sub(1).ok_or(ChainFault::TooLong)?;
            self.push(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, descriptor: &Descriptor) -> Result<(), ChainFault> {
        let segment = Segment { address: descriptor.addr(), len_bytes: descriptor.len() };
        let is_writable = descriptor.is_write_only();
        if !is_writable && !self.writable.is_empty() {
            return Err(ChainFault::Order);
        }
        let (segments, bytes) = if is_writable {
            (&mut self.writable, &mut self.writable_bytes)
        } else {
            (&mut self.readable, &mut self.readable_bytes)
        };
        *bytes = bytes.checked_add(segment.len_bytes).ok_or(ChainFault::TooLarge)?;
        segments.push(segment);
        Ok(())
    }
}

struct Table {
    address: GuestAddress,
    size: u16,
    is_indirect: bool,
}

impl Table {
    fn descriptor(&self, memory: &Memory, index: u16) -> Result<Descriptor, ChainFault> {
        if index >= self.size {
            return Err(ChainFault::OutsideTable);
        }
        let offset = u64::from(index) * DESCRIPTOR_BYTES;
        let address = self.address.0.checked_add(offset).ok_or(ChainFault::TableAddress)?;
        memory.read_obj(GuestAddress(address)).map_err(|_| ChainFault::TableAddress)
    }

    fn indirect(&self, descriptor: &Descriptor) -> Result<Self, ChainFault> {
        let (count, rest) =
            (u64::from(descriptor.len()) / DESCRIPTOR_BYTES, u64::from(descriptor.len()) % DESCRIPTOR_BYTES);
        let size = u16::try_from(count).ok().filter(|size| (1..=MAX_DESCRIPTORS).contains(size));
        match size {
            Some(size) if rest == 0 && !self.is_indirect && !descriptor.has_next() => {
                Ok(Self { address: descriptor.addr(), size, is_indirect: true })
            }
            _ => Err(ChainFault::Indirect),
        }
    }
}
