//! The daemon's side of an image reader.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bulbil_format::{FileReader, Format, FormatError, ReadAt as _};
use bulbil_store::{DiskSource, SourceError};
use rustix::fs::{Mode, OFlags};

use super::link::{self, Patient, broken};
use super::process::ReaderProcess;
use super::wire::{
    self, Answer, DataRanges, Description, Found, MAX_LANES, MAX_PARENTS, MAX_READ_BYTES, ReadRequest, RemoteError,
    Reply, Setup, WireError,
};
use crate::sandbox::SandboxReport;

/// How long opening may take: a compressed file is unpacked meanwhile, which takes hours for the largest.
const OPEN_LIMIT: Duration = Duration::from_secs(12 * 3600);

/// How long one read, or one batch of ranges, may take: far more than slow disks need.
const READ_LIMIT: Duration = Duration::from_secs(300);

/// What to read.
pub(crate) struct ReaderJob {
    /// The image.
    pub(crate) path: PathBuf,
    /// Its declared format.
    pub(crate) format: Option<Format>,
    /// The internal snapshot to read.
    pub(crate) snapshot: Option<String>,
    /// The parents, the image's own first.
    pub(crate) parents: Vec<PathBuf>,
    /// Where the extents of a split image are.
    pub(crate) extent_dir: Option<PathBuf>,
    /// Whether to go on where the platform has no sandbox.
    pub(crate) allow_unsandboxed: bool,
    /// Where a file without a name is made that takes the content of a compressed image.
    pub(crate) scratch_dir: PathBuf,
    /// Whether nobody waits for the outcome any more.
    pub(crate) is_cancelled: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Why an image is not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReaderError {
    /// A file beside the image cannot be used.
    #[error("cannot use `{}`", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: Box<ReaderError>,
    },
    /// The image, or a file, was refused before it was given to a reader.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The reader refused it. `message` begins with a code of [`FormatError`].
    #[error("{message}")]
    Refused {
        message: String,
        #[source]
        source: Option<Box<ReaderError>>,
    },
    /// The reader had no space to unpack it.
    #[error("{message}")]
    NoSpace {
        message: String,
        #[source]
        source: Option<Box<ReaderError>>,
    },
    /// No reader could be started, or it could not be given what it needs.
    #[error("cannot start the image reader")]
    Start(#[source] io::Error),
    /// There are more parents than may be.
    #[error("{0} parents; at most {MAX_PARENTS}")]
    TooManyParents(usize),
    /// The reader ended, did not answer in time, or does not keep to the protocol.
    #[error("{0}")]
    Broken(String),
    /// Nobody waits for it any more.
    #[error("cancelled")]
    Cancelled,
}

impl ReaderError {
    /// Whether the reader failed rather than the image.
    pub(crate) fn is_of_reader(&self) -> bool {
        match self {
            Self::Start(_) | Self::Broken(_) => true,
            Self::Refused { message, .. } => message.starts_with("sandbox-unavailable"),
            _ => false,
        }
    }

    /// Whether a compressed file could not be unpacked for lack of space.
    pub(crate) fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::File { source, .. } => source.is_no_space(),
            _ => false,
        }
    }

    /// Makes a chain of errors of the texts that a reader told.
    fn remote(error: RemoteError) -> Self {
        let RemoteError { code, causes, .. } = error.checked();
        let mut chain = None;
        for message in causes.into_iter().rev() {
            chain = Some(Self::Refused { message, source: chain.map(Box::new) });
        }
        match chain {
            Some(Self::Refused { message, source }) if code == RemoteError::NO_SPACE => {
                Self::NoSpace { message, source }
            }
            Some(refused) => refused,
            None => Self::Broken("no reason was given".to_owned()),
        }
    }
}

