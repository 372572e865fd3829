//! Volumes and snapshots as people use them. Some of it needs `/dev/fuse`, and skips with a reason where that is missing,
//! unless `CI` is set.

#![allow(clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used, reason = "helpers of tests are tests")]

mod support;

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, ChildStdout};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::disks::{content, run};
use support::{Home, Ran, send_signal, wait_until};

const SEED: u64 = 0x5eed_0044;
const MIB: u64 = 1 << 20;

const VOLUME_FIELDS: &[&str] = &[
    "id",
    "name",
    "size_bytes",
    "instance_id",
    "image",
    "snapshot_id",
    "cloned_from",
    "digest",
    "created_at",
    "state",
    "instance",
    "used_bytes",
];

const SNAPSHOT_FIELDS: &[&str] =
    &["id", "name", "digest", "size_bytes", "stored_bytes", "volume_id", "volume", "created_at"];

#[track_caller]
fn assert_has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some(), "no `{field}` in {document:#}");
    }
}

fn home_with_image() -> Home {
    let home = Home::new();
    let disk = home.file("small.raw", content(SEED, 4 << 20));
    home.ok(&["image", "import", &disk]);
    home
}

fn id(document: &Value) -> &str {
    document["id"].as_str().unwrap()
}

/// A command that goes on until it is told to end.
struct Running {
    child: Option<Child>,
    out: BufReader<ChildStdout>,
    /// What it said when it was ready.
    first_line: String,
}

impl Running {
    fn start(home: &Home, args: &[&str]) -> Self {
        let mut child = home.spawn(args);
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut first_line = String::new();
        out.read_line(&mut first_line).unwrap();
        if first_line.is_empty() {
            let ended = child.wait_with_output().unwrap();
            panic!("{args:?}: {}", String::from_utf8_lossy(&ended.stderr));
        }
        Self { child: Some(child), out, first_line: first_line.trim().to_owned() }
    }

    /// The document it wrote when it was ready.
    fn document(&mut self) -> Value {
        let mut text = std::mem::take(&mut self.first_line);
        while !text.trim_end().ends_with('}') {
            self.out.read_line(&mut text).unwrap();
        }
        serde_json::from_str(&text).unwrap()
    }

