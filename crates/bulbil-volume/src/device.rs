//! The block device that servers export: one trait, implemented by volumes and by test fakes.

use std::fmt;

/// What went wrong with a request, in terms a block protocol can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockErrorKind {
    /// The range is outside the device, or the request is malformed.
    OutOfRange,
    /// The device is read only.
    ReadOnly,
    /// The host has no space left for the device's own data.
    NoSpace,
    /// Reading or writing failed, or stored data did not pass verification.
    Io,
    /// An earlier write or sync failed, so no later one can be trusted.
    Poisoned,
}

/// A failed request to a block device.
#[derive(Debug)]
pub struct BlockError {
    kind: BlockErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl BlockError {
    /// Makes an error of `kind`; `message` says what was attempted where.
    #[must_use]
    pub fn new(kind: BlockErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Makes an error with its cause.
    #[must_use]
    pub fn with_source(
        kind: BlockErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// What a protocol should answer.
    #[must_use]
    pub fn kind(&self) -> BlockErrorKind {
        self.kind
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BlockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// What a range of a device holds, as NBD's `base:allocation` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored data.
    Data,
    /// Nothing is stored; reads as zeroes.
    Hole,
}

/// A run of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes in the run.
    pub len_bytes: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// A disk of bytes that can be served to a virtual machine.
///
/// All offsets and lengths are bytes and need no alignment. Methods may be called from many
/// threads at once; requests that overlap in time and in range have no defined order, but
/// requests that only share a 4 KiB block do not disturb each other.
///
/// # Durability
/// A write, discard or write-zeroes is durable when a [`flush`](BlockDevice::flush) that was
/// called after it returned has itself returned `Ok`, or at once when it was made with `fua`.
///
/// # Errors
/// Every method answers [`BlockErrorKind::OutOfRange`] when the range ends past
/// [`size_bytes`](BlockDevice::size_bytes), and changing ones answer
/// [`BlockErrorKind::ReadOnly`] on a read-only device.
pub trait BlockDevice: Send + Sync {
    /// The size in bytes; it may grow while the device is open, and never shrinks.
    fn size_bytes(&self) -> u64;

    /// Asks to be told the new size in bytes whenever the device has grown, until it is dropped.
    ///
    /// The listener is called from the thread that makes the device grow, when requests to the new
    /// part are answered already. A device whose size never changes forgets the listener.
    fn on_resize(&self, _listener: Box<dyn Fn(u64) + Send + Sync>) {}

    /// Whether every changing request is refused.
    fn is_read_only(&self) -> bool;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`BlockErrorKind::Io`] when data could not be read or did not verify; `buf` then holds
    /// nothing a caller may use.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError>;

    /// Whether a read of this range would be answered without fetching or decompressing.
    ///
    /// A server uses it to answer fast requests on the receiving thread. It is a hint: a read
    /// after `true` may still be slow, and must then still be right.
    fn is_fast(&self, offset: u64, len_bytes: u64) -> bool;

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// [`BlockErrorKind::NoSpace`] when the host is full; nothing acknowledged is lost and the
    /// range holds old or new content per 4 KiB block. [`BlockErrorKind::Poisoned`] after any
    /// earlier failure that leaves the state on disk unknown.
    fn write_at(&self, buf: &[u8], offset: u64, fua: bool) -> Result<(), BlockError>;

    /// Makes the range read as zeroes, also after a crash once flushed.
    ///
    /// # Errors
    /// As for [`write_at`](BlockDevice::write_at).
    fn write_zeroes(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError>;

    /// Tells the device that the range is no longer needed; whole 4 KiB blocks in it read as
    /// zeroes afterwards.
    ///
    /// # Errors
    /// As for [`write_at`](BlockDevice::write_at).
    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError>;

    /// Makes everything durable that returned before this call.
    ///
    /// # Errors
    /// [`BlockErrorKind::Io`] when the host could not sync; the device is poisoned from then on.
    fn flush(&self) -> Result<(), BlockError>;

    /// Describes the range as runs of data and holes, at most `max_extents` of them.
    ///
    /// The runs start at `offset`; together they cover `len_bytes` or, when `max_extents` was
    /// reached, a non-empty beginning of it.
    ///
    /// # Errors
    /// [`BlockErrorKind::OutOfRange`] only.
    fn status(&self, offset: u64, len_bytes: u64, max_extents: usize) -> Result<Vec<StatusExtent>, BlockError>;
}
