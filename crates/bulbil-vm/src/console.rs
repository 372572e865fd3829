//! Reads a guest's serial console as it comes and says how far the guest has got.
//!
//! [`ConsoleParser`] takes bytes in pieces of any size and gives events; where the pieces are cut makes no
//! difference. The guest writes what it likes, so nothing here trusts it: lines, escape sequences, history and keys
//! are bounded, and no text that leaves contains a control character. A guest can lie about itself only: its events
//! decide what is reported of that instance, nothing else.
//!
//! Lines come in layers, all of which are taken off before a line is understood:
//!
//! ```text
//! [   48.533210] cloud-init[262]: Cloud-init v. 22.4.2 running 'modules:final' at … Up 48.53 seconds.
//! └ kernel time ┘└── speaker ───┘ └ text
//! <14>Nov 22 06:16:06 cloud-init: -----BEGIN SSH HOST KEY FINGERPRINTS-----
//! ```
//!
//! A login prompt has no end of line; the next line begins right behind it. So prompts end a line by themselves.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Bytes of a line that are kept; the rest up to its end is dropped.
const MAX_LINE_BYTES: usize = 4096;

/// Lines kept for [`ConsoleParser::last_lines`].
const MAX_HISTORY_LINES: usize = 400;

/// Bytes kept for [`ConsoleParser::last_lines`].
const MAX_HISTORY_BYTES: usize = 64 * 1024;

/// Bytes of an escape sequence before it is taken for ordinary text again: an unfinished one must not swallow the
/// rest of the console.
const MAX_ESCAPE_BYTES: usize = 256;

/// Host keys taken from one block.
const MAX_HOST_KEYS: usize = 16;

/// Lines between the marks of a host key block; kernel messages may come in between.
const MAX_HOST_KEY_BLOCK_LINES: usize = 100;

/// Indented lines of one Python traceback.
const MAX_TRACEBACK_LINES: usize = 200;

/// What the console told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum ConsoleEvent {
    /// The machine started again: everything below may come once more.
    Restarted,
    /// Firmware wrote its first line.
    Firmware {
        /// Which one.
        kind: FirmwareKind,
    },
    /// The boot loader wrote its first line.
    BootLoader,
    /// The kernel runs.
    Kernel {
        /// Its release; none when the kernel is told to be quiet and later lines imply it.
        release: Option<String>,
    },
    /// The init system runs.
    UserSpace,
    /// A stage of cloud-init began.
    CloudInit {
        /// Which stage.
        stage: CloudInitStage,
        /// cloud-init's version.
        version: String,
        /// Seconds since the guest's kernel started.
        uptime_s: Option<f64>,
    },
    /// cloud-init is through. (Its message can be set by user data; then this never comes.)
    CloudInitFinished {
        /// The datasource in cloud-init's words.
        datasource: Option<String>,
        /// cloud-init's version.
        version: String,
        /// Seconds since the guest's kernel started.
        uptime_s: Option<f64>,
    },
    /// cloud-init tells whose keys it installed: a user to log in as.
    LoginUser {
        /// The user's name.
        user: String,
        /// The file of the keys, `/home/debian/.ssh/authorized_keys`.
        file: String,
    },
    /// cloud-init tells that a user has no keys.
    NoAuthorizedKeys {
        /// The user's name.
        user: String,
    },
    /// A public host key, as in `ssh_host_ed25519_key.pub`.
    SshHostKey {
        /// Type, base64 and, usually, a comment.
        key: String,
    },
    /// Something went wrong, without ending the boot.
    Problem {
        /// What it is.
        kind: ProblemKind,
        /// The line.
        line: String,
    },
    /// Somebody may log in at the console.
    LoginPrompt {
        /// The host name in the prompt.
        hostname: String,
    },
    /// The guest switches its machine off.
    PoweringOff,
    /// The boot has failed; nothing more is to be expected.
    Failure(BootFailure),
}

/// Which firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirmwareKind {
    /// SeaBIOS.
    SeaBios,
    /// OVMF or another EDK II.
    Uefi,
}

/// A stage of cloud-init.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CloudInitStage {
    /// `init-local`: before the network.
    Local,
    /// `init`: metadata and user data are there.
    Network,
    /// `modules:config`.
    Config,
    /// `modules:final`: packages, the user's scripts.
    Final,
}

impl CloudInitStage {
    /// cloud-init's own word, in console messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "init-local",
            Self::Network => "init",
            Self::Config => "modules:config",
            Self::Final => "modules:final",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [Self::Local, Self::Network, Self::Config, Self::Final].into_iter().find(|stage| stage.as_str() == word)
    }
}

