//! The command line as programs and shells use it: JSON, help, completion, and the daemon behind it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::process::Stdio;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Home, Ran, disks, wait_until};

const SEED: u64 = 0x5eed_0031;

const IMAGE_FIELDS: &[&str] = &[
    "id",
    "name",
    "version",
    "digest",
    "size_bytes",
    "data_bytes",
    "stored_bytes",
    "architecture",
    "boot_mode",
    "source_format",
    "created_at",
];

const INSTANCE_FIELDS: &[&str] = &[
    "id",
    "name",
    "image_id",
    "image",
    "image_digest",
    "volume_id",
    "disk_bytes",
    "cpus",
    "memory_bytes",
    "personality",
    "boot_mode",
    "mac",
    "hostname",
    "public_keys",
    "user_data_bytes",
    "publish",
    "created_at",
    "state",
    "reason",
    "since",
    "shim_pid",
    "vm_pid",
    "accelerator",
    "ssh",
    "phases",
    "boot",
    "health",
    "private_ip",
];

const STATS_FIELDS: &[&str] = &[
    "packs",
    "pack_bytes",
    "manifests",
    "manifest_bytes",
    "attachment_bytes",
    "logical_bytes",
    "data_bytes",
    "unique_bytes",
    "stored_bytes",
    "dead_bytes",
    "ratio",
    "images",
];

/// Programs that were written against an earlier bulbil still find what they read.
#[track_caller]
fn assert_has(document: &Value, fields: &[&str]) {
    for field in fields {
        assert!(document.get(field).is_some(), "no `{field}` in {document:#}");
    }
}

fn small_image(home: &Home) -> Value {
    let disk = home.file("small.raw", disks::content(SEED, 4 << 20));
    home.json(&["image", "import", &disk])
}

