//! Where the key of a store comes from: a file, or the output of a command.
//!
//! A key is 256 bits, as text: 64 hexadecimal digits, or base64 of 32 bytes. White space around it
//! does not count.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use base64::Engine as _;
use zeroize::Zeroizing;

use super::secret::{Secret, fill_random};
use crate::error::{StoreError, StoreErrorKind};

/// A key as text is far shorter; what is longer is not a key.
const MAX_TEXT_BYTES: u64 = 4096;

/// What a failed command may say in an error message.
const MAX_COMPLAINT_CHARACTERS: usize = 300;

/// A key management service in another country answers within this.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a command that was asked is looked at: often enough to cost no time that is felt.
const COMMAND_POLL: Duration = Duration::from_millis(10);

/// A key that opens a slot of an encrypted store; erased when it is dropped and never shown.
#[derive(Clone)]
pub struct StoreKey(Secret);

impl fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreKey")
    }
}

impl StoreKey {
    /// Takes 256 bits as a key.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Secret::new(bytes))
    }

    /// Parses a key: 64 hexadecimal digits, or base64 of 32 bytes.
    ///
    /// # Errors
    /// `Key`; the message does not repeat the text.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let text = text.trim_ascii();
        let mut key = Zeroizing::new([0; 32]);
        let parsed = if text.len() == 64 {
            parse_hex(text.as_bytes(), &mut key)
        } else {
            // Decoding needs room for what is too long by a byte or two.
            let mut decoded = Zeroizing::new([0; 36]);
            let engine = if text.ends_with('=') {
                &base64::engine::general_purpose::STANDARD
            } else {
                &base64::engine::general_purpose::STANDARD_NO_PAD
            };
            let len = if text.len() > 48 { None } else { engine.decode_slice(text, &mut *decoded).ok() };
            key.copy_from_slice(&decoded[..32]);
            len == Some(32)
        };
        if parsed {
            return Ok(Self(Secret::new(*key)));
        }
        let text =
            format!("{} characters are not a key: it is 64 hexadecimal digits, or base64 of 32 bytes", text.len());
        Err(StoreError::new(StoreErrorKind::Key, text))
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.0
    }
}

fn parse_hex(digits: &[u8], key: &mut [u8; 32]) -> bool {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else { return false };
        *byte = high << 4 | low;
    }
    true
}

/// Gives the key of a store when it is opened.
pub trait KeyProvider: fmt::Debug + Send + Sync {
    /// Asks for the key; may take as long as a key management service does.
    ///
    /// # Errors
    /// `Key` when there is none to be had; the message names the source and never its content.
    fn key(&self) -> Result<StoreKey, StoreError>;

    /// What kind of source this is, one word; it is noted in the store, readable by everybody.
    fn kind(&self) -> &'static str;
}

impl KeyProvider for StoreKey {
    fn key(&self) -> Result<StoreKey, StoreError> {
        Ok(self.clone())
    }

    fn kind(&self) -> &'static str {
        "given"
    }
}

/// A key source that can be named in one line of text.
///
/// ```
/// # use bulbil_store::KeySource;
/// let source: KeySource = "command:age -d -i /etc/id.txt /etc/store.key.age".parse().unwrap();
/// assert_eq!(source.to_string(), "command:age -d -i /etc/id.txt /etc/store.key.age");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file that nobody but its owner may read.
    File(PathBuf),
    /// A command, run without a shell, that writes the key to its standard output.
    Command {
        /// The program, searched for in `PATH`.
        program: String,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

impl FromStr for KeySource {
    type Err = StoreError;

    /// Parses `file:PATH` or `command:PROGRAM ARGUMENT…`, cut at white space; there are no quotes, so
    /// that an argument with a blank in it needs a script.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        if let Some(path) = text.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(Self::File(PathBuf::from(path)));
        }
        let mut words = text.strip_prefix("command:").into_iter().flat_map(str::split_ascii_whitespace);
        if let Some(program) = words.next() {
            return Ok(Self::Command { program: program.to_owned(), arguments: words.map(str::to_owned).collect() });
        }
        // Not repeated: somebody may have put the key itself here.
        let text = "a key source is `file:PATH` or `command:PROGRAM ARGUMENT…`";
        Err(StoreError::new(StoreErrorKind::Key, text))
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Command { program, arguments } => {
                write!(f, "command:{program}")?;
                arguments.iter().try_for_each(|argument| write!(f, " {argument}"))
            }
        }
    }
}

