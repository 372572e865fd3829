//! Imports that are killed, cancelled or run out of space leave nothing visible, and succeed when
//! they are made again. Needs `qemu-img`, `qemu-system-x86_64` and, for full disks, user namespaces.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::time::{Duration, Instant};

use bulbil_testkit::Rng;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::disks::{self, assert_served_is};
use support::{Home, Ran, holds_files, send_signal, wait_until};

const SEED: u64 = 0x5eed_0021;

/// A seed of this run's own, unless `BULBIL_TEST_SEED` repeats another one's.
fn fresh_seed() -> u64 {
    let given = std::env::var("BULBIL_TEST_SEED").ok().map(|text| text.parse().unwrap());
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
    let seed = given.unwrap_or_else(|| u64::try_from(clock()).unwrap());
    println!("seed: BULBIL_TEST_SEED={seed}");
    seed
}

/// What the store holds; a killed import may leave a few bytes under a name for ever.
fn store_bytes(home: &Home) -> Value {
    bytes_of(&home.json(&["store", "stats"]))
}

fn bytes_of(stats: &Value) -> Value {
    json!(["packs", "pack_bytes", "manifests"].map(|field| stats[field].clone()))
}

fn empty_store() -> Value {
    json!([0, 0, 0])
}

/// Launches an instance of an image, without a guest to speak of, and compares its disk.
fn assert_instance_has_the_disk(home: &Home, image: &str, source: &str) {
    let instance = home.json(&["launch", image, "--name", "compare", "--memory", "64MiB", "--wait", "running"]);
    assert_served_is(source.as_ref(), "raw", &home.disk_socket(&instance));
    home.ok(&["rm", "compare", "--force"]);
}

#[test]
fn an_import_whose_daemon_is_killed_at_any_time_is_not_there_and_can_be_made_again() {
    const KILLS: u32 = 20;
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED, 64 << 20));
    let import = ["image", "import", disk.as_str()];
    let undisturbed = Home::new();
    let started = Instant::now();
    let expected = undisturbed.json(&import);
    let duration = started.elapsed();
    let mut rng = Rng::new(fresh_seed());
    let (mut kills, mut finished, mut latest) = (0, 0, duration);
    home.assert_no_images();
    while kills < KILLS {
        let delay = Duration::from_micros(rng.below(u64::try_from(latest.as_micros()).unwrap()));
        let started = Instant::now();
        let client = home.spawn(&import);
        // The moment is what this test varies; there is no condition to wait for.
        std::thread::sleep(delay.saturating_sub(started.elapsed()));
        home.signal_daemon(Signal::KILL);
        let ran = Ran::new(format!("import, killed after {delay:?}"), client.wait_with_output().unwrap());
        match ran.status {
            Some(0) => {
                // Quicker than the kill: what earlier tries left in the store helped it.
                finished += 1;
                latest = latest.min(delay).max(Duration::from_millis(50));
                assert_eq!(home.json(&["image", "show", "disk"])["digest"], expected["digest"]);
                home.ok(&["image", "rm", "disk"]);
                assert_eq!(store_bytes(&home), empty_store());
            }
            _ => {
                kills += 1;
                ran.refused(1, &["daemon"]);
                let images = home.json(&["image", "list"]);
                match images.as_array().unwrap().as_slice() {
                    [] => {}
                    // Killed between the end of the import and telling it: it is there, and whole.
                    [image] => {
                        assert_eq!(image["digest"], expected["digest"]);
                        home.ok(&["image", "rm", "disk"]);
                    }
                    more => panic!("more images than were imported: {more:?}"),
                }
            }
        }
        assert!(finished < 3 * KILLS, "the kills come too late");
    }
    println!("{kills} imports were killed, {finished} were quicker; undisturbed: {duration:?}");
    let record = home.json(&import);
    for field in ["digest", "size_bytes", "data_bytes"] {
        assert_eq!(record[field], expected[field], "{field}");
    }
    assert_instance_has_the_disk(&home, "disk", &disk);
    home.ok(&["image", "rm", "disk"]);
    assert_eq!(store_bytes(&home), empty_store(), "what killed imports left goes with a removal");
}

/// Starts an import and returns when it has written to the store.
fn begin_import(home: &Home, disk: &str) -> std::process::Child {
    let client = home.spawn(&["image", "import", disk]);
    let store = home.data().join("store");
    wait_until("the first pack", || holds_files(&store.join("packs")));
    assert!(!holds_files(&store.join("manifests")), "the import is over already");
    client
}