    /// Waits until it has told something.
    fn wait_for_note(&mut self, says: &str) {
        let mut stderr = BufReader::new(self.child.as_mut().unwrap().stderr.as_mut().unwrap());
        let mut told = String::new();
        while !told.contains(says) {
            assert_ne!(stderr.read_line(&mut told).unwrap(), 0, "no `{says}` in {told}");
        }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn signal(&self, signal: Signal) {
        send_signal(self.pid(), signal);
    }

    fn wait(mut self) -> Ran {
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        let mut ended = self.child.take().unwrap().wait_with_output().unwrap();
        ended.stdout = rest.into_bytes();
        Ran::new("a command in the background".to_owned(), ended)
    }

    fn end(self) -> Ran {
        self.signal(Signal::INT);
        self.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Serves a volume while `work` is done on its URI.
fn with_nbd<T>(home: &Home, volume: &str, work: impl FnOnce(&str) -> T) -> T {
    let address = format!("unix:{}", home.text_path("nbd"));
    let served = Running::start(home, &["volume", "serve", volume, "--nbd", &address]);
    let done = work(&served.first_line);
    served.end().ok();
    done
}

fn write(home: &Home, volume: &str, pattern: u8, offset: u64, len_bytes: u64) {
    let command = format!("write -P {pattern} {offset} {len_bytes}");
    with_nbd(home, volume, |uri| run("qemu-io", &["-f", "raw", "-c", &command, "-c", "flush", uri]));
}

fn assert_content(home: &Home, volume: &str, pattern: u8, offset: u64, len_bytes: u64) {
    let command = format!("read -P {pattern} {offset} {len_bytes}");
    with_nbd(home, volume, |uri| {
        let said = run("qemu-io", &["-r", "-f", "raw", "-c", &command, uri]);
        assert!(!said.contains("verification failed"), "{volume}: {said}");
    });
}

/// Whether this machine mounts. Where `CI` is set it must.
fn can_mount() -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some() => panic!("/dev/fuse is needed where CI is set: {error}"),
        Err(error) => {
            eprintln!("skipped: /dev/fuse cannot be opened: {error}");
            false
        }
    }
}

#[test]
fn every_volume_command_writes_one_json_document() {
    let home = home_with_image();
    assert_eq!(home.json(&["volume", "list"]), json!([]));
    assert_eq!(home.json(&["snapshot", "list"]), json!([]));
    let image = home.json(&["image", "show", "small"]);
    let data = home.json(&["volume", "create", "data", "--size", "1GiB"]);
    assert_has(&data, VOLUME_FIELDS);
    assert_eq!(
        json!([data["name"], data["size_bytes"], data["state"], data["digest"], data["instance"]]),
        json!(["data", 1 << 30, "available", null, null])
    );
    assert!(id(&data).starts_with("vol-"));
    let system = home.json(&["volume", "create", "--image", "small", "--size", "10MiB"]);
    assert_eq!(
        json!([system["size_bytes"], system["image"], system["digest"]]),
        json!([10 * MIB, "small:1", image["digest"]])
    );
    assert!(system["name"].as_str().unwrap().starts_with("disk-"));
    assert_eq!(home.json(&["volume", "list"]), json!([data, system]));
    for name in ["data", id(&data)] {
        assert_eq!(home.json(&["volume", "show", name]), data, "{name}");
    }
    let larger = home.json(&["volume", "resize", "data", "2GiB"]);
    assert_eq!(json!([larger["id"], larger["size_bytes"]]), json!([data["id"], 2_u64 << 30]));
    let snapshot = home.json(&["volume", "snapshot", "data", "--name", "before"]);
    assert_has(&snapshot, SNAPSHOT_FIELDS);
    assert_eq!(
        json!([snapshot["name"], snapshot["volume_id"], snapshot["volume"], snapshot["size_bytes"]]),
        json!(["before", data["id"], "data", 2_u64 << 30])
    );
    assert_eq!(home.json(&["snapshot", "list"]), json!([snapshot]));
    assert_eq!(home.json(&["snapshot", "show", "before"]), snapshot);
    let restored = home.json(&["volume", "create", "restored", "--snapshot", "before"]);
    assert_eq!(
        json!([restored["snapshot_id"], restored["size_bytes"], restored["digest"]]),
        json!([snapshot["id"], 2_u64 << 30, snapshot["digest"]])
    );
    let clone = home.json(&["volume", "clone", "data", "--name", "again"]);
    assert_eq!(json!([clone["cloned_from"], clone["size_bytes"]]), json!([data["id"], 2_u64 << 30]));
    let removed = home.json(&["volume", "rm", "again", "restored"]);
    assert_eq!(json!([removed[0]["id"], removed[1]["id"]]), json!([clone["id"], restored["id"]]));
    assert_eq!(home.json(&["snapshot", "rm", id(&snapshot)]), json!([snapshot]));
    let table = home.ok(&["volume", "ls"]).stdout;
    let heading: Vec<_> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["NAME", "ID", "STATE", "INSTANCE", "SIZE", "USED", "FROM", "CREATED"]);
}

#[test]
fn what_is_typed_wrong_is_refused_with_what_to_type() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--size", "1MiB"]);
    home.ok(&["volume", "snapshot", "data", "--name", "before"]);
    let before = home.json(&["volume", "list"]);
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["volume", "create"], 2, &["--size", "--image"]),
        (&["volume", "create", "--size", "1.5GiB"], 2, &["`1.5GiB` is not a size", "20GiB"]),
        (&["volume", "create", "a/b", "--size", "1GiB"], 2, &["`a/b` is not a name"]),
        (&["volume", "create", "--size", "100"], 1, &["(100 bytes) is not possible", "multiple of 512"]),
        (&["volume", "create", "--size", "65TiB"], 1, &["65 TiB", "to 64 TiB"]),
        (&["volume", "create", "--image", "small", "--size", "1MiB"], 1, &["is not possible", "from 4 MiB"]),
        (&["volume", "create", "--image", "debain"], 1, &["there is no image `debain`", "bulbil image list"]),
        (&["volume", "create", "--snapshot", "none"], 1, &["there is no snapshot `none`", "bulbil snapshot list"]),
        (&["volume", "create", "--image", "small", "--snapshot", "before"], 2, &["--snapshot"]),
        (&["volume", "create", "data", "--size", "1MiB"], 1, &["named `data` exists already", "choose another name"]),
        (&["volume", "show", "date"], 1, &["there is no volume `date`", "bulbil volume list"]),
        (&["volume", "resize", "data", "512KiB"], 1, &["cannot have 512 KiB", "it has 1 MiB, only grows"]),
        (&["volume", "snapshot", "data", "--name", "before"], 1, &["a snapshot named `before` exists already"]),
        (&["volume", "serve", "data"], 2, &["--nbd"]),
        (&["volume", "serve", "data", "--nbd", "unix:a", "--vhost-user", "b"], 2, &["--vhost-user"]),
        (&["volume", "serve", "data", "--nbd", "tcp:localhost:10809"], 2, &["unix:PATH"]),
        (&["volume", "serve", "data", "--nbd", "unix:small.raw"], 1, &["is not a socket", "choose another path"]),
        (&["volume", "rm", "date"], 1, &["there is no volume `date`"]),
        (&["snapshot", "show", "after"], 1, &["there is no snapshot `after`", "bulbil snapshot list"]),
        (&["snapshot", "rm"], 2, &["<SNAPSHOTS>"]),
    ];
    for (args, status, says) in cases {
        home.run(args).refused(*status, says);
    }
    assert_eq!(home.json(&["volume", "list"]), before);
}

