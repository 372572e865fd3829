//! How much user data each cloud takes.

use bulbil_types::Personality;

/// The user data is too large for the cloud the instance shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "user data has {len_bytes} bytes, the limit of personality `{personality}` is {limit_bytes} bytes: \
     compress it with gzip (cloud-init unpacks it) or `#include` a URL"
)]
pub struct UserDataError {
    personality: Personality,
    len_bytes: usize,
    limit_bytes: usize,
}

impl UserDataError {
    /// The most the personality takes, in bytes.
    #[must_use]
    pub fn limit_bytes(self) -> usize {
        self.limit_bytes
    }
}

/// The most user data an instance may have, in raw bytes (before base64, after gzip).
///
/// - `ec2`: 16 KiB (AWS, "Run commands on your Linux instance at launch": "limited to 16 KB, in raw
///   form, before it is base64-encoded").
/// - `alibaba`: 32 KiB (Alibaba, `RunInstances` parameter `UserData`).
/// - `nocloud`: 1 MiB. A seed disk has no limit of its own; this one keeps the disk small enough to
///   be built in memory and catches a disk image given by mistake.
#[must_use]
pub const fn user_data_limit_bytes(personality: Personality) -> usize {
    match personality {
        Personality::Ec2 => 16 << 10,
        Personality::Alibaba => 32 << 10,
        Personality::NoCloud => 1 << 20,
    }
}

/// Checks that user data is small enough for `personality`; the content is not looked at.
///
/// # Errors
/// If it is longer than [`user_data_limit_bytes`].
pub fn check_user_data(personality: Personality, user_data: &[u8]) -> Result<(), UserDataError> {
    let limit_bytes = user_data_limit_bytes(personality);
    if user_data.len() <= limit_bytes {
        return Ok(());
    }
    Err(UserDataError { personality, len_bytes: user_data.len(), limit_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_itself_is_allowed_and_one_byte_more_is_not() {
        for (personality, limit) in
            [(Personality::Ec2, 16_384), (Personality::Alibaba, 32_768), (Personality::NoCloud, 1_048_576)]
        {
            assert_eq!(check_user_data(personality, &vec![0; limit]), Ok(()));
            let error = check_user_data(personality, &vec![0; limit + 1]).unwrap_err();
            assert_eq!(error.limit_bytes(), limit);
            let message = error.to_string();
            assert!(message.contains(&limit.to_string()) && message.contains("gzip"), "{message}");
        }
    }
}