/// What kind of trouble a line tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// cloud-init warns: `util.py[WARNING]: …`.
    CloudInitWarning,
    /// cloud-init has an error.
    CloudInitError,
    /// cloud-init points out a setting that will go away. Nothing is wrong yet.
    Deprecation,
    /// A Python program died; the line is its exception.
    Traceback,
    /// systemd could not start a unit.
    UnitFailed,
    /// The kernel killed a process for want of memory.
    OutOfMemory,
    /// The kernel could not read or write a disk.
    DiskError,
}

/// Why a boot failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFailure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// The cause in one sentence.
    pub cause: String,
    /// The line of the console that shows it best.
    pub evidence: String,
}

/// What kind of failure a boot came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The firmware found nothing to start.
    NothingToBoot,
    /// GRUB stands at its own prompt.
    BootLoader,
    /// The kernel panicked.
    KernelPanic,
    /// The initramfs did not find the root file system.
    RootNotFound,
    /// systemd went to emergency or rescue mode.
    EmergencyMode,
}

/// Takes terminal control out of a text: what is left are characters and line ends. Sequences that place the cursor
/// become line ends.
#[must_use]
pub fn plain_text(text: &str) -> String {
    let mut filter = Filter::default();
    let mut plain = Vec::with_capacity(text.len());
    for &byte in text.as_bytes() {
        match filter.take(byte) {
            Filtered::Byte(byte) => plain.push(byte),
            Filtered::LineEnd => plain.push(b'\n'),
            Filtered::Backspace | Filtered::Nothing => {}
        }
    }
    String::from_utf8_lossy(&plain).chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}

enum Filtered {
    Byte(u8),
    LineEnd,
    Backspace,
    Nothing,
}

/// Where in an escape sequence (ECMA-48) the stream is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// After ESC, or after ESC and intermediate bytes.
    Begun,
    /// After `ESC [`, until a final byte.
    Control,
    /// After `ESC ]` and its kin, until BEL or `ESC \`.
    String,
}

#[derive(Debug, Default)]
struct Filter {
    escape: Escape,
    escape_bytes: usize,
}

impl Filter {
    fn take(&mut self, byte: u8) -> Filtered {
        const ESC: u8 = 0x1b;
        if byte == ESC {
            self.enter(Escape::Begun);
            return Filtered::Nothing;
        }
        match self.escape {
            Escape::None => Self::take_plain(byte),
            // A line end inside a sequence means that the sequence was cut off.
            _ if byte == b'\n' => self.leave(Filtered::LineEnd),
            _ if self.escape_bytes >= MAX_ESCAPE_BYTES => self.leave(Filtered::Nothing),
            Escape::Begun => self.take_begun(byte),
            Escape::Control => self.take_control(byte),
            Escape::String => self.take_string(byte),
        }
    }

    fn enter(&mut self, escape: Escape) {
        self.escape = escape;
        self.escape_bytes = 0;
    }

    fn leave(&mut self, filtered: Filtered) -> Filtered {
        self.enter(Escape::None);
        filtered
    }

    fn take_plain(byte: u8) -> Filtered {
        match byte {
            b'\n' | b'\r' => Filtered::LineEnd,
            b'\t' => Filtered::Byte(b' '),
            0x08 => Filtered::Backspace,
            0..0x20 | 0x7f => Filtered::Nothing,
            _ => Filtered::Byte(byte),
        }
    }

    fn take_begun(&mut self, byte: u8) -> Filtered {
        self.escape_bytes += 1;
        match byte {
            b'[' => self.enter(Escape::Control),
            b']' | b'P' | b'X' | b'^' | b'_' => self.enter(Escape::String),
            0x20..=0x2f => {}
            _ => self.enter(Escape::None),
        }
        Filtered::Nothing
    }

    fn take_control(&mut self, byte: u8) -> Filtered {
        self.escape_bytes += 1;
        match byte {
            // Place the cursor, erase the display, go to a line: what follows stands elsewhere.
            b'H' | b'f' | b'J' | b'E' | b'F' | b'd' => self.leave(Filtered::LineEnd),
            0x40..=0x7e => self.leave(Filtered::Nothing),
            _ => Filtered::Nothing,
        }
    }

    fn take_string(&mut self, byte: u8) -> Filtered {
        self.escape_bytes += 1;
        if byte == 0x07 { self.leave(Filtered::Nothing) } else { Filtered::Nothing }
    }
}

