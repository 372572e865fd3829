//! A data directory with its use cases, called as the daemon calls them.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod disks;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_control::{Control, ControlError, DataDir, ImageRecord, ImportRequest, StoreChoice, open_cache, open_store};
use bulbil_export::nbd::{Export, NbdServer};
use bulbil_store::{Digest, Store, StoreUsage};
use bulbil_types::VolumeId;
use bulbil_volume::VolumeDirectory;

/// A data directory of its own; it goes with the value.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    control: Option<Arc<Control>>,
    runtime: tokio::runtime::Runtime,
}

impl Host {
    /// A host without a data directory yet.
    pub(crate) fn closed() -> Self {
        // Not below TMPDIR, which may be too long for sockets.
        let dir = tempfile::Builder::new().prefix("bb-").tempdir_in("/tmp").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { dir, control: None, runtime }
    }

    pub(crate) fn new() -> Self {
        let mut host = Self::closed();
        host.open();
        host
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn data(&self) -> DataDir {
        DataDir::open(&self.path("d")).unwrap()
    }

    /// Opens the data directory, as a daemon does when it begins. Its images are read; no shim can be started.
    pub(crate) fn open(&mut self) {
        self.open_with(Path::new(env!("CARGO_BIN_EXE_image-reader-for-tests")));
    }

    /// Opens the data directory for a daemon that is this program.
    pub(crate) fn open_with(&mut self, program: &Path) {
        self.control = Some(
            self.runtime.block_on(Control::open(self.data(), &StoreChoice::default(), program.to_owned())).unwrap(),
        );
    }

    pub(crate) fn control(&self) -> &Arc<Control> {
        self.control.as_ref().expect("opened")
    }

    pub(crate) fn try_import(&self, path: &Path, name: &str) -> Result<ImageRecord, ControlError> {
        let name = Some(name.parse().unwrap());
        let request = ImportRequest { path: path.to_owned(), name, ..ImportRequest::default() };
        // Held to the end: an import whose listener is gone is cancelled.
        let (progress, listener) = tokio::sync::mpsc::channel(1);
        let imported = self.runtime.block_on(self.control().import_image(request, progress));
        drop(listener);
        imported.map(|(image, _)| image)
    }

    #[track_caller]
    pub(crate) fn import(&self, path: &Path, name: &str) -> ImageRecord {
        self.try_import(path, name).unwrap_or_else(|error| panic!("{error}: {:?}", error.causes()))
    }

    pub(crate) fn remove_image(&self, name: &str) {
        self.runtime.block_on(self.control().remove_image(name)).unwrap();
    }

    pub(crate) fn images(&self) -> Vec<ImageRecord> {
        self.runtime.block_on(self.control().images()).unwrap()
    }

    pub(crate) fn usage(&self) -> StoreUsage {
        self.control().store_usage().unwrap()
    }

    pub(crate) fn store(&self) -> Store {
        open_store(&self.data(), &StoreChoice::default()).unwrap().0
    }

    /// Serves a new volume over a content while `with_socket` runs.
    pub(crate) fn serve(&self, digest: &Digest, with_socket: impl FnOnce(&Path)) {
        let (data, store) = (self.data(), self.store());
        let manifest = store.manifest(digest).unwrap();
        let volumes = VolumeDirectory::open(&data.volumes()).unwrap();
        let cache = open_cache(&data).unwrap();
        let id = VolumeId::random();
        volumes.create(&id, manifest.size_bytes(), Some(&manifest)).unwrap();
        let volume = volumes.open_volume(&id, &Arc::new(store), &Arc::new(cache)).unwrap();
        let export = Export { name: String::new(), description: String::new(), device: Arc::new(volume) };
        let socket = self.path("nbd");
        let server = NbdServer::bind(&socket).unwrap().export(export).unwrap().spawn().unwrap();
        with_socket(&socket);
        server.shutdown();
        server.wait();
        drop(server);
        // Its threads let go of the volume a moment later.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while let Err(error) = volumes.remove(&id) {
            assert!(std::time::Instant::now() < deadline, "{error}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
