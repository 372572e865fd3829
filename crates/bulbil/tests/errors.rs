//! What a user gets to read when something cannot be done, and that nothing has changed then.
//! Needs `qemu-img`, `qemu-system-x86_64` and `ssh-keygen`.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod support;

use std::net::TcpListener;

use bulbil_testkit::Rng;
use support::Home;
use support::disks::{self, run};

const SEED: u64 = 0x5eed_0041;

/// A command line, its exit status, and what standard error says among other things.
type Case<'a> = (&'a [&'a str], i32, &'a [&'a str]);

#[track_caller]
fn check(home: &Home, cases: &[Case]) {
    let before = home.state();
    for (args, status, says) in cases {
        let ran = home.run(args).refused(*status, says);
        println!("$ {}\n{}", ran.command, ran.stderr);
        assert_eq!(home.state(), before, "`{}` changed something", ran.command);
    }
}

/// A home with one small image, `small:1`.
fn home_with_image() -> Home {
    let home = Home::new();
    add_image(&home);
    home
}

fn add_image(home: &Home) {
    let disk = home.file("small.raw", disks::content(SEED, 4 << 20));
    home.ok(&["image", "import", &disk]);
}

/// A file of 128 KiB with bytes at places.
fn file_with(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 128 << 10];
    for (at, part) in parts {
        bytes[*at..at + part.len()].copy_from_slice(part);
    }
    bytes
}

/// A sound qcow2 image.
fn qcow2(home: &Home) -> Vec<u8> {
    let raw = home.file("plain.raw", disks::content(SEED + 1, 2 << 20));
    let image = home.text_path("plain.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &image]);
    std::fs::read(image).unwrap()
}

#[test]
fn files_that_are_no_disks_are_refused() {
    let home = home_with_image();
    let text = home.file("notes.raw", "dear diary\n");
    let empty = home.file("empty.raw", "");
    let noise = home.file("noise.raw", Rng::new(SEED).bytes(100_000));
    let directory = home.text_path("");
    let missing = home.text_path("missing.raw");
    let cannot_import = |path: &str| format!("error: cannot import `{path}`\n");
    check(
        &home,
        &[
            (
                &["image", "import", &text],
                1,
                &[&cannot_import(&text), "caused by: not a disk image: it is a text file\n"],
            ),
            (&["image", "import", &empty], 1, &[&cannot_import(&empty), "0 bytes is an empty file\n"]),
            (&["image", "import", &directory], 1, &["error: cannot import `", "this is a directory"]),
            (&["image", "import", "/dev/null"], 1, &[&cannot_import("/dev/null"), "this is a character device"]),
            (
                &["image", "import", &missing],
                1,
                &[&format!("error: cannot open `{missing}`\n"), "caused by: No such file or directory"],
            ),
            (&["launch", &missing], 1, &[&format!("error: cannot open `{missing}`\n")]),
            (
                &["image", "import", &noise],
                1,
                &[&cannot_import(&noise), "it has no partition table, boot sector or known file system"],
            ),
            (&["launch", &text, "--name", "web"], 1, &[&cannot_import(&text), "it is a text file"]),
            (&["image", "import", &noise, "--format", "tape"], 2, &["`tape`", "raw, qcow2, vhd, vhdx, vmdk or vdi"]),
            (&["image", "import", &noise, "--format", "qcow2"], 1, &["declared qcow2, found no header of it"]),
            (&["image", "import", &noise, "--as", "a/b"], 2, &["`a/b` is not a name"]),
            (&["image", "import", &noise, "--as", "a:"], 2, &["`` is not a name"]),
        ],
    );
    let fifo = home.text_path("fifo");
    run("mkfifo", &[&fifo]);
    check(&home, &[(&["image", "import", &fifo], 1, &[&cannot_import(&fifo), "FIFO"])]);
}

#[test]
fn images_that_cannot_be_taken_are_refused() {
    let home = home_with_image();
    let path = |name: &str| home.text_path(name);
    let sound = qcow2(&home);
    let poked = |at: usize, bytes: &[u8]| {
        let mut image = sound.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let truncated = home.file("truncated.qcow2", &sound[..sound.len() / 2]);
    let encrypted = home.file("encrypted.qcow2", poked(32, &[0, 0, 0, 2]));
    let corrupt = home.file("corrupt.qcow2", poked(36, &[0; 4]));
    let (backed, external) = (path("backed.qcow2"), path("external.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &path("plain.raw"), "-F", "raw", &backed]);
    let data_file = format!("data_file={}", path("external.data"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data_file, &external, "1M"]);
    let vmdk = home.file("disk.vmdk", file_with(&[(0, b"KDMV")]));
    let vhd = home.file("disk.vhd", file_with(&[((128 << 10) - 512, b"conectix")]));
    let qed = home.file("disk.qed", file_with(&[(0, b"QED\0")]));
    let iso = home.file("cd.iso", file_with(&[(0x8001, b"CD001")]));
    let luks = home.file("luks.raw", file_with(&[(0, b"LUKS\xba\xbe")]));
    let two = home.file("two.qcow2", [&sound[..], &file_with(&[((128 << 10) - 512, b"conectix")])].concat());
    let gzip = home.file("disk.raw.gz", file_with(&[(0, b"\x1f\x8b\x08")]));
    check(
        &home,
        &[
            (
                &["image", "import", &truncated],
                1,
                &[&format!("error: cannot import `{truncated}`\n"), "truncated at byte"],
            ),
            (&["image", "import", &encrypted], 1, &["caused by: encrypted: the content, with LUKS"]),
            (&["image", "import", &corrupt], 1, &["caused by: corrupt: L1 table too small"]),
            (&["image", "import", &backed], 1, &["caused by: has-backing-file: \"", "plain.raw"]),
            (
                &["image", "import", &external],
                1,
                &["caused by: external-data-file: the content is in \"", "external.data"],
            ),
            (&["image", "import", &vmdk], 1, &["caused by: unsupported-format: VMDK"]),
            (&["image", "import", &vhd], 1, &["caused by: checksum: that of the footer is wrong"]),
            (&["image", "import", &qed], 1, &["caused by: unsupported-format: QED"]),
            (&["image", "import", &iso], 1, &["caused by: unsupported-format: ISO 9660"]),
            (&["image", "import", &luks], 1, &["caused by: encrypted: a LUKS container"]),
            (&["image", "import", &gzip], 1, &["caused by: corrupt: the gzip file does not unpack"]),
            (&["image", "import", &two], 1, &["caused by: ambiguous-format: the file is both qcow2 and VHD"]),
            (&["image", "import", &vmdk, "--format", "raw"], 1, &["format-mismatch: declared raw, found VMDK"]),
            (&["launch", &backed], 1, &["error: cannot import `", "has-backing-file"]),
        ],
    );
}

#[test]
fn an_error_says_what_to_type_next() {
    let home = home_with_image();
    let (backed, external) = (home.text_path("backed.qcow2"), home.text_path("external.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &home.text_path("small.raw"), "-F", "raw", &backed]);
    let data_file = format!("data_file={}", home.text_path("external.data"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data_file, &external, "1M"]);
    let qed = home.file("disk.qed", file_with(&[(0, b"QED\0")]));
    let zip = home.file("disk.zip", file_with(&[(0, b"PK\x03\x04")]));
    let encrypted = home.text_path("encrypted.qcow2");
    let key = ["--object", "secret,id=key,data=sesame", "-o", "encrypt.format=aes,encrypt.key-secret=key"];
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &key[..], &[&encrypted, "1M"]].concat());
    let noise = home.file("noise.raw", Rng::new(SEED).bytes(100 << 10));
    let flatten = "hint: flatten it first: qemu-img convert -O qcow2 ";
    let convert = "hint: convert it first: qemu-img convert -O qcow2 ";
    check(
        &home,
        &[
            (&["image", "import", &backed], 1, &["hint: name the image it is based on: --parent FILE\n"]),
            (&["image", "import", &external], 1, &[flatten]),
            (&["image", "import", &qed], 1, &[convert]),
            (&["image", "import", &zip], 1, &["hint: unpack it first"]),
            (
                &["image", "import", "https://example.org/disk.qcow2"],
                1,
                &["cannot open `https", "hint: only files are"],
            ),
            (&["disk", "info", "nbd://127.0.0.1/disk"], 1, &["cannot open `nbd", "hint: only files are read"]),
            (&["image", "import", &noise], 1, &["hint: ", "say so: --format raw\n"]),
            (&["image", "import", &backed, "--parent", &noise], 1, &["hint: ", "disk convert -f raw IN OUT.qcow2"]),
            // A launch has no such option.
            (&["launch", &noise], 1, &[&format!("say so: bulbil image import {noise} --format raw\n")]),
            (&["launch", "small", "--snapshot", "x"], 2, &["--snapshot fits a file that is imported", "hint: "]),
            (&["image", "import", &encrypted], 1, &["encrypted: ", "hint: decrypt a copy of it: qemu-img convert"]),
        ],
    );
}

#[test]
fn a_file_name_that_is_not_text_is_no_trouble_of_the_connection() {
    use std::os::unix::ffi::OsStrExt as _;
    let home = home_with_image();
    let path = home.path("disk").with_extension(std::ffi::OsStr::from_bytes(b"\xff.raw"));
    std::fs::copy(home.path("small.raw"), &path).unwrap();
    let output = home.command(&["image", "import"]).arg(&path).args(["--as", "odd"]).output().unwrap();
    let ran = support::Ran::new("image import of a name in another encoding".to_owned(), output);
    if ran.status != Some(0) {
        let ran = ran.refused(1, &["error: cannot import `", "UTF-8"]);
        assert!(!ran.stderr.contains("connection"), "{ran}");
    }
}

#[test]
fn a_name_with_other_content_is_kept() {
    let home = home_with_image();
    let other = home.file("other.raw", disks::content(SEED + 2, 4 << 20));
    let hint = "hint: give it another version: --as NAME:VERSION, or see: bulbil image list\n";
    let says = ["error: image `small:1` exists already, with other content\n", hint];
    check(&home, &[(&["image", "import", &other, "--as", "small"], 1, &says)]);
    home.ok(&["image", "import", &other, "--as", "small:2"]);
    // The same content again is no error and no second image.
    let before = home.state();
    home.ok(&["image", "import", &home.text_path("small.raw")]);
    assert_eq!(home.state(), before);
}

#[test]
fn images_that_are_not_there_are_named() {
    let home = home_with_image();
    let hint = "hint: see which there are: bulbil image list; or import one: bulbil image import FILE\n";
    let no_image = |name: &str| format!("error: there is no image `{name}`\n");
    check(
        &home,
        &[
            (&["launch", "nosuch"], 1, &[&format!("{}{hint}", no_image("nosuch"))]),
            (&["image", "show", "nosuch"], 1, &[&format!("{}{hint}", no_image("nosuch"))]),
            (&["image", "rm", "nosuch"], 1, &[&format!("{}{hint}", no_image("nosuch"))]),
            (&["image", "show", "small:2"], 1, &[&no_image("small:2"), hint]),
            (&["image", "show", "ami-0123456789abcdef0"], 1, &[&no_image("ami-0123456789abcdef0"), hint]),
            (&["image", "show", "../etc"], 1, &[&no_image("../etc"), hint]),
            (&["image", "show", "%2e?x=y#z"], 1, &[&no_image("%2e?x=y#z"), hint]),
            (&["image", "show", ".."], 1, &[&no_image(".."), hint]),
        ],
    );
}

#[test]
fn instances_that_are_not_there_are_named() {
    let home = Home::new();
    let says = "error: there is no instance `nosuch`\nhint: see which there are: bulbil list\n";
    let before = home.state();
    for args in [
        &["show", "nosuch"][..],
        &["stop", "nosuch"],
        &["start", "nosuch"],
        &["reboot", "nosuch"],
        &["exec", "nosuch", "--", "true"],
        &["shell", "nosuch"],
        &["logs", "nosuch"],
        &["logs", "nosuch", "--follow"],
        &["console", "nosuch"],
        &["rm", "nosuch"],
        &["rm", "nosuch", "--force"],
    ] {
        let ran = home.run(args).refused(1, &[]);
        assert_eq!(ran.stderr, says, "{ran}");
    }
    assert_eq!(home.state(), before);
    check(&home, &[(&["show", "i-0123456789abcdef0"], 1, &["there is no instance `i-0123456789abcdef0`"])]);
}

#[test]
fn an_empty_name_is_a_name_of_nothing() {
    let home = Home::new();
    let before = home.state();
    for args in
        [&["show", ""][..], &["stop", ""], &["start", ""], &["rm", ""], &["image", "show", ""], &["image", "rm", ""]]
    {
        let ran = home.run(args);
        assert!(matches!(ran.status, Some(1 | 2)), "{ran}");
        assert!(!ran.stderr.contains("API"), "people type commands, not paths of the API: {ran}");
    }
    assert_eq!(home.state(), before);
}

#[test]
fn launches_that_make_no_sense_are_refused() {
    let home = home_with_image();
    check(
        &home,
        &[
            (
                &["launch", "small", "--personality", "azur"],
                2,
                &["unknown personality `azur`: use `ec2`, `alibaba`, `nocloud`"],
            ),
            (&["launch", "small", "--memory", "10x"], 2, &["`10x` is not a size", "`20GiB`"]),
            (&["launch", "small", "--memory", "1.5GiB"], 2, &["`1.5GiB` is not a size"]),
            (&["launch", "small", "--disk", "-1"], 2, &[]),
            (&["launch", "small", "--memory", "0"], 1, &["error: the memory must be whole MiB, at least 64MiB"]),
            (&["launch", "small", "--memory", "100000000"], 1, &["whole MiB"]),
            (&["launch", "small", "--cpus", "0"], 1, &["error: 0 processors are not possible: use 1 to 255"]),
            (&["launch", "small", "--cpus", "256"], 1, &["error: 256 processors are not possible"]),
            (&["launch", "small", "--cpus", "many"], 2, &["many"]),
            (&["launch", "small", "--count", "0"], 1, &["error: 0 instances at once are not possible: use 1 to 100"]),
            (&["launch", "small", "--count", "101"], 1, &["101 instances"]),
            (
                &["launch", "small", "--disk", "1MiB"],
                1,
                &["error: a disk of 1 MiB is not possible: the image needs 4 MiB"],
            ),
            (&["launch", "small", "--disk", "65TiB"], 1, &["the limit is 64 TiB"]),
            (&["launch", "small", "--name", "a b"], 2, &["`a b` is not a name"]),
            (&["launch", "small", "--name", "i-0123456789abcdef0"], 2, &["looks like an id"]),
            (&["launch", "small", "--wait", "forever"], 2, &["`none`, `running` or `ready`"]),
            (&["launch", "small", "--count", "2", "--publish", "8080:80"], 1, &["one instance only"]),
            (&["launch"], 2, &["<IMAGE|FILE>"]),
            (&["rm"], 2, &[]),
            (&["rm", "--all", "web"], 2, &["--all"]),
            (&["no-such-command"], 2, &["no-such-command"]),
        ],
    );
}

#[test]
fn user_data_over_the_limit_of_its_cloud_is_refused() {
    let home = home_with_image();
    let over = |name: &str, limit: usize| home.file(name, vec![b'#'; limit + 1]);
    let (ec2, alibaba, nocloud) = (over("ec2", 16 << 10), over("alibaba", 32 << 10), over("nocloud", 1 << 20));
    let exact = home.file("exact", vec![b'#'; 16 << 10]);
    let missing = home.text_path("missing");
    let launch = |personality: &'static str, file: &str| {
        ["launch", "small", "--personality", personality, "--user-data", file].map(str::to_owned)
    };
    let before = home.state();
    for (personality, file, says) in [
        ("ec2", &ec2, &["error: the user data cannot be used", "16385 bytes", "`ec2` is 16384 bytes", "gzip"][..]),
        ("alibaba", &alibaba, &["error: the user data cannot be used", "32769 bytes", "`alibaba` is 32768 bytes"]),
        ("nocloud", &nocloud, &["1048577 bytes", "1048576", "hint: compress it with gzip"]),
        ("ec2", &missing, &["error: cannot read the user data `", "No such file"]),
    ] {
        home.run(&launch(personality, file)).refused(1, says);
        assert_eq!(home.state(), before);
    }
    let planned = home.json(&["launch", "small", "--user-data", &exact, "--dry-run"]);
    assert_eq!(planned["user_data_bytes"], 16 << 10);
}

#[test]
fn keys_that_are_not_public_keys_are_refused_and_not_repeated() {
    let home = home_with_image();
    let private = home.text_path("id");
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &private]);
    let text = home.file("notes.pub", "hello\n");
    let empty = home.file("empty.pub", "\n# nothing\n");
    let binary = home.file("binary.pub", [0xff, 0xfe, 0]);
    let missing = home.text_path("missing.pub");
    let launch = |key| ["launch", "small", "--key", key];
    check(
        &home,
        &[
            (
                &launch(&private),
                1,
                &["error: the key file holds a private key; give the public one, which ends in `.pub`"],
            ),
            (&launch(&text), 1, &["error: the key file is not an OpenSSH public key such as `ssh-ed25519 AAAA"]),
            (&launch(&empty), 1, &["error: the key file holds no public key"]),
            (&launch(&binary), 1, &["error: cannot read the public key `"]),
            (&launch(&missing), 1, &["error: cannot read the public key `", "hint: make a key pair with: ssh-keygen"]),
        ],
    );
    let secret = std::fs::read_to_string(&private).unwrap();
    let ran = home.run(&launch(&private));
    for line in secret.lines().filter(|line| !line.contains("-----")) {
        assert!(!ran.stderr.contains(line), "a private key is repeated: {ran}");
    }
    assert!(!std::fs::read_to_string(home.data().join("run/daemon.log")).unwrap().contains("PRIVATE KEY"));
    let public = format!("{private}.pub");
    let planned = home.json(&["launch", "small", "--key", &public, "--dry-run"]);
    let line = std::fs::read_to_string(&public).unwrap();
    assert_eq!(planned["public_keys"][0]["key"], line.trim());
}

#[test]
fn ports_that_cannot_be_published_are_refused() {
    let home = home_with_image();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let on_taken = format!("{port}:80");
    let says_taken = format!("error: cannot publish port {port} of 127.0.0.1\n  caused by: Address already in use");
    let word = "is not a port to publish: write HOST:GUEST or ADDRESS:HOST:GUEST, such as 8080:80";
    check(
        &home,
        &[
            (&["launch", "small", "--publish", "80"], 2, &["`80`", word]),
            (&["launch", "small", "--publish", "web:80"], 2, &["`web:80`", word]),
            (&["launch", "small", "--publish", "0:80"], 2, &["`0:80`", word]),
            (&["launch", "small", "--publish", "8080:99999"], 2, &[word]),
            (&["launch", "small", "--publish", "localhost:8080:80"], 2, &[word]),
            (&["launch", "small", "--publish", ""], 2, &[word]),
            (&["launch", "small", "--publish", &on_taken], 1, &[&says_taken, "hint: choose another port of the host"]),
            (
                &["launch", "small", "--publish", "192.0.2.1:8080:80"],
                1,
                &["error: cannot publish port 8080 of 192.0.2.1\n"],
            ),
        ],
    );
}

#[test]
fn a_disk_that_ends_within_a_sector_says_so() {
    let home = home_with_image();
    check(&home, &[(&["launch", "small", "--disk", "5000000"], 1, &["error: a disk of ", "512"])]);
}

#[test]
fn one_port_cannot_be_published_twice() {
    let home = home_with_image();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (one, two) = (format!("{free}:80"), format!("{free}:81"));
    let args = ["launch", "small", "--publish", &one, "--publish", &two, "--dry-run"];
    check(&home, &[(&args, 1, &[&free.to_string()])]);
}

#[test]
fn a_launch_of_a_file_that_is_refused_imports_nothing() {
    let home = Home::new();
    let disk = home.file("disk.raw", disks::content(SEED, 4 << 20));
    let user_data = home.file("user-data", vec![b'#'; (16 << 10) + 1]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("{}:80", taken.local_addr().unwrap().port());
    check(
        &home,
        &[
            (&["launch", &disk, "--cpus", "0"], 1, &["0 processors"]),
            (&["launch", &disk, "--user-data", &user_data], 1, &["16384"]),
            (&["launch", &disk, "--publish", &port], 1, &["cannot publish"]),
        ],
    );
}

#[test]
fn what_an_instance_uses_is_kept() {
    let home = home_with_image();
    let launched = home.json(&["launch", "small", "--name", "web", "--memory", "64MiB", "--wait", "running"]);
    let state = || {
        let [images, instances, stats] = home.state();
        (images, stats, instances.as_array().unwrap().len(), home.json(&["show", "web"])["vm_pid"].clone())
    };
    let before = state();
    let in_use = "error: an instance named `web` exists already\nhint: choose another --name, or remove it: bulbil rm web --force\n";
    let disk = home.file("other.raw", disks::content(SEED + 3, 4 << 20));
    let cases: &[Case] = &[
        (&["launch", "small", "--name", "web"], 1, &[in_use]),
        (&["launch", &disk, "--name", "web"], 1, &[in_use]),
        (
            &["rm", "web"],
            1,
            &["error: instance `web` is running\nhint: stop it first: bulbil stop web, or: bulbil rm web --force\n"],
        ),
        (&["start", "web"], 1, &["error: instance `web` is running, not stopped\nhint: see it: bulbil show web\n"]),
        (
            &["image", "rm", "small"],
            1,
            &["error: image `small` is the base of instance `web`\nhint: remove the instance first: bulbil rm NAME\n"],
        ),
        (&["exec", "web", "--", "true"], 1, &["error: instance `web` does not answer to ssh yet\nhint: "]),
    ];
    for (args, status, says) in cases {
        let ran = home.run(args);
        assert_eq!(ran.status, Some(*status), "{ran}");
        // `exec` tells first that the instance is still booting.
        assert!(says.iter().all(|part| ran.stderr.contains(part)), "expected {says:?} in {ran}");
        assert_eq!(state(), before, "{ran}");
    }
    home.ok(&["stop", "web", "--force"]);
    check(
        &home,
        &[
            (
                &["exec", "web", "--", "true"],
                1,
                &["error: instance `web` is stopped\nhint: start it: bulbil start web\n"],
            ),
            (&["console", "web"], 1, &["error: instance `web` is stopped\n"]),
            (&["image", "rm", "small"], 1, &["is the base of instance `web`"]),
        ],
    );
    assert_eq!(home.json(&["show", "web"])["id"], launched["id"]);
}

#[test]
fn a_machine_without_qemu_says_what_to_install() {
    let home = Home::with_programs(&["ssh", "ssh-keygen"]);
    add_image(&home);
    let says = [
        "error: `qemu-system-x86_64` was not found: install QEMU (Debian, Ubuntu: apt install qemu-system-x86)\n",
        "hint: ",
    ];
    check(
        &home,
        &[
            (&["launch", "small"], 1, &says),
            (&["launch", "small", "--dry-run"], 1, &says),
            (&["launch", "small", "--count", "3", "--name", "web"], 1, &says),
        ],
    );
}

#[test]
fn a_machine_without_openssh_says_what_to_install() {
    let home = Home::with_programs(&["qemu-system-x86_64"]);
    add_image(&home);
    let says = ["error: `ssh-keygen` was not found: install OpenSSH", "apt install openssh-client", "hint: "];
    check(&home, &[(&["launch", "small"], 1, &says)]);
}

#[test]
fn a_data_directory_that_cannot_be_used_is_named() {
    let home = Home::new();
    let file = home.file("file", "not a directory");
    let long = home.text_path(&"x".repeat(90));
    home.run(&["list", "--data-dir", &file]).refused(1, &["error: cannot create the data directory `", "caused by: "]);
    home.run(&["list", "--data-dir", &long]).refused(1, &["error: the data directory `", "at most 77"]);
    let output = home.command(&["list"]).env_remove("HOME").env_remove("BULBIL_DATA_DIR").output().unwrap();
    support::Ran::new("list, without a home".to_owned(), output).refused(
        1,
        &["error: no data directory: HOME is not set\n", "hint: choose one: --data-dir DIR or BULBIL_DATA_DIR\n"],
    );
}
