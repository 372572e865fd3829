//! Small JSON objects that say whether they are whole.
//!
//! ```text
//! one JSON object in UTF-8, without a line break
//! \n
//! BLAKE3 of everything before this line, 64 hexadecimal digits
//! \n
//! ```
//! A changed digit in such an object could let a block be matched that is about to go, so nothing of
//! it is believed before the hash was compared.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{StoreError, StoreErrorKind};
use crate::objects::Objects;

/// The largest sealed object: a list of condemned packs of a store of some hundred TiB.
const MAX_BYTES: u64 = 256 << 20;
const FOOT_BYTES: usize = 65;

/// Encodes a document.
pub(crate) fn encode<T: Serialize>(document: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(document).expect("documents are plain data with text keys");
    bytes.push(b'\n');
    let hash = blake3::hash(&bytes).to_hex();
    bytes.extend_from_slice(hash.as_bytes());
    bytes.push(b'\n');
    bytes
}

/// Verifies and parses a document.
pub(crate) fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, StoreError> {
    let damaged = || StoreError::corrupt(format!("object `{name}` does not match its hash"));
    let (content, foot) = bytes.len().checked_sub(FOOT_BYTES).map(|at| bytes.split_at(at)).ok_or_else(damaged)?;
    let hash = blake3::hash(content).to_hex();
    if foot[..64] != *hash.as_bytes() || foot[64] != b'\n' {
        return Err(damaged());
    }
    serde_json::from_slice(content)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Corrupt, format!("object `{name}` cannot be read"), e))
}

/// Reads a document.
///
/// # Errors
/// `NotFound`, `Corrupt`, `Io` or `Timeout`.
pub(crate) fn get<T: DeserializeOwned>(objects: &dyn Objects, name: &str) -> Result<T, StoreError> {
    decode(name, &objects.get(name, MAX_BYTES)?)
}

/// Sixteen random bytes as 32 hexadecimal digits.
pub(crate) fn random_id() -> Result<String, StoreError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Io, "the system has no random bytes", e))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_come_back_and_no_changed_byte_goes_unnoticed() {
        let bytes = encode(&vec![("a", 1), ("b", 2)]);
        assert_eq!(decode::<Vec<(String, u32)>>("x", &bytes).unwrap(), [("a".to_owned(), 1), ("b".to_owned(), 2)]);
        for position in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[position] ^= 2;
            assert!(decode::<Vec<(String, u32)>>("x", &bad).is_err(), "byte {position}");
            assert!(decode::<Vec<(String, u32)>>("x", &bytes[..position]).is_err(), "cut at {position}");
        }
    }
}
