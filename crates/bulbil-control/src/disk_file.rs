//! Disk image files as such: no data directory, no store, no daemon.
//!
//! ```text
//! DiskFile (words) ──► open files ──► sandbox ──► open_disk: parents first, then the image itself
//! ```
//! Everything is open before the first byte of it is looked at, so that the process that looks needs no right to open
//! anything; only the extents of split images are opened later, in the directory that was named for them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_format::{
    ConvertError, ConvertObserver, Disk, DiskInfo, ExtentDirectory, FileReader, Format, FormatError, OpenGate,
    OpenOptions, Target, WriteAt, convert, open_disk,
};
use serde::{Deserialize, Serialize};

use crate::error::{ControlError, ErrorCode};
use crate::sandbox::{Sandbox, SandboxError};
use crate::target::new_identity;

/// A disk image file and what its owner says about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskFile {
    /// The file.
    pub path: PathBuf,
    /// Its format; by default it is recognised.
    #[serde(with = "format_word")]
    pub format: Option<Format>,
    /// The image it is based on, the one that is based on, and so on.
    pub parents: Vec<PathBuf>,
    /// The directory in which the other files of a split image lie.
    pub extent_dir: Option<PathBuf>,
    /// The snapshot to read, by name or id, instead of the current state.
    pub snapshot: Option<String>,
}

/// What a disk image file says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// The file, as it was named.
    pub path: String,
    /// Its format.
    pub format: String,
    /// The variant of the format, as its users call it.
    pub variant: Option<String>,
    /// The size of the disk.
    pub size_bytes: u64,
    /// The length of the file; that of a compressed file once it is unpacked.
    pub file_bytes: u64,
    /// How much of the disk has content.
    pub data_bytes: u64,
    /// The unit of allocation.
    pub cluster_bytes: Option<u64>,
    /// What compressed clusters, if there are any, are compressed with.
    pub compression: Option<String>,
    /// How many clusters are compressed.
    pub compressed_clusters: u64,
    /// The identifier the image gives itself.
    pub identifier: Option<String>,
    /// The program that made it.
    pub creator: Option<String>,
    /// The snapshots in it.
    pub snapshots: Vec<SnapshotDescription>,
    /// What a person should know beside all this.
    pub notes: Vec<String>,
}

/// A snapshot in a disk image file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDescription {
    /// Its id, unique in the file.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The size of the disk at that time.
    pub size_bytes: u64,
    /// When it was taken, in seconds since 1970.
    pub created_at: u64,
}

/// A format as the word users type.
mod format_word {
    use bulbil_format::Format;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(format: &Option<Format>, to: S) -> Result<S::Ok, S::Error> {
        format.map(Format::as_str).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Format>, D::Error> {
        let word = Option::<String>::deserialize(from)?;
        word.map(|word| word.parse().map_err(serde::de::Error::custom)).transpose()
    }
}

impl DiskFile {
    /// A file of which nothing is said.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), format: None, parents: Vec::new(), extent_dir: None, snapshot: None }
    }

    /// Opens everything that has been named; `scratch_dir` takes what compressed files unpack to.
    pub(crate) fn open_files(&self, scratch_dir: &Path) -> Result<OpenFiles, ControlError> {
        let gate = self.extent_dir.as_deref().map(extent_gate).transpose()?;
        let open = |path: &PathBuf| OpenFile::new(path, scratch_dir);
        Ok(OpenFiles {
            image: open(&self.path)?,
            parents: self.parents.iter().map(open).collect::<Result<_, _>>()?,
            format: self.format,
            snapshot: self.snapshot.clone(),
            gate,
        })
    }

    /// Adds what has to stay reachable to a sandbox.
    pub(crate) fn allow_in(&self, sandbox: Sandbox) -> Sandbox {
        match &self.extent_dir {
            Some(directory) => sandbox.readable_dir(directory),
            None => sandbox,
        }
    }
}

