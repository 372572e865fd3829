//! A disk image file into one of another format, by a process with as few rights as possible.
//!
//! ```text
//! convert_file: temporary file ──► starts ──► worker: opens files, confines itself, parses, converts, syncs
//!       ▲                                       │
//!       └──────── progress, end or error ◄──────┘ lines on its standard output
//! rename, sync the directory
//! ```
//! The process that names the new file never looks at an image, and the one that does has no right to name anything.
//! Whatever ends the worker, nothing of the new file is left.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulbil_format::{BackingFile, ConvertError, ConvertObserver, convert};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use crate::disk_file::{DiskFile, confine};
use crate::error::{ControlError, ErrorCode};
use crate::export::{ExportProgress, WrittenFile, convert_error};
use crate::new_file::NewFile;
use crate::process;
use crate::sandbox::Sandbox;
use crate::target::{TargetOptions, new_identity};

/// How often the worker says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// What to convert to what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConvertRequest {
    /// The image to read.
    pub input: DiskFile,
    /// The file to write.
    pub output: PathBuf,
    /// As what.
    pub target: TargetOptions,
    /// The image below the new one, which then holds the difference only.
    pub backing: Option<DiskFile>,
    /// Whether a file that is there is replaced.
    pub replace: bool,
    /// Go on where this host cannot restrict the process that reads.
    pub allow_unsandboxed: bool,
}

/// What the worker reads from its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Job {
    request: ConvertRequest,
    /// The new file, empty and without its name yet.
    temporary: PathBuf,
    /// How the new image names the one below.
    backing_name: Option<String>,
}

/// A line that the worker writes to its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    Progress(ExportProgress),
    Done { size_bytes: u64 },
    Error(ControlError),
}

/// Converts a disk image file; the new one is there, complete and durable, when this returns.
///
/// `program` is the binary that takes [`process::CONVERT_COMMAND`]. Dropping the future ends the conversion and leaves
/// nothing of the new file.
///
/// # Errors
/// `InUse` for an output that exists, `Invalid` for files that cannot be read or written so, `NoSpace`, `NotFound`,
/// `Failed`.
pub async fn convert_file(
    program: &Path,
    request: ConvertRequest,
    mut progress: impl FnMut(ExportProgress),
) -> Result<WrittenFile, ControlError> {
    check_apart(&request)?;
    let output = NewFile::create(&request.output, request.replace)?;
    let backing_name = request.backing.as_ref().map(|backing| backing_name(&backing.path, &output)).transpose()?;
    let (path, format) = (request.output.clone(), request.target.format);
    let job = Job { request, temporary: output.temporary().to_owned(), backing_name };
    let size_bytes = run_worker(program, &job, &mut progress).await?;
    let file = output.complete()?;
    Ok(WrittenFile { path, format, size_bytes, file })
}

/// Refuses to write what is read.
fn check_apart(request: &ConvertRequest) -> Result<(), ControlError> {
    let id = |path: &Path| std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let Some(output) = id(&request.output) else { return Ok(()) };
    let files = std::iter::once(&request.input).chain(&request.backing);
    let mut read = files.flat_map(|file| std::iter::once(&file.path).chain(&file.parents));
    match read.find(|path| id(path) == Some(output)) {
        None => Ok(()),
        Some(same) => {
            let text =
                format!("cannot write `{}`: it is `{}`, which is read", request.output.display(), same.display());
            Err(ControlError::new(ErrorCode::Invalid, text))
        }
    }
}

/// How an image at `output` names the one below: by its name alone where they lie together, so that both may be moved.
fn backing_name(backing: &Path, output: &NewFile) -> Result<String, ControlError> {
    let cannot_use = || format!("cannot use `{}` as backing file", backing.display());
    let found =
        backing.canonicalize().map_err(|e| ControlError::io(format!("cannot open `{}`", backing.display()), &e))?;
    let together = output.directory().canonicalize().is_ok_and(|directory| found.parent() == Some(&directory));
    let name = match found.file_name() {
        Some(name) if together => PathBuf::from(name),
        _ => found,
    };
    // A name with a colon is taken for one of a protocol.
    let name = name
        .into_os_string()
        .into_string()
        .ok()
        .map(|name| if name.contains(':') && together { format!("./{name}") } else { name });
    name.ok_or_else(|| ControlError::new(ErrorCode::Invalid, format!("{}: its path is not valid UTF-8", cannot_use())))
}

