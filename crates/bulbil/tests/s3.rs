//! The whole way with a store behind S3: a server of its own, the real `bulbil`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use bulbil_testkit::S3Server;
use serde_json::{Value, json};
use support::{Home, Ran, disks, holds_files};

const SEED: u64 = 0x5eed_0171;

/// A home whose commands may use a bucket, and which keeps its images there.
struct Remote {
    home: Home,
    server: S3Server,
    location: String,
}

impl Remote {
    fn new() -> Self {
        let server = S3Server::start();
        let location = server.location("team").to_string();
        Self { home: Home::new(), server, location }
    }

    fn run(&self, args: &[&str]) -> Ran {
        let mut command = self.home.command(args);
        let output = command.envs(S3Server::environment()).output().unwrap();
        Ran::new(format!("bulbil {}", args.join(" ")), output)
    }

    fn json(&self, args: &[&str]) -> Value {
        self.run(&[args, &["-o", "json"]].concat()).json()
    }
}

#[test]
fn a_data_directory_keeps_its_images_in_a_bucket() {
    let remote = Remote::new();
    let disk = remote.home.file("disk.raw", disks::content(SEED, 6 << 20));
    let image = remote.json(&["image", "import", &disk, "--store", &remote.location]);
    assert!(holds_files(&remote.server.objects().join("team/packs")));
    assert!(!remote.home.data().join("store").exists(), "nothing of it is here");
    assert!(holds_files(&remote.home.data().join("store-state")), "but the index");
    let instance = remote.json(&["launch", "disk", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    disks::assert_served_is(disk.as_ref(), "raw", &remote.home.disk_socket(&instance));
    remote.run(&["rm", "web", "--force"]).ok();
    remote.run(&["image", "export", "disk", "out.raw"]).ok();
    support::assert_same_disk(&remote.home, "out.raw", "raw", &disk);
    let doctor = remote.run(&["doctor"]);
    assert!(doctor.stdout.contains(&remote.location), "{doctor}");
    assert_eq!(remote.json(&["store", "scrub"])["damaged"], 0);
    let planned = remote.json(&["store", "gc", "--dry-run"]);
    assert_eq!(planned["grace_s"], 24 * 3600, "others may read this store");
    assert_eq!(remote.json(&["image", "list"]), json!([image]));
    remote.run(&["image", "rm", "disk"]).ok();
    assert_eq!(remote.json(&["store", "stats"])["packs"], 0);
    remote.run(&["shutdown"]).ok();
}

#[test]
fn an_image_is_copied_to_a_bucket_and_from_there_to_another_host() {
    let remote = Remote::new();
    let disk = remote.home.file("disk.raw", disks::noise(SEED + 1, 40 << 20));
    let image = remote.json(&["image", "import", &disk]);
    let copied = remote.json(&["image", "copy", "disk", "--to", &remote.location]);
    assert_eq!(json!([copied["location"], copied["digest"]]), json!([remote.location, image["digest"]]));
    let again = remote.json(&["image", "copy", "disk", "--to", &remote.location, "--as", "web:2"]);
    assert_eq!(json!([again["existed"], again["stored_bytes"]]), json!([true, 0]));
    remote.run(&["shutdown"]).ok();
    let second = remote.home.text_path("data2");
    let there = |args: &[&str]| remote.run(&[args, &["--data-dir", &second, "-o", "json"]].concat());
    let offered = there(&["image", "list", "--from", &remote.location]).json();
    assert_eq!(json!([offered[0]["name"], offered[1]["name"], offered[1]["version"]]), json!(["disk", "web", "2"]));
    let here = there(&["image", "copy", "web", "--from", &remote.location]).json();
    assert_eq!(here["digest"], image["digest"]);
    there(&["image", "export", "web", &remote.home.text_path("out.raw")]).ok();
    support::assert_same_disk(&remote.home, "out.raw", "raw", &disk);
    there(&["shutdown"]).ok();
}

#[test]
fn two_hosts_share_a_bucket_and_free_only_what_is_theirs() {
    let remote = Remote::new();
    let disk = remote.home.file("disk.raw", disks::noise(SEED + 2, 8 << 20));
    remote.run(&["image", "import", &disk, "--store", &remote.location]).ok();
    let second = remote.home.text_path("data2");
    let there = |args: &[&str]| remote.run(&[args, &["--data-dir", &second, "--store", &remote.location]].concat());
    let image = there(&["image", "import", &disk, "-o", "json"]).json();
    assert!(image["stored_bytes"].as_u64().unwrap() < 64 << 10, "only a manifest is new: {image}");
    remote.run(&["image", "rm", "disk"]).ok();
    remote.run(&["store", "gc", "--grace", "0"]).ok();
    there(&["image", "export", "disk", &remote.home.text_path("out.raw")]).ok();
    support::assert_same_disk(&remote.home, "out.raw", "raw", &disk);
    there(&["image", "rm", "disk"]).ok();
    assert_eq!(remote.json(&["store", "stats"])["packs"], 0);
    there(&["shutdown"]).ok();
    remote.run(&["shutdown"]).ok();
}

#[test]
fn a_bucket_that_cannot_be_used_is_named_and_binds_nothing() {
    let remote = Remote::new();
    let missing = remote.location.replace("bulbil-test", "no-such-bucket");
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["image", "list", "--store", &missing], 1, &["the daemon does not start", "no-such-bucket"]),
        (&["image", "list", "--store", "s3://"], 2, &["s3://"]),
        (&["image", "list", "--store", "s3://key:secret@bucket/x"], 2, &["credentials"]),
        (&["image", "list", "--store", "s3://bucket/x?endpoint=http://example.com"], 2, &["allow_http"]),
        (&["image", "list", "--store", "https://example.com/store"], 2, &["s3://BUCKET"]),
    ];
    for (args, status, says) in cases {
        let ran = remote.run(args).refused(*status, says);
        println!("$ {}\n{}", ran.command, ran.stderr);
        assert!(!ran.stderr.contains("secret"), "{ran}");
    }
    let unsigned = remote
        .home
        .command(&["image", "list", "--store", &remote.location])
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .output()
        .unwrap();
    Ran::new("image list, without credentials".to_owned(), unsigned).refused(1, &["there are no credentials for S3"]);
    assert!(!remote.home.data().join("store.json").exists());
    remote.run(&["image", "list", "--from", &missing]).refused(1, &["no-such-bucket"]);
    remote.run(&["shutdown"]).ok();
}