#[test]
fn an_import_ends_when_its_client_is_interrupted_or_killed() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 1, 160 << 20));
    home.assert_no_images();
    let daemon = home.daemon();
    for signal in [Signal::INT, Signal::KILL, Signal::HUP] {
        let mut client = begin_import(&home, &disk);
        let interrupted_at = Instant::now();
        send_signal(client.id(), signal);
        assert!(!client.wait().unwrap().success());
        wait_until("the packs to be gone", || store_bytes(&home) == empty_store());
        println!("{signal:?}: nothing is left after {:?}", interrupted_at.elapsed());
        home.assert_no_images();
        let temporary = home.data().join("store/tmp");
        wait_until("the temporary files to be gone", || !holds_files(&temporary));
    }
    assert_eq!(home.daemon(), daemon, "the daemon goes on");
    assert_eq!(home.daemons(), [daemon]);
    let small = home.file("small.raw", disks::content(SEED + 2, 3 << 20));
    home.ok(&["image", "import", &small]);
}

/// Takes a client whose daemon was told to end: its import is complete, or it is not there.
fn check_end_of_import(home: &Home, client: std::process::Child, how: &str) {
    // At once: a command that follows meets no daemon that is on its way out.
    let list = home.json(&["image", "list"]);
    let ran =
        Ran::new(format!("import, while the daemon was told to end by {how}"), client.wait_with_output().unwrap());
    if ran.status == Some(0) {
        println!("{how}: the daemon finished the import first");
        assert_eq!(list[0]["name"], "disk", "{ran}");
        home.ok(&["image", "rm", "disk"]);
    } else {
        ran.refused(1, &["daemon"]);
        assert_eq!(list, json!([]));
    }
}

#[test]
fn a_daemon_that_is_told_to_end_during_an_import_leaves_it_whole_or_not_at_all() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 3, 384 << 20));
    home.assert_no_images();
    let client = begin_import(&home, &disk);
    home.ok(&["shutdown"]);
    check_end_of_import(&home, client, "shutdown");
    // Other content: what was left of the first import may be all that the same content needs.
    let disk = home.file("disk.raw", disks::noise(SEED + 5, 384 << 20));
    let client = begin_import_again(&home, &disk);
    let socket = home.data().join("run/bulbil.sock");
    home.signal_daemon(Signal::TERM);
    wait_until("the daemon's socket to be gone", || !socket.exists());
    check_end_of_import(&home, client, "SIGTERM");
}

/// As [`begin_import`], where the store holds packs already.
fn begin_import_again(home: &Home, disk: &str) -> std::process::Child {
    let packs = || home.json(&["store", "stats"])["packs"].as_u64().unwrap();
    let before = packs();
    let client = home.spawn(&["image", "import", disk]);
    wait_until("another pack", || packs() > before);
    client
}

#[test]
fn two_imports_of_one_file_at_once_give_one_image() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 4, 8 << 20));
    let clients = [0, 1].map(|_| home.spawn(&["image", "import", &disk, "--output", "json"]));
    let records = clients.map(|client| Ran::new("import".to_owned(), client.wait_with_output().unwrap()).json());
    assert_eq!(records[0], records[1]);
    assert_eq!(home.json(&["image", "list"]), json!([records[0]]));
}

/// Runs a script as root of a mount namespace of its own, where `$MNT` is an empty directory.
fn in_mount_namespace(home: &Home, script: &str, environment: &[(&str, &str)]) -> Option<Ran> {
    let probe = home.program("unshare").args(["-Urm", "true"]).output();
    let probe = probe.unwrap_or_else(|error| panic!("this test needs `unshare` (Debian: util-linux): {error}"));
    if !probe.status.success() {
        disks::skip(&format!("no user namespaces: {}", String::from_utf8_lossy(&probe.stderr).trim()));
        return None;
    }
    let mount_point = home.path("mnt");
    std::fs::create_dir(&mount_point).unwrap();
    let data = mount_point.join("d");
    let mut command = home.program("unshare");
    command.args(["-Urm", "sh", "-euc", script]).env("MNT", &mount_point).env("BULBIL_DATA_DIR", &data);
    command.env("BULBIL", env!("CARGO_BIN_EXE_bulbil")).envs(environment.iter().copied());
    Some(Ran::new("sh in a namespace".to_owned(), command.output().unwrap()))
}