/// An image that a reader has open, as a disk.
pub(crate) struct ImageReader {
    /// The image file, where the disk is that file byte for byte: nothing is parsed in reading it.
    file: Option<FileReader>,
    control: Mutex<UnixStream>,
    ranges: Mutex<DataRanges>,
    lanes: Lanes,
    disk: Description,
    is_cancelled: Box<dyn Fn() -> bool + Send + Sync>,
    /// Why there is nothing to read any more; the first reason stands.
    failure: OnceLock<String>,
    // Last: its end is waited for when the sockets are closed.
    process: ReaderProcess,
}

/// Sockets that no thread uses at the moment.
struct Lanes {
    idle: Mutex<Vec<UnixStream>>,
    returned: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageReader {
    /// Starts a reader and has it open an image.
    ///
    /// It belongs to the calling thread, and is killed when that ends.
    pub(crate) fn open(program: &Path, job: ReaderJob) -> Result<Self, ReaderError> {
        let files = Files::open(&job)?;
        let lane_count = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(MAX_LANES);
        let lanes: Vec<_> = std::iter::repeat_with(link::lane).take(lane_count).collect::<io::Result<_>>()?;
        let (ours, theirs): (Vec<_>, Vec<_>) = lanes.into_iter().unzip();
        let setup = files.setup(&job, lane_count);
        let image = FileReader::new(files.images[0].0.try_clone()?)?;
        let (control, of_reader) = UnixStream::pair()?;
        for socket in ours.iter().chain([&control]) {
            link::prepare(socket)?;
        }
        let process = ReaderProcess::start(program, of_reader)?;
        let asked = link::send_descriptors(&control, &files.descriptors(&theirs))
            .and_then(|()| link::send_message(&mut Patient::new(&control, READ_LIMIT, &*job.is_cancelled), &setup));
        // From here on only the reader has its ends, so that its end closes them.
        drop((files, theirs));
        let answer =
            asked.and_then(|()| link::receive_message(&mut Patient::new(&control, OPEN_LIMIT, &*job.is_cancelled)));
        match answer.map_err(|error| failure_of(&process, &error))? {
            Answer::Opened { disk, is_file, sandbox } => {
                let disk = disk.checked().map_err(|e| failure_of(&process, &broken(e)))?;
                log_opened(&job.path, &disk, &wire::checked_report(sandbox));
                let lanes = Lanes { idle: Mutex::new(ours), returned: Condvar::new() };
                let (control, ranges) = (Mutex::new(control), Mutex::default());
                let (is_cancelled, failure) = (job.is_cancelled, OnceLock::new());
                let file = (is_file && image.len_bytes() == disk.size_bytes).then_some(image);
                Ok(Self { file, control, ranges, lanes, disk, is_cancelled, failure, process })
            }
            Answer::Refused { error } => Err(match error.parent.and_then(|parent| job.parents.get(parent)) {
                Some(path) => ReaderError::File { path: path.clone(), source: Box::new(ReaderError::remote(error)) },
                None => ReaderError::remote(error),
            }),
        }
    }

    /// The word for the format of the image.
    pub(crate) fn format(&self) -> &str {
        &self.disk.format
    }

    /// Whether nobody waits for the outcome any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        (self.is_cancelled)()
    }