#[test]
fn snapshots_clones_and_larger_volumes_hold_what_was_written() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--image", "small"]);
    write(&home, "data", 0xaa, 0, MIB);
    home.ok(&["volume", "snapshot", "data", "--name", "first"]);
    write(&home, "data", 0xbb, 0, MIB / 2);
    home.ok(&["volume", "resize", "data", "16MiB"]);
    write(&home, "data", 0xcc, 15 * MIB, MIB);
    home.ok(&["volume", "clone", "data", "--name", "clone"]);
    write(&home, "data", 0xdd, 0, 4 * MIB);
    home.ok(&["volume", "create", "restored", "--snapshot", "first"]);
    assert_content(&home, "restored", 0xaa, 0, MIB);
    assert_content(&home, "clone", 0xbb, 0, MIB / 2);
    assert_content(&home, "clone", 0xaa, MIB / 2, MIB / 2);
    assert_content(&home, "clone", 0, 4 * MIB, 11 * MIB);
    assert_content(&home, "clone", 0xcc, 15 * MIB, MIB);
    assert_content(&home, "data", 0xdd, 0, 4 * MIB);
    // The rest is the image's still.
    let image = home.text_path("small.raw");
    let out = home.text_path("restored.raw");
    with_nbd(&home, "restored", |uri| run("qemu-img", &["convert", "-O", "raw", uri, &out]));
    let (image, restored) = (std::fs::read(image).unwrap(), std::fs::read(out).unwrap());
    assert!(image[1 << 20..] == restored[1 << 20..]);
}

#[test]
fn clones_share_what_their_parent_wrote_and_outlive_it() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--image", "small"]);
    write(&home, "data", 0xaa, 0, MIB);
    let used = |name: &str| home.json(&["volume", "show", name])["used_bytes"].as_u64().unwrap();
    let (alone, stored) = (used("data"), home.json(&["store", "stats"]));
    for name in ["one", "two", "three"] {
        let clone = home.json(&["volume", "clone", "data", "--name", name]);
        assert_eq!(json!([clone["name"], clone["state"], clone["size_bytes"]]), json!([name, "available", 4 * MIB]));
    }
    home.ok(&["volume", "clone", "one", "--name", "of-one"]);
    assert_eq!(home.json(&["store", "stats"]), stored, "the store is not asked");
    let shared: u64 = ["data", "one", "two", "three", "of-one"].map(used).iter().sum();
    assert!(shared < alone + 64 * 1024, "{shared} bytes are used, {alone} before");
    write(&home, "data", 0xbb, 0, MIB);
    write(&home, "two", 0xcc, 0, MIB);
    home.ok(&["volume", "snapshot", "three", "--name", "of-three"]);
    home.ok(&["image", "rm", "small"]);
    home.ok(&["volume", "rm", "data", "one"]);
    for (name, byte) in [("of-one", 0xaa), ("two", 0xcc), ("three", 0xaa)] {
        assert_content(&home, name, byte, 0, MIB);
    }
    home.ok(&["volume", "rm", "of-one", "two", "three"]);
    home.ok(&["snapshot", "rm", "of-three"]);
    let stats = home.json(&["store", "stats"]);
    assert_eq!(json!([stats["packs"], stats["manifests"]]), json!([0, 0]), "all space is free again");
}