impl KeyProvider for KeySource {
    fn key(&self) -> Result<StoreKey, StoreError> {
        match self {
            Self::File(path) => read_file(path),
            Self::Command { program, arguments } => run_command(program, arguments, COMMAND_TIMEOUT),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Command { .. } => "command",
        }
    }
}

fn no_key(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Key, message)
}

fn read_file(path: &Path) -> Result<StoreKey, StoreError> {
    let shown = path.display();
    let fail = |e| StoreError::with_source(StoreErrorKind::Key, format!("cannot read the key file `{shown}`"), e);
    // A pipe without a writer must not stop the caller before it is seen to be one.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("a flag of open(2)");
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(no_key(format!("the key file `{shown}` is not a regular file")));
    }
    if metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(no_key(format!("others may read the key file `{shown}` (mode {mode:04o}): chmod 600 {shown}")));
    }
    let text = read_text(file).map_err(fail)?;
    parse_text(&text)
        .map_err(|e| StoreError::with_source(StoreErrorKind::Key, format!("the key file `{shown}` holds no key"), e))
}

fn read_text(source: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(512));
    source.take(MAX_TEXT_BYTES + 1).read_to_end(&mut text)?;
    Ok(text)
}

fn parse_text(text: &[u8]) -> Result<StoreKey, StoreError> {
    if text.len() as u64 > MAX_TEXT_BYTES {
        return Err(no_key(format!("more than {MAX_TEXT_BYTES} bytes are not a key")));
    }
    let text = std::str::from_utf8(text).map_err(|_| no_key("bytes that are not text are not a key".to_owned()))?;
    StoreKey::parse(text)
}

/// Runs a key command and takes its output; it is killed when its time is over.
fn run_command(program: &str, arguments: &[String], timeout: Duration) -> Result<StoreKey, StoreError> {
    let fail = |e| StoreError::with_source(StoreErrorKind::Key, format!("cannot run the key command `{program}`"), e);
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(fail)?;
    let (output, complaint) = (read_aside(child.stdout.take()), read_aside(child.stderr.take()));
    let deadline = Instant::now() + timeout;
    let status = wait_until(&mut child, deadline).map_err(fail)?;
    let left = || deadline.saturating_duration_since(Instant::now());
    let (Some(status), Ok(output)) = (status, output.recv_timeout(left())) else {
        let seconds = timeout.as_secs_f32();
        return Err(no_key(format!("the key command `{program}` did not end within {seconds} s")));
    };
    if !status.success() {
        let complaint = complaint.recv_timeout(left()).unwrap_or_default();
        return Err(no_key(format!("the key command `{program}` failed ({status}): {}", last_line(&complaint))));
    }
    parse_text(&output).map_err(|e| {
        StoreError::with_source(StoreErrorKind::Key, format!("the key command `{program}` gave no key"), e)
    })
}

/// Reads a pipe to its end, or to the limit, in a thread: a child that writes more gets SIGPIPE.
fn read_aside(pipe: Option<impl Read + Send + 'static>) -> Receiver<Zeroizing<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let text = pipe.and_then(|pipe| read_text(pipe).ok()).unwrap_or_default();
        // Nobody may be waiting any more.
        drop(sender.send(text));
    });
    receiver
}

/// Waits for a child; `None` when it had to be killed at the deadline.
fn wait_until(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(COMMAND_POLL);
    }
}

/// What a command said last, short and without control characters.
fn last_line(complaint: &[u8]) -> String {
    let text = String::from_utf8_lossy(complaint);
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    line.chars().filter(|c| !c.is_control()).take(MAX_COMPLAINT_CHARACTERS).collect()
}

