//! Keys in memory, and the two primitives everything is made of: derivation and AES-256-GCM.

use std::fmt;

use aes_gcm::aead::{AeadInOut as _, KeyInit as _};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::{StoreError, StoreErrorKind};

/// Bytes that AES-GCM adds to what it encrypts.
pub(crate) const TAG_BYTES: usize = 16;

/// A key of 256 bits, erased when it is dropped and never shown.
#[derive(Clone)]
pub(crate) struct Secret(Zeroizing<[u8; 32]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    pub(crate) fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn random() -> Result<Self, StoreError> {
        let mut bytes = Zeroizing::new([0; 32]);
        fill_random(&mut *bytes)?;
        Ok(Self(bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Derives a key for one purpose; `context` is a constant that no other purpose uses, and `parts`
    /// have fixed lengths for it.
    pub(crate) fn derive(&self, context: &'static str, parts: &[&[u8]]) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        self.derive_bytes(context, parts, &mut *key);
        Self(key)
    }

    /// As [`derive`](Self::derive), for keys of any length.
    pub(crate) fn derive_bytes(&self, context: &'static str, parts: &[&[u8]], derived: &mut [u8]) {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(self.as_bytes());
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize_xof().fill(derived);
        hasher.zeroize();
    }
}

/// Fills `bytes` with random bytes of the system.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), StoreError> {
    getrandom::fill(bytes).map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))
}

/// AES-256-GCM under one key, with numbers as nonces.
pub(crate) struct Gcm(Aes256Gcm);

impl fmt::Debug for Gcm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gcm")
    }
}

/// What was to be decrypted is not what was encrypted under this key, nonce and context.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotAuthentic;

impl Gcm {
    pub(crate) fn new(key: &Secret) -> Self {
        Self(Aes256Gcm::new(key.as_bytes().into()))
    }

    /// Encrypts in place; a nonce is used for one message only.
    pub(crate) fn seal(&self, nonce: u64, context: &[u8], message: &mut [u8]) -> [u8; TAG_BYTES] {
        let tag = self.0.encrypt_inout_detached(&nonce_of(nonce), context, message.into());
        tag.expect("an object is far below 64 GiB").into()
    }

    /// Decrypts in place. On an error `message` is not to be used.
    pub(crate) fn open(
        &self,
        nonce: u64,
        context: &[u8],
        message: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), NotAuthentic> {
        let opened = self.0.decrypt_inout_detached(&nonce_of(nonce), context, message.into(), &Tag::from(*tag));
        opened.map_err(|_| NotAuthentic)
    }
}

/// 96 bits: the number, little endian, and 4 zero bytes.
fn nonce_of(number: u64) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    nonce.into()
}

/// Encrypts one secret under a key that is used for nothing else: `salt` is new each time. What it is
/// for is `bound` to it.
pub(crate) fn wrap(
    key: &Secret,
    context: &'static str,
    salt: &[u8; 32],
    bound: &[u8],
    secret: &Secret,
) -> [u8; 32 + TAG_BYTES] {
    let gcm = Gcm::new(&key.derive(context, &[salt]));
    let mut wrapped = [0; 32 + TAG_BYTES];
    wrapped[..32].copy_from_slice(secret.as_bytes());
    let tag = gcm.seal(0, bound, &mut wrapped[..32]);
    wrapped[32..].copy_from_slice(&tag);
    wrapped
}

/// Decrypts what [`wrap`] has made of the same key, context, salt and purpose.
pub(crate) fn unwrap(
    key: &Secret,
    context: &'static str,
    salt: &[u8; 32],
    bound: &[u8],
    wrapped: &[u8; 32 + TAG_BYTES],
) -> Result<Secret, NotAuthentic> {
    let (encrypted, tag) = wrapped.split_last_chunk::<TAG_BYTES>().expect("it is longer");
    let mut secret = Zeroizing::new([0; 32]);
    secret.copy_from_slice(encrypted);
    Gcm::new(&key.derive(context, &[salt])).open(0, bound, &mut *secret, tag)?;
    Ok(Secret(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn gcm_gives_what_its_specification_says() {
        // Test case 14 of McGrew and Viega, "The Galois/Counter Mode of Operation".
        let gcm = Gcm::new(&Secret::new([0; 32]));
        let mut message = [0; 16];
        let tag = gcm.seal(0, b"", &mut message);
        assert_eq!(message.to_vec(), hex("cea7403d4d606b6e074ec5d3baf39d18"));
        assert_eq!(tag.to_vec(), hex("d0d1c8a799996bf0265b98b5d48ab919"));
    }

    #[test]
    fn only_the_same_key_nonce_context_and_bytes_open() {
        let gcm = Gcm::new(&Secret::new([1; 32]));
        let mut sealed = *b"attack at dawn";
        let tag = gcm.seal(7, b"context", &mut sealed);
        let open = |gcm: &Gcm, nonce, context: &[u8], change: Option<usize>| {
            let (mut message, mut tag) = (sealed, tag);
            match change {
                Some(at) if at < 14 => message[at] ^= 1,
                Some(at) => tag[at - 14] ^= 0x80,
                None => {}
            }
            gcm.open(nonce, context, &mut message, &tag).map(|()| message)
        };
        assert_eq!(open(&gcm, 7, b"context", None), Ok(*b"attack at dawn"));
        assert_eq!(open(&gcm, 8, b"context", None), Err(NotAuthentic));
        assert_eq!(open(&gcm, 7, b"Context", None), Err(NotAuthentic));
        assert_eq!(open(&Gcm::new(&Secret::new([2; 32])), 7, b"context", None), Err(NotAuthentic));
        for at in 0..30 {
            assert_eq!(open(&gcm, 7, b"context", Some(at)), Err(NotAuthentic), "byte {at}");
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let key = Secret::new([0xab; 32]);
        let shown = format!("{key:?} {:?}", Gcm::new(&key));
        assert_eq!(shown, "Secret Gcm");
    }

    #[test]
    fn keys_of_different_purposes_differ() {
        let key = Secret::new([3; 32]);
        let derived = [
            key.derive("test 1", &[b"a"]),
            key.derive("test 2", &[b"a"]),
            key.derive("test 1", &[b"b"]),
            Secret::new([4; 32]).derive("test 1", &[b"a"]),
        ];
        for (at, one) in derived.iter().enumerate() {
            assert!(derived[at + 1..].iter().all(|other| other.as_bytes() != one.as_bytes()));
        }
    }
}
