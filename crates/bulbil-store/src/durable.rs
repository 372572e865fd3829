//! Directories whose names are durable.

use std::io;
use std::path::Path;

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}

/// Makes a directory and those above it, or takes one that is there. Its name is durable when this returns.
///
/// From the top down, each durable before the next one: so where a process was killed in this, only the lowest that is
/// there may still be lost.
///
/// # Errors
/// When a directory cannot be made or synced.
pub fn make_directory(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let missing: Vec<_> = path.ancestors().take_while(|directory| !directory.is_dir()).collect();
    let lowest = path.ancestors().nth(missing.len()).and_then(Path::parent);
    match lowest.map_or(Ok(()), sync_directory) {
        // A directory in one that this user may not read is not of our making.
        Err(e) if e.kind() != io::ErrorKind::PermissionDenied => return Err(e),
        _ => {}
    }
    for directory in missing.into_iter().rev() {
        match std::fs::create_dir(directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        sync_directory(directory.parent().unwrap_or(directory))?;
    }
    Ok(())
}
