//! Real Debian guests, configured by their stock cloud-init.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use common::{Bulbil, is_alive, kill, wait_for};
use serde_json::Value;

const SCRIPT: &str = "#!/bin/bash\necho \"script as $(id -un)\" > /root/from-script\n";

const CLOUD_CONFIG: &str = "\
#cloud-config
write_files:
  - path: /etc/from-write-files
    permissions: '0640'
    content: |
      written
runcmd:
  - echo ran > /root/from-runcmd
";

/// A cloud-config and a script in one MIME message.
fn multipart() -> String {
    let part =
        |kind: &str, body: &str| format!("--=x\r\nContent-Type: text/{kind}; charset=\"us-ascii\"\r\n\r\n{body}\r\n");
    format!(
        "Content-Type: multipart/mixed; boundary=\"=x\"\r\nMIME-Version: 1.0\r\n\r\n{}{}--=x--\r\n",
        part("cloud-config", CLOUD_CONFIG),
        part("x-shellscript", SCRIPT),
    )
}

fn sha256(bytes: &[u8]) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("coreutils are there");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("gzip").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip is there");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    child.wait_with_output().unwrap().stdout
}

/// A key pair of the test's own; returns the paths of both halves.
fn key_pair(bulbil: &Bulbil) -> (String, String) {
    let private = bulbil.data_dir().join("user_key").to_str().unwrap().to_owned();
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &private]).status().unwrap();
    assert!(made.success());
    let public = format!("{private}.pub");
    (private, public)
}

