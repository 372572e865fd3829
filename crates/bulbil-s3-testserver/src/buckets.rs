//! Buckets as directories, objects as files.
//!
//! An object is written under another name and then linked (which fails where the name is taken: a
//! conditional put) or renamed (which replaces). So the kernel decides who wins, and no reader sees a part.

use std::io::{self, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput, HeadObjectInput,
    HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Object, PutObjectInput, PutObjectOutput, StreamingBlob,
    Timestamp,
};
use s3s::{Body, S3, S3Request, S3Response, S3Result, s3_error};

/// All buckets of the server.
#[derive(Debug)]
pub(crate) struct Buckets {
    root: PathBuf,
    page: usize,
    temporaries: AtomicU64,
}

struct Found {
    bytes: Vec<u8>,
    len_bytes: u64,
    modified: SystemTime,
    etag: ETag,
}

fn internal(error: io::Error) -> s3s::S3Error {
    s3_error!(error, InternalError)
}

fn length(len_bytes: u64) -> Option<i64> {
    i64::try_from(len_bytes).ok()
}

impl Buckets {
    pub(crate) fn new(root: PathBuf, page: usize) -> Result<Self> {
        std::fs::create_dir_all(root.join(".tmp")).context("cannot make the directory of temporary files")?;
        Ok(Self { root, page, temporaries: AtomicU64::new(0) })
    }

    fn bucket(&self, bucket: &str) -> S3Result<PathBuf> {
        let path = self.root.join(bucket);
        if bucket.starts_with('.') || bucket.contains('/') || !path.is_dir() {
            return Err(s3_error!(NoSuchBucket));
        }
        Ok(path)
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        if key.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(s3_error!(InvalidArgument, "this server takes keys that are relative paths"));
        }
        Ok(self.bucket(bucket)?.join(key))
    }

    fn store(&self, path: &Path, bytes: &[u8], only_if_absent: bool) -> S3Result<ETag> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(".tmp").join(number.to_string());
        let put = || -> io::Result<ETag> {
            std::fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
            let mut file = std::fs::File::create(&temporary)?;
            io::Write::write_all(&mut file, bytes)?;
            let etag = etag(&file.metadata()?)?;
            if only_if_absent {
                std::fs::hard_link(&temporary, path)?;
                std::fs::remove_file(&temporary)?;
            } else {
                std::fs::rename(&temporary, path)?;
            }
            Ok(etag)
        };
        put().map_err(|error| {
            drop(std::fs::remove_file(&temporary));
            match error.kind() {
                io::ErrorKind::AlreadyExists => s3_error!(PreconditionFailed),
                _ => internal(error),
            }
        })
    }

    /// Reads an object, or a range of it that is cut at the object's end; none of it for `head`.
    fn read(path: &Path, range: Option<s3s::dto::Range>, head: bool) -> S3Result<(Found, Option<String>)> {
        let mut file = std::fs::File::open(path).map_err(|e| s3_error!(e, NoSuchKey))?;
        let metadata = file.metadata().map_err(internal)?;
        if metadata.is_dir() {
            return Err(s3_error!(NoSuchKey));
        }
        let whole = 0..metadata.len();
        let wanted = range.map_or(Ok(whole), |range| range.check(metadata.len()))?;
        let mut bytes = Vec::new();
        if !head {
            file.seek(io::SeekFrom::Start(wanted.start)).map_err(internal)?;
            file.take(wanted.end - wanted.start).read_to_end(&mut bytes).map_err(internal)?;
        }
        let shown =
            range.map(|_| format!("bytes {}-{}/{}", wanted.start, wanted.end.saturating_sub(1), metadata.len()));
        let modified = metadata.modified().map_err(internal)?;
        Ok((Found { bytes, len_bytes: metadata.len(), modified, etag: etag(&metadata).map_err(internal)? }, shown))
    }

    fn list(&self, input: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
        if input.delimiter.is_some() {
            return Err(s3_error!(NotImplemented, "this server lists without a delimiter only"));
        }
        let root = self.bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or_else(|| input.start_after.clone()).unwrap_or_default();
        let mut keys = Vec::new();
        // No key outside this directory begins with the prefix.
        let directory = prefix.rsplit_once('/').map_or("", |(directory, _)| directory);
        walk(&root, &root.join(directory), &mut keys).map_err(internal)?;
        keys.retain(|key| key.starts_with(&prefix) && *key > after);
        keys.sort();
        let asked = input.max_keys.and_then(|max| usize::try_from(max).ok()).unwrap_or(1000);
        let truncated = keys.len() > asked.min(self.page);
        keys.truncate(asked.min(self.page));
        // What was deleted since is left out.
        let contents: Vec<_> = keys.iter().filter_map(|key| describe(&root, key)).collect();
        Ok(ListObjectsV2Output {
            key_count: i32::try_from(contents.len()).ok(),
            max_keys: input.max_keys,
            is_truncated: Some(truncated),
            next_continuation_token: keys.last().filter(|_| truncated).cloned(),
            contents: Some(contents),
            continuation_token: input.continuation_token,
            name: Some(input.bucket),
            prefix: input.prefix,
            ..Default::default()
        })
    }
}