/// Reads a serial console in pieces.
#[derive(Debug, Default)]
pub struct ConsoleParser {
    filter: Filter,
    line: Vec<u8>,
    history: VecDeque<String>,
    history_bytes: usize,
    boot: Boot,
}

/// What was seen since the machine last started.
#[derive(Debug, Default)]
struct Boot {
    firmware: bool,
    loader: bool,
    kernel: bool,
    user_space: bool,
    failed: bool,
    /// The last line that may explain a failure to come.
    suspect: Option<String>,
    host_keys: Option<HostKeyBlock>,
    traceback_lines: Option<usize>,
}

#[derive(Debug, Default)]
struct HostKeyBlock {
    lines: usize,
    keys: usize,
}

impl ConsoleParser {
    /// A parser for a console from its beginning.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next piece and gives what it tells, in order.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<ConsoleEvent> {
        let mut events = Vec::new();
        for &byte in bytes {
            match self.filter.take(byte) {
                Filtered::Byte(byte) => self.take_byte(byte, &mut events),
                Filtered::LineEnd => self.end_line(&mut events),
                Filtered::Backspace => drop(self.line.pop()),
                Filtered::Nothing => {}
            }
        }
        events
    }

    /// The last `count` lines, oldest first, with the unfinished one, free of control characters.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let open = (!self.line.is_empty()).then(|| line_text(&self.line));
        let whole = count.saturating_sub(usize::from(open.is_some()));
        let skipped = self.history.len().saturating_sub(whole);
        self.history.iter().skip(skipped).cloned().chain(open).take(count).collect()
    }

    fn take_byte(&mut self, byte: u8, events: &mut Vec<ConsoleEvent>) {
        if self.line.len() < MAX_LINE_BYTES {
            self.line.push(byte);
            if byte == b' ' && is_prompt(&self.line) {
                self.end_line(events);
            }
        }
    }

    fn end_line(&mut self, events: &mut Vec<ConsoleEvent>) {
        let text = line_text(&std::mem::take(&mut self.line));
        if text.trim().is_empty() {
            return;
        }
        self.boot.take_line(&text, events);
        self.remember(text);
    }

    fn remember(&mut self, text: String) {
        self.history_bytes += text.len();
        self.history.push_back(text);
        while self.history.len() > MAX_HISTORY_LINES || self.history_bytes > MAX_HISTORY_BYTES {
            let Some(oldest) = self.history.pop_front() else { break };
            self.history_bytes -= oldest.len();
        }
    }
}

fn line_text(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).collect();
    text.trim_end().to_owned()
}

/// Prompts that wait at the end of an unfinished line.
fn is_prompt(line: &[u8]) -> bool {
    let shells: [&[u8]; 4] = [b"grub> ", b"grub rescue> ", b"(initramfs) ", b"Shell> "];
    shells.contains(&line) || (line.ends_with(b" login: ") && login_hostname(&line_text(line)).is_some())
}

/// The host name of `web-1 login:`.
fn login_hostname(line: &str) -> Option<&str> {
    let hostname = line.strip_suffix(" login:")?;
    let one_word = !hostname.is_empty() && !hostname.contains(char::is_whitespace);
    // "Last login: Sun Nov 22" is a message, not a prompt.
    (one_word && !["Last", "Failed"].contains(&hostname)).then_some(hostname)
}

/// A line without its layers.
struct Line<'a> {
    whole: &'a str,
    /// Whether the kernel put its time in front.
    stamped: bool,
    /// Behind the kernel's time and the speaker.
    text: &'a str,
    speaker: Option<&'a str>,
}

impl<'a> Line<'a> {
    fn new(whole: &'a str) -> Self {
        let unstamped = strip_kernel_time(whole);
        let rest = unstamped.unwrap_or(whole);
        let (speaker, text) = split_speaker(rest);
        Self { whole, stamped: unstamped.is_some(), text, speaker }
    }

    fn speaker_is(&self, name: &str) -> bool {
        self.speaker == Some(name)
    }
}

/// Takes off `[   12.345678] `, and the caller `[    T1] ` that some kernels add.
fn strip_kernel_time(line: &str) -> Option<&str> {
    let (time, rest) = line.strip_prefix('[')?.split_once(']')?;
    let (seconds, fraction) = time.trim_start().split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) {
        return None;
    }
    let caller = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let rest = match caller {
        Some((caller, after)) if caller.trim_start().starts_with(['T', 'C']) => after,
        _ => rest,
    };
    Some(rest.strip_prefix(' ').unwrap_or(rest))
}