/// Allows the files of one directory.
fn extent_gate(directory: &Path) -> Result<Arc<dyn OpenGate>, ControlError> {
    match ExtentDirectory::open(directory) {
        Ok(gate) => Ok(Arc::new(gate)),
        Err(FormatError::Io { source, .. }) => Err(ControlError::io(cannot_open(directory), &source)),
        Err(other) => Err(format_error(&cannot_open(directory), &other)),
    }
}

fn cannot_open(path: &Path) -> String {
    format!("cannot open `{}`", path.display())
}

/// An open file of which nothing has been read.
pub(crate) struct OpenFile {
    path: PathBuf,
    reader: Arc<FileReader>,
    /// Without a name, so that it goes with this process.
    scratch: Arc<File>,
}

impl OpenFile {
    fn new(path: &Path, scratch_dir: &Path) -> Result<Self, ControlError> {
        let reader = FileReader::open(path).map_err(|error| match error {
            FormatError::Io { source, .. } => ControlError::io(cannot_open(path), &source),
            other => format_error(&cannot_open(path), &other),
        })?;
        let scratch = tempfile::tempfile_in(scratch_dir).map_err(|e| {
            ControlError::io(format!("cannot make a temporary file in `{}`", scratch_dir.display()), &e)
        })?;
        Ok(Self { path: path.to_owned(), reader: Arc::new(reader), scratch: Arc::new(scratch) })
    }
}

/// A disk image with everything it needs, open.
pub(crate) struct OpenFiles {
    image: OpenFile,
    parents: Vec<OpenFile>,
    format: Option<Format>,
    snapshot: Option<String>,
    gate: Option<Arc<dyn OpenGate>>,
}

impl OpenFiles {
    /// Parses the image and its parents; `what` was attempted.
    pub(crate) fn open_disk(&self, what: &str) -> Result<Arc<dyn Disk>, ControlError> {
        let mut parent = None;
        for file in self.parents.iter().rev() {
            let what = format!("{what}: its parent `{}` cannot be read", file.path.display());
            parent = Some(self.open_one(&what, file, OpenOptions { parent, ..OpenOptions::default() })?);
        }
        let options =
            OpenOptions { format: self.format, snapshot: self.snapshot.clone(), parent, ..Default::default() };
        self.open_one(what, &self.image, options)
    }

    fn open_one(&self, what: &str, file: &OpenFile, options: OpenOptions) -> Result<Arc<dyn Disk>, ControlError> {
        let scratch = Some(Arc::clone(&file.scratch));
        let options = OpenOptions { gate: self.gate.clone(), scratch, ..options };
        let disk = open_disk(Arc::clone(&file.reader) as _, &options);
        disk.map(Arc::from).map_err(|error| format_error(what, &error))
    }
}

pub(crate) fn format_error(what: &str, error: &FormatError) -> ControlError {
    let code = if is_no_space(error) { ErrorCode::NoSpace } else { ErrorCode::Invalid };
    ControlError::with_source(code, what, error)
}

/// Whether a compressed file could not be unpacked for lack of space, which is no fault of the file.
pub(crate) fn is_no_space(error: &FormatError) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error, FormatError::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
}

/// Gives up every right that reading open files does not need; where this host cannot do that, only if it is allowed.
pub(crate) fn confine(sandbox: Sandbox, allow_unsandboxed: bool) -> Result<(), ControlError> {
    sandbox.apply(!allow_unsandboxed).map(drop).map_err(|error| match error {
        SandboxError::Directory { path, source } => ControlError::io(cannot_open(&path), &source),
        other => ControlError::with_source(ErrorCode::Failed, "cannot restrict the rights of this process", &other),
    })
}

/// Tells what disk image files say about themselves.
///
/// Call it where no other thread runs: this process can do little else afterwards.
///
/// # Errors
/// For one file each: it cannot be opened, or is not a sound disk image. For all: there can be no sandbox.
pub fn describe_disks(
    files: &[DiskFile],
    allow_unsandboxed: bool,
) -> Result<impl Iterator<Item = Result<DiskDescription, ControlError>>, ControlError> {
    let opened = open_confined(files, allow_unsandboxed)?;
    Ok(opened.into_iter().map(|(path, opened)| {
        let what = format!("cannot read `{path}`");
        let disk = opened?.open_disk(&what)?;
        describe(path, &*disk).map_err(|error| format_error(&what, &error))
    }))
}

