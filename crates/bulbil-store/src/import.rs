//! The import pipeline: read, hash, match, compress and write at the same time, in bounded memory.
//!
//! ```text
//! coordinator ─ scan jobs ──► workers: read 1 MiB, find zeroes, hash blocks and windows
//!      ▲      ─ frame jobs ─► workers: hash and compress 128 KiB
//!      │      ─ packs ──────► writer:  put and sync 16 MiB
//!      └──────── results ────┘
//! ```
//! The coordinator takes scans in disk order, decides what is new, and alone changes the index.
//! What lands in which pack depends only on the content, never on timing.
//!
//! The manifest is put last, when every pack is durable: before that moment an import is not
//! there, after it it is complete. Packs that a killed import leaves behind are found by the next
//! one, which then does not store their blocks again, or are freed by a collection.
//!
//! An import holds a lease, so that no collection takes what it refers to.

mod changes;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};

use bulbil_types::{BLOCK_BYTES, BLOCK_LEN, BLOCKS_PER_FRAME, FRAME_BYTES, FRAME_LEN};

use crate::digest::{Digest, DigestBuilder, window_leaf};
use crate::error::{StoreError, StoreErrorKind};
use crate::frame::{self, EncodedFrame};
use crate::index::{BlockIndex, IndexedPack};
use crate::lease::WriteLease;
use crate::leaves::Leaves;
use crate::manifest::{Extent, Manifest, PackRef, push_run};
use crate::matching::{KnownBlocks, Location, Placement, place_window};
use crate::pack::{BlockHash, FinishedPack, Footer, PackBuilder, PackId};
use crate::store::Store;

use changes::Carried;
pub use changes::ChangedDisk;

/// An error of the disk that is imported, passed on as the cause.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// A disk to import.
pub trait DiskSource: Sync {
    /// The disk's size in bytes.
    fn size_bytes(&self) -> u64;

    /// The first range at or after `offset` that may hold data; everything before it is zero.
    ///
    /// # Errors
    /// When the map cannot be read.
    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError>;

    /// Fills `buf` from `offset`; called from many threads at once.
    ///
    /// # Errors
    /// When the disk cannot be read or does not verify.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError>;
}

/// Hears how an import goes on; called from the importing thread.
pub trait ImportObserver {
    /// `done_bytes` of the `total_bytes` that the disk's map calls data were taken in;
    /// `stored_bytes` were written to the store for them.
    fn progress(&self, done_bytes: u64, total_bytes: u64, stored_bytes: u64);

    /// Whether the import should stop now.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// What an import did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportReport {
    /// Identity of the disk's content.
    pub digest: Digest,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// Bytes in blocks that are not zero.
    pub data_bytes: u64,
    /// Bytes in blocks that were new to the store, before compression.
    pub new_bytes: u64,
    /// Bytes of packs and manifests that the store grew by.
    pub stored_bytes: u64,
    /// Whether the store held exactly this content before.
    pub existed: bool,
}

/// What an import is to do beyond the usual.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// Leaves what an import that fails has stored, so that the next one need not store it again; a
    /// collection frees it when none comes. Otherwise the packs are taken back.
    pub keep_on_failure: bool,
    /// The content that the disk must turn out to have; another one is not published.
    pub expected_digest: Option<Digest>,
}

const FRAME_BLOCKS: u32 = 32;

/// Windows read by one scan job: large reads, few jobs.
const WINDOWS_PER_SCAN: u64 = 8;

/// Scans in flight for each worker; each holds 1 MiB.
const SCANS_PER_WORKER: usize = 4;

/// A pack is closed by the size of all but this many of its newest frames, so that compression
/// runs ahead by as much and the decision still depends on the content alone.
const FRAMES_AHEAD: usize = 16;

/// Finished packs that wait for the disk; each holds 16 MiB.
const PACKS_AHEAD: usize = 2;

impl Store {
    /// Imports a disk with as many threads as the machine has cores.
    ///
    /// Durable, and its manifest visible, when this returns `Ok`. Another import of the same
    /// store is waited for.
    ///
    /// # Errors
    /// `Source` when the disk cannot be read, `Cancelled`, `NoSpace`, `Io`, `Corrupt`. The store
    /// then holds what it held before.
    pub fn import(&self, source: &dyn DiskSource, observer: &dyn ImportObserver) -> Result<ImportReport, StoreError> {
        self.import_with_options(source, observer, &ImportOptions::default())
    }

