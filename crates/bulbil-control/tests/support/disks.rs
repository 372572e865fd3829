//! Seeded disks as files, and the tools that make and compare images.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output};

use bulbil_testkit::Rng;

/// A boot sector that stops the processor: `cli`, `hlt`, and back to `hlt`.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// Makes disk content: runs of zeros, of noise and of text, of every length up to an eighth of the disk.
///
/// A machine that is started from it halts at once and changes nothing.
pub(crate) fn content(seed: u64, size_bytes: usize) -> Vec<u8> {
    println!("disk content: seed {seed:#x}, {size_bytes} bytes");
    let mut rng = Rng::new(seed);
    let mut bytes = Vec::with_capacity(size_bytes);
    while bytes.len() < size_bytes {
        let scale = rng.below(u64::from(size_bytes.ilog2() - 9));
        let len = usize::try_from(1 + rng.below(512 << scale)).unwrap();
        let len = len.min(size_bytes / 8).min(size_bytes - bytes.len());
        match rng.below(3) {
            0 => bytes.resize(bytes.len() + len, 0),
            1 => bytes.extend(rng.bytes(len)),
            _ => {
                let line = format!("line {} of a file that compresses well\n", rng.next_u64());
                bytes.extend(line.bytes().cycle().take(len));
            }
        }
    }
    make_bootable(&mut bytes);
    bytes
}

/// Makes disk content that neither compresses nor repeats.
pub(crate) fn noise(seed: u64, size_bytes: usize) -> Vec<u8> {
    println!("disk content: noise of seed {seed:#x}, {size_bytes} bytes");
    let mut bytes = Rng::new(seed).bytes(size_bytes);
    make_bootable(&mut bytes);
    bytes
}

/// Like every disk that is imported without saying so: a boot signature.
fn make_bootable(bytes: &mut [u8]) {
    bytes[..512].fill(0);
    bytes[..HALT.len()].copy_from_slice(&HALT);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// Writes a file; what it holds must not outlive the test.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Writes a file, leaving holes for blocks of zeros.
pub(crate) fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (index, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, index as u64 * 4096).unwrap();
        }
    }
}

/// Runs a tool that these tests cannot do without, whatever comes of it.
pub(crate) fn try_run(tool: &str, args: &[&str]) -> Output {
    let output = Command::new(tool).args(args).env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| panic!("these tests need `{tool}` (Debian: apt install qemu-utils): {error}"))
}

/// Runs a tool that must succeed; returns what it wrote.
#[track_caller]
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let output = try_run(tool, args);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "`{tool} {}`: {stdout}{stderr}", args.join(" "));
    stdout.into_owned()
}

/// Has QEMU compare an image file with the default export of an NBD socket.
#[track_caller]
pub(crate) fn assert_served_is(image: &Path, format: &str, socket: &Path) {
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let format = if format == "vhd" { "vpc" } else { format };
    let args = ["compare", "-f", format, "-F", "raw", image.to_str().unwrap(), &url];
    assert_eq!(run("qemu-img", &args), "Images are identical.\n");
}

/// Whether a test that cannot run here may be left out: never where everything must be there.
#[track_caller]
pub(crate) fn skip(reason: &str) {
    let in_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
    assert!(!in_ci, "in CI this test must run: {reason}");
    println!("skipped: {reason}");
}
