//! Instances: launch, find again, stop, start, remove.

use std::net::TcpListener;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulbil_metadata::check_user_data;
use bulbil_types::{BootMode, InstanceId, MAX_DISK_BYTES, Name, Personality, VolumeId};
use bulbil_vm::qemu;
use bulbil_volume::{VolumeDirectory, VolumeError, VolumeErrorKind};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::watch;

use crate::control::{Control, now};
use crate::data_dir::replace_file;
use crate::error::{ControlError, ErrorCode};
use crate::keys;
use crate::model::{InstanceRecord, InstanceState, InstanceView, LoginKey, PublishedPort, RunState};
use crate::process;
use crate::shim::{self, ShimRequest};

/// The least memory a guest is given: less starts no Linux of today.
const MIN_MEMORY_BYTES: u64 = 64 << 20;

/// Most instances of one launch.
const MAX_COUNT: u32 = 100;

/// How long a new shim may take until it answers; it then still starts the machine.
const SHIM_START: Duration = Duration::from_secs(15);

/// What to launch.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct LaunchRequest {
    /// The image: id, name, or name and version.
    pub image: String,
    /// Name of the instance; by default made up. With a count above one, `-1`, `-2`, … is added.
    pub name: Option<Name>,
    /// How many.
    pub count: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Size of the root disk in bytes; by default the image's.
    pub disk_bytes: Option<u64>,
    /// Texts of public key files.
    pub public_keys: Vec<String>,
    /// User data, byte for byte.
    pub user_data: Option<Vec<u8>>,
    /// Which cloud the instance looks like.
    pub personality: Personality,
    /// Ports of the host that lead in.
    pub publish: Vec<PublishedPort>,
    /// Whether to only check.
    pub dry_run: bool,
}

