//! The seam to stores: how one is opened, wherever it lies.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulbil_store::{
    GcOptions, Objects, OwnerId, PackFate, RemoteObjects, RemoteOptions, Store, StoreError, StoreErrorKind,
    StoreOptions,
};
pub use bulbil_store::{KeySource, StoreLocation};
use bulbil_volume::{BaseCache, CacheOptions};

use crate::cache_settings::CacheSize;
use crate::data_dir::DataDir;
use crate::error::{ControlError, ErrorCode};
use crate::store_gc::{GcReport, GcRequest};

/// The object that every store has.
const SETTINGS_OBJECT: &str = "bulbil-store.json";

/// Parses a location as it is typed: a relative path is one below the current directory.
///
/// # Errors
/// A sentence on why it is none.
pub fn parse_location(text: &str) -> Result<StoreLocation, String> {
    match text.parse().map_err(|e| format!("{e}"))? {
        StoreLocation::Directory(path) => Ok(StoreLocation::Directory(absolute(&path)?)),
        other => Ok(other),
    }
}

/// Parses the source of a key as it is typed: a relative path is one below the current directory.
///
/// # Errors
/// A sentence on why it is none; it does not repeat the text.
pub fn parse_key_source(text: &str) -> Result<KeySource, String> {
    match text.parse().map_err(|e| format!("{e}"))? {
        KeySource::File(path) => Ok(KeySource::File(absolute(&path)?)),
        other => Ok(other),
    }
}

/// Locations and sources are written into command lines and JSON, so they have to be text.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    let path = std::path::absolute(path).map_err(|e| e.to_string())?;
    if path.to_str().is_none() { Err(format!("the path `{}` is not valid UTF-8", path.display())) } else { Ok(path) }
}

/// Values in JSON as the text they are parsed from.
pub(crate) mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The same where there may be no value.
pub(crate) mod as_optional_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(value: &Option<impl Display>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_ref().map(ToString::to_string).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: FromStr<Err: Display>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse()).transpose().map_err(D::Error::custom)
    }
}

/// The directory of a store on this host.
pub(crate) fn directory_of(location: &StoreLocation) -> Option<&Path> {
    match location {
        StoreLocation::Directory(path) => Some(path),
        StoreLocation::S3(_) => None,
    }
}

/// Whether two locations are one store, as far as can be seen without opening them.
pub(crate) fn is_same_location(one: &StoreLocation, other: &StoreLocation) -> bool {
    let real = |location| directory_of(location).and_then(|path| path.canonicalize().ok());
    one == other || real(one).is_some_and(|path| real(other) == Some(path))
}

/// The name of what is kept on this host of a store that lies elsewhere.
fn state_name(location: &StoreLocation) -> String {
    let text = location.to_string();
    let readable = text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' });
    // Of two locations that read the same only the hash tells which is which.
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{}-{hash:016x}", readable.take(40).collect::<String>())
}

/// Packs of which less than this share is in use are written anew.
const REPACK_BELOW_PERCENT: u8 = 50;

/// Cycles of one collection without grace: one condemns, the next deletes; more when others collect meanwhile.
const MAX_CYCLES: u32 = 4;

/// How a store is opened.
#[derive(Debug)]
pub(crate) struct OpenRequest<'a> {
    pub(crate) location: &'a StoreLocation,
    /// Opens an encrypted store; a store that is made with one is encrypted.
    pub(crate) key: Option<&'a KeySource>,
    pub(crate) owner: OwnerId,
    /// For what is kept on this host of stores that lie elsewhere; each has its own place in it.
    pub(crate) state_directory: &'a Path,
}

/// Opens a store, or makes one where there is none.
pub(crate) fn open_or_create(request: &OpenRequest<'_>) -> Result<Store, StoreError> {
    let options = StoreOptions::new(&state_directory(request), request.owner);
    let options = match request.key {
        Some(key) => options.with_key(key.clone()).encrypt_new(),
        None => options,
    };
    Store::open(objects_for_a_store(request.location)?, options)
}

/// Opens a store; `None` where there is none.
pub(crate) fn open_existing(request: &OpenRequest<'_>) -> Result<Option<Store>, StoreError> {
    if exists(request.location)? { open_or_create(request).map(Some) } else { Ok(None) }
}

/// Whether there is a store, without making one.
pub(crate) fn exists(location: &StoreLocation) -> Result<bool, StoreError> {
    if directory_of(location).is_some_and(|path| !path.join(SETTINGS_OBJECT).exists()) {
        // Opening the objects would make the directory.
        return Ok(false);
    }
    match open_objects(location)?.get_range(SETTINGS_OBJECT, 0, 1) {
        Err(e) if e.kind() == StoreErrorKind::NotFound => Ok(false),
        other => other.map(|_| true),
    }
}

/// Opens objects in which a store may be made: a service that takes conditions and ignores them is found out first.
fn objects_for_a_store(location: &StoreLocation) -> Result<Arc<dyn Objects>, StoreError> {
    let StoreLocation::S3(bucket) = location else { return open_objects(location) };
    let objects = RemoteObjects::open(bucket, &RemoteOptions::from_process_environment())?;
    match objects.get_range(SETTINGS_OBJECT, 0, 1) {
        Err(e) if e.kind() == StoreErrorKind::NotFound => objects.check_conditional_put()?,
        other => drop(other?),
    }
    Ok(Arc::new(objects))
}

fn open_objects(location: &StoreLocation) -> Result<Arc<dyn Objects>, StoreError> {
    bulbil_store::open_objects(location, &RemoteOptions::from_process_environment())
}

/// A directory's index and lock lie in it, so that all who import into it share them.
fn state_directory(request: &OpenRequest<'_>) -> PathBuf {
    let of_remote = || request.state_directory.join(state_name(request.location));
    directory_of(request.location).map_or_else(of_remote, |path| path.join("index"))
}

/// Collects garbage and adds to a report what became of each pack.
///
/// Without a time of grace what is found unused goes at once, which takes more than one cycle.
pub(crate) fn collect(
    store: &Store,
    request: &GcRequest,
    grace: Duration,
    mut report: GcReport,
) -> Result<GcReport, StoreError> {
    let options = GcOptions {
        grace,
        dry_run: request.dry_run,
        repack_below_percent: if request.repack { REPACK_BELOW_PERCENT } else { 0 },
    };
    for _ in 0..MAX_CYCLES {
        let cycle = store.collect(&options)?;
        let condemned = cycle.packs.iter().any(|pack| pack.fate == PackFate::Condemned);
        report.add_cycle(&cycle);
        if request.dry_run || !grace.is_zero() || !(condemned || cycle.overtaken) {
            break;
        }
    }
    Ok(report)
}

/// Opens the base cache of a data directory.
///
/// # Errors
/// `Failed` when its directory or its settings cannot be used.
pub fn open_cache(data: &DataDir) -> Result<BaseCache, ControlError> {
    let CacheSize(max_bytes) = CacheSize::read(data.root())?;
    let options = max_bytes.map_or_else(CacheOptions::default, CacheOptions::bounded);
    BaseCache::open_with(&data.cache(), options)
        .map_err(|e| ControlError::with_source(ErrorCode::Failed, "cannot open the base cache", &e))
}
