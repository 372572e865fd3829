//! Lists: page by page, going on where a failure has interrupted.

use std::sync::Mutex;

use futures_util::TryStreamExt as _;
use object_store::ObjectStore as _;
use object_store::path::Path;
use tokio::time::Instant;

use super::Inner;
use super::attempts::{Attempt, judge_with, timely};
use super::http::watched;
use super::policy::Failure;
use crate::error::{StoreError, StoreErrorKind};

/// What S3 gives in one page; each such part has a time limit of its own.
const OBJECTS_PER_PART: usize = 1000;

#[derive(Default)]
struct Listing {
    objects: Vec<(String, u64)>,
    last: Option<Path>,
}

impl Inner {
    pub(super) async fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let what = format!("list `{directory}`");
        let deadline = Instant::now() + self.options.list_deadline;
        // Keys come in order: what fails goes on after the last one that came.
        let found = Mutex::new(Listing::default());
        loop {
            // As long as pages come, an attempt is not late.
            let page_deadline = deadline.min(Instant::now() + self.options.deadline);
            let page = self.try_before(&what, page_deadline, || {
                timely(self.options.attempt_timeout, self.list_page(directory, &found))
            });
            if page.await? {
                break;
            }
            if Instant::now() >= deadline {
                let failure = Failure::last(StoreErrorKind::Timeout, "the list does not end");
                return Err(self.error(&what, &failure));
            }
        }
        Ok(found.into_inner().expect("no panic while held").objects)
    }

    /// Takes the next thousand or so; `true` when these were the last.
    async fn list_page(&self, directory: &str, found: &Mutex<Listing>) -> Attempt<bool> {
        let below = self.path(directory)?;
        let after = found.lock().expect("no panic while held").last.clone();
        let mut stream = match &after {
            Some(after) => self.store.list_with_offset(Some(&below), after),
            None => self.store.list(Some(&below)),
        };
        for _ in 0..OBJECTS_PER_PART {
            let (next, seen) = watched(stream.try_next()).await;
            let Some(meta) = next.map_err(|error| judge_with(seen, &error))? else { return Ok(true) };
            let mut found = found.lock().expect("no panic while held");
            if found.last.as_ref().is_some_and(|last| *last >= meta.location) {
                return Err(Failure::last(StoreErrorKind::Io, "the service lists objects out of order"));
            }
            if let Some(name) = self.name_of(&meta.location) {
                found.objects.push((name, meta.size));
            }
            found.last = Some(meta.location);
        }
        Ok(false)
    }

    fn name_of(&self, path: &Path) -> Option<String> {
        let name = path.as_ref();
        if self.location.prefix.is_empty() {
            return Some(name.to_owned());
        }
        name.strip_prefix(&self.location.prefix)?.strip_prefix('/').map(str::to_owned)
    }
}
