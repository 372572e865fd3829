//! Leases: what a collection must not take from somebody who is at work.
//!
//! ```text
//! leases/<id>   sealed JSON: who, for what, which list of condemned packs was read, until when
//! ends/<id>     sealed JSON, put if absent: how the lease ended
//! ```
//! Everybody who will publish a manifest holds a lease from before looking at what the store has until
//! the manifest is there. The object is replaced to renew it.
//!
//! How a lease ends is decided by who puts `ends/<id>` first:
//!
//! ```text
//! holder:     puts "publishing these names" ──► puts the manifests, each if absent ──► deletes both
//! collection: puts "expired"                ──► the holder can publish nothing any more
//!             (after "publishing")              puts a void object at each name where no manifest is
//! ```
//! So a holder that was stopped for a long time cannot publish something that refers to packs which a
//! collection has taken meanwhile, at whatever operation it was stopped. An "expired" end stays for ever:
//! nobody can know that its holder will not wake up.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::error::{StoreError, StoreErrorKind};
use crate::gc::list;
use crate::objects::Objects;
use crate::pack::PackId;
use crate::process::ProcessId;
use crate::published::OwnerId;
use crate::sealed;
use crate::store::Store;

const FORMAT_VERSION: u32 = 1;
const LEASES: &str = "leases";
const ENDS: &str = "ends";

/// How long a lease lasts after it was last renewed.
const DURATION: Duration = Duration::from_millis(DURATION_MS);
const DURATION_MS: u64 = 600_000;
/// A renewal that failed is tried again after this time.
const RETRY: Duration = Duration::from_secs(10);
/// A holder that could not renew for so long gives up, well before anybody else takes it for dead.
const GIVE_UP: Duration = Duration::from_secs(300);

/// A lease as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeaseDocument {
    pub(crate) format_version: u32,
    pub(crate) owner: OwnerId,
    /// What the holder does, for people.
    pub(crate) purpose: String,
    /// The newest list of condemned packs that the holder had read when it began; 0 before it has.
    pub(crate) generation: u64,
    pub(crate) started_ms: u64,
    pub(crate) expires_ms: u64,
    /// The holder's process, by which collections of the same host know that it has ended.
    pub(crate) process: Option<ProcessId>,
}

/// How a lease ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub(crate) enum End {
    /// Its holder publishes manifests under these names, each if nothing is there.
    Publishing { names: Vec<String> },
    /// A collection has ended it.
    Expired { collector: String },
}

#[derive(Debug, Serialize, Deserialize)]
struct EndDocument {
    format_version: u32,
    #[serde(flatten)]
    end: End,
}

/// What stands where a manifest can never be published any more.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Void {
    /// The lease whose holder had announced the name.
    void: String,
    random: String,
}

impl Void {
    /// Nothing larger is a void object.
    pub(crate) const MAX_BYTES: u64 = 256;

    pub(crate) fn encoded(lease: &str) -> Result<Vec<u8>, StoreError> {
        Ok(Self::with(lease, sealed::random_id()?))
    }

    pub(crate) fn with(lease: &str, random: String) -> Vec<u8> {
        sealed::encode(&Self { void: lease.to_owned(), random })
    }

    /// Whether an object is a void one, also when it is damaged: then it must not pass for a damaged manifest,
    /// which may be deleted.
    pub(crate) fn is(bytes: &[u8]) -> bool {
        bytes.iter().zip(b"{\"void\":").filter(|(found, expected)| found == expected).count() > 4
    }
}

fn lease_name(id: &str) -> String {
    format!("{LEASES}/{id}")
}

fn end_name(id: &str) -> String {
    format!("{ENDS}/{id}")
}

pub(crate) fn encode_end(end: End) -> Vec<u8> {
    sealed::encode(&EndDocument { format_version: FORMAT_VERSION, end })
}

fn read_end(objects: &dyn Objects, id: &str) -> Result<End, StoreError> {
    Ok(sealed::get::<EndDocument>(objects, &end_name(id))?.end)
}

/// A lease that this process holds.
///
/// Dropping it gives it up, unless nobody knows whether an announced manifest may still appear.
#[derive(Debug)]
pub(crate) struct WriteLease {
    objects: Arc<dyn Objects>,
    id: String,
    condemned: HashSet<PackId>,
    unusable: HashSet<PackId>,
    renewal: Arc<Renewal>,
    thread: Option<JoinHandle<()>>,
    announced: bool,
    leave: bool,
}

#[derive(Debug)]
struct Renewal {
    state: Mutex<RenewalState>,
    changed: Condvar,
}

#[derive(Debug)]
struct RenewalState {
    stop: bool,
    /// Somebody has ended the lease.
    ended: bool,
    renewed: Instant,
}

