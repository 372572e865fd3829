//! The disks that are measured with.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::bench_dir;
use super::process::fresh_directory;
use crate::images::{Image, Profile, build};
use crate::run::{Cmd, say, workspace_root};

/// Data on the large disk: enough that starting and ending a measurement does not count.
const LARGE_DATA_BYTES: u64 = 1200 << 20;

/// Where the large disk's files come from: programs, libraries and texts, as on any real disk.
const LARGE_SOURCE: &str = "/usr";

/// The Debian guest's disk.
pub(crate) struct Debian {
    pub(crate) raw: PathBuf,
    pub(crate) qcow2: PathBuf,
    /// The same files in a file system made anew.
    pub(crate) rebuilt: PathBuf,
}

/// Builds the Debian disks unless they are there.
pub(crate) fn debian() -> Result<Debian> {
    let raw = build(Image::Debian { profile: Profile::Fast, rebuilt: true }, false)?;
    Ok(Debian { qcow2: raw.with_extension("qcow2"), rebuilt: raw.with_file_name("debian-12-rebuilt.raw"), raw })
}

/// A file system full of this machine's own files; made once and kept.
pub(crate) fn large() -> Result<PathBuf> {
    made_of_files("large.raw", LARGE_DATA_BYTES)
}

/// The same of twice the size, for conversions.
pub(crate) fn huge() -> Result<PathBuf> {
    made_of_files("huge.raw", 2 * LARGE_DATA_BYTES)
}

/// Disks of a server, to be stored in this order; built once and kept.
pub(crate) fn servers() -> Result<[(&'static str, PathBuf); 4]> {
    let dir = bench_dir().join("disks");
    Cmd::new(workspace_root().join("images/build-server-disks.sh")).args([&dir]).run()?;
    Ok([
        ("1. a server", dir.join("server.raw")),
        ("2. updated in place", dir.join("server-updated.raw")),
        ("3. the updated one made anew", dir.join("server-remade.raw")),
        ("4. the first one made anew", dir.join("server-again.raw")),
    ])
}

fn made_of_files(name: &str, data_bytes: u64) -> Result<PathBuf> {
    let dir = bench_dir().join("disks");
    let disk = dir.join(name);
    if disk.is_file() {
        return Ok(disk);
    }
    say(format!("making {} out of {LARGE_SOURCE}", disk.display()));
    let tree = dir.join("tree");
    fresh_directory(&tree)?;
    let copied_bytes = copy_files(Path::new(LARGE_SOURCE), &tree, data_bytes)?;
    if copied_bytes < data_bytes / 2 {
        bail!("{LARGE_SOURCE} has only {copied_bytes} bytes of files to make a disk of");
    }
    // Room for the file system's own tables, and little else: random reads should meet data.
    let size_kib = copied_bytes / 1024 * 108 / 100 + (48 << 10);
    let unfinished = dir.join("unfinished.raw");
    Cmd::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-d"])
        .args([&tree, &unfinished])
        .args([format!("{size_kib}k")])
        .run()?;
    fs::rename(&unfinished, &disk).with_context(|| format!("cannot rename {}", unfinished.display()))?;
    fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(disk)
}

/// Copies regular files in the order of their names until `limit_bytes` are reached.
fn copy_files(from: &Path, to: &Path, limit_bytes: u64) -> Result<u64> {
    let mut copied = 0;
    let mut entries: Vec<_> =
        fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(metadata) = fs::symlink_metadata(&source) else { continue };
        if metadata.is_dir() {
            fs::create_dir(&target).with_context(|| format!("cannot create {}", target.display()))?;
            copied += copy_files(&source, &target, limit_bytes - copied)?;
        } else if metadata.is_file() && metadata.nlink() == 1 && fs::copy(&source, &target).is_ok() {
            // A file with several names would come several times; one that is not readable is left out.
            copied += metadata.len().next_multiple_of(4096);
        }
        if copied >= limit_bytes {
            return Ok(limit_bytes);
        }
    }
    Ok(copied)
}

/// A copy of a disk, cut or filled up with a hole to `size_bytes`.
pub(crate) fn resized(disk: &Path, target: &Path, size_bytes: u64) -> Result<()> {
    Cmd::new("cp").args(["--sparse=always"]).args([disk, target]).run()?;
    let file = File::options().write(true).open(target).with_context(|| format!("cannot open {}", target.display()))?;
    file.set_len(size_bytes).with_context(|| format!("cannot change the size of {}", target.display()))
}

/// Reads a file once, so that whoever reads it first afterwards has no disadvantage.
pub(crate) fn warm_up(path: &Path) -> Result<()> {
    let fail = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(fail)?;
    let mut buf = vec![0; 1 << 20];
    while file.read(&mut buf).with_context(fail)? > 0 {}
    Ok(())
}
