//! The program that the tests of this crate start as image reader. By the name it is called, it is one that keeps to
//! the protocol, or one that does not; with other arguments it sandboxes itself and does what they say, which a test
//! cannot do in a process of its own.

use std::io::{self, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use bulbil_control::sandbox::{LandlockLevel, Sandbox};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some((name, words)) = words.split_first() else { return ExitCode::from(2) };
    let done = match (name.rsplit('/').next().unwrap_or_default(), words) {
        (lie, ["image-reader"]) if lie.starts_with("lies-about-") => lie_about(lie).is_ok(),
        (_, ["image-reader"]) => bulbil_control::run_image_reader().is_ok(),
        (_, ["read-dir", directory, script @ ..]) => return run(Sandbox::reader().readable_dir(directory), script),
        (_, ["write-dir", directory, script @ ..]) => return run(Sandbox::reader().writable_dir(directory), script),
        (_, ["many-open", script @ ..]) => {
            let open: Vec<_> = (0..100).map(|_| std::fs::File::open("/dev/null")).collect();
            let done = run(Sandbox::reader(), script);
            drop(open);
            return done;
        }
        (_, ["nothing", script @ ..]) => return run(Sandbox::reader(), script),
        _ => false,
    };
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Ends with how many steps were done, in order, before one was refused.
fn run(sandbox: Sandbox, script: &[&str]) -> ExitCode {
    match sandbox.apply(true) {
        Ok(report) if report.landlock != LandlockLevel::None => {}
        _ => return ExitCode::from(100),
    }
    let done = script.chunks(2).take_while(|step| try_step(step).is_some()).count();
    ExitCode::from(u8::try_from(done).unwrap_or(u8::MAX))
}

fn try_step(step: &[&str]) -> Option<()> {
    let [verb, path] = step else { return None };
    let path = Path::new(path);
    match *verb {
        "read" => std::fs::read(path).ok().map(drop),
        "list" => std::fs::read_dir(path).ok()?.next().map(drop),
        "create" => std::fs::File::create(path).ok().map(drop),
        "truncate" => std::fs::File::options().write(true).truncate(true).open(path).ok().map(drop),
        "rename" => std::fs::rename(path, path.with_extension("renamed")).ok(),
        "remove" => std::fs::remove_file(path).ok(),
        "run" => std::process::Command::new(path).status().ok().map(drop),
        "allocate-gib" => {
            let bytes = usize::try_from(path.to_str()?.parse::<u64>().ok()? << 30).ok()?;
            Vec::<u8>::new().try_reserve_exact(bytes).ok()
        }
        _ => None,
    }
}

/// The size of the disk that a lying reader pretends to have.
const SIZE_BYTES: u64 = 1 << 20;

/// Plays a reader that was taken over.
fn lie_about(lie: &str) -> io::Result<()> {
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let lanes = receive_lanes(&control)?;
    let mut header = [0; 4];
    control.read_exact(&mut header)?;
    control.read_exact(&mut vec![0; u32::from_le_bytes(header) as usize])?;
    let size_bytes = if lie == "lies-about-size" { u64::MAX } else { SIZE_BYTES };
    let answer = serde_json::json!({
        "answer": "opened",
        "disk": {
            "format": "raw", "variant": null, "size_bytes": size_bytes, "file_bytes": 0, "data_bytes": null,
            "cluster_bytes": null, "compression": null, "compressed_clusters": 0, "snapshots": [], "identifier": null,
            "creator": null, "notes": [],
        },
        "is_file": false,
        "sandbox": {"landlock": "enforced", "seccomp": true, "missing": []},
    });
    let json = answer.to_string();
    let claimed = if lie == "lies-about-message" { u32::MAX } else { u32::try_from(json.len()).unwrap_or_default() };
    control.write_all(&claimed.to_le_bytes())?;
    control.write_all(json.as_bytes())?;
    let mut threads = Vec::new();
    for lane in lanes {
        let too_long = lie == "lies-about-length";
        threads.push(std::thread::spawn(move || serve_zeros(lane, too_long)));
    }
    // Covers nothing, so that a walk over the ranges would never end.
    while control.read_exact(&mut [0; 8]).is_ok() {
        control.write_all(&[0, 0, 0, 0, 8, 0, 0, 0])?;
        control.write_all(&0_u64.to_le_bytes())?;
    }
    Ok(())
}

fn serve_zeros(mut lane: UnixStream, too_long: bool) -> io::Result<()> {
    let mut request = [0_u8; 16];
    while lane.read_exact(&mut request).is_ok() {
        let [_, _, _, _, _, _, _, _, a, b, c, d, ..] = request;
        let len = u32::from_le_bytes([a, b, c, d]) + u32::from(too_long);
        lane.write_all(&0_u32.to_le_bytes())?;
        lane.write_all(&len.to_le_bytes())?;
        lane.write_all(&vec![0; len as usize])?;
    }
    Ok(())
}

fn receive_lanes(control: &UnixStream) -> io::Result<Vec<UnixStream>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(control, &mut [io::IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    // The image and its scratch file are the last two.
    received.truncate(received.len().saturating_sub(2));
    Ok(received.into_iter().map(UnixStream::from).collect())
}