impl Renewal {
    fn lock(&self) -> MutexGuard<'_, RenewalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteLease {
    /// Takes a lease and reads what must not be referred to.
    ///
    /// # Errors
    /// `Corrupt` when the newest list of condemned packs is damaged: a collection makes a new one. `Io`,
    /// `NoSpace`, `Timeout`.
    pub(crate) fn begin(store: &Store, purpose: &str) -> Result<Self, StoreError> {
        let objects = Arc::clone(&store.objects);
        let now_ms = store.clock.now_ms();
        let mut document = LeaseDocument {
            format_version: FORMAT_VERSION,
            owner: store.owner,
            purpose: purpose.to_owned(),
            generation: 0,
            started_ms: now_ms,
            expires_ms: now_ms.saturating_add(DURATION_MS),
            process: ProcessId::own(),
        };
        let state = RenewalState { stop: false, ended: false, renewed: Instant::now() };
        let mut lease = Self {
            id: sealed::random_id()?,
            objects: Arc::clone(&objects),
            condemned: HashSet::new(),
            unusable: HashSet::new(),
            renewal: Arc::new(Renewal { state: Mutex::new(state), changed: Condvar::new() }),
            thread: None,
            announced: false,
            leave: false,
        };
        // First the lease, then the list: a collection that does not see the lease has put its list before.
        objects.put(&lease_name(&lease.id), &sealed::encode(&document))?;
        let newest = list::read_newest(&*objects)?;
        if let Some(list) = newest.list? {
            lease.condemned.extend(list.packs.iter().map(|pack| pack.id));
            document.generation = newest.generation;
            objects.put(&lease_name(&lease.id), &sealed::encode(&document))?;
        }
        lease.unusable = &lease.condemned | &crate::scrub::quarantine::packs(&*objects)?;
        lease.start_renewing(document, Arc::clone(&store.clock))?;
        Ok(lease)
    }

    /// Packs that may be going: no manifest may be published that refers to one.
    pub(crate) fn condemned(&self) -> &HashSet<PackId> {
        &self.condemned
    }

    /// Packs to which no block is matched: condemned or quarantined.
    pub(crate) fn unusable(&self) -> &HashSet<PackId> {
        &self.unusable
    }

    /// Whether the lease can still be relied on.
    ///
    /// # Errors
    /// `Timeout` when it could not be renewed for a long time or was ended by a collection.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        let state = self.renewal.lock();
        if state.ended {
            return Err(ended());
        }
        if state.renewed.elapsed() > GIVE_UP {
            let text = "the storage did not let this work say for 5 minutes that it goes on; try again";
            return Err(StoreError::new(StoreErrorKind::Timeout, text));
        }
        Ok(())
    }

    /// Says under which names manifests will be put, each if absent. At most once for each lease.
    ///
    /// After this no collection can end the lease without voiding those names.
    ///
    /// # Errors
    /// `Timeout` when a collection has ended the lease; `Io`, `NoSpace`.
    pub(crate) fn announce(&mut self, names: Vec<String>) -> Result<(), StoreError> {
        assert!(!self.announced, "a lease publishes once");
        self.check()?;
        self.announced = true;
        let end = encode_end(End::Publishing { names });
        if self.objects.put_if_absent(&end_name(&self.id), &end)? {
            return Ok(());
        }
        self.announced = false;
        Err(ended())
    }

    /// Sees to it that nothing appears any more under an announced name after putting it has failed.
    ///
    /// `false` when an object is there; an error when nobody knows: then the lease is left to expire.
    pub(crate) fn void(&mut self, name: &str) -> Result<bool, StoreError> {
        let void = || {
            if !self.objects.is_remote() {
                // A put into a directory is over when it fails.
                return match self.objects.get_range(name, 0, 1) {
                    Err(e) if e.kind() == StoreErrorKind::NotFound => Ok(true),
                    other => other.map(|_| false),
                };
            }
            self.objects.put_if_absent(name, &Void::encoded(&self.id)?)
        };
        let outcome = void();
        self.leave |= outcome.is_err();
        outcome
    }

    fn start_renewing(&mut self, document: LeaseDocument, clock: Arc<dyn Clock>) -> Result<(), StoreError> {
        let (objects, id, renewal) = (Arc::clone(&self.objects), self.id.clone(), Arc::clone(&self.renewal));
        let run = move || renew(&*objects, &id, document, &*clock, &renewal);
        let thread = std::thread::Builder::new().name("lease".to_owned()).spawn(run);
        self.thread = Some(thread.map_err(|e| StoreError::io("cannot start the thread that renews a lease", e))?);
        Ok(())
    }
}

fn ended() -> StoreError {
    let text = "this took too long: a collection of unused packs has taken it for dead; try again";
    StoreError::new(StoreErrorKind::Timeout, text)
}