/// Everything that was asked for took effect.
fn check_configured(bulbil: &Bulbil, name: &str, datasource: &str, user_data: &[u8], private_key: &str) {
    let shown = bulbil.show(name);
    assert_eq!(shown["boot"]["verdict"], "ready", "{shown:#}");
    assert_eq!(bulbil.sh(name, "hostname"), name);
    assert_eq!(
        bulbil.sh(name, "sudo cat /etc/from-write-files; sudo stat -c %a /etc/from-write-files"),
        "written\n640"
    );
    assert_eq!(bulbil.sh(name, "sudo cat /root/from-runcmd"), "ran");
    assert_eq!(bulbil.sh(name, "sudo cat /root/from-script"), "script as root");
    let result: Value = serde_json::from_str(&bulbil.sh(name, "cat /run/cloud-init/result.json")).unwrap();
    assert!(result["v1"]["datasource"].as_str().unwrap().contains(datasource), "{result}");
    assert_eq!(result["v1"]["errors"], Value::Array(vec![]));
    let chosen = bulbil.sh(name, "sudo cat /run/cloud-init/cloud.cfg /run/cloud-init/ds-identify.log");
    let short = datasource.trim_start_matches("DataSource");
    assert!(chosen.contains(short), "ds-identify chose it without help: {chosen}");
    let got = bulbil.sh(name, "sudo sha256sum /var/lib/cloud/instance/user-data.txt");
    assert_eq!(got[..64], sha256(user_data), "user data arrived byte for byte");
    // The user's own key, not bulbil's, with a plain ssh.
    let port = shown["ssh"]["port"].to_string();
    let user = format!("{}@127.0.0.1", shown["ssh"]["user"].as_str().unwrap());
    let plain = Command::new("ssh")
        .args(["-F", "none", "-i", private_key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-p", &port])
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"])
        .args([&user, "id", "-un"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&plain.stdout).trim(), "debian", "{}", String::from_utf8_lossy(&plain.stderr));
}

#[test]
fn guest_alibaba_and_nocloud_personalities_are_taken_for_what_they_show() {
    let bulbil = Bulbil::new();
    bulbil.import("debian-12.qcow2");
    let (private_key, public_key) = key_pair(&bulbil);
    let user_data = multipart();
    let file = bulbil.file("user-data", &user_data);
    let launch = |personality: &str| {
        let arguments =
            ["launch", "debian-12", "--name", personality, "--personality", personality, "--key", &public_key];
        bulbil.command(&arguments).args(["--user-data", &file]).stderr(Stdio::piped()).spawn().unwrap()
    };
    let both = [launch("alibaba"), launch("nocloud")];
    for child in both {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        for phase in ["volume", "kernel", "cloud-init local", "cloud-init final", "ssh", "ready"] {
            assert!(said.contains(phase), "{phase} is not told:\n{said}");
        }
    }
    check_configured(&bulbil, "alibaba", "DataSourceAliYun", user_data.as_bytes(), &private_key);
    check_configured(&bulbil, "nocloud", "DataSourceNoCloud", user_data.as_bytes(), &private_key);
    assert_eq!(bulbil.sh("nocloud", "lsblk -no LABEL | grep -c cidata"), "1");
}

/// Asks for an instance id as hard as a guest can: every header, every source address it can take.
const STEAL: &str = r#"
set -u
token=$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
ask() { curl -s -m 5 -H "X-aws-ec2-metadata-token: $token" "$@" http://169.254.169.254/latest/meta-data/instance-id; echo; }
ask
for header in X-Forwarded-For Forwarded X-Real-IP Host; do ask -H "$header: 10.0.2.16"; done
for header in X-Instance-ID X-Tenant-ID X-Instance-Id; do ask -H "$header: OTHER"; done
dev=$(ip -o route get 169.254.169.254 | sed 's/.* dev \([^ ]*\).*/\1/')
for address in 10.0.2.16 10.0.2.2 169.254.169.254; do
    ip address add $address/24 dev $dev 2>/dev/null
    ask --interface $address
    ip address del $address/24 dev $dev 2>/dev/null
done
ip link set dev $dev address 52:54:00:OTHERMAC 2>/dev/null && ask
true
"#;

#[test]
fn guest_two_ec2_instances_are_apart_and_outlive_the_daemon_and_their_machine() {
    let bulbil = Bulbil::new();
    bulbil.import("debian-12.qcow2");
    let (private_key, public_key) = key_pair(&bulbil);
    let user_data = gzip(multipart().as_bytes());
    let file = bulbil.file("user-data.gz", &user_data);
    let arguments = ["launch", "debian-12", "--name", "pair", "--count", "2", "--key", &public_key, "-o", "json"];
    let launched: Value = {
        let output = bulbil.command(&arguments).args(["--user-data", &file]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let id = |i: usize| launched[i]["id"].as_str().unwrap().to_owned();
    let (a, b) = ("pair-1", "pair-2");
    check_configured(&bulbil, a, "DataSourceEc2", &user_data, &private_key);

    // Different in everything that identifies them.
    for script in
        ["cat /etc/machine-id", "cat /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2", "cloud-init query instance_id"]
    {
        let (of_a, of_b) = (bulbil.sh(a, script), bulbil.sh(b, script));
        assert!(of_a != of_b && !of_a.is_empty(), "{script}: {of_a}");
    }
    assert_eq!(bulbil.sh(a, "cloud-init query instance_id"), id(0));

    // One never sees what the other writes.
    bulbil.sh(a, "echo from-a | sudo tee /etc/only-here && sync");
    assert_eq!(bulbil.run(&["exec", b, "--", "test", "-e", "/etc/only-here"]).status, 1);

    // One never gets the other's metadata. The last question may take the guest's network away.
    let other_mac = launched[1]["mac"].as_str().unwrap().trim_start_matches("52:54:00:").to_owned();
    let steal = STEAL.replace("OTHERMAC", &other_mac).replace("OTHER", &id(1));
    let script = bulbil.file("steal.sh", &steal);
    let mut copy = bulbil.command(&["exec", a, "--", "sudo", "tee", "/root/steal.sh"]);
    // `exec` hands standard input on.
    let copied = copy.stdin(std::fs::File::open(&script).unwrap()).stdout(Stdio::null()).status().unwrap();
    assert!(copied.success());
    bulbil.sh(a, "sudo systemd-run --quiet --unit=steal sh -c 'sh /root/steal.sh > /dev/ttyS0 2>&1; echo steal-is-over > /dev/ttyS0'");
    let console = wait_for("the end of the attempts", || {
        let log = bulbil.run(&["logs", a]).ok();
        log.contains("steal-is-over").then_some(log)
    });
    let answers = console.matches(&id(0)).count();
    assert!(answers >= 8, "its own id is answered whatever it says: {answers}\n{console}");
    assert!(!console.split("cloud-init").last().unwrap().contains(&id(1)), "{console}");

    // The daemon's death disturbs nobody.
    let mut session = bulbil
        .command(&["exec", b, "--", "sh", "-c", "echo before; read line; echo after $line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(session.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "before");
    kill(bulbil.daemon_pid().into(), "-9");
    session.stdin.take().unwrap().write_all(b"the daemon\n").unwrap();
    assert_eq!(said.next().unwrap().unwrap(), "after the daemon");
    assert!(session.wait().unwrap().success());
    let shown = bulbil.show(b);
    assert_eq!((&shown["state"], &shown["boot"]["verdict"]), (&Value::from("running"), &Value::from("ready")));
    assert_eq!(bulbil.sh(b, "hostname"), b);

    // A machine that is killed is stopped, says why, and starts again with its data.
    bulbil.sh(b, "echo kept | sudo tee /root/kept && sync");
    kill(shown["vm_pid"].as_u64().unwrap(), "-9");
    let stopped = wait_for("the state to change", || Some(bulbil.show(b)).filter(|s| s["state"] == "stopped"));
    assert!(stopped["reason"].as_str().unwrap().contains("signal 9"), "{stopped:#}");
    assert!(!is_alive(shown["shim_pid"].as_u64().unwrap()));
    bulbil.run(&["start", b]).ok();
    assert_eq!(bulbil.sh(b, "sudo cat /root/kept"), "kept");
    assert_eq!(bulbil.sh(b, "cloud-init query instance_id"), id(1), "the same instance as before");

    // The power button, and an end in order.
    let stop = bulbil.run(&["stop", b, "--timeout", "120"]);
    assert!(stop.stderr.contains("stopped by the user"), "{}", stop.stderr);
}

#[test]
fn guest_with_broken_user_data_is_degraded_and_says_what_did_not_happen() {
    let bulbil = Bulbil::new();
    bulbil.import("debian-12.qcow2");
    let user_data = "#cloud-config\nruncmd:\n  - [false]\n  - exit 3\n";
    let file = bulbil.file("user-data", user_data);
    let ran = bulbil.run(&["launch", "debian-12", "--name", "broken", "--user-data", &file]);
    assert_eq!(ran.status, 0, "it is up: {}", ran.stderr);
    assert!(ran.stderr.contains("broken is degraded"), "{}", ran.stderr);
    assert!(ran.stderr.contains("did not happen: ") && ran.stderr.contains("scripts"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint: "), "{}", ran.stderr);
    assert_eq!(bulbil.show("broken")["boot"]["verdict"], "degraded");
}
