//! Seed disks are read by the tools guests and people use.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bulbil_format::seed::write_iso9660;
use bulbil_format::{Format, OpenOptions, open_disk};

const TIME: u64 = 1_700_000_000;

fn image(dir: &Path, label: &str, files: &[(&str, &[u8])]) -> PathBuf {
    let bytes = write_iso9660(label, files, TIME).unwrap();
    assert_eq!(bytes, write_iso9660(label, files, TIME).unwrap(), "the same arguments give the same bytes");
    assert!(bytes.len().is_multiple_of(4096));
    // busybox finds no label on a disk that ends before the places of other file systems' superblocks.
    assert!(bytes.len() >= 512 << 10);
    let path = dir.join("seed.iso");
    support::write_sparse(&path, &bytes);
    path
}

fn nocloud() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("user-data", b"#cloud-config\nhostname: web\n"),
        ("meta-data", b"instance-id: i-0123456789abcdef0\n"),
        ("network-config", &[b'#'; 5000]),
        ("vendor-data", b""),
    ]
}

fn config_drive() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("openstack/latest/meta_data.json", b"{}"),
        ("openstack/latest/user_data", &[7; 2048]),
        ("openstack/latest/network_data.json", &[8; 2049]),
        ("openstack/2018-08-27/meta_data.json", b"{ }"),
        ("ec2/latest/meta-data.json", b"{  }"),
    ]
}

#[test]
fn the_label_is_found_as_given() {
    let dir = tempfile::tempdir().unwrap();
    for label in ["cidata", "CIDATA", "config-2", "sixteen-letters!"] {
        let path = image(dir.path(), label, &nocloud());
        let output = support::run("blkid", &["-p", "-o", "export", path.to_str().unwrap()]);
        assert!(output.lines().any(|line| line == format!("LABEL={label}")), "{output}");
        assert!(output.lines().any(|line| line == "TYPE=iso9660"), "{output}");
    }
}

/// Extracts a seed disk with xorriso, which `extra` tells what to prefer, and compares.
fn check_extracted(extra: &[&str], label: &str, files: &[(&str, &[u8])]) {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), label, files);
    let out = dir.path().join("out");
    let args = ["-indev", path.to_str().unwrap(), "-osirrox", "on", "-extract", "/", out.to_str().unwrap()];
    let output = match Command::new("xorriso").args(extra).args(args).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: xorriso does not run here ({error})");
            return;
        }
    };
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    for word in ["WARNING", "SORRY", "FAILURE", "damage"] {
        assert!(!messages.contains(word), "{messages}");
    }
    assert!(messages.contains(&format!("Volume id    : '{label}'")), "{messages}");
    for (name, content) in files {
        assert!(std::fs::read(out.join(name)).unwrap() == *content, "{name}");
    }
    let listed = support::run("find", &[out.to_str().unwrap(), "-type", "f"]);
    assert_eq!(listed.lines().count(), files.len(), "{listed}");
    support::run("chmod", &["-R", "u+w", out.to_str().unwrap()]);
}

#[test]
fn xorriso_reads_rock_ridge() {
    check_extracted(&[], "cidata", &nocloud());
    check_extracted(&[], "config-2", &config_drive());
}

#[test]
fn xorriso_reads_joliet() {
    check_extracted(&["-read_fs", "norock"], "cidata", &nocloud());
    check_extracted(&["-read_fs", "norock"], "config-2", &config_drive());
}

#[test]
fn xorriso_reads_directories_of_many_sectors() {
    let names: Vec<String> = (0..300).map(|n| format!("dir-{}/a-rather-long-name-{n:040}.txt", n % 3)).collect();
    let contents: Vec<Vec<u8>> = (0..300_u64).map(|n| n.to_le_bytes().repeat(usize::try_from(n).unwrap())).collect();
    let files: Vec<(&str, &[u8])> =
        names.iter().zip(&contents).map(|(name, content)| (name.as_str(), content.as_slice())).collect();
    check_extracted(&[], "cidata", &files);
    check_extracted(&["-read_fs", "norock"], "cidata", &files);
}

#[test]
fn an_empty_seed_disk_is_read() {
    check_extracted(&[], "cidata", &[]);
}

#[test]
fn a_seed_disk_is_a_raw_disk_only_if_declared() {
    let bytes = write_iso9660("cidata", &nocloud(), TIME).unwrap();
    let error = open_disk(Arc::new(bytes.clone()), &OpenOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "unsupported-format: ISO 9660");
    let disk = open_disk(Arc::new(bytes.clone()), &OpenOptions::declared(Format::Raw)).unwrap();
    assert_eq!(disk.size_bytes(), bytes.len() as u64);
}