    /// Whether the reader is lost, and not only the image damaged.
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.get().is_some()
    }

    /// Reads up to [`MAX_READ_BYTES`] over one lane.
    fn read_piece(&self, lane: &UnixStream, piece: &mut [u8], offset_bytes: u64) -> io::Result<Option<RemoteError>> {
        let mut lane = Patient::new(lane, READ_LIMIT, &*self.is_cancelled);
        let len_bytes = u32::try_from(piece.len()).expect("a piece is small");
        lane.write_all(&ReadRequest { offset_bytes, len_bytes }.encode())?;
        match receive_reply(&mut lane)? {
            Reply::Data(len) => {
                wire::check_read(len, piece.len()).map_err(broken)?;
                lane.read_exact(piece).map(|()| None)
            }
            Reply::Error(len) => receive_error(&mut lane, len).map(Some),
        }
    }

    fn fetch_ranges(&self, control: &UnixStream, from: u64) -> io::Result<Result<DataRanges, RemoteError>> {
        let mut control = Patient::new(control, READ_LIMIT, &*self.is_cancelled);
        control.write_all(&from.to_le_bytes())?;
        match receive_reply(&mut control)? {
            Reply::Data(len) => {
                DataRanges::check_len(len).map_err(broken)?;
                let mut bytes = vec![0; len];
                control.read_exact(&mut bytes)?;
                DataRanges::decode(&bytes, from, self.disk.size_bytes).map(Ok).map_err(broken)
            }
            Reply::Error(len) => receive_error(&mut control, len).map(Err),
        }
    }

    /// Remembers that the reader is lost, and why; all threads then hear the same.
    fn fail(&self, error: &io::Error) -> ReaderError {
        if (self.is_cancelled)() {
            self.process.kill();
            return ReaderError::Cancelled;
        }
        let reason = self.failure.get_or_init(|| failure_of(&self.process, error).to_string());
        self.process.kill();
        self.lanes.returned.notify_all();
        ReaderError::Broken(reason.clone())
    }

    fn take_lane(&self) -> Result<UnixStream, ReaderError> {
        let mut idle = lock(&self.lanes.idle);
        loop {
            if let Some(reason) = self.failure.get() {
                return Err(ReaderError::Broken(reason.clone()));
            }
            if let Some(lane) = idle.pop() {
                return Ok(lane);
            }
            // Lanes that failed do not come back: the reason is looked at again now and then.
            let waited = self.lanes.returned.wait_timeout(idle, Duration::from_millis(100));
            idle = waited.unwrap_or_else(PoisonError::into_inner).0;
            if (self.is_cancelled)() {
                return Err(ReaderError::Cancelled);
            }
        }
    }

    fn return_lane(&self, lane: UnixStream) {
        lock(&self.lanes.idle).push(lane);
        self.lanes.returned.notify_one();
    }
}

impl DiskSource for ImageReader {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let mut from = offset;
        while from < self.disk.size_bytes {
            let mut ranges = lock(&self.ranges);
            match ranges.find(from) {
                Found::Range(range) => return Ok(Some(range)),
                Found::NoneUpTo(end) => from = end,
                Found::Unknown => {
                    let control = lock(&self.control);
                    *ranges = match self.fetch_ranges(&control, from) {
                        Ok(fetched) => fetched.map_err(ReaderError::remote)?,
                        Err(error) => return Err(self.fail(&error).into()),
                    };
                }
            }
        }
        Ok(None)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        if let Some(file) = &self.file {
            let failed = |source| FormatError::Io { operation: "read", offset_bytes: offset, source };
            return Ok(file.read_exact_at(buf, offset).map_err(failed)?);
        }
        let lane = self.take_lane()?;
        let mut at = offset;
        for piece in buf.chunks_mut(MAX_READ_BYTES) {
            match self.read_piece(&lane, piece, at) {
                Ok(None) => at += piece.len() as u64,
                Ok(Some(error)) => {
                    self.return_lane(lane);
                    return Err(ReaderError::remote(error).into());
                }
                // What is still on the lane is nobody's: it is closed.
                Err(error) => return Err(self.fail(&error).into()),
            }
        }
        self.return_lane(lane);
        Ok(())
    }
}

impl From<io::Error> for ReaderError {
    /// Of what happens before the reader has been asked anything.
    fn from(error: io::Error) -> Self {
        Self::Start(error)
    }
}

fn receive_reply(from: &mut Patient<'_>) -> io::Result<Reply> {
    let mut header = [0; Reply::BYTES];
    from.read_exact(&mut header)?;
    Reply::decode(header).map_err(broken)
}

fn receive_error(from: &mut Patient<'_>, len: usize) -> io::Result<RemoteError> {
    let mut json = vec![0; len];
    from.read_exact(&mut json)?;
    wire::from_json(&json).map_err(broken)
}