/// Writes a new random key to a file of mode 0600. Durable when this returns.
///
/// # Errors
/// `Key` when the file exists: a key that something is encrypted with is never overwritten. `Io` or
/// `NoSpace`, and then there is no such file.
pub fn write_new_key_file(path: &Path) -> Result<(), StoreError> {
    let shown = path.display();
    let mut key = Zeroizing::new([0; 32]);
    fill_random(&mut *key)?;
    let mut text = Zeroizing::new(String::with_capacity(65));
    for byte in key.iter() {
        text.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).expect("below 16")));
    }
    text.push('\n');
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(no_key(format!("`{shown}` exists already, and a key is never overwritten")));
        }
        opened => opened.map_err(|e| StoreError::io(format!("cannot create the key file `{shown}`"), e))?,
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written =
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).and_then(|()| File::open(parent)?.sync_all());
    written.map_err(|e| {
        drop(std::fs::remove_file(path));
        StoreError::io(format!("cannot write the key file `{shown}`"), e)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn expected() -> [u8; 32] {
        std::array::from_fn(|at| at as u8)
    }

    fn message(error: &StoreError) -> String {
        use std::error::Error as _;
        assert_eq!(error.kind(), StoreErrorKind::Key);
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text
    }

    #[test]
    fn keys_are_hexadecimal_or_base64() {
        let base64 = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        for text in [HEX, &HEX.to_uppercase(), &format!("  {HEX}\n"), base64, base64.trim_end_matches('=')] {
            assert_eq!(StoreKey::parse(text).unwrap().secret().as_bytes(), &expected(), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_key_is_refused_and_not_repeated() {
        let long = HEX.repeat(2);
        for text in ["", "secret", &HEX[1..], &HEX.replace('a', "g"), &long, &"A".repeat(40), &"A".repeat(48)] {
            let error = StoreKey::parse(text).unwrap_err();
            assert!(text.is_empty() || !error.to_string().contains(text), "{error}");
        }
        assert_eq!(format!("{:?}", StoreKey::parse(HEX).unwrap()), "StoreKey");
    }

    #[test]
    fn sources_are_parsed_and_shown() {
        let command = |program: &str, arguments: &[&str]| KeySource::Command {
            program: program.to_owned(),
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
        };
        for (text, source) in [
            ("file:/etc/bulbil.key", KeySource::File("/etc/bulbil.key".into())),
            ("file:a b", KeySource::File("a b".into())),
            ("command:get-key", command("get-key", &[])),
            ("command:age -d -i id.txt key.age", command("age", &["-d", "-i", "id.txt", "key.age"])),
        ] {
            assert_eq!(text.parse::<KeySource>().unwrap(), source);
            assert_eq!(source.to_string(), text);
        }
        for text in ["", "file:", "command:", "command:  ", "/etc/key", HEX] {
            assert!(!message(&text.parse::<KeySource>().unwrap_err()).contains(HEX), "{text}");
        }
    }

    #[test]
    fn a_new_key_file_is_private_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_new_key_file(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        let source = KeySource::File(path.clone());
        assert_eq!(source.key().unwrap().secret().as_bytes(), StoreKey::parse(&text).unwrap().secret().as_bytes());
        assert!(message(&write_new_key_file(&path).unwrap_err()).contains("exists already"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let other = dir.path().join("other");
        write_new_key_file(&other).unwrap();
        assert_ne!(std::fs::read_to_string(&other).unwrap(), text);
    }

    #[test]
    fn a_key_file_that_others_may_read_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_new_key_file(&path).unwrap();
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let text = message(&KeySource::File(path.clone()).key().unwrap_err());
            assert!(text.contains("chmod 600"), "{text}");
        }
        assert!(message(&KeySource::File(dir.path().to_owned()).key().unwrap_err()).contains("not a regular file"));
        assert!(message(&KeySource::File(dir.path().join("none")).key().unwrap_err()).contains("cannot read"));
    }

    fn run(script: &str, timeout: Duration) -> Result<StoreKey, StoreError> {
        run_command("sh", &["-c".to_owned(), script.to_owned()], timeout)
    }

    #[test]
    fn a_command_gives_the_key() {
        let key = run(&format!("echo chatter >&2; echo {HEX}"), COMMAND_TIMEOUT).unwrap();
        assert_eq!(key.secret().as_bytes(), &expected());
    }

    #[test]
    fn a_command_that_fails_gives_nothing_or_too_much_is_told() {
        let fails = |script: &str| message(&run(script, COMMAND_TIMEOUT).unwrap_err());
        assert!(fails(&format!("echo {HEX}; echo 'no identity matched' >&2; exit 3")).ends_with("no identity matched"));
        assert!(fails("true").contains("gave no key"));
        assert!(fails("yes | head -c 5000").contains("gave no key"));
        assert!(message(&run_command("no-such-program", &[], COMMAND_TIMEOUT).unwrap_err()).contains("cannot run"));
        let echoed = fails(&format!("printf '{HEX}x'"));
        assert!(!echoed.contains(HEX), "{echoed}");
    }

    #[test]
    fn a_command_that_does_not_end_is_killed() {
        let text = message(&run("exec sleep 1000", Duration::from_millis(50)).unwrap_err());
        assert!(text.contains("did not end"), "{text}");
        // One whose child keeps the output open is not waited for either.
        let text = message(&run(&format!("echo {HEX}; sleep 20 &"), Duration::from_millis(200)).unwrap_err());
        assert!(text.contains("did not end"), "{text}");
    }
}
