//! Images from store to store: only the blocks that the other store has not are stored there.
//!
//! A copy is an import whose disk is the content of an image, with the digest that it must have. One that is cut off
//! leaves what it has stored; the next one finds those blocks and goes on from there.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bulbil_format::{DiskContent as _, ExtentKind};
use bulbil_store::{
    AttachmentKind, Digest, DiskSource, ImportOptions, ImportReport, SourceError, Store, StoreErrorKind, StoredImage,
};
use bulbil_types::{ImageId, ImageRef, Name};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::control::{Control, now};
use crate::error::{ControlError, ErrorCode};
use crate::image_content::ImageContent;
use crate::images::{ImportProgress, Observer, check_version};
use crate::model::ImageRecord;
use crate::store_ops::{self, KeySource, OpenRequest, StoreLocation};

/// Another store than that of the data directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OtherStore {
    /// Where it lies.
    #[serde(with = "store_ops::as_text")]
    pub location: StoreLocation,
    /// Where its key is found.
    #[serde(default, with = "store_ops::as_optional_text")]
    pub key: Option<KeySource>,
}

/// What to copy into another store.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyToRequest {
    /// The store, which is made where there is none.
    pub to: OtherStore,
    /// Name in that store; by default the image's own.
    pub name: Option<Name>,
    /// Version in that store; by default the image's own.
    pub version: Option<Name>,
}

/// What to copy from another store.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyFromRequest {
    /// The store.
    pub from: OtherStore,
    /// The image in it: its name, or name and version. Without a version, or with `latest`, the newest.
    pub image: String,
    /// Name here; by default as there.
    pub name: Option<Name>,
    /// Version here; by default as there.
    pub version: Option<Name>,
}

/// An image that was copied into another store.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopiedImage {
    /// The store.
    #[serde(with = "store_ops::as_text")]
    pub location: StoreLocation,
    /// What it offers now.
    #[serde(flatten)]
    pub image: StoredImage,
    /// Bytes that store grew by.
    pub stored_bytes: u64,
    /// Whether it had the content before.
    pub existed: bool,
}

/// What another store offers by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OfferedImages {
    /// The images, by name and version.
    pub images: Vec<StoredImage>,
    /// Names of records that cannot be read.
    pub unreadable: Vec<String>,
}

/// A content of a store, as a disk that can be imported.
struct StoredDisk(ImageContent);

impl DiskSource for StoredDisk {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>, SourceError> {
        let mut at = offset;
        while let Some(extent) = self.0.next_extent(at)? {
            let end = extent.offset_bytes + extent.len_bytes;
            if extent.kind == ExtentKind::Data {
                return Ok(Some(extent.offset_bytes..end));
            }
            at = end;
        }
        Ok(None)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), SourceError> {
        Ok(self.0.read_exact_at(buf, offset)?)
    }
}

impl Control {
    /// Copies an image into another store and offers it there by name. Complete and durable when this returns.
    ///
    /// The copy stops when the receiver of `progress` is dropped; the image may be removed here meanwhile.
    ///
    /// # Errors
    /// `NotFound` for an image that is not there, `InUse` when the other store offers something else by that name,
    /// `StoreKey`, `NoSpace`, `Timeout`, `Cancelled`, `Failed`. What was stored until then stays, for the next try.
    pub async fn copy_image_to(
        &self,
        image: &str,
        request: CopyToRequest,
        progress: mpsc::Sender<ImportProgress>,
    ) -> Result<CopiedImage, ControlError> {
        let (image, in_use) = self.use_image(image).await?;
        let name = request.name.unwrap_or_else(|| image.name.clone());
        let version = request.version.unwrap_or_else(|| image.version.clone());
        check_version(&version)?;
        let offered = StoredImage { name, version, ..stored_image(&image) };
        let (source, to, opened) = (Arc::clone(&self.store), request.to.clone(), self.opening());
        let copied = tokio::task::spawn_blocking(move || {
            let _in_use = in_use;
            copy_to(&source, &to, opened, offered, progress)
        });
        let copied = copied.await;
        self.free_if_removed(&image).await;
        let copied = copied.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the copy broke off", &e))??;
        tracing::info!(image = %image.id, store = %copied.location, name = %copied.image.name, "image copied");
        Ok(copied)
    }

