//! Session tokens (AWS "IMDSv2", Alibaba "security hardened mode").
//!
//! A token says when it ends and proves that this store made it:
//!
//! ```text
//! hex( end: u64 big-endian, ms | serial: u64 big-endian | BLAKE3 keyed hash of the two: 32 bytes )
//! ```
//!
//! Nothing is remembered per token, so "any number of tokens at once" (AWS, "How Instance Metadata
//! Service Version 2 works") costs no memory and a guest that asks for millions evicts none of the
//! others. The key is 256 bits of the operating system's randomness and lives in the instance's
//! service: a token of another instance, or of this one before its service was made anew, is
//! simply wrong.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The longest life of a token: six hours (AWS, "How Instance Metadata Service Version 2 works").
pub const MAX_TOKEN_TTL_S: u32 = 21_600;

const CLAIM_BYTES: usize = 16;
const TOKEN_BYTES: usize = CLAIM_BYTES + blake3::OUT_LEN;

/// Makes and checks the tokens of one instance. `Debug` shows nothing of the key.
pub struct TokenStore {
    key: [u8; blake3::KEY_LEN],
    serial: AtomicU64,
}

impl TokenStore {
    /// A store with a new random key: no token made before is valid in it.
    ///
    /// # Panics
    /// If the operating system has no randomness to give.
    #[must_use]
    pub fn new() -> Self {
        let mut key = [0; blake3::KEY_LEN];
        getrandom::fill(&mut key).expect("the operating system gives random bytes");
        Self { key, serial: AtomicU64::new(0) }
    }

    /// Makes a token that is valid for `ttl` after `now`.
    ///
    /// `now` is the time since an origin of the caller's choice that stays the same for the life
    /// of the store.
    #[must_use]
    pub fn issue(&self, ttl: Duration, now: Duration) -> String {
        let end_ms = u64::try_from(now.saturating_add(ttl).as_millis()).unwrap_or(u64::MAX);
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut token = [0; TOKEN_BYTES];
        let (claim, proof) = token.split_at_mut(CLAIM_BYTES);
        claim.copy_from_slice(&((u128::from(end_ms) << 64) | u128::from(serial)).to_be_bytes());
        proof.copy_from_slice(self.proof(claim).as_bytes());
        to_hex(&token)
    }

    /// Whether `token` was made by this store and has not ended. The comparison takes constant time.
    #[must_use]
    pub fn is_valid(&self, token: &[u8], now: Duration) -> bool {
        let Some(bytes) = from_hex(token) else { return false };
        let Some((claim, proof)) = bytes.split_first_chunk::<CLAIM_BYTES>() else { return false };
        let Ok(proof) = <[u8; blake3::OUT_LEN]>::try_from(proof) else { return false };
        // `blake3::Hash` compares in constant time.
        let genuine = self.proof(claim) == blake3::Hash::from(proof);
        let end_ms = u128::from_be_bytes(*claim) >> 64;
        genuine && now.as_millis() < end_ms
    }

    fn proof(&self, claim: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.key, claim)
    }
}

impl Default for TokenStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for TokenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStore").finish_non_exhaustive()
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'))
        .collect()
}

fn from_hex(text: &[u8]) -> Option<[u8; TOKEN_BYTES]> {
    let mut bytes = [0; TOKEN_BYTES];
    if text.len() != 2 * TOKEN_BYTES {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = pair.iter().try_fold(0, |value, digit| Some((value << 4) | hex_value(*digit)?))?;
    }
    Some(bytes)
}

/// Lower case only, so that a token has one spelling.
pub(crate) fn hex_value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: Duration = Duration::from_secs(1000);

    #[test]
    fn a_token_lives_exactly_as_long_as_it_was_asked_for() {
        let store = TokenStore::new();
        let token = store.issue(Duration::from_secs(60), T0);
        for (after_ms, valid) in [(0, true), (59_999, true), (60_000, false), (86_400_000, false)] {
            assert_eq!(store.is_valid(token.as_bytes(), T0 + Duration::from_millis(after_ms)), valid, "{after_ms}");
        }
    }

    #[test]
    fn tokens_differ_and_any_number_is_valid_at_once() {
        let store = TokenStore::new();
        let tokens: std::collections::HashSet<String> =
            (0..10_000).map(|_| store.issue(Duration::from_secs(9), T0)).collect();
        assert_eq!(tokens.len(), 10_000);
        assert!(tokens.iter().all(|token| store.is_valid(token.as_bytes(), T0)));
    }

    #[test]
    fn a_token_of_another_store_is_wrong() {
        let token = TokenStore::new().issue(Duration::from_secs(60), T0);
        assert!(!TokenStore::new().is_valid(token.as_bytes(), T0));
    }

    #[test]
    fn no_changed_character_and_no_other_length_is_accepted() {
        let store = TokenStore::new();
        let token = store.issue(Duration::from_secs(60), T0);
        for position in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[position] = if changed[position] == b'0' { b'1' } else { b'0' };
            assert!(!store.is_valid(&changed, T0), "{position}");
        }
        for wrong in ["", "0", &token[1..], &token[2..], &format!("{token}00"), &token.to_uppercase(), &"é".repeat(48)]
        {
            assert!(!store.is_valid(wrong.as_bytes(), T0), "{wrong}");
        }
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", TokenStore::new()), "TokenStore { .. }");
    }
}