/// How long a shim whose machine has ended may take to close the volume: it may have a boot trace to store.
const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// Removes a volume as soon as the shim that had it open has ended.
fn remove_unused(volumes: &VolumeDirectory, id: &VolumeId) -> Result<(), VolumeError> {
    let deadline = Instant::now() + CLOSE_LIMIT;
    loop {
        match volumes.remove(id) {
            Err(e) if e.kind() == VolumeErrorKind::InUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

impl Control {
    /// Creates instances and starts them; returns as soon as their shims run.
    ///
    /// # Errors
    /// `NotFound`, `Invalid`, `InUse`, `MissingProgram`, `NoSpace`, `Failed`. What was created for
    /// an instance that could not be started is removed again.
    pub async fn launch(self: &Arc<Self>, request: LaunchRequest) -> Result<Vec<InstanceView>, ControlError> {
        let records = self.plan(&request).await?;
        if request.dry_run {
            return Ok(records.into_iter().map(|record| view(record, RunState::pending(now()))).collect());
        }
        let mut launched = Vec::new();
        for record in records {
            let id = record.id.clone();
            let user_data = request.user_data.as_deref();
            match self.create_and_start(record, user_data).await {
                Ok(instance) => launched.push(instance),
                Err(error) => {
                    self.discard(&id).await;
                    return Err(error.while_running(&launched));
                }
            }
        }
        Ok(launched)
    }

    /// Checks of a request what does not depend on the image, which may not be there yet.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub async fn check_launch(&self, request: &LaunchRequest) -> Result<(), ControlError> {
        let invalid = |text: String| Err(ControlError::new(ErrorCode::Invalid, text));
        if request.cpus == 0 || request.cpus > 255 {
            return invalid(format!("{} processors are not possible: use 1 to 255", request.cpus));
        }
        if request.memory_bytes < MIN_MEMORY_BYTES || !request.memory_bytes.is_multiple_of(1 << 20) {
            return invalid("the memory must be whole MiB, at least 64MiB".to_owned());
        }
        if request.count == 0 || request.count > MAX_COUNT {
            return invalid(format!("{} instances at once are not possible: use 1 to {MAX_COUNT}", request.count));
        }
        if request.count > 1 && !request.publish.is_empty() {
            return invalid("a port of the host can lead to one instance only; launch them one by one".to_owned());
        }
        if request.disk_bytes.is_some_and(|bytes| !bytes.is_multiple_of(512)) {
            return invalid(format!(
                "a disk of {} bytes is not possible: it must be a multiple of 512",
                request.disk_bytes.unwrap_or_default()
            ));
        }
        if let Some(user_data) = &request.user_data {
            check_user_data(request.personality, user_data)
                .map_err(|e| ControlError::with_source(ErrorCode::Invalid, "the user data cannot be used", &e))?;
        }
        for text in &request.public_keys {
            keys::parse_public_keys(text)?;
        }
        check_qemu().await?;
        check_ports(&request.publish)?;
        for index in 1..=request.count {
            self.choose_name(request, index, &InstanceId::random()).await?;
        }
        Ok(())
    }

    /// Checks a request and fills in what it leaves open; changes nothing.
    async fn plan(&self, request: &LaunchRequest) -> Result<Vec<InstanceRecord>, ControlError> {
        let image = self.image(&request.image).await?;
        self.check_launch(request).await?;
        check_firmware(image.boot_mode)?;
        let disk_bytes = request.disk_bytes.unwrap_or(image.size_bytes);
        if disk_bytes < image.size_bytes || disk_bytes > MAX_DISK_BYTES {
            let text = format!(
                "a disk of {} is not possible: the image needs {}, the limit is {}",
                bulbil_types::ByteSize(disk_bytes),
                bulbil_types::ByteSize(image.size_bytes),
                bulbil_types::ByteSize(MAX_DISK_BYTES),
            );
            return Err(ControlError::new(ErrorCode::Invalid, text));
        }
        let mut public_keys = Vec::new();
        for text in &request.public_keys {
            public_keys.extend(keys::parse_public_keys(text)?);
        }
        public_keys.push(keys::own_public_key(&self.data)?);
        let mut seen = std::collections::HashSet::new();
        public_keys.retain(|key| seen.insert(key.clone()));
        let mut records = Vec::new();
        for index in 1..=request.count {
            let id = InstanceId::random();
            let name = self.choose_name(request, index, &id).await?;
            records.push(InstanceRecord {
                hostname: name.to_hostname(),
                name,
                image_id: image.id.clone(),
                image: format!("{}:{}", image.name, image.version),
                image_digest: image.digest,
                volume_id: VolumeId::random(),
                disk_bytes,
                cpus: request.cpus,
                memory_bytes: request.memory_bytes,
                personality: request.personality,
                boot_mode: image.boot_mode,
                mac: mac_of(&id),
                public_keys: name_keys(&public_keys),
                user_data_bytes: request.user_data.as_ref().map_or(0, |data| data.len() as u64),
                publish: request.publish.clone(),
                created_at: now(),
                id,
            });
        }
        Ok(records)
    }

    async fn choose_name(&self, request: &LaunchRequest, index: u32, id: &InstanceId) -> Result<Name, ControlError> {
        let text = match &request.name {
            Some(name) if request.count > 1 => format!("{name}-{index}"),
            Some(name) => name.to_string(),
            None => format!("vm-{}", id.as_str().trim_start_matches("i-").get(..8).unwrap_or_default()),
        };
        let name: Name = text
            .parse()
            .map_err(|e| ControlError::with_source(ErrorCode::Invalid, format!("`{text}` is not a usable name"), &e))?;
        if name.to_hostname().is_empty() {
            return Err(ControlError::new(ErrorCode::Invalid, format!("no host name can be made of `{name}`")));
        }
        match self.catalog.find_instance(name.as_str()).await? {
            Some(_) => Err(ControlError::new(ErrorCode::InUse, format!("an instance named `{name}` exists already"))),
            None => Ok(name),
        }
    }

    async fn create_and_start(
        self: &Arc<Self>,
        record: InstanceRecord,
        user_data: Option<&[u8]>,
    ) -> Result<InstanceView, ControlError> {
        let fail = |e| ControlError::io(format!("cannot create instance {}", record.id), &e);
        let _alone = self.lock_instance(&record.id).await;
        // The row first: it takes the name, and whatever follows can be found and removed.
        {
            let _image_stays = self.image_uses.lock().await;
            self.image(record.image_id.as_str()).await?;
            self.catalog.add_instance(&record, &RunState::pending(now())).await?;
        }
        let directory = self.data.instance(&record.id);
        directory.create().map_err(fail)?;
        let document = serde_json::to_vec_pretty(&record).expect("records are plain data");
        replace_file(&directory.file("instance.json"), &document).map_err(fail)?;
        if let Some(user_data) = user_data {
            replace_file(&directory.file("user-data"), user_data).map_err(fail)?;
        }
        let manifest = self.store.manifest(&record.image_digest).map_err(|e| {
            ControlError::with_source(ErrorCode::Failed, format!("cannot read image `{}`", record.image), &e)
        })?;
        self.volumes.create(&record.volume_id, record.disk_bytes, Some(&manifest)).map_err(|e| {
            let code = if e.kind() == VolumeErrorKind::NoSpace { ErrorCode::NoSpace } else { ErrorCode::Failed };
            ControlError::with_source(code, "cannot create the root disk", &e)
        })?;
        self.start_shim(&record).await?;
        self.instance(record.id.as_str()).await
    }

    /// Removes what a launch that failed has left; errors are only logged.
    async fn discard(&self, id: &InstanceId) {
        if let Err(error) = self.remove_instance(id.as_str(), true).await
            && error.code() != ErrorCode::NotFound
        {
            tracing::warn!(instance = %id, %error, "cannot remove what a failed launch left");
        }
    }

    /// Starts the shim of an instance and listens to it.
    async fn start_shim(self: &Arc<Self>, record: &InstanceRecord) -> Result<(), ControlError> {
        let directory = self.data.instance(&record.id);
        let fail = |e: std::io::Error| ControlError::io(format!("cannot start instance `{}`", record.name), &e);
        directory.create().map_err(fail)?;
        let log = std::fs::File::options().create(true).append(true).open(directory.file("shim.log")).map_err(fail)?;
        let mut child = Command::new(&self.program)
            .arg(process::SHIM_COMMAND)
            .arg("--data-dir")
            .arg(self.data.root())
            .arg(record.id.as_str())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir(self.data.root())
            .kill_on_drop(false)
            .spawn()
            .map_err(fail)?;
        let socket = directory.socket("shim");
        let connected = tokio::select! {
            stream = shim::connect(&socket, SHIM_START) => stream,
            _ = child.wait() => Err(std::io::Error::other("its supervising process ended")),
        };
        if connected.is_err() {
            // One that comes too late must not start a machine that nobody knows of.
            drop(child.start_kill());
        }
        // Reaped whenever it ends; it does not end with the daemon.
        tokio::spawn(async move {
            if let Err(error) = child.wait().await {
                tracing::warn!(%error, "cannot wait for a shim");
            }
        });
        match connected {
            Ok(stream) => {
                self.follow(record.id.clone(), stream);
                Ok(())
            }
            Err(error) => {
                let reason = shim::read_state(&directory).and_then(|run| run.reason);
                let reason = reason.or_else(|| last_line(&directory.file("shim.log")));
                let cause = reason.map_or(error, std::io::Error::other);
                Err(fail(cause))
            }
        }
    }

    /// Keeps what a shim tells, until it ends.
    fn follow(self: &Arc<Self>, id: InstanceId, stream: UnixStream) {
        let (sender, receiver) = watch::channel(RunState::pending(now()));
        self.running().insert(id.clone(), receiver);
        let control = Arc::clone(self);
        tokio::spawn(async move {
            control.follow_until_end(&id, stream, &sender).await;
        });
    }

    async fn follow_until_end(&self, id: &InstanceId, mut stream: UnixStream, sender: &watch::Sender<RunState>) {
        let mut saved = None;
        if shim::ask_to_watch(&mut stream).await.is_ok() {
            let mut lines = BufReader::new(stream).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let Ok(run) = serde_json::from_str::<RunState>(&line) else { continue };
                // The end is told when the shim is gone: only then may the instance be started again.
                if run.state == InstanceState::Stopped {
                    continue;
                }
                sender.send_replace(run.clone());
                // Written when the state changes, and when the boot is decided; phases are not kept.
                let mark = (run.state, run.boot.is_some());
                if saved.replace(mark) != Some(mark) {
                    self.save_run(id, &run).await;
                }
            }
        }
        let ended = self.state_left_behind(id);
        self.save_run(id, &ended).await;
        self.running().remove(id);
        sender.send_replace(ended);
    }

    /// What is known of an instance whose shim is gone.
    fn state_left_behind(&self, id: &InstanceId) -> RunState {
        match shim::read_state(&self.data.instance(id)) {
            Some(run) if run.state == InstanceState::Stopped => run,
            _ => RunState::stopped("its supervising process ended unexpectedly, and the machine with it", now()),
        }
    }

    async fn save_run(&self, id: &InstanceId, run: &RunState) {
        if let Err(error) = self.catalog.save_run(id, run).await {
            tracing::error!(instance = %id, %error, causes = ?error.causes(), "cannot save an instance's state");
        }
    }

    /// Finds the instances that went on while no daemon ran.
    pub(crate) async fn find_running(self: &Arc<Self>) -> Result<(), ControlError> {
        for (record, run) in self.catalog.instances().await? {
            if run.state == InstanceState::Stopped {
                continue;
            }
            match UnixStream::connect(self.data.instance(&record.id).socket("shim")).await {
                Ok(stream) => {
                    tracing::info!(instance = %record.id, name = %record.name, "running instance found again");
                    self.follow(record.id, stream);
                }
                Err(_) => {
                    let left = match self.volumes.record(&record.volume_id) {
                        Err(e) if e.kind() == VolumeErrorKind::NotFound => {
                            let text = format!("its launch was interrupted; remove it: bulbil rm {}", record.name);
                            RunState::stopped(text, now())
                        }
                        _ => self.state_left_behind(&record.id),
                    };
                    self.catalog.save_run(&record.id, &left).await?;
                }
            }
        }
        Ok(())
    }

    /// Lists all instances, oldest first.
    ///
    /// # Errors
    /// `Failed` when the catalog cannot be read.
    pub async fn instances(&self) -> Result<Vec<InstanceView>, ControlError> {
        let rows = self.catalog.instances().await?;
        Ok(rows.into_iter().map(|(record, run)| self.current(record, run)).collect())
    }

    /// Finds an instance by id or name.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn instance(&self, wanted: &str) -> Result<InstanceView, ControlError> {
        let row = self.catalog.find_instance(wanted).await?;
        let (record, run) =
            row.ok_or_else(|| ControlError::new(ErrorCode::NotFound, format!("there is no instance `{wanted}`")))?;
        Ok(self.current(record, run))
    }

    fn current(&self, record: InstanceRecord, run: RunState) -> InstanceView {
        let heard = self.running().get(&record.id).map(|receiver| receiver.borrow().clone());
        view(record, heard.unwrap_or(run))
    }

    /// What is heard of an instance from now on; `None` when it does not run.
    pub fn watch(&self, id: &InstanceId) -> Option<watch::Receiver<RunState>> {
        self.running().get(id).cloned()
    }

    /// Starts an instance that is stopped.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when it is not stopped, or one of its ports is taken; `Failed`.
    pub async fn start(self: &Arc<Self>, wanted: &str) -> Result<InstanceView, ControlError> {
        let instance = self.instance(wanted).await?;
        let _alone = self.lock_instance(&instance.record.id).await;
        let instance = self.instance(instance.record.id.as_str()).await?;
        if instance.run.state != InstanceState::Stopped {
            let text = format!("instance `{wanted}` is {}, not stopped", instance.run.state);
            return Err(ControlError::new(ErrorCode::InUse, text));
        }
        check_qemu().await?;
        check_firmware(instance.record.boot_mode)?;
        check_ports(&instance.record.publish)?;
        self.start_shim(&instance.record).await?;
        self.instance(wanted).await
    }

    /// Powers an instance off and waits until it is; one that is stopped already is fine.
    ///
    /// The guest is asked first, and switched off when it has not done so within `grace`, or at
    /// once with `force`.
    ///
    /// # Errors
    /// `NotFound`; `Timeout` when it does not end; `Failed`.
    pub async fn stop(&self, wanted: &str, grace: Duration, force: bool) -> Result<InstanceView, ControlError> {
        let instance = self.instance(wanted).await?;
        // One that is just being started can be asked a moment later.
        drop(self.lock_instance(&instance.record.id).await);
        let Some(mut receiver) = self.watch(&instance.record.id) else { return Ok(instance) };
        let grace = if force { Duration::ZERO } else { grace };
        let socket = self.data.instance(&instance.record.id).socket("shim");
        let request = ShimRequest::Stop { grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX) };
        if let Err(error) = shim::send(&socket, &request).await {
            tracing::warn!(instance = %instance.record.id, %error, "cannot reach the shim");
        }
        let limit = grace.saturating_add(Duration::from_secs(30));
        // The sender is gone only after the last state was sent and saved, so both ways out are fine.
        let stopped = async { drop(receiver.wait_for(|run| run.state == InstanceState::Stopped).await) };
        match tokio::time::timeout(limit, stopped).await {
            Ok(()) => self.instance(wanted).await,
            Err(_) => Err(ControlError::new(ErrorCode::Timeout, format!("instance `{wanted}` does not end"))),
        }
    }

    /// Removes an instance, its disk and its files.
    ///
    /// # Errors
    /// `NotFound`; `InUse` when it runs and `force` is not set; `Failed`.
    pub async fn remove_instance(&self, wanted: &str, force: bool) -> Result<InstanceView, ControlError> {
        let mut instance = self.instance(wanted).await?;
        if force && self.watch(&instance.record.id).is_some() {
            instance = self.stop(wanted, Duration::ZERO, true).await?;
        }
        let _alone = self.lock_instance(&instance.record.id).await;
        instance.run = self.instance(instance.record.id.as_str()).await?.run;
        if instance.run.state != InstanceState::Stopped && self.watch(&instance.record.id).is_some() {
            let text = format!("instance `{wanted}` is {}", instance.run.state);
            return Err(ControlError::new(ErrorCode::InUse, text));
        }
        let id = &instance.record.id;
        let failed = |e: &(dyn std::error::Error + 'static)| {
            ControlError::with_source(ErrorCode::Failed, format!("cannot remove instance `{wanted}`"), e)
        };
        let (volumes, volume_id, directory) =
            (self.volumes.clone(), instance.record.volume_id.clone(), self.data.instance(id));
        let base = volumes.record(&volume_id).ok().and_then(|volume| volume.base);
        // A large overlay takes a while.
        let removed = tokio::task::spawn_blocking(move || (remove_unused(&volumes, &volume_id), directory.remove()));
        let (volume, files) = removed.await.map_err(|e| failed(&e))?;
        volume.map_err(|e| failed(&e))?;
        files.map_err(|e| failed(&e))?;
        self.catalog.remove_instance(id).await?;
        tracing::info!(instance = %id, name = %instance.record.name, "instance removed");
        // A snapshot has put its volume above another content than the image's.
        if base.is_some_and(|base| base != instance.record.image_digest) {
            self.free_content().await;
        }
        Ok(instance)
    }
}

