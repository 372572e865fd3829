//! Files into the store: a disk of any format becomes a catalogued image.
//!
//! The file is parsed by an image reader, a process of its own (`reader`); here its answers are stored.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulbil_format::Format;
use bulbil_store::{DiskSource, ImportObserver, ImportReport, SourceError, Store, StoreErrorKind};
use bulbil_types::{Architecture, BootMode, ImageId, ImageRef, Name};
use tokio::sync::mpsc;

use crate::catalog::first_version;
use crate::control::{Control, now};
use crate::error::{ControlError, ErrorCode};
use crate::model::ImageRecord;
use crate::reader::{ImageReader, ReaderError, ReaderJob};

/// Means the newest version where an image is named, so no version may be called so.
pub(crate) const NEWEST: &str = "latest";

/// What to import and as what.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct ImportRequest {
    /// The file, absolute.
    pub path: PathBuf,
    /// Name of the image; by default made of the file's.
    pub name: Option<Name>,
    /// Version of the image; `1` by default.
    pub version: Option<Name>,
    /// Format of the file; by default it is recognised.
    pub format: Option<String>,
    /// The file it is based on, the one that is based on, and so on; absolute. No other parent is opened.
    #[serde(default)]
    pub parents: Vec<PathBuf>,
    /// The directory of the other files of a split image, absolute. No other file is opened.
    #[serde(default)]
    pub extent_dir: Option<PathBuf>,
    /// The snapshot to import, by name or id, instead of the current state.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Go on where this host cannot restrict the process that reads the file.
    #[serde(default)]
    pub allow_unsandboxed: bool,
}

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImportProgress {
    /// Bytes of data taken in.
    pub done_bytes: u64,
    /// Bytes of data in the file's own map.
    pub total_bytes: u64,
    /// Bytes written to the store.
    pub stored_bytes: u64,
}

/// Passes progress on and stops the import when nobody listens any more.
pub(crate) struct Observer {
    progress: mpsc::Sender<ImportProgress>,
    cancelled: Arc<AtomicBool>,
}

impl Observer {
    pub(crate) fn new(progress: mpsc::Sender<ImportProgress>) -> Self {
        Self { progress, cancelled: Arc::default() }
    }
}