async fn run_worker(program: &Path, job: &Job, progress: &mut impl FnMut(ExportProgress)) -> Result<u64, ControlError> {
    let fail = |e: io::Error| ControlError::io("cannot start the process that converts", &e);
    let document = serde_json::to_vec(job)
        .map_err(|e| ControlError::with_source(ErrorCode::Invalid, "cannot convert files of these names", &e))?;
    let mut child = tokio::process::Command::new(program)
        .arg(process::CONVERT_COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // Apart from the terminal's signals: whoever hears them decides.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(fail)?;
    let mut stdin = child.stdin.take().expect("piped");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // It reads all of this before it writes anything. If it is gone, its status says more.
    let _sent = stdin.write_all(&document).await.is_ok();
    drop(stdin);
    let mut end = None;
    while let Some(line) = lines.next_line().await.map_err(fail)? {
        match serde_json::from_str(&line) {
            Ok(Step::Progress(step)) => progress(step),
            Ok(Step::Done { size_bytes }) => end = Some(Ok(size_bytes)),
            Ok(Step::Error(error)) => end = Some(Err(error)),
            Err(error) => tracing::warn!(%error, "the process that converts said what makes no sense"),
        }
    }
    let status = child.wait().await.map_err(fail)?;
    end.unwrap_or_else(|| {
        let text = format!("cannot convert `{}`", job.request.input.path.display());
        let cause = io::Error::other(format!("the process that converts ended early: {status}"));
        Err(ControlError::with_source(ErrorCode::Failed, text, &cause))
    })
}

/// Does what a [`convert_file`] in another process asks for on `input`, and tells it on `output`.
///
/// Call it where no other thread runs; this process can do nothing else afterwards, and ends with the thread that
/// started it.
pub fn convert_worker(input: impl Read, output: impl Write + Send) {
    // While it unpacks a file it tells nothing, and would not hear that nobody listens.
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        tracing::warn!(%error, "cannot end with the process that started this one");
    }
    let listener = Listener { output: Mutex::new((output, Instant::now())), gone: AtomicBool::new(false) };
    let job: Result<Job, _> = serde_json::from_reader(input);
    let done = match job {
        Ok(job) => job.run(&listener),
        Err(error) => Err(ControlError::with_source(ErrorCode::Failed, "cannot read what to convert", &error)),
    };
    listener.tell(&match done {
        Ok(size_bytes) => Step::Done { size_bytes },
        Err(error) => Step::Error(error),
    });
}

impl Job {
    /// Returns the size of the disk.
    fn run(self, observer: &dyn ConvertObserver) -> Result<u64, ControlError> {
        let Self { request, temporary, backing_name } = self;
        let cannot_write = format!("cannot write `{}`", request.output.display());
        let output = File::options().read(true).write(true).open(&temporary);
        let output = output.map_err(|e| ControlError::io(&*cannot_write, &e))?;
        let scratch_dir = temporary.parent().unwrap_or(Path::new("/"));
        let input = request.input.open_files(scratch_dir)?;
        let below = request.backing.as_ref().map(|backing| backing.open_files(scratch_dir)).transpose()?;
        confine(request.input.allow_in(Sandbox::reader()), request.allow_unsandboxed)?;
        let what = format!("cannot convert `{}`", request.input.path.display());
        let disk = input.open_disk(&what)?;
        let below =
            below.map(|files| files.open_disk(&format!("{what}: its backing file cannot be read"))).transpose()?;
        let backing =
            below.zip(backing_name).map(|(disk, name)| BackingFile { name, format: disk.format(), content: disk });
        let name = request.output.file_stem().unwrap_or_default().to_string_lossy();
        let target = request.target.target(&name, backing);
        let target = target.map_err(|e| ControlError::with_source(ErrorCode::Invalid, &*cannot_write, &e))?;
        convert(&*disk, &output, &target, &new_identity(), observer).map_err(|error| match error {
            ConvertError::Read(error) => crate::disk_file::format_error(&what, &error),
            other => convert_error(&cannot_write, &other),
        })?;
        // Here, and not only where it gets its name, because this process may be ended at any time.
        output.sync_all().map_err(|e| ControlError::io(&*cannot_write, &e))?;
        Ok(disk.size_bytes())
    }
}

/// The process that started this one.
struct Listener<W> {
    /// With the time when it last heard something.
    output: Mutex<(W, Instant)>,
    gone: AtomicBool,
}

impl<W: Write + Send> Listener<W> {
    fn tell(&self, step: &Step) {
        let mut line = serde_json::to_vec(step).expect("steps are plain data");
        line.push(b'\n');
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let (writer, told_at) = &mut *output;
        if writer.write_all(&line).and_then(|()| writer.flush()).is_err() {
            self.gone.store(true, Ordering::Relaxed);
        }
        *told_at = Instant::now();
    }

    fn is_due(&self) -> bool {
        // Another thread is telling something if this is locked.
        self.output.try_lock().is_ok_and(|output| output.1.elapsed() >= PROGRESS_INTERVAL)
    }
}

impl<W: Write + Send> ConvertObserver for Listener<W> {
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        if self.is_due() {
            self.tell(&Step::Progress(ExportProgress { done_bytes, total_bytes }));
        }
    }

    fn is_cancelled(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}
