//! The command line of `ssh` that reaches an instance.

use bulbil_control::{InstanceState, InstanceView};

use crate::error::{CliError, CliResult};

/// Arguments of `ssh` up to and including the destination.
pub(crate) fn arguments(instance: &InstanceView, user: Option<&str>) -> CliResult<Vec<String>> {
    let name = &instance.record.name;
    if instance.run.state == InstanceState::Stopped {
        return Err(
            CliError::new(format!("instance `{name}` is stopped")).hint(format!("start it: bulbil start {name}"))
        );
    }
    let not_yet = || {
        CliError::new(format!("instance `{name}` does not answer to ssh yet"))
            .hint(format!("see how far it is: bulbil logs {name} --follow"))
    };
    let ssh = instance.run.ssh.as_ref().ok_or_else(not_yet)?;
    let user = user.or(ssh.user.as_deref()).ok_or_else(not_yet)?;
    let mut arguments = bulbil_control::shim::ssh_options(ssh);
    arguments.push(format!("{user}@{}", ssh.address));
    Ok(arguments)
}

/// One word of a command as a shell reads it back: what `exec -- sh -c 'a b'` needs, because ssh
/// joins words with spaces and the guest's shell splits them again.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_guests_shell() {
        assert_eq!(quote("uname"), "uname");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("$HOME;*"), "'$HOME;*'");
    }
}