/// Splits `cloud-init[262]: text` and `<14>Nov 22 06:16:06 cloud-init: text` into speaker and text. The indentation
/// of the text stays: it tells where a traceback ends.
fn split_speaker(line: &str) -> (Option<&str>, &str) {
    let Some((head, text)) = line.split_once(": ") else { return (None, line) };
    let word = head.rsplit(' ').next().unwrap_or(head);
    let syslog = head.starts_with('<') && head.contains('>');
    let name = word.strip_suffix(']').and_then(|word| word.split_once('['));
    match name {
        Some((name, pid)) if (head == word || syslog) && pid.bytes().all(|b| b.is_ascii_digit()) => (Some(name), text),
        None if syslog => (Some(word), text),
        _ => (None, line),
    }
}

impl Boot {
    fn take_line(&mut self, whole: &str, events: &mut Vec<ConsoleEvent>) {
        let line = Line::new(whole);
        if self.take_firmware(&line, events) || self.take_loader(&line, events) {
            return;
        }
        self.take_kernel(&line, events);
        self.take_user_space(&line, events);
        self.take_cloud_init(&line, events);
        self.take_host_keys(&line, events);
        self.take_problem(&line, events);
        self.take_failure(&line, events);
    }

    /// Everything begins anew when firmware speaks after a kernel or a loader did.
    fn take_firmware(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) -> bool {
        let kind = if line.whole.starts_with("SeaBIOS (version") {
            FirmwareKind::SeaBios
        } else if line.whole.starts_with("BdsDxe: ") || line.whole.starts_with("UEFI firmware (version") {
            FirmwareKind::Uefi
        } else {
            return self.take_firmware_failure(line, events);
        };
        if self.kernel || self.loader {
            *self = Self::default();
            events.push(ConsoleEvent::Restarted);
        }
        if !std::mem::replace(&mut self.firmware, true) {
            events.push(ConsoleEvent::Firmware { kind });
        }
        if line.text.starts_with("BdsDxe: failed to load") {
            self.suspect(line.text);
        }
        self.take_firmware_failure(line, events);
        true
    }

    fn take_firmware_failure(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) -> bool {
        if line.whole.starts_with("Boot failed: ") {
            self.suspect(line.whole);
            return true;
        }
        let nothing = ["No bootable device", "UEFI Interactive Shell", "BdsDxe: No bootable option"];
        let found = nothing.iter().any(|words| line.whole.starts_with(words));
        if found {
            let cause = "the firmware found no disk it can start from";
            self.fail(FailureKind::NothingToBoot, cause.into(), line, events);
        }
        found
    }

    fn take_loader(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) -> bool {
        if line.stamped {
            return false;
        }
        let text = line.whole;
        if ["GRUB loading", "Welcome to GRUB", "Booting `"].iter().any(|words| text.starts_with(words)) {
            self.reach_loader(events);
            return true;
        }
        if text.starts_with("error: ") && !self.kernel {
            self.suspect(text);
            return true;
        }
        let cause = match text {
            "grub rescue>" => "GRUB could not find its own files and waits at its rescue prompt",
            "grub>" => "GRUB found no configuration and waits at its prompt",
            _ => return false,
        };
        self.reach_loader(events);
        self.fail(FailureKind::BootLoader, cause.into(), line, events);
        true
    }

    fn reach_loader(&mut self, events: &mut Vec<ConsoleEvent>) {
        if !std::mem::replace(&mut self.loader, true) {
            events.push(ConsoleEvent::BootLoader);
        }
    }

    fn take_kernel(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        let release = line.text.strip_prefix("Linux version ").and_then(|rest| rest.split(' ').next());
        // A second kernel without firmware before it: kexec.
        if release.is_some() && self.user_space {
            *self = Self::default();
            events.push(ConsoleEvent::Restarted);
        }
        if release.is_some() || line.stamped {
            self.reach_kernel(release, events);
        }
        if line.stamped && line.text.starts_with("reboot: Power down") {
            events.push(ConsoleEvent::PoweringOff);
        }
    }

    fn reach_kernel(&mut self, release: Option<&str>, events: &mut Vec<ConsoleEvent>) {
        if !std::mem::replace(&mut self.kernel, true) {
            // What the loader complained about did not stop it.
            self.suspect = None;
            events.push(ConsoleEvent::Kernel { release: release.map(str::to_owned) });
        }
    }