/// What a script left about a command: `name.status`, `name.out`, `name.err`.
fn ran(home: &Home, name: &str) -> Ran {
    let read = |end: &str| std::fs::read_to_string(home.path(&format!("{name}.{end}"))).unwrap();
    Ran {
        command: name.to_owned(),
        status: read("status").trim().parse().ok(),
        stdout: read("out"),
        stderr: read("err"),
    }
}

/// `run NAME ARGUMENTS` runs bulbil and leaves what [`ran`] reads.
const RUN: &str = "
    trap '\"$BULBIL\" shutdown 2> /dev/null' EXIT
    run() { name=$1; shift; s=0; \"$BULBIL\" \"$@\" > $name.out 2> $name.err || s=$?; echo $s > $name.status; }
";

#[test]
fn an_import_that_fills_the_disk_fails_whole_and_can_be_made_again() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 5, 48 << 20));
    let script = format!(
        "{RUN}
        mount -t tmpfs -o size=24m none \"$MNT\"
        run first image import \"$DISK\" -o json
        run list image list -o json
        run stats store stats -o json
        mount -o remount,size=96m \"$MNT\"
        run second image import \"$DISK\" -o json
        run list-after image list -o json
        "
    );
    let Some(script) = in_mount_namespace(&home, &script, &[("DISK", &disk)]) else { return };
    script.ok();
    let first = ran(&home, "first").refused(
        1,
        &["error: cannot import `", "No space left on device", "hint: free some space, or choose another --data-dir"],
    );
    println!("{}", first.stderr);
    assert_eq!(ran(&home, "list").json(), json!([]));
    assert_eq!(bytes_of(&ran(&home, "stats").json()), empty_store());
    let second = ran(&home, "second").json();
    assert_eq!(ran(&home, "list-after").json(), json!([second]));
    let elsewhere = home.json(&["image", "import", disk.as_str()]);
    assert_eq!(second["digest"], elsewhere["digest"]);
}

/// Every step of an import meets a full disk once: the space goes from too little for the pack to
/// enough for everything, in single pages at the end.
#[test]
fn wherever_the_space_ends_an_import_is_there_as_a_whole_or_not_at_all() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::noise(SEED + 6, 2 << 20));
    let missing_kib: Vec<i32> = (1..7).map(|step| step * 64).chain((-4..16).map(|step| step * 4)).collect();
    let words: Vec<_> = missing_kib.iter().map(ToString::to_string).collect();
    let script = format!(
        "{RUN}
        mount -t tmpfs -o size=64m none \"$MNT\"
        run all image import \"$DISK\" -o json
        need=$(df -k --output=used \"$MNT\" | tail -n 1)
        run end shutdown
        umount -l \"$MNT\"
        for missing in $MISSING; do
            mount -t tmpfs -o size=64m none \"$MNT\"
            run start$missing image list -o json
            mount -o remount,size=$((need - missing))k \"$MNT\"
            run import$missing image import \"$DISK\" -o json
            mount -o remount,size=64m \"$MNT\"
            run list$missing image list -o json
            run stats$missing store stats -o json
            run again$missing image import \"$DISK\" -o json
            run end$missing shutdown
            umount -l \"$MNT\"
        done
        "
    );
    let Some(script) = in_mount_namespace(&home, &script, &[("DISK", &disk), ("MISSING", &words.join(" "))]) else {
        return;
    };
    script.ok();
    let (mut failed, mut leftovers) = (0, Vec::new());
    for missing in &missing_kib {
        assert_eq!(ran(&home, &format!("start{missing}")).json(), json!([]));
        let list = ran(&home, &format!("list{missing}")).json();
        let import = ran(&home, &format!("import{missing}"));
        if import.status == Some(0) {
            assert_eq!(list, json!([import.json()]), "{missing} KiB too little");
        } else {
            failed += 1;
            println!("{missing} KiB too little: {}", import.stderr);
            // SQLite has its own words.
            let says = if import.stderr.contains("catalog") { "full" } else { "No space left on device" };
            import.refused(1, &[says, "hint: free some space"]);
            assert_eq!(list, json!([]), "{missing} KiB too little");
            let stats = ran(&home, &format!("stats{missing}")).json();
            if bytes_of(&stats) != empty_store() {
                leftovers.push(format!("{missing} KiB too little: {stats}"));
            }
        }
        ran(&home, &format!("again{missing}")).json();
    }
    println!("{failed} of {} sizes were too small", missing_kib.len());
    assert!((10..missing_kib.len()).contains(&failed), "{failed} of {} sizes were too small", missing_kib.len());
    assert!(leftovers.is_empty(), "failed imports left:\n{}", leftovers.join("\n"));
}