    /// As [`import`](Self::import), with options.
    ///
    /// # Errors
    /// As [`import`](Self::import); `Source` as well when the disk is not the content that was expected.
    pub fn import_with_options(
        &self,
        source: &dyn DiskSource,
        observer: &dyn ImportObserver,
        options: &ImportOptions,
    ) -> Result<ImportReport, StoreError> {
        self.import_as(source, observer, options, false)
    }

    /// Imports a disk and publishes a new edition of its manifest also when there is one; returns the manifest.
    pub(crate) fn import_new_edition(
        &self,
        source: &dyn DiskSource,
        observer: &dyn ImportObserver,
    ) -> Result<Manifest, StoreError> {
        let report = self.import_as(source, observer, &ImportOptions::default(), true)?;
        self.manifest(&report.digest)
    }

    fn import_as(
        &self,
        source: &dyn DiskSource,
        observer: &dyn ImportObserver,
        options: &ImportOptions,
        always_publish: bool,
    ) -> Result<ImportReport, StoreError> {
        let lock = self.lock_for_changes()?;
        self.refresh_keys()?;
        let begun = WriteLease::begin(self, "import");
        let imported = begun.map(|lease| import_with(self, lease, source, None, observer, options, always_publish));
        let (report, leftover) = imported.unwrap_or_else(|error| (Err(error), Vec::new()));
        drop(lock);
        if report.is_ok() || !options.keep_on_failure {
            self.free_leftover(leftover);
        }
        report
    }
}

fn source_error(error: SourceError) -> StoreError {
    StoreError::with_source(StoreErrorKind::Source, "cannot read the disk", error)
}

/// Imports under a lease that was taken before anything that is stored was looked at; returns as well
/// the packs that were put in vain.
fn import_with(
    store: &Store,
    lease: WriteLease,
    source: &dyn DiskSource,
    carried: Option<Carried<'_>>,
    observer: &dyn ImportObserver,
    options: &ImportOptions,
    always_publish: bool,
) -> (Result<ImportReport, StoreError>, Vec<PackId>) {
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let queue = Queue::default();
    let (results, inbox) = mpsc::channel();
    let (pack_sender, pack_receiver) = mpsc::sync_channel::<(u32, FinishedPack)>(PACKS_AHEAD);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let results = results.clone();
            let (queue, key) = (&queue, store.block_hash_key.as_bytes());
            scope.spawn(move || work(queue, source, key, &results));
        }
        let objects = Arc::clone(&store.objects);
        scope.spawn(move || {
            for (number, pack) in pack_receiver {
                let put = objects.put_if_absent(&pack.id.object_name(), &pack.bytes).map(|_| ());
                let len_bytes = pack.bytes.len() as u64;
                if results.send(Outcome::Pack { number, len_bytes, footer: pack.footer, put }).is_err() {
                    return;
                }
            }
        });
        // Workers end when the queue closes, which dropping the guard does on every way out.
        let _close = CloseOnDrop(&queue);
        let pipeline = Pipeline { queue: &queue, inbox: &inbox, packs: pack_sender };
        let mut import = match Import::new(store, lease, source, carried, observer, pipeline) {
            Ok(import) => import,
            Err(error) => return (Err(error), Vec::new()),
        };
        let ran = import.run(workers * SCANS_PER_WORKER);
        let outcome = ran.and_then(|()| import.publish(options.expected_digest, always_publish));
        let is_new = matches!(&outcome, Ok(report) if !report.existed);
        let leftover = if is_new { Vec::new() } else { import.leftover() };
        // Of what stays behind the index does not know all blocks: the next import reads the footers.
        if outcome.is_ok() || !options.keep_on_failure {
            import.close_index();
        }
        (outcome, leftover)
    })
}

/// Jobs for the workers; compression first, because it lets the pipeline drain.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    frames: VecDeque<FrameJob>,
    scans: VecDeque<ScanJob>,
    closed: bool,
}

#[derive(Debug)]
struct FrameJob {
    number: usize,
    plain: Vec<u8>,
}

#[derive(Debug)]
struct ScanJob {
    sequence: u64,
    windows: Range<u64>,
}

enum Job {
    Frame(FrameJob),
    Scan(ScanJob),
}