impl ImportObserver for Observer {
    fn progress(&self, done_bytes: u64, total_bytes: u64, stored_bytes: u64) {
        // A listener that is behind misses a step; the next one says more.
        if let Err(mpsc::error::TrySendError::Closed(_)) =
            self.progress.try_send(ImportProgress { done_bytes, total_bytes, stored_bytes })
        {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// What the blocking part of an import found.
struct Imported {
    report: ImportReport,
    format: String,
    boot_mode: BootMode,
}

impl Control {
    /// Imports a file and catalogues it; also says whether the image was there before. The image is
    /// visible when this returns, complete and durable.
    ///
    /// The import stops when the receiver of `progress` is dropped. Importing a content again under
    /// the same name gives the image that is there.
    ///
    /// # Errors
    /// `Invalid` for a file that cannot be taken, `InUse` for a name that has other content,
    /// `NoSpace`, `Cancelled`, `Failed`. The catalog and the store are then as before.
    pub async fn import_image(
        &self,
        request: ImportRequest,
        progress: mpsc::Sender<ImportProgress>,
    ) -> Result<(ImageRecord, bool), ControlError> {
        let name = request.name.clone().map_or_else(|| name_of_file(&request.path), Ok)?;
        let version = request.version.clone().unwrap_or_else(first_version);
        check_version(&version)?;
        let format = request.format.as_deref().map(str::parse::<Format>).transpose();
        let format =
            format.map_err(|e| ControlError::with_source(ErrorCode::Invalid, cannot_import(&request.path), &e))?;
        let _one_change_of_images = self.image_changes.lock().await;
        let wanted = ImageRef::Named { name: name.clone(), version: Some(version.clone()) };
        let existing = self.catalog.find_image(&wanted).await?;
        let (store, program) = (Arc::clone(&self.store), self.program.clone());
        let job = self.reader_job(&request, format, &progress);
        let imported = tokio::task::spawn_blocking(move || import_blocking(&store, &program, job, progress)).await;
        let imported =
            imported.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the import broke off", &e))??;
        if let Some(existing) = existing {
            return match existing.digest == imported.report.digest {
                true => Ok((existing, true)),
                false => {
                    self.drop_unused_content().await?;
                    let text = format!("image `{name}:{version}` exists already, with other content");
                    Err(ControlError::new(ErrorCode::InUse, text))
                }
            };
        }
        let record = ImageRecord {
            id: ImageId::random(),
            name,
            version,
            digest: imported.report.digest,
            size_bytes: imported.report.size_bytes,
            data_bytes: imported.report.data_bytes,
            stored_bytes: imported.report.stored_bytes,
            architecture: Architecture::X86_64,
            boot_mode: imported.boot_mode,
            source_format: imported.format,
            created_at: now(),
        };
        if let Err(error) = self.catalog.add_image(&record).await {
            if let Err(left) = self.drop_unused_content().await {
                tracing::warn!(error = %left, "cannot free what a failed import left");
            }
            return Err(error);
        }
        tracing::info!(image = %record.id, name = %record.name, digest = %record.digest, "image imported");
        Ok((record, false))
    }

    fn reader_job(
        &self,
        request: &ImportRequest,
        format: Option<Format>,
        progress: &mpsc::Sender<ImportProgress>,
    ) -> ReaderJob {
        let progress = progress.clone();
        ReaderJob {
            path: request.path.clone(),
            format,
            snapshot: request.snapshot.clone(),
            parents: request.parents.clone(),
            extent_dir: request.extent_dir.clone(),
            allow_unsandboxed: request.allow_unsandboxed,
            scratch_dir: self.data.root().to_owned(),
            is_cancelled: Box::new(move || progress.is_closed()),
        }
    }

    /// Lists all images.
    ///
    /// # Errors
    /// `Failed` when the catalog cannot be read.
    pub async fn images(&self) -> Result<Vec<ImageRecord>, ControlError> {
        self.catalog.images().await
    }

    /// Finds an image by id, name, or name and version.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a text that names no image.
    pub async fn image(&self, wanted: &str) -> Result<ImageRecord, ControlError> {
        let parsed: ImageRef = wanted
            .parse()
            .map_err(|e| ControlError::with_source(ErrorCode::NotFound, format!("there is no image `{wanted}`"), &e))?;
        let found = self.catalog.find_image(&parsed).await?;
        found.ok_or_else(|| ControlError::new(ErrorCode::NotFound, format!("there is no image `{wanted}`")))
    }

    /// Removes an image and frees what nothing else uses.
    ///
    /// # Errors
    /// `NotFound`; `InUse` while an instance was launched from it, running or not.
    pub async fn remove_image(&self, wanted: &str) -> Result<ImageRecord, ControlError> {
        let _one_change_of_images = self.image_changes.lock().await;
        let no_new_use = self.image_uses.lock().await;
        let image = self.image(wanted).await?;
        let instances = self.catalog.instances().await?;
        let others = self.catalog.images().await?;
        let shared = others.iter().any(|other| other.id != image.id && other.digest == image.digest);
        let mut users = instances.iter().filter(|(record, _)| record.image_digest == image.digest);
        if !shared && let Some((user, _)) = users.next() {
            let more = users.count();
            let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let text = format!("image `{wanted}` is the base of instance `{}`{and_more}", user.name);
            return Err(ControlError::new(ErrorCode::InUse, text));
        }
        self.catalog.remove_image(&image.id).await?;
        drop(no_new_use);
        self.drop_unused_content().await?;
        tracing::info!(image = %image.id, name = %image.name, "image removed");
        Ok(image)
    }

    /// Frees every content that nothing refers to: that of an image that
    /// was just removed, and what an import has left that was killed before it was catalogued.
    ///
    /// The caller holds the lock on changes of images, so no import is between store and catalog.
    pub(crate) async fn drop_unused_content(&self) -> Result<(), ControlError> {
        self.give_up_unused(false).await?;
        let store = Arc::clone(&self.store);
        let freed = tokio::task::spawn_blocking(move || store.sweep());
        let freed = freed.await.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the sweep broke off", &e))?;
        freed.map(drop).map_err(|e| ControlError::store("cannot free unused space", &e))
    }
}

/// Refuses the version that means another one.
pub(crate) fn check_version(version: &Name) -> Result<(), ControlError> {
    if version.as_str() == NEWEST {
        let text = format!("no version may be called `{NEWEST}`: it means the newest one");
        return Err(ControlError::new(ErrorCode::Invalid, text));
    }
    Ok(())
}

fn import_blocking(
    store: &Store,
    program: &Path,
    job: ReaderJob,
    progress: mpsc::Sender<ImportProgress>,
) -> Result<Imported, ControlError> {
    let what = cannot_import(&job.path);
    // This thread has to stay as long as the reader is wanted.
    let reader = ImageReader::open(program, job).map_err(|e| reader_error(&what, &e))?;
    let format = reader.format().to_owned();
    let boot_mode = boot_mode(&reader).map_err(|e| read_error(&what, &reader, &*e))?;
    let observer = Observer::new(progress);
    let report = store.import(&reader, &observer).map_err(|e| match e.kind() {
        StoreErrorKind::Source => read_error(&what, &reader, &e),
        _ => ControlError::store(&*what, &e),
    })?;
    Ok(Imported { report, format, boot_mode })
}

fn reader_error(what: &str, error: &ReaderError) -> ControlError {
    let code = match error {
        ReaderError::Cancelled => ErrorCode::Cancelled,
        error if error.is_of_reader() => ErrorCode::Failed,
        error if error.is_no_space() => ErrorCode::NoSpace,
        _ => ErrorCode::Invalid,
    };
    ControlError::with_source(code, what, error)
}

/// An error of reading an image that was opened: it is the image's, unless the reader itself is lost.
fn read_error(what: &str, reader: &ImageReader, error: &(dyn std::error::Error + 'static)) -> ControlError {
    let code = if reader.is_cancelled() {
        ErrorCode::Cancelled
    } else if reader.has_failed() {
        ErrorCode::Failed
    } else {
        ErrorCode::Invalid
    };
    ControlError::with_source(code, what, error)
}

fn cannot_import(path: &Path) -> String {
    format!("cannot import `{}`", path.display())
}

/// Makes a name of a file's: without its extension, other characters as `-`.
fn name_of_file(path: &Path) -> Result<Name, ControlError> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let clean: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).take(63).collect();
    clean.trim_start_matches(['-', '_', '.']).parse().map_err(|e| {
        let text = format!("no image name can be made of `{}`; give one with --as", path.display());
        ControlError::with_source(ErrorCode::Invalid, text, &e)
    })
}

/// How firmware starts a disk: by BIOS where the first sector holds boot code, because that is
/// quicker under emulation, else by UEFI.
fn boot_mode(disk: &dyn DiskSource) -> Result<BootMode, SourceError> {
    let mut sector = [0; 512];
    disk.read_exact_at(&mut sector, 0)?;
    Ok(boot_mode_of(&sector))
}

fn boot_mode_of(first_sector: &[u8; 512]) -> BootMode {
    // The boot code area ends where the disk signature and the partition table begin.
    let has_code = first_sector[..440].iter().any(|byte| *byte != 0);
    let signed = first_sector[510..] == [0x55, 0xaa];
    if has_code && signed { BootMode::Bios } else { BootMode::Uefi }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_without_boot_code_are_started_by_uefi() {
        let mut sector = [0; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(boot_mode_of(&sector), BootMode::Uefi, "a protective MBR");
        sector[0] = 0xeb;
        assert_eq!(boot_mode_of(&sector), BootMode::Bios);
        sector[510] = 0;
        assert_eq!(boot_mode_of(&sector), BootMode::Uefi);
    }

    #[test]
    fn image_names_are_made_of_file_names() {
        let name = |path: &str| name_of_file(Path::new(path)).map(|name| name.to_string()).ok();
        assert_eq!(name("/x/debian-12.qcow2").as_deref(), Some("debian-12"));
        assert_eq!(name("/x/my disk (1).raw").as_deref(), Some("my-disk--1-"));
        assert_eq!(name("/"), None);
    }
}