fn renew(objects: &dyn Objects, id: &str, mut document: LeaseDocument, clock: &dyn Clock, renewal: &Renewal) {
    let mut wait = DURATION / 3;
    loop {
        let mut state = renewal.lock();
        let until = Instant::now() + wait;
        while !state.stop && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            state = renewal.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.stop {
            return;
        }
        drop(state);
        document.expires_ms = clock.now_ms().saturating_add(DURATION_MS);
        let renewed = match read_end(objects, id) {
            Ok(End::Expired { .. }) => {
                renewal.lock().ended = true;
                return;
            }
            _ => objects.put(&lease_name(id), &sealed::encode(&document)),
        };
        match renewed {
            Ok(()) => {
                renewal.lock().renewed = Instant::now();
                wait = DURATION / 3;
            }
            Err(error) => {
                tracing::warn!(lease = id, %error, "cannot renew a lease");
                wait = RETRY;
            }
        }
    }
}

impl Drop for WriteLease {
    fn drop(&mut self) {
        self.renewal.lock().stop = true;
        self.renewal.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A renewal that lands after the deletion would make the lease anew.
            drop(thread.join());
        }
        if self.leave {
            return;
        }
        // The lease first: an end without a lease is one that was dealt with.
        let lease = self.objects.delete(&lease_name(&self.id));
        let end = lease.and_then(|()| if self.announced { self.objects.delete(&end_name(&self.id)) } else { Ok(()) });
        if let Err(error) = end {
            tracing::warn!(lease = %self.id, %error, "cannot give a lease back; it expires");
        }
    }
}

/// A lease as a collection found it.
#[derive(Debug, Clone)]
pub(crate) struct FoundLease {
    pub(crate) id: String,
    /// `None` when it cannot be read.
    pub(crate) document: Option<LeaseDocument>,
    pub(crate) expired: bool,
}

/// Lists the leases; with `end_expired` those that have expired are ended, and `expired` says which.
///
/// # Errors
/// `Io` or `Timeout`; `Corrupt` when the end of an expired lease is damaged.
pub(crate) fn survey(
    objects: &dyn Objects,
    clock: &dyn Clock,
    end_expired: bool,
) -> Result<Vec<FoundLease>, StoreError> {
    // Before the leases: an end that is listed here and whose lease is not there any more is over.
    let ends = objects.list(ENDS)?;
    let mut found = Vec::new();
    for (name, _) in objects.list(LEASES)? {
        let Some(id) = name.strip_prefix("leases/").map(str::to_owned) else { continue };
        let document = match sealed::get::<LeaseDocument>(objects, &name) {
            Ok(document) => Some(document),
            Err(e) if e.kind() == StoreErrorKind::NotFound => continue,
            // To end a lease is always safe; one that nobody can read would protect for ever.
            Err(e) if e.kind() == StoreErrorKind::Corrupt => None,
            Err(e) => return Err(e),
        };
        let expired = document.as_ref().is_none_or(|document| has_expired(document, clock.now_ms()));
        if expired && end_expired {
            end(objects, &id)?;
        }
        found.push(FoundLease { id, document, expired });
    }
    if end_expired {
        let ids: HashSet<_> = found.iter().map(|lease| lease.id.as_str()).collect();
        for (name, _) in ends {
            let Some(id) = name.strip_prefix("ends/").filter(|id| !ids.contains(id)) else { continue };
            if matches!(read_end(objects, id), Ok(End::Publishing { .. })) {
                objects.delete(&name)?;
            }
        }
    }
    Ok(found)
}

fn has_expired(lease: &LeaseDocument, now_ms: u64) -> bool {
    // A clock that is far ahead must not protect for ever.
    let too_late = now_ms.saturating_add(2 * DURATION_MS);
    lease.expires_ms < now_ms || lease.expires_ms > too_late || lease.process.as_ref().is_some_and(ProcessId::has_ended)
}

/// Ends a lease, so that its holder publishes nothing any more.
fn end(objects: &dyn Objects, id: &str) -> Result<(), StoreError> {
    let expired = encode_end(End::Expired { collector: sealed::random_id()? });
    if objects.put_if_absent(&end_name(id), &expired)? {
        return objects.delete(&lease_name(id));
    }
    match read_end(objects, id) {
        Ok(End::Expired { .. }) => objects.delete(&lease_name(id)),
        Ok(End::Publishing { names }) => {
            for name in &names {
                // Where a manifest is, it was published in time and stays.
                objects.put_if_absent(name, &Void::encoded(id)?)?;
            }
            objects.delete(&lease_name(id))?;
            objects.delete(&end_name(id))
        }
        // Given back by its holder meanwhile, or dealt with by another collection.
        Err(e) if e.kind() == StoreErrorKind::NotFound => objects.delete(&lease_name(id)),
        Err(e) => Err(e),
    }
}