impl Queue {
    fn push(&self, add: impl FnOnce(&mut QueueState)) {
        add(&mut self.state.lock().expect("no panic while held"));
        self.changed.notify_one();
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock().expect("no panic while held");
        loop {
            if state.closed {
                return None;
            }
            if let Some(frame) = state.frames.pop_front() {
                return Some(Job::Frame(frame));
            }
            if let Some(scan) = state.scans.pop_front() {
                return Some(Job::Scan(scan));
            }
            state = self.changed.wait(state).expect("no panic while held");
        }
    }
}

struct CloseOnDrop<'a>(&'a Queue);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.0.state.lock() {
            state.closed = true;
        }
        self.0.changed.notify_all();
    }
}

type Leaf = [u8; 32];

/// One window of a scan: `None` when it is all zero.
type ScannedWindow = Option<(Leaf, Vec<Option<BlockHash>>)>;

struct Scanned {
    first_window: u64,
    bytes: Vec<u8>,
    windows: Vec<ScannedWindow>,
}

enum Outcome {
    Scan { sequence: u64, scanned: Result<Scanned, StoreError> },
    Frame { number: usize, frame: Result<EncodedFrame, StoreError> },
    Pack { number: u32, len_bytes: u64, footer: Footer, put: Result<(), StoreError> },
}

fn work(queue: &Queue, source: &dyn DiskSource, key: &[u8; 32], results: &Sender<Outcome>) {
    let mut compressor = None;
    while let Some(job) = queue.next() {
        let outcome = match job {
            Job::Scan(ScanJob { sequence, windows }) => {
                // A reader of strangers' bytes that panics must fail the import, not leave it waiting.
                let scanned = std::panic::catch_unwind(AssertUnwindSafe(|| scan(source, key, windows)));
                let scanned = scanned.unwrap_or_else(|_| Err(source_error("the disk's reader panicked".into())));
                Outcome::Scan { sequence, scanned }
            }
            Job::Frame(FrameJob { number, plain }) => {
                Outcome::Frame { number, frame: compress(plain, &mut compressor) }
            }
        };
        if results.send(outcome).is_err() {
            return;
        }
    }
}

fn compress(
    plain: Vec<u8>,
    compressor: &mut Option<zstd::bulk::Compressor<'static>>,
) -> Result<EncodedFrame, StoreError> {
    if compressor.is_none() {
        *compressor = Some(frame::compressor()?);
    }
    frame::encode(plain, compressor.as_mut().expect("made above"))
}

fn scan(source: &dyn DiskSource, key: &[u8; 32], windows: Range<u64>) -> Result<Scanned, StoreError> {
    let start = windows.start * FRAME_BYTES;
    let end = (windows.end * FRAME_BYTES).min(source.size_bytes());
    let window_count = usize::try_from(windows.end - windows.start).expect("a scan is a few windows");
    let mut bytes = vec![0; window_count * FRAME_LEN];
    let used = usize::try_from(end - start).expect("a scan is a few windows");
    source.read_exact_at(&mut bytes[..used], start).map_err(source_error)?;
    let windows_scanned = bytes.chunks_exact(FRAME_LEN).map(|window| scan_window(window, key)).collect();
    Ok(Scanned { first_window: windows.start, bytes, windows: windows_scanned })
}

fn scan_window(window: &[u8], key: &[u8; 32]) -> ScannedWindow {
    let hashes: Vec<_> =
        window.chunks_exact(BLOCK_LEN).map(|block| (!is_zero(block)).then(|| block_hash(block, key))).collect();
    hashes.iter().any(Option::is_some).then(|| (window_leaf(window), hashes))
}

/// The hash by which a block is recognised in a store.
pub(crate) fn block_hash(block: &[u8], key: &[u8; 32]) -> BlockHash {
    *blake3::keyed_hash(key, block).as_bytes().first_chunk().expect("16 of 32 bytes")
}

fn is_zero(block: &[u8]) -> bool {
    // Folding a stretch without an early exit lets the compiler use vector instructions.
    block.chunks(512).all(|stretch| stretch.iter().fold(0, |seen, byte| seen | byte) == 0)
}

/// Walks a disk's data and cuts it into scan jobs of whole windows.
struct ScanPlan<'a> {
    source: &'a dyn DiskSource,
    data: Option<Range<u64>>,
    next_window: u64,
}

