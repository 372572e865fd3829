//! From a record to a virtual machine that runs.

use std::path::Path;
use std::sync::Arc;

use bulbil_export::nbd::{Export, NbdServer, ServeError, ServerHandle};
use bulbil_export::vhost_user::{Options, VhostUserHandle, VhostUserServer};
use bulbil_format::seed::write_iso9660;
use bulbil_metadata::{InstanceView as MetadataView, nocloud_seed, smbios, system_uuid};
use bulbil_types::{BootMode, Personality};
use bulbil_vm::accel::{self, Accelerator};
use bulbil_vm::attach::{self, DiskAttach, DiskChoice};
use bulbil_vm::spec::{Disk, DiskSource, Firmware, InstanceSpec, Nic, Paths, Smbios, SocketRole, disk_serial};
use bulbil_vm::{QemuCommand, QemuProcess, qemu, qemu_argv};
use bulbil_volume::{BlockDevice as _, Volume, VolumeDirectory};

use super::volume_requests::{DISK_NODE, OpenDisk};
use crate::control::kvm_probe;
use crate::data_dir::{DataDir, InstanceDir, replace_file};
use crate::error::{ControlError, ErrorCode};
use crate::model::InstanceRecord;
use crate::process;
use crate::store_binding::{StoreChoice, open_store};
use crate::store_ops::open_cache;
use crate::volume_ops::open_volume;