#[test]
fn contents_stay_as_long_as_a_volume_or_a_snapshot_needs_them() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--image", "small"]);
    home.ok(&["image", "rm", "small"]);
    let image = std::fs::read(home.text_path("small.raw")).unwrap();
    let read_back = |volume: &str| {
        let out = home.text_path("out.raw");
        with_nbd(&home, volume, |uri| run("qemu-img", &["convert", "-O", "raw", uri, &out]));
        std::fs::read(out).unwrap()
    };
    assert!(read_back("data") == image);
    write(&home, "data", 0xaa, 0, 4096);
    home.ok(&["volume", "snapshot", "data", "--name", "kept"]);
    home.ok(&["volume", "rm", "data"]);
    home.ok(&["volume", "create", "again", "--snapshot", "kept"]);
    home.ok(&["snapshot", "rm", "kept"]);
    // Another daemon knows it too.
    home.ok(&["shutdown"]);
    let disk = home.file("other.raw", content(SEED + 1, 1 << 20));
    home.ok(&["image", "import", &disk]);
    home.ok(&["image", "rm", "other"]);
    assert!(read_back("again")[4096..] == image[4096..]);
    home.ok(&["volume", "rm", "again"]);
    let stats = home.json(&["store", "stats"]);
    assert_eq!(json!([stats["packs"], stats["manifests"]]), json!([0, 0]), "all space is free again");
}

#[test]
fn a_served_volume_is_locked_and_its_socket_goes_with_the_command() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--size", "8MiB"]);
    let address = format!("unix:{}", home.text_path("nbd"));
    let mut served =
        Running::start(&home, &["volume", "serve", "data", "--nbd", &address, "-o", "json", "--read-only"]);
    let offered = served.document();
    assert_eq!(json!([offered["read_only"], offered["size_bytes"]]), json!([true, 8 * MIB]));
    let uri = offered["uri"].as_str().unwrap();
    assert!(run("nbdinfo", &[uri]).contains("is_read_only: true"));
    assert_eq!(home.json(&["volume", "show", "data"])["state"], "in-use");
    for args in [
        &["volume", "serve", "data", "--nbd", &format!("{address}-2")] as &[&str],
        &["volume", "rm", "data"],
        &["volume", "snapshot", "data"],
        &["volume", "resize", "data", "16MiB"],
    ] {
        home.run(args).refused(1, &["is in use by another process", "hint: "]);
    }
    home.ok(&["shutdown"]);
    assert!(run("nbdinfo", &["--size", uri]).starts_with("8388608"), "it does not need the daemon");
    served.end().ok();
    assert!(!home.path("nbd").exists());
    assert_eq!(home.json(&["volume", "show", "data"])["state"], "available");
}

#[test]
fn a_volume_is_served_to_a_machine_that_others_start() {
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--size", "8MiB"]);
    let socket = home.text_path("vhost");
    let served = Running::start(&home, &["volume", "serve", "data", "--vhost-user", &socket]);
    assert_eq!(served.first_line, socket);
    drop(std::os::unix::net::UnixStream::connect(&socket).unwrap());
    assert_eq!(home.json(&["volume", "show", "data"])["state"], "in-use");
    served.end().ok();
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn the_root_volume_of_an_instance_is_a_volume_that_stays_with_it() {
    let home = home_with_image();
    let launched = home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    let volume = home.json(&["volume", "show", "web"]);
    assert_eq!(
        json!([volume["id"], volume["instance"], volume["instance_id"], volume["state"], volume["image"]]),
        json!([launched["volume_id"], "web", launched["id"], "in-use", "small:1"])
    );
    home.run(&["volume", "rm", "web"]).refused(1, &["is the root volume of instance `web`", "bulbil rm web"]);
    let address = format!("unix:{}", home.text_path("nbd"));
    home.run(&["volume", "serve", "web", "--nbd", &address]).refused(1, &["in use", "bulbil stop web"]);
    // While it runs.
    let snapshot = home.json(&["volume", "snapshot", "web", "--name", "live"]);
    assert_eq!(json!([snapshot["volume"], snapshot["size_bytes"]]), json!(["web", 4 * MIB]));
    let larger = home.json(&["volume", "resize", "web", "8MiB"]);
    assert_eq!(larger["size_bytes"], 8 * MIB);
    let socket = home.disk_socket(&launched);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    assert!(run("nbdinfo", &["--size", &uri]).starts_with("8388608"));
    assert_eq!(home.json(&["show", "web"])["disk_bytes"], 8 * MIB);
    let live_write = |pattern: &str| run("qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} 5M 1M"), &uri]);
    for (name, pattern) in [("of-running", "0x5a"), ("again", "0x5b")] {
        live_write(pattern);
        home.ok(&["volume", "clone", "web", "--name", name]);
    }
    live_write("0x5c");
    assert_content(&home, "of-running", 0x5a, 5 * MIB, MIB);
    assert_content(&home, "again", 0x5b, 5 * MIB, MIB);
    home.ok(&["volume", "rm", "of-running", "again"]);
    home.ok(&["stop", "web", "--force"]);
    // While it does not.
    write(&home, "web", 0xee, 7 * MIB, MIB);
    home.ok(&["volume", "snapshot", "web", "--name", "at-rest"]);
    home.ok(&["volume", "resize", "web", "12MiB"]);
    home.ok(&["start", "web", "--wait", "running"]);
    assert!(run("nbdinfo", &["--size", &uri]).starts_with("12582912"));
    home.ok(&["volume", "clone", "web", "--name", "copy"]);
    home.ok(&["rm", "web", "--force"]);
    assert_content(&home, "copy", 0xee, 7 * MIB, MIB);
    let left = home.json(&["volume", "list"]);
    assert_eq!(json!([left.as_array().unwrap().len(), left[0]["name"]]), json!([1, "copy"]));
    home.ok(&["volume", "rm", "copy"]);
    home.ok(&["snapshot", "rm", "live", "at-rest"]);
    home.ok(&["image", "rm", "small"]);
    let stats = home.json(&["store", "stats"]);
    assert_eq!(json!([stats["packs"], stats["manifests"]]), json!([0, 0]), "all space is free again");
}