    /// Copies an image of another store into this one and catalogues it; also says whether it was there before.
    ///
    /// The copy stops when the receiver of `progress` is dropped.
    ///
    /// # Errors
    /// `NotFound` for a store or an image that is not there, `InUse` for a name that has other content here,
    /// `StoreKey`, `NoSpace`, `Timeout`, `Cancelled`, `Failed`. The catalog is then as before; what was stored stays
    /// for the next try, until a removal of an image frees it.
    pub async fn copy_image_from(
        &self,
        request: CopyFromRequest,
        progress: mpsc::Sender<ImportProgress>,
    ) -> Result<(ImageRecord, bool), ControlError> {
        let (from, opened) = (request.from.clone(), self.opening());
        let wanted = request.image.clone();
        let found = tokio::task::spawn_blocking(move || {
            let store = open_other(&from, &opened)?;
            let image = find_offered(&store, &from.location, &wanted)?;
            Ok::<_, ControlError>((store, image))
        });
        let broken = |e| ControlError::with_source(ErrorCode::Failed, "the copy broke off", &e);
        let (source, offered) = found.await.map_err(broken)??;
        let name = request.name.unwrap_or_else(|| offered.name.clone());
        let version = request.version.unwrap_or_else(|| offered.version.clone());
        check_version(&version)?;
        let _one_change_of_images = self.image_changes.lock().await;
        let here = ImageRef::Named { name: name.clone(), version: Some(version.clone()) };
        if let Some(existing) = self.catalog.find_image(&here).await? {
            return match existing.digest == offered.digest {
                true => Ok((existing, true)),
                false => {
                    let text = format!("image `{name}:{version}` exists already, with other content");
                    Err(ControlError::new(ErrorCode::InUse, text))
                }
            };
        }
        let (target, digest) = (Arc::clone(&self.store), offered.digest);
        let what = format!("cannot copy `{}:{}` from `{}`", offered.name, offered.version, request.from.location);
        let report =
            tokio::task::spawn_blocking(move || copy_content(Arc::new(source), &target, &digest, progress, &what));
        let report = report.await.map_err(broken)??;
        let record = ImageRecord {
            id: ImageId::random(),
            name,
            version,
            digest,
            size_bytes: report.size_bytes,
            data_bytes: report.data_bytes,
            stored_bytes: report.stored_bytes,
            architecture: offered.architecture,
            boot_mode: offered.boot_mode,
            source_format: offered.source_format,
            created_at: now(),
        };
        self.catalog.add_image(&record).await?;
        tracing::info!(image = %record.id, name = %record.name, store = %request.from.location, "image copied here");
        Ok((record, false))
    }

    /// Lists what another store offers by name.
    ///
    /// # Errors
    /// `NotFound` when there is no store; `StoreKey`, `Timeout`, `Failed`.
    pub async fn offered_images(&self, store: OtherStore) -> Result<OfferedImages, ControlError> {
        let opened = self.opening();
        let listed = tokio::task::spawn_blocking(move || {
            let failed = |e| ControlError::store(format!("cannot list the images of `{}`", store.location), &e);
            let listed = open_other(&store, &opened)?.images().map_err(failed)?;
            Ok(OfferedImages { images: listed.images, unreadable: listed.unreadable })
        });
        listed.await.map_err(|e| ControlError::with_source(ErrorCode::Failed, "the listing broke off", &e))?
    }

    pub(crate) fn opening(&self) -> Opening {
        Opening { owner: self.binding.owner, state_directory: self.data.store_state() }
    }
}

/// As what and with what on this host another store is opened.
pub(crate) struct Opening {
    owner: bulbil_store::OwnerId,
    state_directory: PathBuf,
}

impl Opening {
    fn request<'a>(&'a self, other: &'a OtherStore) -> OpenRequest<'a> {
        OpenRequest {
            location: &other.location,
            key: other.key.as_ref(),
            owner: self.owner,
            state_directory: &self.state_directory,
        }
    }
}

pub(crate) fn open_other(other: &OtherStore, opening: &Opening) -> Result<Store, ControlError> {
    let what = format!("cannot open the store `{}`", other.location);
    let opened = store_ops::open_existing(&opening.request(other)).map_err(|e| ControlError::store(&*what, &e))?;
    opened.ok_or_else(|| ControlError::new(ErrorCode::NotFound, format!("there is no store at `{}`", other.location)))
}