/// Reads disk image files to their ends and decodes everything that is compressed.
///
/// Call it where no other thread runs: this process can do little else afterwards.
///
/// # Errors
/// As [`describe_disks`].
pub fn check_disks(
    files: &[DiskFile],
    allow_unsandboxed: bool,
    observer: &dyn ConvertObserver,
) -> Result<impl Iterator<Item = Result<DiskDescription, ControlError>>, ControlError> {
    let opened = open_confined(files, allow_unsandboxed)?;
    Ok(opened.into_iter().map(move |(path, opened)| {
        let what = format!("cannot check `{path}`");
        let disk = opened?.open_disk(&what)?;
        read_all(&*disk, observer).map_err(|error| format_error(&what, &error))?;
        describe(path, &*disk).map_err(|error| format_error(&what, &error))
    }))
}

type OpenedFile = (String, Result<OpenFiles, ControlError>);

fn open_confined(files: &[DiskFile], allow_unsandboxed: bool) -> Result<Vec<OpenedFile>, ControlError> {
    let scratch_dir = std::env::temp_dir();
    let open = |file: &DiskFile| (file.path.display().to_string(), file.open_files(&scratch_dir));
    let opened = files.iter().map(open).collect();
    confine(files.iter().fold(Sandbox::reader(), |sandbox, file| file.allow_in(sandbox)), allow_unsandboxed)?;
    Ok(opened)
}

fn describe(path: String, disk: &dyn Disk) -> Result<DiskDescription, FormatError> {
    let info: DiskInfo = disk.info();
    let data_bytes = match info.data_bytes {
        Some(bytes) => bytes,
        None => disk.data_extents().map(|extent| extent.map(|extent| extent.len_bytes)).sum::<Result<_, _>>()?,
    };
    let snapshot = |snapshot: bulbil_format::SnapshotInfo| SnapshotDescription {
        id: snapshot.id,
        name: snapshot.name,
        size_bytes: snapshot.size_bytes,
        created_at: snapshot.created_unix_s,
    };
    Ok(DiskDescription {
        path,
        format: info.format.to_string(),
        variant: info.variant,
        size_bytes: info.size_bytes,
        file_bytes: info.file_bytes,
        data_bytes,
        cluster_bytes: info.cluster_bytes,
        compression: info.compression.map(|compression| compression.to_string()),
        compressed_clusters: info.compressed_clusters,
        identifier: info.identifier,
        creator: info.creator,
        snapshots: info.snapshots.into_iter().map(snapshot).collect(),
        notes: info.notes,
    })
}

/// Takes everything and keeps nothing.
struct Nowhere;

impl WriteAt for Nowhere {
    fn write_all_at(&self, _buf: &[u8], _offset_bytes: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _len_bytes: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn read_exact_at(&self, _buf: &mut [u8], _offset_bytes: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Reads what a disk has with all threads: a conversion of which nothing is kept.
fn read_all(disk: &dyn Disk, observer: &dyn ConvertObserver) -> Result<(), FormatError> {
    match convert(disk, &Nowhere, &Target::Raw, &new_identity(), observer) {
        Ok(()) => Ok(()),
        Err(ConvertError::Read(error)) => Err(error),
        Err(other) => Err(FormatError::Io { operation: "read", offset_bytes: 0, source: std::io::Error::other(other) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_fault_of_the_image() {
        let code_of = |kind: std::io::ErrorKind| {
            let error = FormatError::Io { operation: "unpack", offset_bytes: 0, source: kind.into() };
            format_error("cannot read `disk.gz`", &error).code()
        };
        assert_eq!(code_of(std::io::ErrorKind::StorageFull), ErrorCode::NoSpace);
        assert_eq!(code_of(std::io::ErrorKind::InvalidData), ErrorCode::Invalid);
    }
}
