//! Images out of the store: a catalogued image becomes a file of any format.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bulbil_format::{ConvertError, ConvertObserver, convert};
use bulbil_store::{Digest, Store};
use tokio::sync::mpsc;

use crate::control::Control;
use crate::error::{ControlError, ErrorCode};
use crate::image_content::ImageContent;
use crate::model::ImageRecord;
use crate::new_file::{FileSize, NewFile};
use crate::target::{TargetFormat, TargetOptions, new_identity};

/// Where to write an image and as what.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct ExportRequest {
    /// The file, absolute.
    pub path: PathBuf,
    /// What to write.
    pub target: TargetOptions,
    /// Whether a file that is there is replaced.
    pub replace: bool,
}

/// How far an export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExportProgress {
    /// Bytes of data written.
    pub done_bytes: u64,
    /// Bytes of data in the image.
    pub total_bytes: u64,
}

/// An image file that was written.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct WrittenFile {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: TargetFormat,
    /// The size of the disk.
    pub size_bytes: u64,
    /// What the file takes.
    #[serde(flatten)]
    pub file: FileSize,
}

/// Passes progress on and stops the export when nobody listens any more.
struct Observer(mpsc::Sender<ExportProgress>);

impl ConvertObserver for Observer {
    fn progress(&self, done_bytes: u64, total_bytes: u64) {
        // A listener that is behind misses a step; the next one says more.
        let _told = self.0.try_send(ExportProgress { done_bytes, total_bytes }).is_ok();
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_closed()
    }
}

/// Contents that are being read, which therefore stay in the store.
pub(crate) type ContentsInUse = Arc<Mutex<Vec<Digest>>>;

/// Keeps a content in the store as long as it lives.
pub(crate) struct UseOfContent {
    digest: Digest,
    all: ContentsInUse,
}

impl UseOfContent {
    fn begin(digest: Digest, all: &ContentsInUse) -> Self {
        all.lock().unwrap_or_else(PoisonError::into_inner).push(digest);
        Self { digest, all: Arc::clone(all) }
    }
}

impl Drop for UseOfContent {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(position) = all.iter().position(|digest| *digest == self.digest) {
            all.swap_remove(position);
        }
    }
}

impl Control {
    /// Writes an image to a file, which is there, complete and durable, when this returns.
    ///
    /// The export stops when the receiver of `progress` is dropped. An image may be removed meanwhile; its content
    /// stays until the export ends.
    ///
    /// # Errors
    /// `NotFound` for an image or a directory that is not there, `InUse` for a file that is, `Invalid` for a target
    /// that cannot be written so, `NoSpace`, `Cancelled`, `Failed`. The file is then not there, or as it was.
    pub async fn export_image(
        &self,
        image: &str,
        request: ExportRequest,
        progress: mpsc::Sender<ExportProgress>,
    ) -> Result<WrittenFile, ControlError> {
        let (image, in_use) = self.use_image(image).await?;
        let (store, exported) = (Arc::clone(&self.store), image.clone());
        let written = tokio::task::spawn_blocking(move || {
            let _in_use = in_use;
            export_blocking(store, &exported, &request, progress)
        });
        let written = written.await;
        self.free_if_removed(&image).await;
        let broken = |e| ControlError::with_source(ErrorCode::Failed, "the export broke off", &e);
        let written = written.map_err(broken)??;
        tracing::info!(image = %image.id, name = %image.name, format = %written.format, "image exported");
        Ok(written)
    }

    /// Finds an image and keeps its content in the store as long as the second value lives.
    pub(crate) async fn use_image(&self, image: &str) -> Result<(ImageRecord, UseOfContent), ControlError> {
        // Nobody decides meanwhile that nothing needs this content.
        let _no_removal = self.image_uses.lock().await;
        let image = self.image(image).await?;
        let in_use = UseOfContent::begin(image.digest, &self.contents_in_use);
        Ok((image, in_use))
    }

    /// The contents that are being exported or copied.
    pub(crate) fn contents_in_use(&self) -> Vec<Digest> {
        self.contents_in_use.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Frees the content of an image that was removed while it was being exported or copied.
    pub(crate) async fn free_if_removed(&self, image: &ImageRecord) {
        let freed = async {
            if self.images().await?.iter().any(|other| other.digest == image.digest) {
                return Ok(());
            }
            let _one_change_of_images = self.image_changes.lock().await;
            self.drop_unused_content().await
        };
        if let Err(error) = freed.await {
            tracing::warn!(image = %image.id, %error, "cannot free an image that was removed during its export");
        }
    }
}

fn export_blocking(
    store: Arc<Store>,
    image: &ImageRecord,
    request: &ExportRequest,
    progress: mpsc::Sender<ExportProgress>,
) -> Result<WrittenFile, ControlError> {
    let what = format!("cannot export `{}:{}` to `{}`", image.name, image.version, request.path.display());
    if !request.path.is_absolute() {
        return Err(ControlError::new(ErrorCode::Invalid, format!("{what}: the path is not absolute")));
    }
    let target = request.target.target(image.name.as_str(), None);
    let target = target.map_err(|e| ControlError::with_source(ErrorCode::Invalid, &*what, &e))?;
    let manifest = store.manifest(&image.digest);
    let manifest = manifest.map_err(|e| ControlError::with_source(ErrorCode::Failed, &*what, &e))?;
    let content = ImageContent::new(store, manifest);
    let output = NewFile::create(&request.path, request.replace)?;
    convert(&content, output.file(), &target, &new_identity(), &Observer(progress))
        .map_err(|e| convert_error(&what, &e))?;
    let file = output.complete()?;
    Ok(WrittenFile { path: request.path.clone(), format: request.target.format, size_bytes: image.size_bytes, file })
}

/// An error of a conversion as a user meets it.
pub(crate) fn convert_error(what: &str, error: &ConvertError) -> ControlError {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let code = match error {
        ConvertError::Write { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded) => {
            ErrorCode::NoSpace
        }
        ConvertError::Write { source, .. } if source.kind() == FileTooLarge => ErrorCode::Invalid,
        ConvertError::Unsupported { .. } | ConvertError::Read(_) => ErrorCode::Invalid,
        ConvertError::Cancelled => ErrorCode::Cancelled,
        _ => ErrorCode::Failed,
    };
    ControlError::with_source(code, what, error)
}
