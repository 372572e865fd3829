//! What the sandbox leaves of a process, and what becomes of an import whose reader is not one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::path::Path;
use std::process::Command;

use bulbil_control::ErrorCode;
use bulbil_store::StoreUsage;
use support::{Host, disks};

const PROGRAM: &str = env!("CARGO_BIN_EXE_image-reader-for-tests");

/// Runs steps in a sandboxed process; returns how many were done before one was refused.
#[track_caller]
fn steps_done(rights: &[&str], script: &[&str]) -> i32 {
    let status = Command::new(PROGRAM).args(rights).args(script).status().unwrap();
    let done = status.code().unwrap_or_else(|| panic!("{rights:?} {script:?}: {status}"));
    assert_ne!(done, 100, "this test needs Linux with seccomp and Landlock");
    done
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with one file, and another beside it.
fn two_directories() -> (tempfile::TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["inside", "outside"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        disks::write(&dir.path().join(name).join("file"), b"content");
    }
    let paths = ["inside", "outside"].map(|name| text(&dir.path().join(name)).to_owned());
    let [inside, outside] = paths;
    (dir, inside, outside)
}

#[test]
fn with_descriptors_only_nothing_can_be_opened_or_run() {
    let (_dir, inside, _) = two_directories();
    let file = format!("{inside}/file");
    let steps: [[&str; 2]; 6] = [
        ["read", &file],
        ["list", &inside],
        ["create", &format!("{inside}/new")],
        ["remove", &file],
        ["run", "/bin/true"],
        ["allocate-gib", "5"],
    ];
    for step in steps {
        assert_eq!(steps_done(&["nothing"], &step), 0, "{step:?}");
    }
    assert_eq!(steps_done(&["nothing"], &["allocate-gib", "1"]), 1);
}

#[test]
fn a_process_that_was_given_many_descriptors_is_held_back_as_well() {
    assert_eq!(steps_done(&["many-open"], &["read", "/etc/passwd"]), 0);
}

#[test]
fn a_limit_that_is_lower_already_stays() {
    let steps_done = |limit: &str| {
        let script = format!("{limit} exec \"$0\" nothing allocate-gib 3");
        Command::new("sh").args(["-c", &script, PROGRAM]).status().unwrap().code()
    };
    assert_eq!(steps_done(""), Some(1));
    assert_eq!(steps_done("ulimit -S -v 2097152;"), Some(0));
}

#[test]
fn in_a_readable_directory_files_are_read_and_nothing_is_changed() {
    let (_dir, inside, outside) = two_directories();
    let (file, other) = (format!("{inside}/file"), format!("{outside}/file"));
    let rights = ["read-dir", inside.as_str()];
    assert_eq!(steps_done(&rights, &["read", &file, "list", &inside]), 2);
    let link = format!("{inside}/link");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    let around = format!("{inside}/../outside/file");
    let new = format!("{inside}/new");
    let steps: [[&str; 2]; 10] = [
        ["read", &other],
        ["read", &link],
        ["read", &around],
        ["read", "/etc/passwd"],
        ["list", &outside],
        ["create", &new],
        ["truncate", &file],
        ["rename", &file],
        ["remove", &file],
        ["run", "/bin/true"],
    ];
    for step in steps {
        assert_eq!(steps_done(&rights, &step), 0, "{step:?}");
    }
    assert_eq!(std::fs::read(file).unwrap(), b"content");
}

#[test]
fn in_a_writable_directory_files_are_made_and_removed_and_nowhere_else() {
    let (_dir, inside, outside) = two_directories();
    let rights = ["write-dir", inside.as_str()];
    let new = format!("{inside}/new");
    let renamed = format!("{inside}/new.renamed");
    assert_eq!(steps_done(&rights, &["create", &new, "truncate", &new, "rename", &new, "remove", &renamed]), 4);
    let other = format!("{outside}/file");
    let steps: [[&str; 2]; 6] = [
        ["read", &other],
        ["create", &format!("{outside}/new")],
        ["truncate", &other],
        ["rename", &other],
        ["remove", &other],
        ["run", "/bin/true"],
    ];
    for step in steps {
        assert_eq!(steps_done(&rights, &step), 0, "{step:?}");
    }
    assert_eq!(std::fs::read(other).unwrap(), b"content");
}

/// Imports with a program in place of the reader; the import must fail and leave nothing.
#[track_caller]
fn import_with(program: &Path, expected: &str) {
    let mut host = Host::closed();
    host.open_with(program);
    let disk = host.path("disk.raw");
    disks::write(&disk, &disks::content(0x5eed_0051, 1 << 20));
    let error = host.try_import(&disk, "disk").unwrap_err();
    let causes = error.causes().join(": ");
    assert!(causes.contains(expected), "{}: {causes}", program.display());
    assert_eq!(error.code(), ErrorCode::Failed, "{causes}");
    assert!(host.images().is_empty());
    assert_eq!(host.usage(), StoreUsage::default());
}

#[test]
fn a_program_that_is_no_reader_fails_the_import() {
    import_with(Path::new("/nonexistent/program"), "cannot start the image reader: No such file");
    import_with(Path::new("/bin/false"), "the image reader ended too early (exit status 1)");
}

#[test]
fn a_reader_that_lies_fails_the_import() {
    let dir = tempfile::tempdir().unwrap();
    let liar = |lie: &str| {
        let path = dir.path().join(lie);
        std::os::unix::fs::symlink(PROGRAM, &path).unwrap();
        path
    };
    import_with(&liar("lies-about-message"), "a message of 4294967295 bytes");
    import_with(&liar("lies-about-size"), "a description that cannot be: the size of the disk");
    import_with(&liar("lies-about-length"), "513 bytes instead of 512");
    import_with(&liar("lies-about-ranges"), "ranges that cannot be");
}
