//! The image reader itself.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bulbil_format::{Disk, ExtentDirectory, FileReader, Format, FormatError, OpenGate, OpenOptions, open_disk};
use bulbil_types::MAX_DISK_BYTES;
use rustix::process::Signal;

use super::link::{broken, receive_descriptors, receive_message, send_message};
use super::wire::{
    Answer, DataRanges, Description, MAX_RANGES, MAX_READ_BYTES, ReadRequest, RemoteError, Reply, Setup, to_json,
};
use crate::error::{ControlError, ErrorCode};
use crate::sandbox::{Sandbox, SandboxReport};

/// Reads one image for the daemon that is at the other end of standard input, until that closes it.
///
/// Call it while there is one thread only: the sandbox is applied here.
///
/// # Errors
/// When the daemon does not keep to the protocol. That an image is refused is told to the daemon and is no error.
pub fn run_image_reader() -> Result<(), ControlError> {
    // Whoever started this process reads its answers; there is nothing to go on for without them.
    let dying = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from);
    let served = dying.and_then(|()| serve());
    served
        .map_err(|e| ControlError::with_source(ErrorCode::Failed, "the image reader is started by the daemon only", &e))
}

fn serve() -> io::Result<()> {
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let descriptors = receive_descriptors(&control)?;
    let setup: Setup = receive_message(&mut control)?;
    let given = Given::new(&setup, descriptors).ok_or_else(|| io::Error::other("other descriptors than announced"))?;
    let unpacked = Arc::clone(&given.image.scratch);
    let (disk, sandbox, lanes) = match open(&setup, given) {
        Ok(opened) => opened,
        Err(error) => return send_message(&mut control, &Answer::Refused { error: *error }),
    };
    // That the lengths are equal too, which they are not in an archive, the daemon sees for itself.
    let is_file = disk.format() == Format::Raw && unpacked.metadata()?.len() == 0;
    let answer = Answer::Opened { disk: Box::new(Description::of(&disk.info())), is_file, sandbox };
    send_message(&mut control, &answer)?;
    for lane in lanes {
        let disk = Arc::clone(&disk);
        std::thread::Builder::new().name("lane".to_owned()).spawn(move || end_on_panic(|| serve_lane(lane, &*disk)))?;
    }
    // Returning ends the process, and with it the lanes.
    end_on_panic(|| serve_ranges(control, &*disk));
    Ok(())
}

/// The descriptors, by what they are for.
struct Given {
    lanes: Vec<UnixStream>,
    image: GivenFile,
    parents: Vec<GivenFile>,
    extent_dir: Option<OwnedFd>,
}

/// A file, and an empty one to unpack it to.
struct GivenFile {
    file: File,
    scratch: Arc<File>,
}

impl Given {
    fn new(setup: &Setup, descriptors: Vec<OwnedFd>) -> Option<Self> {
        if setup.descriptors() != Some(descriptors.len()) {
            return None;
        }
        let mut rest = descriptors.into_iter();
        let lanes = rest.by_ref().take(setup.lanes).map(UnixStream::from).collect();
        let mut file = || Some(GivenFile { file: rest.next()?.into(), scratch: Arc::new(rest.next()?.into()) });
        let image = file()?;
        let parents = setup.parents.iter().map(|_| file()).collect::<Option<_>>()?;
        Some(Self { lanes, image, parents, extent_dir: rest.next() })
    }
}

type Opened = (Arc<dyn Disk>, SandboxReport, Vec<UnixStream>);

/// Gives up every right that is not needed, and only then looks at the image.
fn open(setup: &Setup, given: Given) -> Result<Opened, Box<RemoteError>> {
    let mut sandbox = Sandbox::reader().file_bytes_at_most(MAX_DISK_BYTES);
    let mut gate: Option<Arc<dyn OpenGate>> = None;
    if let Some(directory) = given.extent_dir {
        let of_io = |e: io::Error| Box::new(RemoteError::new("io", &e));
        sandbox = sandbox.readable_dir_fd(directory.try_clone().map_err(of_io)?);
        gate = Some(Arc::new(ExtentDirectory::from(directory)));
    }
    let report = sandbox.apply(!setup.allow_unsandboxed).map_err(|e| Box::new(RemoteError::new(e.code(), &e)))?;
    let mut parent = None;
    for (index, (file, format)) in given.parents.into_iter().zip(&setup.parents).enumerate().rev() {
        let options = OpenOptions { parent: parent.take(), gate: gate.clone(), ..declared(format.as_deref()) };
        let opened = open_one(file, options);
        parent = Some(opened.map_err(|error| Box::new(RemoteError { parent: Some(index), ..*error }))?);
    }
    let snapshot = setup.snapshot.clone();
    let options = OpenOptions { parent, gate, snapshot, ..declared(setup.format.as_deref()) };
    Ok((open_one(given.image, options)?, report, given.lanes))
}