/// Two contents of one name never share it: each is a file of its own.
fn etag(metadata: &std::fs::Metadata) -> io::Result<ETag> {
    use std::os::unix::fs::MetadataExt as _;
    let since = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(ETag::Strong(format!("{:x}-{:x}-{:x}", metadata.ino(), since.as_nanos(), metadata.len())))
}

fn describe(root: &Path, key: &str) -> Option<Object> {
    let metadata = std::fs::metadata(root.join(key)).ok()?;
    Some(Object {
        key: Some(key.to_owned()),
        size: length(metadata.len()),
        last_modified: metadata.modified().ok().map(Timestamp::from),
        e_tag: etag(&metadata).ok(),
        ..Default::default()
    })
}

fn walk(root: &Path, directory: &Path, keys: &mut Vec<String>) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(root, &path, keys)?;
        } else if let Some(key) = path.strip_prefix(root).ok().and_then(Path::to_str) {
            keys.push(key.to_owned());
        }
    }
    Ok(())
}

async fn collect(body: Option<StreamingBlob>, promised: Option<i64>) -> S3Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(promised.and_then(|len| usize::try_from(len).ok()).unwrap_or(0).min(64 << 20));
    let Some(mut body) = body else { return Ok(bytes) };
    while let Some(piece) = body.next().await {
        // Cut off, or not the bytes that were signed.
        bytes.extend_from_slice(&piece.map_err(|_| s3_error!(IncompleteBody))?);
    }
    if promised.is_some_and(|promised| length(bytes.len() as u64) != Some(promised)) {
        return Err(s3_error!(IncompleteBody));
    }
    Ok(bytes)
}

#[async_trait::async_trait]
impl S3 for Buckets {
    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let path = self.object(&input.bucket, &input.key)?;
        let only_if_absent = match input.if_none_match {
            None => false,
            Some(ETagCondition::Any) => true,
            Some(_) => return Err(s3_error!(NotImplemented)),
        };
        if input.if_match.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        let bytes = collect(input.body, input.content_length).await?;
        let etag = tokio::task::block_in_place(|| self.store(&path, &bytes, only_if_absent))?;
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(etag), ..Default::default() }))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let path = self.object(&input.bucket, &input.key)?;
        let (found, content_range) = tokio::task::block_in_place(|| Self::read(&path, input.range, false))?;
        Ok(S3Response::new(GetObjectOutput {
            content_length: length(found.bytes.len() as u64),
            body: Some(StreamingBlob::from(Body::from(found.bytes))),
            content_range,
            e_tag: Some(found.etag),
            last_modified: Some(found.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let path = self.object(&request.input.bucket, &request.input.key)?;
        let (found, _) = Self::read(&path, None, true)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: length(found.len_bytes),
            e_tag: Some(found.etag),
            last_modified: Some(found.modified.into()),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let path = self.object(&request.input.bucket, &request.input.key)?;
        match std::fs::remove_file(path) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Err(internal(e)),
            _ => Ok(S3Response::new(DeleteObjectOutput::default())),
        }
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let list = tokio::task::block_in_place(|| self.list(request.input))?;
        Ok(S3Response::new(list))
    }
}