fn find_offered(store: &Store, location: &StoreLocation, wanted: &str) -> Result<StoredImage, ControlError> {
    let missing =
        || ControlError::new(ErrorCode::NotFound, format!("the store `{location}` offers no image `{wanted}`"));
    let failed = |e| ControlError::store(format!("cannot read the images of `{location}`"), &e);
    let Ok(ImageRef::Named { name, version }) = wanted.parse() else { return Err(missing()) };
    match version.filter(|version| version.as_str() != crate::images::NEWEST) {
        Some(version) => store.image(&name, &version).map_err(|e| match e.kind() {
            StoreErrorKind::NotFound => missing(),
            _ => failed(e),
        }),
        None => {
            let all = store.images().map_err(failed)?.images.into_iter().filter(|image| image.name == name);
            all.max_by(|a, b| (a.created_at, a.version.as_str()).cmp(&(b.created_at, b.version.as_str())))
                .ok_or_else(missing)
        }
    }
}

fn stored_image(image: &ImageRecord) -> StoredImage {
    StoredImage {
        name: image.name.clone(),
        version: image.version.clone(),
        digest: image.digest,
        size_bytes: image.size_bytes,
        data_bytes: image.data_bytes,
        architecture: image.architecture,
        boot_mode: image.boot_mode,
        source_format: image.source_format.clone(),
        created_at: image.created_at,
    }
}

fn copy_to(
    source: &Arc<Store>,
    to: &OtherStore,
    opening: Opening,
    offered: StoredImage,
    progress: mpsc::Sender<ImportProgress>,
) -> Result<CopiedImage, ControlError> {
    let what = format!("cannot copy `{}:{}` to `{}`", offered.name, offered.version, to.location);
    let target = store_ops::open_or_create(&opening.request(to));
    let target = target.map_err(|e| ControlError::store(format!("cannot open the store `{}`", to.location), &e))?;
    let taken = || {
        let text =
            format!("the store `{}` offers something else as `{}:{}`", to.location, offered.name, offered.version);
        ControlError::new(ErrorCode::InUse, text)
    };
    // Known before anything is sent.
    match target.image(&offered.name, &offered.version) {
        Ok(there) if there.digest != offered.digest => return Err(taken()),
        Err(e) if e.kind() != StoreErrorKind::NotFound => return Err(ControlError::store(what, &e)),
        _ => {}
    }
    let report = copy_content(Arc::clone(source), &target, &offered.digest, progress, &what)?;
    let image = match target.put_image(&offered).map_err(|e| ControlError::store(&*what, &e))? {
        true => offered,
        // Offered before, perhaps as imported at another time.
        false => match target.image(&offered.name, &offered.version) {
            Ok(there) if there.digest == offered.digest => there,
            _ => return Err(taken()),
        },
    };
    let (stored_bytes, existed) = (report.stored_bytes, report.existed);
    Ok(CopiedImage { location: to.location.clone(), image, stored_bytes, existed })
}

fn copy_content(
    source: Arc<Store>,
    target: &Store,
    digest: &Digest,
    progress: mpsc::Sender<ImportProgress>,
    what: &str,
) -> Result<ImportReport, ControlError> {
    let failed = |e: &bulbil_store::StoreError| match e.kind() {
        // The disk that cannot be read is no stranger's file but a content of a store.
        StoreErrorKind::Source => ControlError::with_source(ErrorCode::Failed, what, e),
        _ => ControlError::store(what, e),
    };
    let manifest = source.manifest(digest).map_err(|e| failed(&e))?;
    let disk = StoredDisk(ImageContent::new(Arc::clone(&source), manifest));
    let options = ImportOptions { keep_on_failure: true, expected_digest: Some(*digest) };
    let report = target.import_with_options(&disk, &Observer::new(progress), &options).map_err(|e| failed(&e))?;
    copy_attachments(&source, target, digest);
    Ok(report)
}

/// What helps to use a content and is not needed to read it.
fn copy_attachments(source: &Store, target: &Store, digest: &Digest) {
    for kind in [AttachmentKind::BootTrace, AttachmentKind::Leaves] {
        let Ok(bytes) = source.attachment(digest, kind) else { continue };
        if target.attachment(digest, kind).is_ok() {
            continue;
        }
        if let Err(error) = target.put_attachment(digest, kind, &bytes) {
            tracing::warn!(?kind, %digest, %error, "cannot copy an attachment");
        }
    }
}