fn failed(what: &str) -> impl Fn(&(dyn std::error::Error + 'static)) -> ControlError + use<'_> {
    move |e| ControlError::with_source(ErrorCode::Failed, what, e)
}

/// The instance's disk, open, and served once its machine is about to start.
pub(super) struct ServedDisk {
    volume: Arc<Volume>,
    server: Option<DiskServer>,
}

/// What serves the disk to the machine.
#[derive(Debug, Clone)]
pub(super) enum DiskServer {
    Nbd(Arc<ServerHandle>),
    VhostUser(Arc<VhostUserHandle>),
}

impl ServedDisk {
    /// Opens the volume.
    pub(super) fn open(data: &DataDir, record: &InstanceRecord) -> Result<Self, ControlError> {
        let (store, _) = open_store(data, &StoreChoice::default())?;
        let cache = open_cache(data)?;
        let volumes = VolumeDirectory::open(&data.volumes()).map_err(|e| failed("cannot open the volumes")(&e))?;
        let volume = open_volume(&volumes, &record.volume_id, &Arc::new(store), &Arc::new(cache))
            .map_err(|e| failed("cannot open the root disk")(&e))?;
        volume.expect_boot();
        Ok(Self { volume: Arc::new(volume), server: None })
    }

    /// Serves the volume on the instance's socket, and returns where its machine finds it.
    fn serve(
        &mut self,
        directory: &InstanceDir,
        record: &InstanceRecord,
        attach: DiskAttach,
        queues: u16,
    ) -> Result<DiskSource, ControlError> {
        let socket = directory.socket("disk");
        let served = match attach {
            DiskAttach::Nbd => self.serve_nbd(&socket, record).map(|server| DiskServer::Nbd(Arc::new(server))),
            DiskAttach::VhostUser => {
                self.serve_vhost_user(&socket, record, queues).map(|server| DiskServer::VhostUser(Arc::new(server)))
            }
        };
        self.server = Some(served.map_err(|e| failed("cannot serve the root disk")(&e))?);
        Ok(match attach {
            DiskAttach::Nbd => DiskSource::Nbd { socket, export: String::new() },
            DiskAttach::VhostUser => DiskSource::VhostUser { socket, queues },
        })
    }

    fn serve_nbd(&self, socket: &Path, record: &InstanceRecord) -> Result<ServerHandle, ServeError> {
        let export = Export {
            name: String::new(),
            description: format!("{} of {}", record.volume_id, record.id),
            device: Arc::clone(&self.volume) as _,
        };
        NbdServer::bind(socket)?.export(export)?.spawn()
    }

    fn serve_vhost_user(
        &self,
        socket: &Path,
        record: &InstanceRecord,
        queues: u16,
    ) -> Result<VhostUserHandle, ServeError> {
        let options = Options { serial: disk_serial(&record.volume_id), queues, ..Options::default() };
        VhostUserServer::bind(socket, Arc::clone(&self.volume) as _, options)?.spawn()
    }

    /// Lets requests to the shim reach the volume, once it is served.
    pub(super) fn open_to(&self, data: &DataDir, open_disk: &OpenDisk) {
        if let Some(server) = &self.server {
            open_disk.set_volume(data, Arc::clone(&self.volume), server.clone());
        }
    }

    /// Ends the server and makes everything durable.
    pub(super) fn close(self) -> Result<(), ControlError> {
        match self.server {
            Some(DiskServer::Nbd(server)) => server.shutdown(),
            Some(DiskServer::VhostUser(server)) => server.shutdown(),
            None => {}
        }
        self.volume.flush().map_err(|e| failed("cannot flush the root disk")(&e))
    }
}

/// A machine that was started.
pub(super) struct Machine {
    pub(super) process: QemuProcess,
    pub(super) accelerator: Accelerator,
}

/// Serves the disk and starts QEMU for an instance whose network is there already.
pub(super) async fn start(
    program: &Path,
    directory: &InstanceDir,
    record: &InstanceRecord,
    view: &MetadataView,
    disk: &mut ServedDisk,
) -> Result<Machine, ControlError> {
    let missing = |e: &qemu::QemuError| ControlError::new(ErrorCode::MissingProgram, e.to_string());
    let search_path = std::env::var_os("PATH").unwrap_or_default();
    let found = qemu::find_qemu(None, &search_path).map_err(|e| missing(&e))?;
    let (binary, attach) = tokio::join!(qemu::QemuBinary::probe(&found), choose_attach(&found));
    let (binary, attach) = (binary.map_err(|e| missing(&e))?, attach?);
    let choice = std::env::var(process::ACCEL_VARIABLE).unwrap_or_default();
    let choice = choice.parse().map_err(|e: accel::ParseAccelError| failed("cannot choose an accelerator")(&e))?;
    let detection = accel::detect_accelerator(choice, &kvm_probe(program))
        .await
        .map_err(|e| failed("cannot choose an accelerator")(&e))?;
    let firmware = firmware(directory, record)?;
    let seed_iso = seed(directory, record, view)?;
    let disk = disk.serve(directory, record, attach, disk_queues(detection.accelerator, record.cpus))?;
    let spec = spec(directory, record, view, detection.accelerator, firmware, seed_iso, binary.sandbox, disk);
    let argv = qemu_argv(&spec, &binary.version).map_err(|e| failed("cannot describe the machine")(&e))?;
    tracing::info!(?argv, disk = %attach, "starting the virtual machine");
    let command = QemuCommand {
        program: binary.path,
        argv,
        stderr_log: directory.file("qemu.log"),
        // QEMU finds its firmware by its own paths; it needs nothing of ours.
        environment: vec![("PATH".into(), search_path)],
    };
    let process = QemuProcess::spawn(command).await.map_err(|e| failed("cannot start the virtual machine")(&e))?;
    Ok(Machine { process, accelerator: detection.accelerator })
}

async fn choose_attach(qemu: &Path) -> Result<DiskAttach, ControlError> {
    let choice = std::env::var(process::DISK_VARIABLE).unwrap_or_default();
    let choice = choice.parse().map_err(|e: attach::ParseDiskChoiceError| failed("cannot attach the root disk")(&e))?;
    let has_device = choice != DiskChoice::Nbd && qemu::has_vhost_user_blk(qemu).await;
    attach::choose_attach(choice, has_device).map_err(|e| failed("cannot attach the root disk")(&e))
}

/// Emulated processors are too slow to keep more than one queue busy.
fn disk_queues(accelerator: Accelerator, cpus: u32) -> u16 {
    if accelerator == Accelerator::Kvm && cpus > 1 { 2 } else { 1 }
}

fn firmware(directory: &InstanceDir, record: &InstanceRecord) -> Result<Firmware, ControlError> {
    if record.boot_mode == BootMode::Bios {
        return Ok(Firmware::Bios);
    }
    let ovmf = qemu::find_ovmf().map_err(|e| ControlError::new(ErrorCode::MissingProgram, e.to_string()))?;
    let vars = directory.file("uefi-vars.fd");
    qemu::create_uefi_vars(&ovmf.vars, &vars).map_err(|e| failed("cannot prepare the firmware")(&e))?;
    Ok(Firmware::Uefi(bulbil_vm::UefiFirmware { code: ovmf.code, vars }))
}

fn seed(
    directory: &InstanceDir,
    record: &InstanceRecord,
    view: &MetadataView,
) -> Result<Option<std::path::PathBuf>, ControlError> {
    if record.personality != Personality::NoCloud {
        return Ok(None);
    }
    let files = nocloud_seed(view);
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let iso = write_iso9660("cidata", &files, view.launched_at).map_err(|e| failed("cannot make the seed disk")(&e))?;
    let path = directory.file("seed.iso");
    replace_file(&path, &iso).map_err(|e| ControlError::io("cannot write the seed disk", &e))?;
    Ok(Some(path))
}

#[expect(clippy::too_many_arguments, reason = "one place that knows all parts of a machine")]
fn spec(
    directory: &InstanceDir,
    record: &InstanceRecord,
    view: &MetadataView,
    accelerator: Accelerator,
    firmware: Firmware,
    seed_iso: Option<std::path::PathBuf>,
    sandbox: bool,
    disk: DiskSource,
) -> InstanceSpec {
    InstanceSpec {
        name: record.name.to_string(),
        id: record.id.clone(),
        cpus: record.cpus,
        memory_bytes: record.memory_bytes,
        accelerator,
        firmware,
        uuid: system_uuid(&record.id, record.personality),
        smbios: smbios(view).into_iter().map(|table| Smbios::new(table.table, table.fields)).collect(),
        disks: vec![Disk {
            node: DISK_NODE.to_owned(),
            source: disk,
            serial: disk_serial(&record.volume_id),
            read_only: false,
            boot_index: Some(0),
        }],
        seed_iso,
        nic: Some(Nic {
            mac: record.mac.clone(),
            socket: directory.socket("net"),
            mtu: 1500,
            role: SocketRole::Connect,
        }),
        hotplug_ports: 4,
        paths: Paths {
            serial_log: directory.file("serial.log"),
            console_socket: directory.socket("console"),
            qmp_socket: directory.socket("qmp"),
            pid_file: directory.file("qemu.pid"),
            guest_agent_socket: Some(directory.socket("agent")),
        },
        sandbox,
        start_paused: false,
    }
}
