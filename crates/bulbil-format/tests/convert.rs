//! A conversion gives the same file whoever is quicker and wherever the source has holes, and ends when it cannot go on.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulbil_format::{
    Compression, ConvertError, ConvertObserver, DiskContent, Extent, ExtentKind, Format, FormatError, Identity,
    NoObserver, Qcow2Options, Target, WriteAt, convert,
};
use support::{Rng, content, open_bytes, open_path, run, write_sparse};

const SEED: u64 = 0x5eed_0007;
const IDENTITY: Identity = Identity { uuid: [7; 16], created_unix_s: 1_700_000_000 };
const DISK_BYTES: usize = (13 << 20) + 512;

fn targets() -> Vec<Target> {
    let qcow2 = |compression, cluster_bytes| {
        Target::Qcow2(Qcow2Options { cluster_bytes, compression, ..Qcow2Options::default() })
    };
    vec![
        Target::Raw,
        qcow2(None, 64 << 10),
        qcow2(Some(Compression::Zlib), 64 << 10),
        qcow2(Some(Compression::Zstd), 4096),
        qcow2(Some(Compression::Zstd), 2 << 20),
    ]
}

/// A file in memory that fails where it is told to.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// How many bytes are taken before the device is full.
    room_bytes: Option<AtomicU64>,
    fails_set_len: bool,
}

impl Memory {
    fn with_room(room_bytes: u64) -> Self {
        Self { room_bytes: Some(AtomicU64::new(room_bytes)), ..Self::default() }
    }
}

impl WriteAt for Memory {
    fn write_all_at(&self, buf: &[u8], offset_bytes: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        if let Some(room) = &self.room_bytes {
            let taken = room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |room| room.checked_sub(len));
            taken.map_err(|_| io::Error::from(ErrorKind::StorageFull))?;
        }
        let mut bytes = self.bytes.lock().unwrap();
        let start = usize::try_from(offset_bytes).unwrap();
        let end = bytes.len().max(start + buf.len());
        bytes.resize(end, 0);
        bytes[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        if self.fails_set_len {
            return Err(ErrorKind::PermissionDenied.into());
        }
        self.bytes.lock().unwrap().resize(usize::try_from(len_bytes).unwrap(), 0);
        Ok(())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        buf.copy_from_slice(self.bytes.lock().unwrap().get(start..start + buf.len()).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A source whose reads take now longer, now shorter, and that fails where it is told to.
#[derive(Debug)]
struct Troubled<'a> {
    disk: &'a dyn DiskContent,
    jitter: bool,
    reads: AtomicU64,
    bad_byte: Option<u64>,
    bad_extent: Option<u64>,
}

impl<'a> Troubled<'a> {
    fn new(disk: &'a dyn DiskContent) -> Self {
        Self { disk, jitter: false, reads: AtomicU64::new(0), bad_byte: None, bad_extent: None }
    }
}

fn bad(at: u64) -> FormatError {
    FormatError::Io { operation: "read", offset_bytes: at, source: io::Error::from(ErrorKind::InvalidData) }
}

impl DiskContent for Troubled<'_> {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        if self.jitter {
            std::thread::sleep(Duration::from_micros(Rng(number).below(3000)));
        }
        match self.bad_byte {
            Some(at) if (offset_bytes..offset_bytes + buf.len() as u64).contains(&at) => Err(bad(at)),
            _ => self.disk.read_exact_at(buf, offset_bytes),
        }
    }

    fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
        let extent = self.disk.next_extent(offset_bytes)?;
        match (self.bad_extent, extent) {
            (Some(at), Some(extent)) if extent.end_bytes() > at => Err(bad(at)),
            _ => Ok(extent),
        }
    }
}

fn convert_to_memory(source: &dyn DiskContent, target: &Target) -> Vec<u8> {
    let file = Memory::default();
    convert(source, &file, target, &IDENTITY, &NoObserver).unwrap();
    file.bytes.into_inner().unwrap()
}

/// The same content in files with holes, without holes, and compressed.
fn sources(disk: &[u8]) -> (tempfile::TempDir, Vec<Box<dyn bulbil_format::Disk>>) {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
    write_sparse(&raw, disk);
    let mut sources = vec![open_bytes(disk, Some(Format::Raw)).unwrap(), open_path(&raw, Some(Format::Raw)).unwrap()];
    for options in ["cluster_size=512", "cluster_size=2M", "compression_type=zstd"] {
        let paths = [raw.to_str().unwrap(), image.to_str().unwrap()];
        run("qemu-img", &[&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options], &paths[..]].concat());
        sources.push(open_bytes(&std::fs::read(&image).unwrap(), Some(Format::Qcow2)).unwrap());
    }
    (dir, sources)
}

#[test]
fn the_holes_of_the_source_do_not_show_in_the_file() {
    println!("seed {SEED:#x}");
    let disk = content(&mut Rng(SEED), DISK_BYTES);
    let (_dir, sources) = sources(&disk);
    for target in targets() {
        let mut files = sources.iter().map(|source| convert_to_memory(&**source, &target));
        let first = files.next().unwrap();
        assert!(files.all(|file| file == first), "{target:?}");
    }
}

#[test]
fn the_order_in_which_threads_are_ready_does_not_show_in_the_file() {
    println!("seed {SEED:#x}");
    let disk = content(&mut Rng(SEED), DISK_BYTES);
    let source = open_bytes(&disk, Some(Format::Raw)).unwrap();
    for target in targets() {
        let first = convert_to_memory(&*source, &target);
        let troubled = Troubled { jitter: true, ..Troubled::new(&*source) };
        for _ in 0..6 {
            assert!(convert_to_memory(&troubled, &target) == first, "{target:?}");
        }
    }
}

