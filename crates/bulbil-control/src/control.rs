//! The daemon's centre: opens everything once and keeps track of running instances.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulbil_store::{Store, StoreUsage};
use bulbil_types::InstanceId;
use bulbil_vm::accel::{self, ProbeCommand};
use bulbil_vm::qemu;
use bulbil_volume::VolumeDirectory;
use tokio::sync::watch;

use crate::catalog::Catalog;
use crate::data_dir::DataDir;
use crate::error::{ControlError, ErrorCode};
use crate::export::ContentsInUse;
use crate::model::RunState;
use crate::process;
use crate::reader;
use crate::store_binding::{StoreBinding, StoreChoice, open_store};

/// All use cases over one data directory.
#[derive(Debug)]
pub struct Control {
    pub(crate) data: DataDir,
    pub(crate) catalog: Catalog,
    pub(crate) store: Arc<Store>,
    pub(crate) binding: StoreBinding,
    pub(crate) volumes: VolumeDirectory,
    /// The binary that shims are started from.
    pub(crate) program: PathBuf,
    /// What is heard from the shims of instances that are not known to be stopped.
    pub(crate) running: Mutex<HashMap<InstanceId, watch::Receiver<RunState>>>,
    /// Images are added and removed one at a time; held as long as an import takes.
    pub(crate) image_changes: tokio::sync::Mutex<()>,
    /// Held for a moment while an instance comes to refer to an image, and while it is decided that
    /// nothing refers to one: otherwise a launch could get an image that is being removed.
    pub(crate) image_uses: Arc<tokio::sync::Mutex<()>>,
    /// Contents that are being exported, which stay in the store although their image may be removed.
    pub(crate) contents_in_use: ContentsInUse,
    /// One for each instance, held while it is created, started or removed.
    instance_locks: Mutex<HashMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
}

/// What this host offers to instances.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct HostReport {
    /// Checks in the order people read them.
    pub checks: Vec<HostCheck>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct HostCheck {
    /// What.
    pub name: String,
    /// Whether it is as one would wish.
    pub ok: bool,
    /// Whether instances can be launched without it.
    pub optional: bool,
    /// What was seen, or is to be done.
    pub detail: String,
}

impl Control {
    /// Opens or makes everything below a data directory, and finds running instances again.
    ///
    /// # Errors
    /// `OtherStore` when the directory is bound to another store than was chosen; `StoreKey`; others when the
    /// directory, the catalog or the store cannot be used.
    pub async fn open(data: DataDir, choice: &StoreChoice, program: PathBuf) -> Result<Arc<Self>, ControlError> {
        let failed = |what: &str, e: &(dyn std::error::Error + 'static)| {
            ControlError::with_source(ErrorCode::Failed, format!("cannot open the {what}"), e)
        };
        let (opened, choice) = (data.clone(), choice.clone());
        // Perhaps over a network, and then not quick.
        let opened = tokio::task::spawn_blocking(move || open_store(&opened, &choice)).await;
        let (store, binding) = opened.map_err(|e| failed("image store", &e))??;
        let catalog = Catalog::open(&data.catalog()).await?;
        let volumes = VolumeDirectory::open(&data.volumes()).map_err(|e| failed("volumes", &e))?;
        let control = Arc::new(Self {
            data,
            catalog,
            store: Arc::new(store),
            binding,
            volumes,
            program,
            running: Mutex::default(),
            image_changes: tokio::sync::Mutex::default(),
            image_uses: Arc::default(),
            contents_in_use: Arc::default(),
            instance_locks: Mutex::default(),
        });
        control.find_running().await?;
        Ok(control)
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> &DataDir {
        &self.data
    }

    /// Adds up the objects of the store, without reading them.
    ///
    /// # Errors
    /// `Failed` when it cannot be listed.
    pub fn store_usage(&self) -> Result<StoreUsage, ControlError> {
        self.store.usage().map_err(|e| ControlError::with_source(ErrorCode::Failed, "cannot read the store", &e))
    }

    /// Waits until nobody else creates, starts or removes this instance.
    pub(crate) async fn lock_instance(&self, id: &InstanceId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.instance_locks.lock().unwrap_or_else(PoisonError::into_inner);
            // Locks nobody holds or waits for are of no use any more.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(id.clone()).or_default())
        };
        lock.lock_owned().await
    }

    pub(crate) fn running(&self) -> MutexGuard<'_, HashMap<InstanceId, watch::Receiver<RunState>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostReport {
    /// Looks at this machine: programs, acceleration, space. Needs no daemon.
    pub async fn of_this_host(data_root: &Path, program: &Path, search_path: &std::ffi::OsStr) -> Self {
        let mut checks = Vec::new();
        let mut add = |name: &str, ok: bool, detail: String| {
            let optional = ["uefi firmware", "acceleration", "free space"].contains(&name);
            checks.push(HostCheck { name: name.to_owned(), ok, optional, detail });
        };
        let qemu = match qemu::find_qemu(None, search_path) {
            Ok(path) => qemu::QemuBinary::probe(&path).await.map(|found| (path, found)),
            Err(e) => Err(e),
        };
        match qemu {
            Ok((path, found)) => add("qemu", true, format!("{} at {}", found.version, path.display())),
            Err(e) => add("qemu", false, e.to_string()),
        }
        match qemu::find_ovmf() {
            Ok(firmware) => add("uefi firmware", true, firmware.code.display().to_string()),
            Err(e) => add("uefi firmware", false, format!("{e} (needed by images without BIOS boot code only)")),
        }
        for (name, package) in [("ssh", "openssh-client"), ("ssh-keygen", "openssh-client")] {
            let found = std::env::split_paths(search_path).map(|folder| folder.join(name)).find(|path| path.is_file());
            match found {
                Some(path) => add(name, true, path.display().to_string()),
                None => add(name, false, format!("not found: apt install {package}")),
            }
        }
        let (ok, text) = reader::probe_sandbox(program).await;
        add("image sandbox", ok, text);
        let kvm = accel::check_kvm(&kvm_probe(program)).await;
        let text = if kvm.works() { kvm.to_string() } else { format!("{kvm}; instances are emulated, which is slow") };
        add("acceleration", kvm.works(), text);
        match free_space(data_root) {
            Ok(bytes) => {
                let size = bulbil_types::ByteSize(bytes);
                add("free space", bytes > 2 << 30, format!("{size} at {}", data_root.display()));
            }
            Err(e) => add("free space", false, e.to_string()),
        }
        Self { checks }
    }
}

/// The command that tries KVM in a process of its own.
pub(crate) fn kvm_probe(program: &Path) -> ProbeCommand {
    ProbeCommand {
        program: program.to_owned(),
        args: vec![process::KVM_PROBE_COMMAND.into()],
        timeout: accel::PROBE_TIMEOUT,
    }
}

/// Tries KVM in this process, which may hang; see [`process::KVM_PROBE_COMMAND`].
///
/// # Errors
/// A sentence on why it does not work.
pub fn probe_kvm() -> Result<(), String> {
    bulbil_vm::probe_kvm_blocking().map_err(|e| e.to_string())
}

fn free_space(path: &Path) -> std::io::Result<u64> {
    // The directory may not exist yet; what counts is where it would be.
    let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let space = rustix::fs::statvfs(existing)?;
    Ok(space.f_bavail * space.f_frsize)
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
