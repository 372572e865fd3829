//! Deduplication on real disks: those that `cargo xtask guest-image` builds, one of them a second time
//! from scratch.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::{Path, PathBuf};

use support::{Host, disks};

/// What a build of the same packages at another time may add: logs, caches and times in metadata.
const MAX_REBUILT_BYTES: u64 = 3 << 20;

/// The built disks, unless they are not there.
fn images() -> Option<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images");
    let directory = std::env::var_os("BULBIL_TEST_IMAGES").map_or_else(default, PathBuf::from);
    for name in ["debian-12.raw", "debian-12.qcow2", "debian-12-rebuilt.raw"] {
        let path = directory.join(name);
        if !path.is_file() {
            disks::skip(&format!("`{}` is not there: build it with `cargo xtask guest-image`", path.display()));
            return None;
        }
    }
    Some(directory)
}

#[test]
fn a_rebuilt_disk_adds_little_and_another_format_nothing() {
    let Some(images) = images() else { return };
    let host = Host::new();
    let mut imported = Vec::new();
    for (file, name) in [("debian-12.raw", "raw"), ("debian-12.qcow2", "qcow2"), ("debian-12-rebuilt.raw", "rebuilt")] {
        let started = std::time::Instant::now();
        let before = host.usage();
        let record = host.import(&images.join(file), name);
        let after = host.usage();
        let grown = after.pack_bytes + after.manifest_bytes - before.pack_bytes - before.manifest_bytes;
        println!(
            "{file}: {} bytes, {} of data, the store grew by {grown}, {} ms",
            record.size_bytes,
            record.data_bytes,
            started.elapsed().as_millis()
        );
        assert_eq!(record.stored_bytes, grown, "{file}");
        imported.push(record);
    }
    let [raw, qcow2, rebuilt] = imported.try_into().unwrap();
    assert_eq!(qcow2.digest, raw.digest);
    assert_eq!(qcow2.stored_bytes, 0);
    assert_ne!(rebuilt.digest, raw.digest, "a disk that was built again and is the same shows nothing here");
    assert!(rebuilt.stored_bytes <= MAX_REBUILT_BYTES, "the rebuilt disk added {} bytes", rebuilt.stored_bytes);
    assert!(raw.stored_bytes < raw.data_bytes / 2, "a Debian disk compresses to less than a half");
}