#[test]
fn every_image_command_writes_one_json_document() {
    let home = Home::new();
    assert_eq!(home.json(&["image", "list"]), json!([]));
    let image = small_image(&home);
    assert_has(&image, IMAGE_FIELDS);
    assert_eq!(
        json!([image["name"], image["version"], image["size_bytes"], image["source_format"], image["boot_mode"]]),
        json!(["small", "1", 4 << 20, "raw", "bios"])
    );
    assert!(image["id"].as_str().unwrap().starts_with("ami-"));
    assert!(image["digest"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(home.json(&["image", "list"]), json!([image]));
    for name in ["small", "small:1", "small:latest", image["id"].as_str().unwrap()] {
        assert_eq!(home.json(&["image", "show", name]), image, "{name}");
        assert_eq!(home.json(&["image", "info", name]), image, "{name}");
    }
    assert_has(&home.json(&["store", "stats"]), STATS_FIELDS);
    assert_eq!(home.json(&["image", "rm", "small"]), json!([image]));
}

#[test]
fn every_instance_command_writes_one_json_document() {
    let home = Home::new();
    assert_eq!(home.json(&["list"]), json!([]));
    let image = small_image(&home);
    let planned = home.json(&["launch", "small", "--dry-run"]);
    assert_has(&planned, INSTANCE_FIELDS);
    assert_eq!(home.json(&["launch", "small", "--dry-run", "--count", "2"]).as_array().unwrap().len(), 2);
    assert_eq!(home.json(&["list"]), json!([]), "a dry run creates nothing");
    let launched = home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    assert_has(&launched, INSTANCE_FIELDS);
    assert_eq!(
        json!([launched["name"], launched["state"], launched["image"], launched["image_id"], launched["memory_bytes"]]),
        json!(["web", "running", "small:1", image["id"], 64 << 20])
    );
    for command in ["show", "info"] {
        let shown = home.json(&[command, "web"]);
        assert_has(&shown, INSTANCE_FIELDS);
        assert_eq!(shown["id"], launched["id"]);
    }
    for command in ["list", "ls"] {
        let list = home.json(&[command]);
        assert_eq!(list.as_array().unwrap().len(), 1);
        assert_has(&list[0], INSTANCE_FIELDS);
    }
    let stopped = home.json(&["stop", "web", "--force"]);
    assert_eq!(json!([stopped["id"], stopped["state"]]), json!([launched["id"], "stopped"]));
    let started = home.json(&["start", "web", "--wait", "running"]);
    assert_eq!(json!([started["id"], started["state"]]), json!([launched["id"], "running"]));
    let removed = home.json(&["rm", "web", "--force"]);
    assert_eq!(json!([removed.as_array().unwrap().len(), removed[0]["id"]]), json!([1, launched["id"]]));
}

#[test]
fn a_dry_run_of_a_file_creates_nothing() {
    let home = Home::new();
    let disk = home.file("small.raw", disks::content(SEED, 4 << 20));
    let before = home.state();
    home.run(&["launch", &disk, "--dry-run"]);
    assert_eq!(home.state(), before);
}

#[test]
fn results_are_on_standard_output_and_the_rest_on_standard_error() {
    let home = Home::new();
    let disk = home.file("small.raw", disks::content(SEED, 4 << 20));
    let imported = home.ok(&["image", "import", &disk]);
    let image = home.json(&["image", "show", "small"]);
    assert_eq!(imported.stdout, format!("{}\n", image["id"].as_str().unwrap()));
    assert!(imported.stderr.starts_with("imported small:1 in "), "{imported}");
    assert!(
        !imported.stderr.contains('\u{1b}') && !imported.stderr.contains('\r'),
        "no bar off a terminal: {imported}"
    );
    let list = home.ok(&["image", "list"]);
    assert_eq!(list.stderr, "");
    let heading: Vec<_> = list.stdout.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["NAME", "VERSION", "ID", "SIZE", "DATA", "BOOT", "IMPORTED"]);
    assert!(home.ok(&["image", "show", "small"]).stdout.contains("4 MiB (4194304)"));
    let removed = home.ok(&["image", "rm", "small"]);
    assert_eq!((removed.stdout.as_str(), removed.stderr.as_str()), ("", "removed small:1\n"));
}

#[test]
fn a_reader_that_has_gone_ends_a_command_silently() {
    let home = Home::new();
    home.ok(&["image", "list"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = home.command(&["image", "list"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let ran = Ran::new("image list, to nobody".to_owned(), child.wait_with_output().unwrap());
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(3), ""), "{ran}");
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let home = Home::new();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let child = home.command(&["list"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let ran = Ran::new("list, to a full disk".to_owned(), child.wait_with_output().unwrap());
    ran.refused(1, &["error: cannot write to standard output\n", "No space left on device"]);
}

#[test]
fn commands_at_the_same_time_start_one_daemon() {
    for round in 0..4 {
        let home = Home::new();
        let clients: Vec<_> = (0..2 + round % 2 * 4).map(|_| home.spawn(&["list", "-o", "json"])).collect();
        for client in clients {
            let ran = Ran::new("list, beside others".to_owned(), client.wait_with_output().unwrap());
            assert_eq!(ran.json(), json!([]));
        }
        // Those that came second may still be on their way out.
        wait_until("one daemon to be left", || home.daemons().len() == 1);
        assert_eq!(home.daemons(), [home.daemon()]);
        let before = home.daemon();
        home.ok(&["list"]);
        assert_eq!(home.daemon(), before, "one that runs is used");
    }
}

#[test]
fn a_daemon_that_was_killed_is_replaced() {
    let home = Home::new();
    let image = small_image(&home);
    for _ in 0..5 {
        let killed = home.daemon();
        home.signal_daemon(Signal::KILL);
        // At once, whether or not the kernel is through with it.
        assert_eq!(home.json(&["image", "list"]), json!([image]));
        assert_ne!(home.daemon(), killed);
    }
}

#[test]
fn a_command_after_a_shutdown_starts_a_new_daemon() {
    let home = Home::new();
    for _ in 0..5 {
        home.ok(&["list"]);
        let ended = home.daemon();
        let ran = home.ok(&["shutdown"]);
        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.contains(&format!("process {ended}")) && ran.stderr.contains("ended"), "{ran}");
        home.ok(&["list"]);
        assert_ne!(home.daemon(), ended);
    }
}

#[test]
fn a_shutdown_without_a_daemon_is_fine() {
    let home = Home::new();
    let ran = home.ok(&["shutdown"]);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", "no daemon is running\n"));
    home.ok(&["list"]);
    home.ok(&["shutdown"]);
    let ran = home.ok(&["shutdown"]);
    assert_eq!(ran.stderr, "no daemon is running\n");
}

#[test]
fn a_daemon_in_the_foreground_excludes_another_and_ends_on_request() {
    let home = Home::new();
    let mut daemon = home.spawn(&["serve"]);
    let client = || home.data().join("run/bulbil.sock").exists();
    wait_until("the daemon's socket", client);
    home.ok(&["list"]);
    assert_eq!(home.daemon(), daemon.id());
    let second = home.run(&["serve"]);
    assert_eq!(second.status, Some(1), "{second}");
    assert!(second.stderr.contains("error: a daemon runs already for `"), "{second}");
    assert!(second.stderr.contains("hint: end it first: bulbil shutdown"), "{second}");
    home.ok(&["shutdown"]);
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn doctor_needs_no_daemon_and_leaves_no_trace() {
    let home = Home::new();
    let ran = home.ok(&["doctor"]);
    assert!(ran.stdout.contains("qemu") && ran.stdout.contains("not running"), "{ran}");
    let report = home.json(&["doctor"]);
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() >= 6, "{report:#}");
    for check in checks {
        assert_has(check, &["name", "ok", "optional", "detail"]);
    }
    assert!(!home.data().exists(), "doctor only looks");
    assert!(home.daemons().is_empty());
    home.ok(&["list"]);
    let daemon = home.daemon();
    let ran = home.ok(&["doctor"]);
    assert!(ran.stdout.contains(&format!("process {daemon}")), "{ran}");
}

#[test]
fn doctor_fails_where_nothing_can_be_launched() {
    let home = Home::with_programs(&["ssh"]);
    let ran = home.run(&["doctor"]);
    assert_eq!(ran.status, Some(1), "{ran}");
    for package in ["apt install qemu-system-x86", "apt install openssh-client"] {
        assert!(ran.stdout.contains(package), "{ran}");
    }
    let report: Value = serde_json::from_str(&home.run(&["doctor", "-o", "json"]).stdout).unwrap();
    assert!(report["checks"].is_array());
}

#[test]
fn completion_scripts_are_written_for_each_shell() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let ran = home.ok(&["completion", shell]);
        assert_eq!(ran.stderr, "");
        for word in ["bulbil", "launch", "import", "personality"] {
            assert!(ran.stdout.contains(word), "{shell}: {word}");
        }
        let script = home.file(&format!("script.{shell}"), &ran.stdout);
        match home.program(shell).args(["-n", &script]).output() {
            Ok(checked) => assert!(checked.status.success() && checked.stderr.is_empty(), "{shell}: {checked:?}"),
            Err(error) => assert_ne!(shell, "bash", "this test needs `bash`: {error}"),
        }
    }
    assert!(!home.data().exists(), "completion only writes");
}

/// The commands below one, as its help lists them.
fn subcommands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names =
        listed.take_while(|line| !line.is_empty()).filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Help of every command, with the words that lead to it.
fn all_help(home: &Home) -> Vec<(Vec<String>, String)> {
    let (mut found, mut todo) = (Vec::new(), vec![Vec::<String>::new()]);
    while let Some(words) = todo.pop() {
        let args: Vec<_> = words.iter().cloned().chain(["--help".to_owned()]).collect();
        let ran = home.ok(&args);
        assert_eq!(ran.stderr, "", "{words:?}");
        for name in subcommands(&ran.stdout) {
            todo.push(words.iter().cloned().chain([name]).collect());
        }
        found.push((words, ran.stdout));
    }
    found
}

#[test]
fn every_command_has_help() {
    let home = Home::new();
    let all = all_help(&home);
    let names: Vec<_> = all.iter().map(|(words, _)| words.join(" ")).collect();
    for name in [
        "",
        "image",
        "image import",
        "image list",
        "image show",
        "image rm",
        "launch",
        "list",
        "show",
        "shell",
        "exec",
        "logs",
        "console",
        "stop",
        "start",
        "reboot",
        "rm",
        "store",
        "store stats",
        "doctor",
        "completion",
        "serve",
        "shutdown",
    ] {
        assert!(names.iter().any(|known| known == name), "`bulbil {name}` is not in the help: {names:?}");
    }
    for (words, help) in &all {
        let first = help.lines().next().unwrap();
        assert!(first.starts_with(char::is_uppercase), "{words:?}: {first}");
        assert!(words.is_empty() || !first.ends_with('.'), "{words:?}: {first}");
        assert!(
            help.contains(&format!("Usage: {}", [&["bulbil".to_owned()], &words[..]].concat().join(" "))),
            "{help}"
        );
        assert!(help.contains("--data-dir") && help.contains("--output"), "{words:?}");
    }
    assert!(home.run(&["help", "image", "import"]).ok().stdout.contains("qcow2"));
    assert!(!home.data().exists(), "help only tells");
}

/// The commands in the `Example:` or `Examples:` part of a help text.
fn examples(help: &str) -> Vec<String> {
    let part = help.lines().skip_while(|line| !matches!(*line, "Example:" | "Examples:")).skip(1);
    let lines = part.take_while(|line| line.starts_with("  "));
    lines.map(|line| line.trim().split("   ").next().unwrap().split(" > ").next().unwrap().to_owned()).collect()
}

#[test]
fn examples_in_the_help_are_commands_that_exist() {
    let home = Home::new();
    let all = all_help(&home);
    for command in ["", "image import", "launch", "exec", "completion"] {
        let (_, help) = all.iter().find(|(words, _)| words.join(" ") == command).unwrap();
        let examples = examples(help);
        assert!(!examples.is_empty(), "`bulbil {command} --help` has no examples:\n{help}");
        for example in examples {
            let mut words: Vec<_> = example.split_whitespace().collect();
            assert_eq!(words.remove(0), "bulbil", "{example}");
            assert!(example.starts_with(format!("bulbil {command}").trim_end()), "{example}");
            // Everything before `--help` is parsed first, so an option that is not there is an error.
            let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
            words.insert(end, "--help");
            home.ok(&words);
        }
    }
    assert_eq!(home.run(&["launch", "x", "--no-such-option", "--help"]).status, Some(2), "this test sees mistakes");
}

#[test]
fn the_version_is_told() {
    let home = Home::new();
    assert_eq!(home.ok(&["--version"]).stdout, format!("bulbil {}\n", env!("CARGO_PKG_VERSION")));
}
