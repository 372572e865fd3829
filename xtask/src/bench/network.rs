//! An S3 server behind a slow network, and what passed through.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

/// In the path of every pack.
const PACKS: &str = "/packs/";

/// A running `s3_behind_network` (crates/bulbil-testkit/examples).
#[derive(Debug)]
pub(crate) struct SlowS3 {
    child: Child,
    /// Until it is dropped.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    endpoint: String,
    /// A store in the bucket.
    location: String,
    /// The directory whose files are the bucket's objects.
    pub(crate) objects: PathBuf,
    /// What a process needs to use the bucket.
    environment: Vec<(String, String)>,
}

/// What passed in some time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) requests: u64,
    /// Bytes of the answers' bodies.
    pub(crate) bytes: u64,
    /// Bytes of frames that were asked for more than once. The end of a pack is read for its footer, whatever else is there.
    pub(crate) repeated_bytes: u64,
    requested: BTreeMap<String, Vec<(u64, u64)>>,
}

impl SlowS3 {
    pub(crate) fn start(program: &Path, latency_ms: u32, bytes_per_s: u64) -> Result<Self> {
        let mut command = Command::new(program);
        command.args([latency_ms.to_string(), bytes_per_s.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("a server without standard output")?);
        let (endpoint, location, objects, environment) = Default::default();
        let mut server = Self { child, stdin, stdout, endpoint, location, objects, environment };
        loop {
            let line = server.line()?;
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["endpoint", endpoint] => server.endpoint = endpoint.to_owned(),
                ["location", location] => server.location = location.to_owned(),
                ["objects", objects] => server.objects = objects.into(),
                ["environment", name, value] => server.environment.push((name.to_owned(), value.to_owned())),
                ["ready"] => return Ok(server),
                _ => bail!("the S3 server behind a network says `{line}`"),
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line).context("cannot read from the S3 server behind a network")?;
        if read == 0 {
            bail!("the S3 server behind a network has ended");
        }
        Ok(line.trim_end().to_owned())
    }

    /// The variables of a process whose store is in the bucket.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        let store = ("BULBIL_STORE", self.location.as_str());
        self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).chain([store])
    }

    /// A command that fetches a whole object.
    pub(crate) fn download_command(&self, object: &str, target: &Path) -> Result<Command> {
        let value = |wanted| self.environment.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let keys = value("AWS_ACCESS_KEY_ID").zip(value("AWS_SECRET_ACCESS_KEY"));
        let (id, secret) = keys.context("an S3 server without keys")?;
        let bucket = self.objects.file_name().context("a bucket without a name")?.to_string_lossy();
        let mut command = Command::new("curl");
        command.args(["--fail", "--silent", "--show-error", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user"]);
        // What later versions send by themselves.
        command
            .arg(format!("{id}:{secret}"))
            .args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"])
            .arg("--output")
            .arg(target);
        command.arg(format!("{}/{bucket}/{object}", self.endpoint));
        Ok(command)
    }

    /// What passed since this was last asked.
    pub(crate) fn take(&mut self) -> Result<Traffic> {
        let stdin = self.stdin.as_mut().context("a server without standard input")?;
        writeln!(stdin, "take").context("cannot write to the S3 server behind a network")?;
        let mut traffic = Traffic::default();
        loop {
            let line = self.line()?;
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["request", method, path, range] => {
                    let object = self.objects.parent().map(|root| root.join(path.trim_start_matches('/')));
                    let size_bytes = object.and_then(|object| object.metadata().ok()).map(|found| found.len());
                    traffic.add(method, path, range, size_bytes)?;
                }
                ["response-bytes", bytes] => traffic.bytes = bytes.parse().context("no number of bytes")?,
                ["taken"] => return Ok(traffic),
                _ => bail!("the S3 server behind a network says `{line}`"),
            }
        }
    }
}

impl Drop for SlowS3 {
    fn drop(&mut self) {
        // It ends by itself then, and removes its objects.
        drop(self.stdin.take());
        drop(self.child.wait());
    }
}

impl Traffic {
    fn add(&mut self, method: &str, path: &str, range: &str, size_bytes: Option<u64>) -> Result<()> {
        self.requests += 1;
        let bounds = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
        // Ranges from the end, and whole objects, are no frames.
        if let (Some((first, last)), true) = (bounds, method == "GET" && path.contains(PACKS))
            && !first.is_empty()
        {
            let (first, last): (u64, u64) = (first.parse()?, last.parse()?);
            if size_bytes == Some(last + 1) {
                return Ok(());
            }
            let known = self.requested.entry(path.to_owned()).or_default();
            let overlap = |(from, to): &(u64, u64)| (to + 1).min(last + 1).saturating_sub(first.max(*from));
            self.repeated_bytes += known.iter().map(overlap).sum::<u64>();
            known.push((first, last));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_two_requests_have_in_common_are_counted() {
        let mut traffic = Traffic::default();
        for (path, range) in [
            ("/b/packs/1", "bytes=0-99"),
            ("/b/packs/1", "bytes=100-199"),
            ("/b/packs/2", "bytes=0-99"),
            ("/b/packs/1", "bytes=190-209"),
            ("/b/manifests/1", "bytes=0-99"),
            ("/b/manifests/1", "bytes=0-99"),
            ("/b/packs/1", "-"),
            ("/b/packs/2", "bytes=50-999"),
        ] {
            traffic.add("GET", path, range, Some(1000)).unwrap();
        }
        assert_eq!((traffic.requests, traffic.repeated_bytes), (8, 10));
    }
}
