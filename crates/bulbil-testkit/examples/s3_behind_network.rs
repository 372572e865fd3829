//! What `cargo xtask bench store --part cold-boot` starts: an S3 server with one bucket, behind a slow network.
//!
//! ```text
//! s3_behind_network LATENCY_MS BYTES_PER_S
//! ```
//! It prints `endpoint URL`, `location LOCATION` of a store in the bucket, `objects DIRECTORY` whose files are the
//! bucket's objects, `environment NAME VALUE` for what uses it, and `ready`. For each line on standard input it prints
//! what has passed since the last one: `request METHOD PATH RANGE` for each (`-`: the whole object), `response-bytes N`,
//! and `taken`. It ends when standard input does.

use std::error::Error;
use std::io::{self, BufRead as _, Write as _};
use std::time::Duration;

use bulbil_testkit::{HttpFaultProxy, ProxyOptions, S3Server};

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: s3_behind_network LATENCY_MS BYTES_PER_S";
    let [latency_ms, bytes_per_s] = std::env::args().skip(1).collect::<Vec<_>>().try_into().map_err(|_| usage)?;
    let options = ProxyOptions {
        latency: Duration::from_millis(latency_ms.parse()?),
        bytes_per_s: Some(bytes_per_s.parse()?),
        log: true,
        ..ProxyOptions::default()
    };
    let server = S3Server::start();
    let proxy = HttpFaultProxy::start(server.address(), options);
    let mut out = io::stdout().lock();
    writeln!(out, "endpoint {}", proxy.endpoint())?;
    writeln!(out, "location {}", S3Server::location_at(&proxy.endpoint(), "store"))?;
    writeln!(out, "objects {}", server.objects().display())?;
    for (name, value) in S3Server::environment() {
        writeln!(out, "environment {name} {value}")?;
    }
    writeln!(out, "ready")?;
    let mut told_bytes = 0;
    for line in io::stdin().lock().lines() {
        line?;
        for request in proxy.take_log() {
            let range = request.range.as_deref().unwrap_or("-");
            writeln!(out, "request {} {} {range}", request.method, request.path)?;
        }
        let all_bytes: u64 = proxy.passed().values().map(|passed| passed.response_bytes).sum();
        writeln!(out, "response-bytes {}", all_bytes - told_bytes)?;
        told_bytes = all_bytes;
        writeln!(out, "taken")?;
        out.flush()?;
    }
    Ok(())
}
