//! SSH keys: those users give, and the pair that bulbil itself logs in with.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::data_dir::DataDir;
use crate::error::{ControlError, ErrorCode};

/// Longest public key line taken: RSA of 16384 bits is under 3 KiB.
const MAX_LINE_BYTES: usize = 8192;

/// Checks the text of a public key file: one key per line, comments and empty lines left out.
///
/// # Errors
/// `Invalid` naming what is wrong; a private key is recognised and never repeated.
pub(crate) fn parse_public_keys(text: &str) -> Result<Vec<String>, ControlError> {
    let invalid = |message: &str| ControlError::new(ErrorCode::Invalid, message.to_owned());
    if text.contains("PRIVATE KEY-----") {
        return Err(invalid("the key file holds a private key; give the public one, which ends in `.pub`"));
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() {
        return Err(invalid("the key file holds no public key"));
    }
    match keys.iter().find(|key| !is_public_key(key)) {
        Some(_) => Err(invalid("the key file is not an OpenSSH public key such as `ssh-ed25519 AAAA… name`")),
        None => Ok(keys),
    }
}

fn is_public_key(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace();
    let kind = words.next().is_some_and(|word| {
        ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|prefix| word.starts_with(prefix))
    });
    let blob = words.next().is_some_and(|word| {
        word.starts_with("AAAA") && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
    });
    kind && blob && line.len() <= MAX_LINE_BYTES && !line.chars().any(char::is_control)
}

/// The private key that bulbil logs in with.
pub(crate) fn own_private_key(data: &DataDir) -> PathBuf {
    data.keys().join("id_ed25519")
}

/// The public half of bulbil's own key; the pair is made at the first call.
///
/// # Errors
/// `MissingProgram` without `ssh-keygen`.
pub(crate) fn own_public_key(data: &DataDir) -> Result<String, ControlError> {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _first = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let private = own_private_key(data);
    let public = private.with_extension("pub");
    if !public.exists() {
        generate(&private)?;
    }
    let text = std::fs::read_to_string(&public)
        .map_err(|e| ControlError::io(format!("cannot read `{}`", public.display()), &e))?;
    Ok(text.trim().to_owned())
}

fn generate(private: &Path) -> Result<(), ControlError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let directory = private.parent().expect("a key lies in a directory");
    let fail = |e: std::io::Error| ControlError::io("cannot make bulbil's own ssh key", &e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fail)?;
    // Under another name first, so that an interrupted run leaves nothing that looks finished.
    let temporary = directory.join(format!("new-{}", bulbil_types::VolumeId::random()));
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "bulbil", "-f"])
        .arg(&temporary)
        .stdin(std::process::Stdio::null())
        .output();
    let output = match made {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let text = "`ssh-keygen` was not found: install OpenSSH (Debian, Ubuntu: apt install openssh-client)";
            return Err(ControlError::new(ErrorCode::MissingProgram, text));
        }
        other => other.map_err(fail)?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(ControlError::new(ErrorCode::Failed, format!("`ssh-keygen` failed: {said}")));
    }
    std::fs::rename(&temporary, private).map_err(fail)?;
    std::fs::rename(temporary.with_extension("pub"), private.with_extension("pub")).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_keys_are_told_from_everything_else() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl me@home";
        assert_eq!(parse_public_keys(&format!("# mine\n\n{key}\n")).unwrap(), [key]);
        for (text, says) in [
            ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "private key"),
            ("", "no public key"),
            ("hello", "not an OpenSSH"),
            ("ssh-ed25519 !!!", "not an OpenSSH"),
        ] {
            assert!(parse_public_keys(text).unwrap_err().to_string().contains(says), "{text}");
        }
    }
}