    fn take_user_space(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        let status = ["[  OK  ] ", "[FAILED] ", "[ TIME ] ", "[DEPEND] "];
        let spoken = line.speaker_is("systemd") || line.speaker_is("cloud-init");
        if spoken || status.iter().any(|words| line.text.starts_with(words)) {
            self.reach_user_space(events);
        }
        if let Some(hostname) = login_hostname(line.whole) {
            self.reach_user_space(events);
            events.push(ConsoleEvent::LoginPrompt { hostname: hostname.to_owned() });
        }
    }

    fn reach_user_space(&mut self, events: &mut Vec<ConsoleEvent>) {
        self.reach_kernel(None, events);
        if !std::mem::replace(&mut self.user_space, true) {
            events.push(ConsoleEvent::UserSpace);
        }
    }

    fn take_cloud_init(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        let event = cloud_init_message(line.text).or_else(|| authorized_keys_message(line.text));
        if let Some(event) = event {
            self.reach_user_space(events);
            events.push(event);
        }
    }

    fn take_host_keys(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        if line.text.starts_with("-----BEGIN SSH HOST KEY KEYS-----") {
            self.host_keys = Some(HostKeyBlock::default());
        } else if line.text.starts_with("-----END SSH HOST KEY KEYS-----") {
            self.host_keys = None;
        } else if let Some(block) = &mut self.host_keys {
            block.lines += 1;
            if is_public_key(line.text) && block.keys < MAX_HOST_KEYS {
                block.keys += 1;
                events.push(ConsoleEvent::SshHostKey { key: line.text.trim().to_owned() });
            }
            if block.lines >= MAX_HOST_KEY_BLOCK_LINES {
                self.host_keys = None;
            }
        }
    }

    fn take_problem(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        let kind = match self.traceback_end(line) {
            true => Some(ProblemKind::Traceback),
            false => problem_kind(line),
        };
        if let Some(kind) = kind {
            if kind == ProblemKind::UnitFailed {
                self.suspect(line.text);
            }
            events.push(ConsoleEvent::Problem { kind, line: line.text.trim().to_owned() });
        }
    }

    /// Whether this line is the exception behind a traceback: the first one that is not indented.
    fn traceback_end(&mut self, line: &Line<'_>) -> bool {
        if line.text.starts_with("Traceback (most recent call last):") {
            self.traceback_lines = Some(0);
            return false;
        }
        match self.traceback_lines {
            Some(count) if line.text.starts_with(' ') && count < MAX_TRACEBACK_LINES => {
                self.traceback_lines = Some(count + 1);
                false
            }
            Some(_) => {
                self.traceback_lines = None;
                true
            }
            None => false,
        }
    }

    fn take_failure(&mut self, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        if may_explain(line) {
            self.suspect(line.text);
        }
        if let Some((kind, cause)) = failure(line) {
            self.fail(kind, cause, line, events);
        }
    }

    fn suspect(&mut self, line: &str) {
        self.suspect = Some(line.trim().to_owned());
    }

    /// Reports the first failure of a boot; what follows from it is not reported again.
    fn fail(&mut self, kind: FailureKind, cause: String, line: &Line<'_>, events: &mut Vec<ConsoleEvent>) {
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        // A panic is its own evidence; a prompt or a mode is the consequence of an earlier line.
        let earlier = if kind == FailureKind::KernelPanic { None } else { self.suspect.take() };
        let evidence = earlier.unwrap_or_else(|| line.text.trim().to_owned());
        events.push(ConsoleEvent::Failure(BootFailure { kind, cause, evidence }));
    }
}

/// Understands `Cloud-init v. 22.4.2 running 'init' at … Up 31.55 seconds.` and `… finished at … Datasource D.  Up …`.
fn cloud_init_message(text: &str) -> Option<ConsoleEvent> {
    let (_, rest) = text.split_once("Cloud-init v. ")?;
    let (version, rest) = rest.split_once(' ')?;
    let version = version.to_owned();
    let uptime_s = uptime_seconds(rest);
    if let Some(rest) = rest.strip_prefix("running '") {
        let (word, _) = rest.split_once('\'')?;
        return Some(ConsoleEvent::CloudInit { stage: CloudInitStage::from_word(word)?, version, uptime_s });
    }
    let rest = rest.strip_prefix("finished at ")?;
    let datasource =
        rest.split_once(" Datasource ").and_then(|(_, rest)| rest.rsplit_once(".  Up ")).map(|(name, _)| name);
    Some(ConsoleEvent::CloudInitFinished { datasource: datasource.map(str::to_owned), version, uptime_s })
}