// What would otherwise fail only in the shim:

async fn check_qemu() -> Result<(), ControlError> {
    let missing = |e: &qemu::QemuError| ControlError::new(ErrorCode::MissingProgram, e.to_string());
    let program = qemu::find_qemu(None, &std::env::var_os("PATH").unwrap_or_default()).map_err(|e| missing(&e))?;
    qemu::QemuBinary::probe(&program).await.map(drop).map_err(|e| missing(&e))
}

fn check_firmware(boot_mode: BootMode) -> Result<(), ControlError> {
    match boot_mode {
        BootMode::Bios => Ok(()),
        BootMode::Uefi => {
            let found = qemu::find_ovmf().map(drop);
            found.map_err(|e| ControlError::new(ErrorCode::MissingProgram, e.to_string()))
        }
    }
}

/// All at the same time, so that one that is named twice is found too.
fn check_ports(publish: &[PublishedPort]) -> Result<(), ControlError> {
    let listen = |port: &PublishedPort| {
        TcpListener::bind((port.address, port.host_port)).map_err(|error| {
            let text = format!("cannot publish port {} of {}", port.host_port, port.address);
            ControlError::with_source(ErrorCode::InUse, text, &error)
        })
    };
    publish.iter().map(listen).collect::<Result<Vec<_>, _>>().map(drop)
}

fn view(record: InstanceRecord, run: RunState) -> InstanceView {
    InstanceView::new(record, run, shim::GUEST_IP.to_string())
}

/// A locally administered address out of the instance's id, in QEMU's own range.
fn mac_of(id: &InstanceId) -> String {
    let hex = id.as_str().trim_start_matches("i-");
    format!("52:54:00:{}:{}:{}", &hex[0..2], &hex[2..4], &hex[4..6])
}

fn name_keys(keys: &[String]) -> Vec<LoginKey> {
    let named = |(index, key): (usize, &String)| {
        let comment = key.split_ascii_whitespace().nth(2).unwrap_or_default();
        let name = if comment.is_empty() { format!("key-{index}") } else { comment.to_owned() };
        LoginKey { name, key: key.clone() }
    };
    keys.iter().enumerate().map(named).collect()
}

fn last_line(path: &std::path::Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().rfind(|line| !line.trim().is_empty()).map(str::to_owned)
}