#[test]
fn a_raw_file_has_the_bytes_of_the_disk_and_its_length() {
    for disk in [content(&mut Rng(SEED), DISK_BYTES), vec![0; 4 << 20], vec![7; 512]] {
        let source = open_bytes(&disk, Some(Format::Raw)).unwrap();
        assert!(convert_to_memory(&*source, &Target::Raw) == disk);
    }
}

/// A disk full of content that does not compress.
fn noise() -> Box<dyn bulbil_format::Disk> {
    let mut rng = Rng(SEED);
    let bytes = std::iter::repeat_with(|| rng.next().to_le_bytes()).flatten();
    open_bytes(&bytes.take(DISK_BYTES).collect::<Vec<_>>(), Some(Format::Raw)).unwrap()
}

#[test]
fn a_source_that_cannot_be_read_ends_the_conversion() {
    let source = noise();
    for target in targets() {
        for bad_byte in [0, 5 << 20, DISK_BYTES as u64 - 1] {
            let troubled = Troubled { bad_byte: Some(bad_byte), ..Troubled::new(&*source) };
            let error = convert(&troubled, &Memory::default(), &target, &IDENTITY, &NoObserver).unwrap_err();
            let ConvertError::Read(FormatError::Io { offset_bytes, .. }) = error else { panic!("{error:?}") };
            assert_eq!(offset_bytes, bad_byte, "{target:?}");
        }
        let troubled = Troubled { bad_extent: Some(5 << 20), ..Troubled::new(&*source) };
        let error = convert(&troubled, &Memory::default(), &target, &IDENTITY, &NoObserver).unwrap_err();
        assert!(matches!(error, ConvertError::Read(_)), "{error:?}");
    }
}

#[test]
fn a_full_device_ends_the_conversion() {
    let source = noise();
    for target in targets() {
        // The whole image needs a little more than the disk: the last of these fails with the tables, if any.
        let needed = convert_to_memory(&*source, &target).len() as u64;
        for room_bytes in [0, 1, 3 << 20, 10 << 20, needed.min(DISK_BYTES as u64) - 1] {
            let troubled = Troubled { jitter: true, ..Troubled::new(&*source) };
            let file = Memory::with_room(room_bytes);
            let error = convert(&troubled, &file, &target, &IDENTITY, &NoObserver).unwrap_err();
            let ConvertError::Write { source, .. } = error else { panic!("{error:?}") };
            assert_eq!(source.kind(), ErrorKind::StorageFull);
        }
        let file = Memory { fails_set_len: true, ..Memory::default() };
        let error = convert(&*source, &file, &target, &IDENTITY, &NoObserver).unwrap_err();
        assert!(matches!(&error, ConvertError::Write { source, .. } if source.kind() == ErrorKind::PermissionDenied));
    }
}

/// Hears what was done, and says stop at some point.
#[derive(Default)]
struct Listener {
    most_bytes: AtomicU64,
    total_bytes: AtomicU64,
    stop_at_bytes: Option<u64>,
}

impl ConvertObserver for Listener {
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        assert!(done_bytes <= total_bytes);
        self.most_bytes.fetch_max(done_bytes, Ordering::SeqCst);
        self.total_bytes.store(total_bytes, Ordering::SeqCst);
    }

    fn is_cancelled(&self) -> bool {
        self.stop_at_bytes.is_some_and(|stop| self.most_bytes.load(Ordering::SeqCst) >= stop)
    }
}

#[test]
fn an_observer_can_stop_a_conversion() {
    let source = noise();
    for target in targets() {
        for stop_at_bytes in [0, 1, 5 << 20] {
            let listener = Listener { stop_at_bytes: Some(stop_at_bytes), ..Listener::default() };
            let error = convert(&*source, &Memory::default(), &target, &IDENTITY, &listener).unwrap_err();
            assert!(matches!(error, ConvertError::Cancelled), "{error:?}");
            assert!(listener.most_bytes.load(Ordering::SeqCst) < DISK_BYTES as u64, "nothing was stopped");
        }
    }
}

#[test]
fn progress_counts_content_and_ends_with_all_of_it() {
    println!("seed {SEED:#x}");
    let disk = content(&mut Rng(SEED), DISK_BYTES);
    let (_dir, sources) = sources(&disk);
    for source in &sources {
        let content_bytes: u64 = source.data_extents().map(|extent| extent.unwrap().len_bytes).sum();
        for target in targets().into_iter().take(2) {
            let listener = Listener::default();
            convert(&**source, &Memory::default(), &target, &IDENTITY, &listener).unwrap();
            assert_eq!(listener.most_bytes.into_inner(), content_bytes);
            assert_eq!(listener.total_bytes.into_inner(), content_bytes);
        }
    }
}

#[test]
fn what_the_map_calls_zero_is_never_read() {
    #[derive(Debug)]
    struct Unreadable;
    impl DiskContent for Unreadable {
        fn size_bytes(&self) -> u64 {
            16 << 40
        }

        fn read_exact_at(&self, _buf: &mut [u8], offset_bytes: u64) -> Result<(), FormatError> {
            Err(bad(offset_bytes))
        }

        fn next_extent(&self, offset_bytes: u64) -> Result<Option<Extent>, FormatError> {
            let len_bytes = self.size_bytes().saturating_sub(offset_bytes);
            Ok((len_bytes > 0).then_some(Extent { offset_bytes, len_bytes, kind: ExtentKind::Zero }))
        }
    }
    let target = Target::Qcow2(Qcow2Options::default());
    let source: Arc<dyn DiskContent> = Arc::new(Unreadable);
    assert!(convert(&*source, &Memory::default(), &target, &IDENTITY, &NoObserver).is_ok());
}
