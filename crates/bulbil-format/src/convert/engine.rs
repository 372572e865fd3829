//! The threads of a conversion.
//!
//! Each thread takes the next piece of the disk, reads and prepares it, waits for its turn, has it placed, and writes
//! it while the next one is placed. Offsets are thus given in the order of the disk, whoever is quicker.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::bytes::to_usize;
use crate::{ConvertError, ConvertObserver, DiskContent, Extent, WriteAt};

/// More threads than this do not help: placing and the file system are one for all.
const MAX_THREADS: usize = 16;

/// How one format is written.
pub(crate) trait Writer: Sync {
    /// What one thread keeps between pieces: compressors, buffers.
    type Worker: Send;
    /// What is made of a piece before its place is known, and then its place.
    type Prepared: Send;
    /// What is known of the file so far: tables, the end.
    type State: Send;

    /// The length of a piece: a multiple of what the format compresses or stores as one; the last one may be shorter.
    fn piece_bytes(&self) -> u64;

    /// Whether pieces of zeros are looked at as well.
    fn wants_zeros(&self) -> bool {
        false
    }

    /// Makes what a thread keeps.
    fn worker(&self) -> Result<Self::Worker, ConvertError>;

    /// Begins the file.
    fn begin(&self, file: &dyn WriteAt) -> Result<Self::State, ConvertError>;

    /// Does what can be done with a piece without knowing its place. Called by many threads at once.
    fn prepare(&self, worker: &mut Self::Worker, offset: u64, piece: &[u8]) -> Result<Self::Prepared, ConvertError>;

    /// Gives a piece its place. Called in the order of the disk by one thread at a time; must be quick.
    fn place(&self, state: &mut Self::State, offset: u64, prepared: &mut Self::Prepared) -> Result<(), ConvertError>;

    /// Writes a piece to its place. Called by many threads at once.
    fn write(
        &self,
        file: &dyn WriteAt,
        offset: u64,
        piece: &[u8],
        prepared: &Self::Prepared,
    ) -> Result<(), ConvertError>;

    /// Writes the tables and whatever else completes the file, its length included.
    fn finish(&self, file: &dyn WriteAt, state: Self::State) -> Result<(), ConvertError>;
}

/// Runs a whole conversion.
pub(crate) fn run<W: Writer>(
    writer: &W,
    source: &dyn DiskContent,
    file: &dyn WriteAt,
    observer: &dyn ConvertObserver,
) -> Result<(), ConvertError> {
    let total_bytes = content_bytes(source)?;
    let job = Job {
        writer,
        source,
        file,
        observer,
        total_bytes,
        done_bytes: AtomicU64::new(0),
        pieces: Mutex::new(Pieces::new(source, writer.piece_bytes(), writer.wants_zeros())),
        turns: Mutex::new(Turns { next: 0, state: writer.begin(file)?, failed: None }),
        turned: Condvar::new(),
    };
    let helpers = std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Where the system gives no more threads, the work is done by those there are.
            if std::thread::Builder::new().spawn_scoped(scope, || job.work()).is_err() {
                break;
            }
        }
        job.work();
    });
    let turns = job.turns.into_inner().unwrap_or_else(PoisonError::into_inner);
    match turns.failed {
        Some(error) => Err(error),
        None => writer.finish(file, turns.state),
    }
}

fn content_bytes(source: &dyn DiskContent) -> Result<u64, ConvertError> {
    source
        .data_extents()
        .map(|extent| extent.map(|extent| extent.len_bytes))
        .sum::<Result<_, _>>()
        .map_err(ConvertError::Read)
}

struct Job<'a, W: Writer> {
    writer: &'a W,
    source: &'a dyn DiskContent,
    file: &'a dyn WriteAt,
    observer: &'a dyn ConvertObserver,
    total_bytes: u64,
    done_bytes: AtomicU64,
    pieces: Mutex<Pieces<'a>>,
    turns: Mutex<Turns<W::State>>,
    turned: Condvar,
}

struct Turns<S> {
    /// The number of the piece that is placed next.
    next: u64,
    state: S,
    /// Why the conversion ends early.
    failed: Option<ConvertError>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Writer> Job<'_, W> {
    fn work(&self) {
        if let Err(error) = self.convert_pieces() {
            lock(&self.turns).failed.get_or_insert(error);
        }
        self.turned.notify_all();
    }

