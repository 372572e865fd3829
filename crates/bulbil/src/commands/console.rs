//! `bulbil logs` and `bulbil console`: the serial port.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::time::Duration;

use bulbil_control::InstanceState;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{Context, instance};
use crate::error::{CliError, CliResult};
use crate::terminal::RawTerminal;

/// How often the log is looked at while it is followed.
const FOLLOW_TICK: Duration = Duration::from_millis(200);

/// How much of a log is read at a time, and looked at for its last lines.
const TAIL_BYTES: u64 = 1 << 20;

/// Ctrl-], as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

pub(crate) async fn logs(context: &Context<'_>, name: &str, follow: bool, lines: Option<usize>) -> CliResult<()> {
    let instance = context.client.instance(name).await.map_err(|e| instance::with_hints(e.into(), name))?;
    let path = context.data.instance(&instance.record.id).file("serial.log");
    let fail = |e: &io::Error| CliError::io(format!("cannot read `{}`", path.display()), e);
    let mut offset = match lines {
        Some(_) => std::fs::metadata(&path).map_or(0, |metadata| metadata.len().saturating_sub(TAIL_BYTES)),
        None => 0,
    };
    // Escape sequences of a guest are nothing for a person's terminal.
    let plain = std::io::stdout().is_terminal();
    let mut first = true;
    loop {
        let mut bytes = Vec::new();
        match File::open(&path) {
            Ok(mut file) => {
                file.seek(SeekFrom::Start(offset)).map_err(|e| fail(&e))?;
                file.take(TAIL_BYTES).read_to_end(&mut bytes).map_err(|e| fail(&e))?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(fail(&e)),
        }
        offset += bytes.len() as u64;
        let shown = if first { last_lines(&bytes, lines) } else { &bytes };
        if plain {
            let text = String::from_utf8_lossy(shown);
            let text: String = text.split_inclusive('\n').map(plain_line).collect();
            context.printer.raw(text.as_bytes())?;
        } else {
            context.printer.raw(shown)?;
        }
        first = false;
        if !bytes.is_empty() {
            continue;
        }
        if !follow {
            return Ok(());
        }
        let now = context.client.instance(instance.record.id.as_str()).await;
        if now.is_ok_and(|instance| instance.run.state == InstanceState::Stopped) {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_TICK).await;
    }
}

fn plain_line(line: &str) -> String {
    let end = if line.ends_with('\n') { "\n" } else { "" };
    bulbil_control::plain_text(line.trim_end_matches(['\r', '\n'])) + end
}

fn last_lines(bytes: &[u8], lines: Option<usize>) -> &[u8] {
    let Some(lines) = lines else { return bytes };
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut start = body.len();
    for _ in 0..lines {
        match body[..start].iter().rposition(|byte| *byte == b'\n') {
            Some(newline) => start = newline,
            None => return bytes,
        }
    }
    &bytes[(start + 1).min(bytes.len())..]
}

pub(crate) async fn attach(context: &Context<'_>, name: &str) -> CliResult<()> {
    let instance = context.client.instance(name).await.map_err(|e| instance::with_hints(e.into(), name))?;
    let name = &instance.record.name;
    if instance.run.state == InstanceState::Stopped {
        return Err(
            CliError::new(format!("instance `{name}` is stopped")).hint(format!("start it: bulbil start {name}"))
        );
    }
    let socket = context.data.instance(&instance.record.id).socket("console");
    let fail = |e: &io::Error| CliError::io(format!("cannot attach to the console of `{name}`"), e);
    let _alone = lock_console(context, &instance)?;
    let mut stream = UnixStream::connect(&socket).await.map_err(|e| fail(&e))?;
    context.printer.note(&format!("console of {name}; leave it with Ctrl-]"));
    let terminal = RawTerminal::enter().map_err(|e| fail(&e))?;
    let mut typed = [0; 1024];
    let mut shown = [0; 4096];
    let mut stdin = tokio::io::stdin();
    loop {
        tokio::select! {
            read = stream.read(&mut shown) => match read.map_err(|e| fail(&e))? {
                0 => break,
                len => context.printer.raw(&shown[..len])?,
            },
            read = stdin.read(&mut typed) => {
                let len = read.map_err(|e| fail(&e))?;
                let keys = &typed[..len];
                let escape = keys.iter().position(|key| *key == ESCAPE);
                stream.write_all(&keys[..escape.unwrap_or(len)]).await.map_err(|e| fail(&e))?;
                if escape.is_some() || len == 0 {
                    break;
                }
            }
        }
    }
    drop(terminal);
    context.printer.note("");
    Ok(())
}

/// QEMU serves one at a time, and lets a second one wait without a word.
fn lock_console(context: &Context<'_>, instance: &bulbil_control::InstanceView) -> CliResult<File> {
    let path = context.data.instance(&instance.record.id).file("console.lock");
    let fail = |e: &io::Error| CliError::io(format!("cannot lock `{}`", path.display()), e);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(|e| fail(&e))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let name = &instance.record.name;
            Err(CliError::new(format!("the console of `{name}` is in use by another bulbil"))
                .hint(format!("read along: bulbil logs {name} --follow")))
        }
        Err(errno) => Err(fail(&errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn the_end_of_a_log_is_cut_at_lines() {
        let log = b"one\ntwo\nthree\n";
        assert_eq!(last_lines(log, None), log);
        assert_eq!(last_lines(log, Some(2)), b"two\nthree\n");
        assert_eq!(last_lines(log, Some(9)), log);
        assert_eq!(last_lines(log, Some(0)), b"");
        assert_eq!(last_lines(b"", Some(1)), b"");
    }
}