fn uptime_seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.rsplit_once("Up ")?;
    let seconds: f64 = rest.split(' ').next()?.parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0).then_some(seconds)
}

/// Understands `ci-info: +++Authorized keys from F for user U+++` and `ci-info: no authorized SSH keys … for user U.`.
fn authorized_keys_message(text: &str) -> Option<ConsoleEvent> {
    let (_, text) = text.split_once("ci-info: ")?;
    if let Some((_, rest)) = text.split_once("Authorized keys from ") {
        let (file, user) = rest.split_once(" for user ")?;
        let user = user.trim_end_matches(['+', ' ']);
        return is_user_name(user).then(|| ConsoleEvent::LoginUser { user: user.into(), file: file.into() });
    }
    let (_, user) = text.split_once("no authorized SSH keys fingerprints found for user ")?;
    let user = user.trim_end_matches(['.', ' ']);
    is_user_name(user).then(|| ConsoleEvent::NoAuthorizedKeys { user: user.into() })
}

/// A name that may go on an `ssh` command line.
fn is_user_name(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn is_public_key(text: &str) -> bool {
    let mut words = text.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let blob = words.next().unwrap_or_default();
    let known = ["ssh-", "ecdsa-sha2-", "sk-"].iter().any(|prefix| kind.starts_with(prefix));
    known && blob.len() >= 40 && blob.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
}

fn problem_kind(line: &Line<'_>) -> Option<ProblemKind> {
    let text = line.text;
    let levels = [
        (".py[WARNING]: ", ProblemKind::CloudInitWarning),
        (".py[ERROR]: ", ProblemKind::CloudInitError),
        (".py[CRITICAL]: ", ProblemKind::CloudInitError),
        (".py[DEPRECATED]: ", ProblemKind::Deprecation),
    ];
    if let Some((_, kind)) = levels.iter().find(|(mark, _)| text.contains(mark)) {
        return Some(*kind);
    }
    if text.starts_with("[FAILED] ") {
        return Some(ProblemKind::UnitFailed);
    }
    if line.stamped && text.starts_with("Out of memory: Killed process") {
        return Some(ProblemKind::OutOfMemory);
    }
    let disk = ["I/O error, dev ", "EXT4-fs error", "XFS (", "BTRFS error"];
    let broken = |words: &&str| text.contains(*words) && (*words != "XFS (" || text.contains("rror"));
    (line.stamped && disk.iter().any(broken)).then_some(ProblemKind::DiskError)
}

/// Lines that come before a failure and tell more than it does.
fn may_explain(line: &Line<'_>) -> bool {
    let text = line.text;
    let marks = ["[ TIME ] ", "[DEPEND] ", "ALERT!", "Gave up waiting for root", "Warning: /dev/"];
    marks.iter().any(|mark| text.starts_with(mark))
        || text.contains("dracut-initqueue timeout")
        || text.contains("UNEXPECTED INCONSISTENCY")
}

fn failure(line: &Line<'_>) -> Option<(FailureKind, String)> {
    let text = line.text;
    if let Some(reason) = text.strip_prefix("Kernel panic - not syncing: ") {
        return Some((FailureKind::KernelPanic, panic_cause(reason)));
    }
    if text == "(initramfs)" || text.contains("Dropping to a shell!") {
        let cause = "the initramfs did not find the root file system and waits at its prompt";
        return Some((FailureKind::RootNotFound, cause.into()));
    }
    let modes = [
        "You are in emergency mode",
        "You are in rescue mode",
        "Entering emergency mode",
        "Welcome to emergency mode",
        "Cannot open access to console, the root account is locked",
        "[  OK  ] Started Emergency Shell",
        "[  OK  ] Started emergency.service",
        "[  OK  ] Reached target Emergency Mode",
        "[  OK  ] Reached target emergency.target",
    ];
    modes.iter().any(|words| text.contains(words)).then(|| {
        let cause = "the guest went to emergency mode: something it needs for booting failed";
        (FailureKind::EmergencyMode, cause.into())
    })
}

fn panic_cause(reason: &str) -> String {
    if reason.contains("Unable to mount root fs") {
        "the kernel panicked: it found no root file system".into()
    } else if reason.contains("IO-APIC + timer") {
        // The kernel measures its timer against a clock that runs on while an emulated processor waits for its turn.
        "the kernel panicked at its timer check, as happens now and then under emulation on a busy host: start it again"
            .into()
    } else {
        format!("the kernel panicked: {reason}")
    }
}