/// The daemon has checked the word.
fn declared(format: Option<&str>) -> OpenOptions {
    OpenOptions::declared(format.and_then(|format| format.parse::<Format>().ok()))
}

fn open_one(given: GivenFile, options: OpenOptions) -> Result<Arc<dyn Disk>, Box<RemoteError>> {
    let options = OpenOptions { scratch: Some(given.scratch), ..options };
    let opened = FileReader::new(given.file).and_then(|file| open_disk(Arc::new(file), &options));
    opened.map(Arc::from).map_err(|error| Box::new(RemoteError::of_format(&error)))
}

/// A reader that panics must not live on half: its end tells the daemon.
fn end_on_panic(work: impl FnOnce() -> io::Result<()>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the daemon is gone"),
        Err(_) => std::process::abort(),
    }
}

/// Answers reads, with no memory but one buffer, until the daemon closes the lane.
fn serve_lane(mut lane: UnixStream, disk: &dyn Disk) -> io::Result<()> {
    // The beginning of the reply and its bytes go out together.
    let mut reply = vec![0; Reply::BYTES + MAX_READ_BYTES];
    let mut request = [0; ReadRequest::BYTES];
    while receive_or_end(&mut lane, &mut request)? {
        let ReadRequest { offset_bytes, len_bytes } =
            ReadRequest::decode(request, disk.size_bytes()).map_err(broken)?;
        let len = len_bytes as usize;
        let (header, bytes) = reply.split_at_mut(Reply::BYTES);
        match disk.read_exact_at(&mut bytes[..len], offset_bytes) {
            Ok(()) => {
                header.copy_from_slice(&Reply::Data(len).encode());
                lane.write_all(&reply[..Reply::BYTES + len])?;
            }
            Err(error) => send_error(&mut lane, &error)?,
        }
    }
    Ok(())
}

/// Answers where data is, until the daemon closes the control socket.
fn serve_ranges(mut control: UnixStream, disk: &dyn Disk) -> io::Result<()> {
    let mut request = [0; 8];
    while receive_or_end(&mut control, &mut request)? {
        match ranges_from(disk, u64::from_le_bytes(request)) {
            Ok(ranges) => {
                let bytes = ranges.encode();
                control.write_all(&Reply::Data(bytes.len()).encode())?;
                control.write_all(&bytes)?;
            }
            Err(error) => send_error(&mut control, &error)?,
        }
    }
    Ok(())
}

/// Collects a batch of ranges from an offset on; ranges that touch are made one.
fn ranges_from(disk: &dyn Disk, from: u64) -> Result<DataRanges, FormatError> {
    let size_bytes = disk.size_bytes();
    let mut found = DataRanges { ranges: Vec::new(), covered: from..from };
    while found.covered.end < size_bytes {
        let Some(extent) = disk.next_extent(found.covered.end)? else { break };
        let range = found.covered.end..extent.end_bytes().min(size_bytes);
        if extent.kind.has_content() {
            let is_full = found.ranges.len() == MAX_RANGES;
            match found.ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ if is_full => return Ok(found),
                _ => found.ranges.push(range.clone()),
            }
        }
        found.covered.end = range.end;
    }
    found.covered.end = size_bytes.max(from);
    Ok(found)
}

fn send_error(to: &mut UnixStream, error: &FormatError) -> io::Result<()> {
    let json = to_json(&RemoteError::of_format(error));
    to.write_all(&Reply::Error(json.len()).encode())?;
    to.write_all(&json)
}

/// Receives a request; false when the other side has closed the socket.
fn receive_or_end(from: &mut UnixStream, request: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(request) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