impl ScanPlan<'_> {
    fn next(&mut self) -> Result<Option<Range<u64>>, StoreError> {
        let start_byte = self.next_window * FRAME_BYTES;
        if start_byte >= self.source.size_bytes() {
            return Ok(None);
        }
        if self.data.as_ref().is_none_or(|data| data.end <= start_byte) {
            self.data = self.source.next_data(start_byte).map_err(source_error)?;
        }
        let Some(data) = &self.data else {
            return Ok(None);
        };
        let first = (data.start / FRAME_BYTES).max(self.next_window);
        let data_end = data.end.min(self.source.size_bytes()).div_ceil(FRAME_BYTES);
        // Jobs end at multiples of their size, so that the cut does not depend on where data begins.
        let end = data_end.min((first / WINDOWS_PER_SCAN + 1) * WINDOWS_PER_SCAN);
        self.next_window = end;
        Ok((first < end).then_some(first..end))
    }
}

fn total_data_bytes(source: &dyn DiskSource) -> Result<u64, StoreError> {
    let (mut total, mut offset) = (0, 0);
    while let Some(data) = source.next_data(offset).map_err(source_error)? {
        if data.end <= offset || data.start >= source.size_bytes() {
            break;
        }
        total += data.end.min(source.size_bytes()) - data.start.max(offset);
        offset = data.end;
    }
    Ok(total)
}

/// Blocks stored before this import, and those of packs that are on their way.
struct Known<'a> {
    store: &'a Store,
    index: BlockIndex,
    /// Blocks of packs that are not in the index yet.
    pending: HashMap<BlockHash, Location>,
    pending_packs: HashMap<u32, Vec<BlockHash>>,
    /// The footer that was asked last: runs stay in one pack.
    last_footer: Option<(u32, Arc<Footer>)>,
}

impl Known<'_> {
    fn footer(&mut self, pack: u32) -> Result<&Footer, StoreError> {
        if self.last_footer.as_ref().is_none_or(|(number, _)| *number != pack) {
            let IndexedPack { id, len_bytes } = self.index.packs()[pack as usize];
            self.last_footer = Some((pack, self.store.footer(id, len_bytes)?));
        }
        Ok(&self.last_footer.as_ref().expect("set above").1)
    }
}