#[test]
fn a_mounted_volume_is_a_file_until_it_is_unmounted() {
    if !can_mount() {
        return;
    }
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--image", "small"]);
    let directory = home.text_path("disk");
    std::fs::create_dir(&directory).unwrap();
    let mut mounted = Running::start(&home, &["volume", "mount", "data", &directory]);
    assert_eq!(mounted.first_line, format!("{directory}/disk.raw"));
    home.ok(&["shutdown"]);
    let file = std::fs::File::options().read(true).write(true).open(&mounted.first_line).unwrap();
    file.write_all_at(&[0xaa; 5000], 100).unwrap();
    file.sync_all().unwrap();
    home.run(&["volume", "rm", "data"]).refused(1, &["is in use by another process"]);
    // Busy: the first signal does not take it away.
    mounted.signal(Signal::INT);
    mounted.wait_for_note("is in use");
    let pid = mounted.pid();
    assert!(file.write_at(&[0xbb; 10], 100).is_ok());
    drop(file);
    run("umount", &[&directory]);
    mounted.wait().ok();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_content(&home, "data", 0xaa, 110, 4990);
    assert_content(&home, "data", 0xbb, 100, 10);

    let again = Running::start(&home, &["volume", "mount", "data", &directory, "--read-only"]);
    assert!(std::fs::File::options().write(true).open(&again.first_line).is_err());
    again.end().ok();
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);

    home.run(&["volume", "mount", "data", &home.text_path("none")]).refused(1, &["cannot use", "mkdir"]);
    home.run(&["volume", "mount", "data", &home.text_path("data")]).refused(1, &["is not an empty directory"]);
}

#[test]
fn a_killed_mount_leaves_a_directory_that_can_be_used_again() {
    if !can_mount() {
        return;
    }
    let home = home_with_image();
    home.ok(&["volume", "create", "data", "--size", "8MiB"]);
    let directory = home.text_path("disk");
    std::fs::create_dir(&directory).unwrap();
    let mounted = Running::start(&home, &["volume", "mount", "data", &directory]);
    let file = std::fs::File::options().write(true).open(&mounted.first_line).unwrap();
    file.write_all_at(&[0xaa; 4096], 0).unwrap();
    file.sync_all().unwrap();
    mounted.signal(Signal::KILL);
    drop(mounted.wait());
    drop(file);
    wait_until("the directory to be unmounted", || {
        std::fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_none())
    });
    assert_content(&home, "data", 0xaa, 0, 4096);
}

#[test]
fn a_mounted_image_is_a_read_only_file_that_outlives_the_image() {
    if !can_mount() {
        return;
    }
    let home = home_with_image();
    let image = std::fs::read(home.text_path("small.raw")).unwrap();
    let directory = home.text_path("disk");
    std::fs::create_dir(&directory).unwrap();
    let mounted = Running::start(&home, &["image", "mount", "small", &directory]);
    home.ok(&["image", "rm", "small"]);
    assert!(std::fs::read(&mounted.first_line).unwrap() == image);
    assert!(std::fs::File::options().write(true).open(&mounted.first_line).is_err());
    mounted.end().ok();
    // What it kept is freed with the next removal.
    let disk = home.file("other.raw", content(SEED + 1, 1 << 20));
    home.ok(&["image", "import", &disk]);
    home.ok(&["image", "rm", "other"]);
    let stats = home.json(&["store", "stats"]);
    assert_eq!(json!([stats["packs"], stats["manifests"]]), json!([0, 0]));
    home.run(&["image", "mount", "small", &directory]).refused(1, &["there is no image `small`", "bulbil image list"]);
}
