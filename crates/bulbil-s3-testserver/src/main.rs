//! An S3 server over a directory, for tests: a process of its own, as a service is.
//!
//! ```text
//! bulbil-s3-testserver DIRECTORY BUCKET [PAGE]
//! ```
//! It listens on a free loopback port and prints `http://127.0.0.1:PORT` as its only line. Requests are
//! signed with the key `bulbil-test` and the secret `bulbil-test-secret`. A list has at most PAGE objects
//! for each request, 1000 unless told. The server ends when its standard input does, so that it outlives no
//! test, however that ends.
//!
//! Signatures, bodies and XML are those of `s3s`; the objects, and the promise that a conditional put has
//! one winner, are in [`buckets`].

#![forbid(unsafe_code)]

mod buckets;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

use crate::buckets::Buckets;

const KEY_ID: &str = "bulbil-test";
const SECRET: &str = "bulbil-test-secret";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let usage = "usage: bulbil-s3-testserver DIRECTORY BUCKET [PAGE]";
    let mut arguments = std::env::args().skip(1);
    let root = PathBuf::from(arguments.next().context(usage)?);
    let bucket = arguments.next().context(usage)?;
    let page = arguments.next().map_or(Ok(1000), |page| page.parse()).context(usage)?;
    std::fs::create_dir_all(root.join(&bucket)).context("cannot make the bucket")?;
    let mut service = S3ServiceBuilder::new(Buckets::new(root, page)?);
    service.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
    let service = service.build();

    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("cannot listen")?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "http://{}", listener.local_addr()?)?;
    stdout.flush()?;
    let serve = async {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            drop(stream.set_nodelay(true));
            let service = service.clone();
            tokio::spawn(async move {
                // A client that goes away is no event.
                drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
            });
        }
    };
    let mut ignored = Vec::new();
    tokio::select! {
        () = serve => {}
        _ = async { tokio::io::stdin().read_to_end(&mut ignored).await } => {}
    }
    Ok(())
}
