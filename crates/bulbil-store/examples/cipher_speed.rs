//! How fast this machine encrypts, one thread: `cargo run --release -p bulbil-store --example cipher_speed`.
#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::cast_precision_loss, reason = "a measurement")]

use std::sync::Arc;
use std::time::Duration;

use aes_gcm::aead::{AeadInOut as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Nonce};
use bulbil_store::{DirObjects, OwnerId, Store, StoreKey, StoreOptions};

/// Processor time of this thread.
fn used() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// The best of several rounds: other work on the machine only makes it slower.
fn measure(name: &str, len: usize, mut work: impl FnMut(&mut [u8])) {
    let mut buf = vec![0x5a; len];
    let times = 1 + (16 << 20) / len;
    let mut best = Duration::MAX;
    for _ in 0..60 {
        let start = used();
        for _ in 0..times {
            work(&mut buf);
        }
        best = best.min((used() - start) / u32::try_from(times).unwrap());
    }
    println!("{name:<32} {len:>8} bytes {:>6.0} MB/s", len as f64 / best.as_secs_f64() / 1e6);
}

fn main() {
    let gcm = Aes256Gcm::new(&[1; 32].into());
    let nonce = Nonce::from([0; 12]);
    for len in [4 << 10, 50 << 10, 128 << 10] {
        let seal = |buf: &mut [u8]| {
            gcm.encrypt_inout_detached(&nonce, b"", buf.into()).unwrap();
        };
        measure("AES-256-GCM, encrypt", len, seal);
        let mut sealed = vec![0x5a; len];
        let tag = gcm.encrypt_inout_detached(&nonce, b"", sealed.as_mut_slice().into()).unwrap();
        measure("AES-256-GCM, copy and decrypt", len, |buf| {
            buf.copy_from_slice(&sealed);
            gcm.decrypt_inout_detached(&nonce, b"", buf.into(), &tag).unwrap();
        });
    }
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::new(&dir.path().join("index"), OwnerId::default());
    let options = options.with_key(StoreKey::from_bytes([1; 32])).encrypt_new();
    let store = Store::open(Arc::new(DirObjects::open(dir.path()).unwrap()), options).unwrap();
    let xts = store.overlay_key(&[0; 32]).unwrap().file_cipher("data.0");
    for len in [4 << 10, 128 << 10, 1 << 20] {
        measure("AES-256-XTS, encrypt", len, |buf| xts.encrypt(7, buf));
        measure("AES-256-XTS, decrypt", len, |buf| xts.decrypt(7, buf));
    }
}