impl KnownBlocks for Known<'_> {
    type Error = StoreError;

    fn is_at(&mut self, hash: &BlockHash, location: Location) -> Result<bool, StoreError> {
        let block = location.block as usize;
        if self.index.is_skipped(location.pack) {
            return Ok(false);
        }
        if let Some(blocks) = self.pending_packs.get(&location.pack) {
            return Ok(blocks.get(block) == Some(hash));
        }
        match self.footer(location.pack) {
            Ok(footer) => Ok(footer.blocks.get(block) == Some(hash)),
            // A pack that was damaged since it was indexed holds nothing that may be referred to.
            Err(error) if matches!(error.kind(), StoreErrorKind::Corrupt | StoreErrorKind::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn find(&mut self, hash: &BlockHash) -> Result<Option<Location>, StoreError> {
        if let Some(location) = self.pending.get(hash) {
            return Ok(Some(*location));
        }
        for candidate in self.index.candidates(hash)? {
            if self.is_at(hash, candidate)? {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }
}

/// The pack that is being filled.
struct OpenPack {
    number: u32,
    builder: PackBuilder,
    /// Hashes of the blocks of each frame, by frame number, until the frame is compressed.
    hashes: BTreeMap<usize, Vec<BlockHash>>,
    /// Compressed frames that wait for an earlier one.
    ready: BTreeMap<usize, EncodedFrame>,
    dispatched: usize,
    added: usize,
}

struct Import<'a> {
    lease: WriteLease,
    observer: &'a dyn ImportObserver,
    queue: &'a Queue,
    inbox: &'a Receiver<Outcome>,
    packs: Option<mpsc::SyncSender<(u32, FinishedPack)>>,
    plan: ScanPlan<'a>,
    known: Known<'a>,
    /// The content that this one is a change of, if it is one.
    carried: Option<Carried<'a>>,
    /// The packs of that content, as its manifest names them.
    carried_packs: HashMap<u32, PackRef>,
    numbers: HashMap<PackId, u32>,
    scans: BTreeMap<u64, Scanned>,
    digest: Option<DigestBuilder>,
    leaves: Leaves,
    extents: Vec<Extent>,
    previous: Option<Location>,
    frame_bytes: Vec<u8>,
    frame_hashes: Vec<BlockHash>,
    open: Option<OpenPack>,
    packs_in_flight: usize,
    new_packs: Vec<PackId>,
    total_bytes: u64,
    done_bytes: u64,
    new_blocks: u64,
    stored_bytes: u64,
}

/// The coordinator's ends of the pipeline.
struct Pipeline<'a> {
    queue: &'a Queue,
    inbox: &'a Receiver<Outcome>,
    packs: mpsc::SyncSender<(u32, FinishedPack)>,
}

impl<'a> Import<'a> {
    fn new(
        store: &'a Store,
        lease: WriteLease,
        source: &'a dyn DiskSource,
        carried: Option<Carried<'a>>,
        observer: &'a dyn ImportObserver,
        Pipeline { queue, inbox, packs }: Pipeline<'a>,
    ) -> Result<Self, StoreError> {
        let mut index = store.open_index(lease.unusable())?;
        index.begin_changes()?;
        let numbers = if carried.is_some() { index.numbers() } else { HashMap::new() };
        Ok(Self {
            lease,
            observer,
            queue,
            inbox,
            packs: Some(packs),
            plan: ScanPlan { source, data: None, next_window: 0 },
            known: Known { store, index, pending: HashMap::new(), pending_packs: HashMap::new(), last_footer: None },
            carried,
            carried_packs: HashMap::new(),
            numbers,
            scans: BTreeMap::new(),
            digest: Some(DigestBuilder::new(source.size_bytes())),
            leaves: Leaves::default(),
            extents: Vec::new(),
            previous: None,
            frame_bytes: Vec::with_capacity(FRAME_LEN),
            frame_hashes: Vec::new(),
            open: None,
            packs_in_flight: 0,
            new_packs: Vec::new(),
            total_bytes: total_data_bytes(source)?,
            done_bytes: 0,
            new_blocks: 0,
            stored_bytes: 0,
        })
    }

    fn run(&mut self, max_scans: usize) -> Result<(), StoreError> {
        let (mut next_sequence, mut wanted) = (0, 0);
        let mut planned_all = false;
        loop {
            while !planned_all && next_sequence - wanted < max_scans as u64 {
                match self.plan.next()? {
                    Some(windows) => {
                        let job = ScanJob { sequence: next_sequence, windows };
                        self.queue.push(|state| state.scans.push_back(job));
                        next_sequence += 1;
                    }
                    None => planned_all = true,
                }
            }
            if wanted == next_sequence {
                break;
            }
            while !self.scans.contains_key(&wanted) {
                self.receive()?;
            }
            let scanned = self.scans.remove(&wanted).expect("waited for");
            wanted += 1;
            self.take(&scanned)?;
            self.observer.progress(self.done_bytes.min(self.total_bytes), self.total_bytes, self.stored_bytes);
        }
        self.carry_rest()?;
        self.finish_packs()
    }

    /// Waits for one result and files it.
    fn receive(&mut self) -> Result<(), StoreError> {
        if self.observer.is_cancelled() {
            return Err(StoreError::new(StoreErrorKind::Cancelled, "the import was cancelled"));
        }
        self.lease.check()?;
        match self.inbox.recv().expect("workers outlive the coordinator") {
            Outcome::Scan { sequence, scanned } => {
                self.scans.insert(sequence, scanned?);
            }
            Outcome::Frame { number, frame } => {
                let open = self.open.as_mut().expect("a pack is closed after its last frame");
                open.ready.insert(number, frame?);
                while let Some(frame) = open.ready.remove(&open.added) {
                    let hashes = open.hashes.remove(&open.added).expect("kept since it was dispatched");
                    open.builder.push(&frame, &hashes);
                    open.added += 1;
                }
            }
            Outcome::Pack { number, len_bytes, footer, put } => {
                self.packs_in_flight -= 1;
                // First of all: whatever fails from here on, the pack may be there and is to be freed then.
                let id = self.known.index.packs()[number as usize].id;
                self.new_packs.push(id);
                put?;
                self.pack_is_durable(number, len_bytes, &footer)?;
            }
        }
        Ok(())
    }

    fn pack_is_durable(&mut self, number: u32, len_bytes: u64, footer: &Footer) -> Result<(), StoreError> {
        self.stored_bytes += len_bytes;
        for (hash, block) in footer.blocks.iter().zip(0..) {
            let at = Location { pack: number, block };
            self.known.index.insert(hash, at)?;
            if self.known.pending.get(hash) == Some(&at) {
                self.known.pending.remove(hash);
            }
        }
        self.known.pending_packs.remove(&number);
        self.known.index.set_pack_len(number, len_bytes);
        Ok(())
    }

    fn take(&mut self, scanned: &Scanned) -> Result<(), StoreError> {
        for (offset, window) in scanned.windows.iter().enumerate() {
            let number = scanned.first_window + offset as u64;
            self.done_bytes += FRAME_BYTES;
            if self.carry_to(number, window)? {
                continue;
            }
            if let Some((leaf, hashes)) = window {
                self.push_leaf(number, *leaf);
                let placements = place_window(hashes, self.previous, &mut self.known)?;
                let bytes = &scanned.bytes[offset * FRAME_LEN..(offset + 1) * FRAME_LEN];
                self.place(number, bytes, hashes, &placements)?;
            }
        }
        Ok(())
    }

    fn push_leaf(&mut self, window: u64, leaf: Leaf) {
        self.digest.as_mut().expect("taken only at the end").push(window, leaf);
        self.leaves.push(window, leaf);
    }

    fn place(
        &mut self,
        window: u64,
        bytes: &[u8],
        hashes: &[Option<BlockHash>],
        placements: &[Option<Placement>],
    ) -> Result<(), StoreError> {
        for (index, (hash, placement)) in hashes.iter().zip(placements).enumerate() {
            let (Some(hash), Some(placement)) = (hash, placement) else { continue };
            let location = match placement {
                Placement::Known(location) => *location,
                Placement::New => self.store_block(&bytes[index * BLOCK_LEN..(index + 1) * BLOCK_LEN], hash)?,
            };
            self.previous = Some(location);
            let first_block = window * BLOCKS_PER_FRAME + index as u64;
            let run = Extent { first_block, blocks: 1, pack: location.pack, block_in_pack: location.block };
            push_run(&mut self.extents, run);
        }
        Ok(())
    }

    /// Puts a block into the frame that is being filled.
    fn store_block(&mut self, block: &[u8], hash: &BlockHash) -> Result<Location, StoreError> {
        if let Some(location) = self.known.pending.get(hash) {
            return Ok(*location);
        }
        if self.open.is_none() {
            self.open_pack()?;
        }
        let open = self.open.as_ref().expect("opened above");
        let in_frame = u32::try_from(self.frame_hashes.len()).expect("at most 32");
        let dispatched = u32::try_from(open.dispatched).expect("at most 2048");
        let location = Location { pack: open.number, block: dispatched * FRAME_BLOCKS + in_frame };
        self.frame_bytes.extend_from_slice(block);
        self.frame_hashes.push(*hash);
        self.known.pending.insert(*hash, location);
        self.known.pending_packs.entry(open.number).or_default().push(*hash);
        self.new_blocks += 1;
        if self.frame_hashes.len() as u64 == BLOCKS_PER_FRAME {
            self.dispatch_frame()?;
            self.close_pack_if_full()?;
        }
        Ok(location)
    }

    fn open_pack(&mut self) -> Result<(), StoreError> {
        let id = PackId::random()?;
        let builder = self.known.store.pack_builder(id)?;
        let number = self.known.index.add_pack(IndexedPack { id, len_bytes: 0 })?;
        self.open = Some(OpenPack {
            number,
            builder,
            hashes: BTreeMap::new(),
            ready: BTreeMap::new(),
            dispatched: 0,
            added: 0,
        });
        Ok(())
    }

    fn dispatch_frame(&mut self) -> Result<(), StoreError> {
        let open = self.open.as_mut().expect("a frame belongs to a pack");
        let number = open.dispatched;
        open.hashes.insert(number, std::mem::take(&mut self.frame_hashes));
        open.dispatched += 1;
        let plain = std::mem::replace(&mut self.frame_bytes, Vec::with_capacity(FRAME_LEN));
        self.queue.push(|state| state.frames.push_back(FrameJob { number, plain }));
        Ok(())
    }

    fn close_pack_if_full(&mut self) -> Result<(), StoreError> {
        self.wait_for_frames(FRAMES_AHEAD)?;
        let open = self.open.as_ref().expect("a frame was just added");
        // Exactly the frames up to the limit decide, even where more are compressed already.
        let decided = open.dispatched.saturating_sub(FRAMES_AHEAD);
        if open.builder.is_full_with(decided) || open.dispatched >= PackBuilder::MAX_FRAMES {
            self.close_pack()?;
        }
        Ok(())
    }

    fn wait_for_frames(&mut self, allowed: usize) -> Result<(), StoreError> {
        while self.open.as_ref().is_some_and(|open| open.dispatched - open.added > allowed) {
            self.receive()?;
        }
        Ok(())
    }

    fn close_pack(&mut self) -> Result<(), StoreError> {
        self.wait_for_frames(0)?;
        while self.packs_in_flight >= PACKS_AHEAD {
            self.receive()?;
        }
        let open = self.open.take().expect("there is a pack to close");
        self.packs_in_flight += 1;
        let sender = self.packs.as_ref().expect("open until the end");
        sender.send((open.number, open.builder.finish())).expect("the writer outlives the coordinator");
        Ok(())
    }

    fn finish_packs(&mut self) -> Result<(), StoreError> {
        if !self.frame_hashes.is_empty() {
            self.dispatch_frame()?;
        }
        if self.open.is_some() {
            self.close_pack()?;
        }
        while self.packs_in_flight > 0 {
            self.receive()?;
        }
        Ok(())
    }

    fn publish(&mut self, expected_digest: Option<Digest>, always: bool) -> Result<ImportReport, StoreError> {
        let digest = self.digest.take().expect("published once").finish();
        if let Some(expected) = expected_digest.filter(|expected| *expected != digest) {
            return Err(source_error(format!("its content is {digest}, not {expected}").into()));
        }
        let size_bytes = self.plan.source.size_bytes();
        let manifest = self.manifest(digest, size_bytes)?;
        let published = self.known.store.publish(&mut self.lease, &manifest, always)?;
        self.known.store.keep_leaves(&digest, &self.leaves, !published);
        let manifest_bytes = self.known.store.encode_manifest(&manifest, "")?.len() as u64;
        Ok(ImportReport {
            digest,
            size_bytes,
            data_bytes: manifest.data_bytes(),
            new_bytes: if published { self.new_blocks * BLOCK_BYTES } else { 0 },
            stored_bytes: if published { self.stored_bytes + manifest_bytes } else { 0 },
            existed: !published,
        })
    }

    /// Numbers the packs that extents use in the order of their first use.
    fn manifest(&mut self, digest: Digest, size_bytes: u64) -> Result<Manifest, StoreError> {
        let mut numbers = HashMap::new();
        let mut packs = Vec::new();
        let mut extents = std::mem::take(&mut self.extents);
        for extent in &mut extents {
            let number = match numbers.get(&extent.pack) {
                Some(number) => *number,
                None => {
                    let number = u32::try_from(packs.len()).expect("no more than the index numbers");
                    packs.push(self.pack_ref(extent.pack)?);
                    numbers.insert(extent.pack, number);
                    number
                }
            };
            extent.pack = number;
        }
        Manifest::new(size_bytes, digest, packs, extents)
    }

    fn pack_ref(&mut self, number: u32) -> Result<PackRef, StoreError> {
        if let Some(pack) = self.carried_packs.get(&number) {
            return Ok(*pack);
        }
        let IndexedPack { id, len_bytes } = self.known.index.packs()[number as usize];
        let footer_digest = self.known.footer(number)?.digest;
        Ok(PackRef { id, footer_digest, len_bytes })
    }

    /// Closes the index; one that cannot be closed is rebuilt by the next import.
    fn close_index(&mut self) {
        if let Err(error) = self.known.index.end_changes() {
            tracing::warn!(%error, "cannot close the index; it will be rebuilt");
        }
    }

    /// The packs that were put by an import that failed or brought nothing new, when all have arrived.
    fn leftover(&mut self) -> Vec<PackId> {
        self.packs = None;
        while self.packs_in_flight > 0 {
            match self.inbox.recv() {
                Ok(Outcome::Pack { number, len_bytes, footer, put }) => {
                    self.packs_in_flight -= 1;
                    self.new_packs.push(self.known.index.packs()[number as usize].id);
                    // It may stay, and is then to be found by the next import.
                    if let Err(error) = put.and_then(|()| self.pack_is_durable(number, len_bytes, &footer)) {
                        tracing::warn!(%error, "the blocks of a pack are not in the index");
                    }
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        std::mem::take(&mut self.new_packs)
    }
}