    fn convert_pieces(&self) -> Result<(), ConvertError> {
        // Should a piece panic, the others must not wait for its turn for ever.
        let _guard = FailOnPanic { job: self };
        let mut worker = self.writer.worker()?;
        let mut buf = vec![0; to_usize(self.writer.piece_bytes())];
        while let Some(piece) = self.next_piece()? {
            let bytes = buf.get_mut(..to_usize(piece.len_bytes)).unwrap_or_default();
            self.source.read_exact_at(bytes, piece.offset_bytes).map_err(ConvertError::Read)?;
            let mut prepared = self.writer.prepare(&mut worker, piece.offset_bytes, bytes)?;
            if !self.place(&piece, &mut prepared)? {
                return Ok(());
            }
            self.writer.write(self.file, piece.offset_bytes, bytes, &prepared)?;
            let done = self.done_bytes.fetch_add(piece.content_bytes, Ordering::Relaxed) + piece.content_bytes;
            self.observer.progress(done.min(self.total_bytes), self.total_bytes);
        }
        Ok(())
    }

    fn next_piece(&self) -> Result<Option<Piece>, ConvertError> {
        if self.observer.is_cancelled() {
            return Err(ConvertError::Cancelled);
        }
        lock(&self.pieces).next_piece().map_err(ConvertError::Read)
    }

    /// Waits for the turn of a piece and has it placed; `false` if another thread failed.
    fn place(&self, piece: &Piece, prepared: &mut W::Prepared) -> Result<bool, ConvertError> {
        let mut turns = lock(&self.turns);
        while turns.failed.is_none() && turns.next != piece.number {
            turns = self.turned.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        if turns.failed.is_some() {
            return Ok(false);
        }
        let placed = self.writer.place(&mut turns.state, piece.offset_bytes, prepared);
        turns.next += 1;
        drop(turns);
        self.turned.notify_all();
        placed.map(|()| true)
    }
}

struct FailOnPanic<'a, 'b, W: Writer> {
    job: &'a Job<'b, W>,
}

impl<W: Writer> Drop for FailOnPanic<'_, '_, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.job.turns).failed.get_or_insert(ConvertError::Cancelled);
            self.job.turned.notify_all();
        }
    }
}

/// A range of the disk that one thread converts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    number: u64,
    offset_bytes: u64,
    len_bytes: u64,
    /// How much of it the map calls content.
    content_bytes: u64,
}

/// Cuts a disk into pieces at multiples of their length, leaving out those without content.
struct Pieces<'a> {
    source: &'a dyn DiskContent,
    piece_bytes: u64,
    wants_zeros: bool,
    number: u64,
    /// Everything before was cut.
    next_bytes: u64,
    /// The extent that reaches past `next_bytes`, once it is known.
    extent: Option<Extent>,
}

impl<'a> Pieces<'a> {
    fn new(source: &'a dyn DiskContent, piece_bytes: u64, wants_zeros: bool) -> Self {
        Self { source, piece_bytes, wants_zeros, number: 0, next_bytes: 0, extent: None }
    }

    fn next_piece(&mut self) -> Result<Option<Piece>, crate::FormatError> {
        if !self.wants_zeros {
            self.skip_zeros()?;
        }
        let size_bytes = self.source.size_bytes();
        if self.next_bytes >= size_bytes {
            return Ok(None);
        }
        let offset_bytes = self.next_bytes;
        let end_bytes = offset_bytes.saturating_add(self.piece_bytes).min(size_bytes);
        let piece = Piece {
            number: self.number,
            offset_bytes,
            len_bytes: end_bytes - offset_bytes,
            content_bytes: self.content_before(end_bytes)?,
        };
        self.number += 1;
        self.next_bytes = end_bytes;
        Ok(Some(piece))
    }

    /// Returns the extent at `at`, which is no earlier than the last one asked for.
    fn extent_at(&mut self, at: u64) -> Result<Option<Extent>, crate::FormatError> {
        match self.extent {
            Some(extent) if extent.end_bytes() > at => {}
            _ => self.extent = self.source.next_extent(at)?,
        }
        Ok(self.extent)
    }

    /// Moves on to the piece in which the next content begins.
    fn skip_zeros(&mut self) -> Result<(), crate::FormatError> {
        let mut at = self.next_bytes;
        loop {
            match self.extent_at(at)? {
                None => {
                    self.next_bytes = u64::MAX;
                    return Ok(());
                }
                Some(extent) if !extent.kind.has_content() => at = extent.end_bytes(),
                Some(_) => {
                    self.next_bytes = self.next_bytes.max(at - at % self.piece_bytes);
                    return Ok(());
                }
            }
        }
    }

    /// Counts the content from `next_bytes` to `end`.
    fn content_before(&mut self, end: u64) -> Result<u64, crate::FormatError> {
        let (mut at, mut content) = (self.next_bytes, 0);
        while at < end {
            let Some(extent) = self.extent_at(at)? else { break };
            let until = extent.end_bytes().min(end);
            if extent.kind.has_content() {
                content += until - at;
            }
            at = until;
        }
        Ok(content)
    }
}