/// Explains why a reader is lost.
fn failure_of(process: &ReaderProcess, error: &io::Error) -> ReaderError {
    let protocol = error.get_ref().and_then(|source| source.downcast_ref::<WireError>());
    ReaderError::Broken(match (error.kind(), protocol) {
        (ErrorKind::ConnectionAborted, _) => return ReaderError::Cancelled,
        (ErrorKind::TimedOut, _) => "the image reader did not answer in time".to_owned(),
        (_, Some(protocol)) => format!("the image reader does not keep to the protocol: {protocol}"),
        (ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset, None) => process.explain_end(),
        _ => format!("the image reader cannot be reached: {error}"),
    })
}

fn log_opened(path: &Path, disk: &Description, sandbox: &SandboxReport) {
    let path = path.display();
    tracing::info!(%path, format = disk.format, size_bytes = disk.size_bytes, %sandbox, "image open");
    for note in &disk.notes {
        tracing::warn!(%path, note, "about the image");
    }
}

/// All that the reader is given, open.
struct Files {
    /// The image and its parents; each with a file without a name, which goes with its last descriptor.
    images: Vec<(File, File)>,
    extent_dir: Option<OwnedFd>,
}

impl Files {
    fn open(job: &ReaderJob) -> Result<Self, ReaderError> {
        if job.parents.len() > MAX_PARENTS {
            return Err(ReaderError::TooManyParents(job.parents.len()));
        }
        let beside =
            |path: &Path, error: ReaderError| ReaderError::File { path: path.to_owned(), source: Box::new(error) };
        let with_scratch = |image: File| -> io::Result<_> { Ok((image, tempfile::tempfile_in(&job.scratch_dir)?)) };
        let mut images = vec![with_scratch(open_image(&job.path)?)?];
        for path in &job.parents {
            images.push(with_scratch(open_image(path).map_err(|e| beside(path, e.into()))?)?);
        }
        let extent_dir = job.extent_dir.as_deref().map(|path| {
            let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            opened.map_err(|errno| beside(path, opening(errno.into()).into()))
        });
        Ok(Self { images, extent_dir: extent_dir.transpose()? })
    }

    fn setup(&self, job: &ReaderJob, lanes: usize) -> Setup {
        Setup {
            format: job.format.map(|format| format.to_string()),
            snapshot: job.snapshot.clone(),
            lanes,
            parents: vec![None; job.parents.len()],
            extent_dir: self.extent_dir.is_some(),
            allow_unsandboxed: job.allow_unsandboxed,
        }
    }

    /// In the order that [`Setup`] gives.
    fn descriptors<'a>(&'a self, lanes: &'a [UnixStream]) -> Vec<rustix::fd::BorrowedFd<'a>> {
        let images = self.images.iter().flat_map(|(image, scratch)| [image.as_fd(), scratch.as_fd()]);
        let directory = self.extent_dir.iter().map(|directory| directory.as_fd());
        lanes.iter().map(|lane| lane.as_fd()).chain(images).chain(directory).collect()
    }
}

/// Opens what can be an image, for reading; nothing of its content is looked at.
fn open_image(path: &Path) -> Result<File, FormatError> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(opening)?;
    // Refuses what is neither a file nor a block device, and tells it by name.
    FileReader::new(file.try_clone().map_err(opening)?)?;
    Ok(file)
}

fn opening(source: io::Error) -> FormatError {
    FormatError::Io { operation: "open", offset_bytes: 0, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_meets_a_full_disk_is_told_from_an_image_that_is_refused() {
        let remote = |kind: ErrorKind| {
            let error = FormatError::Io { operation: "unpack", offset_bytes: 0, source: kind.into() };
            ReaderError::remote(RemoteError::of_format(&error))
        };
        let full = remote(ErrorKind::StorageFull);
        assert!(full.is_no_space() && !full.is_of_reader());
        assert!(ReaderError::File { path: PathBuf::new(), source: Box::new(full) }.is_no_space());
        assert!(!remote(ErrorKind::InvalidData).is_no_space());
    }
}
