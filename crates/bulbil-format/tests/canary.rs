//! An image that asks for another file gets nothing of it: neither opening nor reading yields a byte.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

#[path = "hostile/images.rs"]
mod images;
mod support;

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulbil_format::{Disk, ExtentDirectory, FileReader, Format, FormatError, OpenGate, OpenOptions, ReadAt, open_disk};
use images::*;
use support::Rng;

/// A folder with images and links, and beside it a file that none of them may read.
struct Ground {
    dir: tempfile::TempDir,
    /// The other file is this, again and again.
    secret: [u8; 16],
    /// Kept open, so that there is a descriptor to name.
    canary: std::fs::File,
}

impl Ground {
    fn new() -> Self {
        let seed = u64::from(std::process::id());
        println!("seed {seed:#x}");
        let mut rng = Rng(seed);
        let secret = std::array::from_fn(|_| rng.next().to_le_bytes()[0]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("canary");
        let mut canary = std::fs::File::create_new(&path).unwrap();
        canary.write_all(&secret.repeat(16 << 10)).unwrap();
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        symlink("../canary", folder.join("link")).unwrap();
        symlink("..", folder.join("folder-link")).unwrap();
        Self { canary: std::fs::File::open(&path).unwrap(), dir, secret }
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("folder")
    }

    /// Every way to name the other file.
    fn names(&self) -> Vec<String> {
        let absolute = self.dir.path().join("canary").to_str().unwrap().to_owned();
        let descriptor = self.canary.as_raw_fd();
        vec![
            absolute.clone(),
            "../canary".to_owned(),
            "./../canary".to_owned(),
            "..\\canary".to_owned(),
            "link".to_owned(),
            "folder-link/canary".to_owned(),
            format!("file://{absolute}"),
            format!("file:{absolute}"),
            format!("json:{{'driver':'file','filename':'{absolute}'}}"),
            format!("/proc/self/fd/{descriptor}"),
            format!("fd:{descriptor}"),
        ]
    }

    fn has_secret(&self, bytes: &[u8]) -> bool {
        bytes.windows(self.secret.len()).any(|window| window == self.secret)
    }

    /// Opens and reads an image; returns whether any of the other file came to light, and the refusal.
    fn leaks(&self, image: &Path, options: &OpenOptions) -> (bool, String) {
        let opened = FileReader::open(image).and_then(|file| open_disk(Arc::new(file), options));
        match opened.and_then(|disk| read(&*disk)) {
            Ok(content) => (self.has_secret(&content), "opened".to_owned()),
            Err(error) => (self.has_secret(error.to_string().as_bytes()), error.to_string()),
        }
    }

    /// Opens and reads an image in all ways an operator could ask for, none of which allow it the other file.
    fn check(&self, what: &str, image: &[u8]) {
        let path = self.folder().join("image");
        support::write_sparse(&path, image);
        for (how, options) in self.all_options() {
            let (leaks, outcome) = self.leaks(&path, &options);
            println!("{what}, {how}: {outcome}");
            assert!(!leaks, "{what}, {how}: {outcome}");
        }
        std::fs::remove_file(path).unwrap();
    }

    fn all_options(&self) -> Vec<(String, OpenOptions)> {
        let mut all = Vec::new();
        for format in [None].into_iter().chain(Format::ALL.iter().copied().map(Some)) {
            let name = format.map_or("undeclared".to_owned(), |format| format!("declared {format}"));
            let options = OpenOptions::declared(format);
            let gate = Some(Arc::new(ExtentDirectory::open(&self.folder()).unwrap()) as Arc<dyn OpenGate>);
            all.push((format!("{name} with a folder"), OpenOptions { gate, ..options.clone() }));
            let parent = open_disk(Arc::new(vec![0x11; 1 << 20]), &OpenOptions::declared(Format::Raw));
            let parent = Some(Arc::from(parent.unwrap()));
            all.push((format!("{name} with a parent"), OpenOptions { parent, ..options.clone() }));
            all.push((name, options));
        }
        all
    }
}

fn read(disk: &dyn Disk) -> Result<Vec<u8>, FormatError> {
    let len = usize::try_from(disk.size_bytes().min(4 << 20)).unwrap();
    let mut content = vec![0; len];
    disk.read_exact_at(&mut content, 0).map(|()| content)
}

#[test]
fn backing_files_of_qcow2_are_never_read() {
    let ground = Ground::new();
    let image = qemu("qcow2", "-o cluster_size=4k");
    for name in ground.names() {
        let len = u32::try_from(name.len()).unwrap();
        let header = [(8, &0x800_u64.to_be_bytes()[..]), (16, &len.to_be_bytes()), (0x800, name.as_bytes())];
        ground.check(&format!("backing file {name:?}"), &poked(image.clone(), &header));
    }
}

#[test]
fn data_files_of_qcow2_are_never_read() {
    let ground = Ground::new();
    let image = qemu("qcow2", "-o cluster_size=4k");
    for name in ground.names() {
        let len = u32::try_from(name.len()).unwrap().to_be_bytes();
        let extension = [&0x4441_5441_u32.to_be_bytes()[..], &len, name.as_bytes()].concat();
        for feature in [0, 4] {
            let image = poked(image.clone(), &[(79, &[feature]), (112, &extension)]);
            ground.check(&format!("data file {name:?}"), &image);
        }
    }
}

#[test]
fn extents_of_vmdk_are_never_read_outside_of_the_folder() {
    let ground = Ground::new();
    let sparse = qemu("vmdk", "-o subformat=monolithicSparse");
    for name in ground.names() {
        for (create_type, kind) in [
            ("monolithicFlat", "FLAT"),
            ("twoGbMaxExtentFlat", "FLAT"),
            ("vmfs", "VMFS"),
            ("twoGbMaxExtentSparse", "SPARSE"),
            ("monolithicSparse", "SPARSE"),
            ("fullDevice", "FLAT"),
            ("custom", "FLAT"),
        ] {
            let offset = if kind == "FLAT" { " 0" } else { "" };
            let extent = format!("RW 128 {kind} \"{name}\"{offset}");
            let descriptor = vmdk_descriptor(create_type, "ffffffff", &extent);
            ground.check(&format!("{create_type} of {name:?}"), &descriptor);
            let mut inside = sparse.clone();
            inside[512..512 * 21].fill(0);
            inside[512..512 + descriptor.len()].copy_from_slice(&descriptor);
            ground.check(&format!("{create_type} of {name:?} in a sparse file"), &inside);
        }
        let hint = format!("parentFileNameHint=\"{name}\"\n");
        let child = vmdk_descriptor("monolithicFlat", "12345678", "RW 128 FLAT \"image\" 0");
        ground.check(&format!("parent {name:?}"), &[child, hint.into_bytes()].concat());
    }
}

#[test]
fn parents_of_vhd_and_vhdx_are_never_read() {
    let ground = Ground::new();
    let vhdx = qemu("vhdx", "-o block_size=1M");
    let parameters = vhdx_item_at(&vhdx, &VHDX_FILE_PARAMETERS);
    ground.check("VHDX with a parent", &poked(vhdx, &[(parameters + 4, &[2])]));
    for name in ground.names() {
        let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        let mut image = vhd_dynamic(20 << 10, &[4, u32::MAX, 13, u32::MAX, 22]);
        let last = image.len() - 512;
        for footer in [0, last] {
            image[footer + 60..footer + 64].copy_from_slice(&VHD_DIFFERENCING.to_be_bytes());
            fix_vhd_sum(&mut image[footer..footer + 512], 64);
        }
        image[512 + 64..512 + 64 + units.len()].copy_from_slice(&units);
        fix_vhd_sum(&mut image[512..1536], 36);
        ground.check(&format!("VHD with the parent {name:?}"), &image);
    }
}

#[test]
fn archives_lead_to_no_file_outside() {
    let ground = Ground::new();
    let image = qemu("vmdk", "-o subformat=streamOptimized");
    for name in ground.names() {
        let href = name.replace('\'', "&apos;");
        let archive = tar(&[("vm.ovf", &ovf(&[(&href, image.len())])), ("disk.vmdk", &image)]);
        ground.check(&format!("OVA of {name:?}"), &archive);
        // A hard link, a symbolic link.
        for kind in [b'1', b'2'] {
            let mut header = tar_header("disk.raw", 0, kind);
            let target = name.as_bytes().get(..100).unwrap_or(name.as_bytes());
            header[157..157 + target.len()].copy_from_slice(target);
            fix_tar_sum(&mut header);
            ground.check(&format!("tar with a link to {name:?}"), &[header, vec![0; 1024]].concat());
        }
    }
}

/// What a gate must not be: it follows links.
struct FollowsLinks(PathBuf);

impl OpenGate for FollowsLinks {
    fn open_extent(&self, name: &str) -> Result<Arc<dyn ReadAt>, FormatError> {
        Ok(Arc::new(FileReader::open(&self.0.join(name))?))
    }
}

#[test]
fn the_check_sees_what_a_careless_gate_lets_out() {
    let ground = Ground::new();
    let path = ground.folder().join("image");
    let descriptor = vmdk_descriptor("monolithicFlat", "ffffffff", "RW 128 FLAT \"link\" 0");
    support::write_sparse(&path, &descriptor);
    let gate: Option<Arc<dyn OpenGate>> = Some(Arc::new(FollowsLinks(ground.folder())));
    let options = OpenOptions { gate, ..OpenOptions::default() };
    assert_eq!(ground.leaks(&path, &options), (true, "opened".to_owned()));
}

#[test]
fn a_file_of_the_folder_is_read() {
    let ground = Ground::new();
    let path = ground.folder().join("image");
    std::fs::copy(ground.dir.path().join("canary"), ground.folder().join("disk-flat.vmdk")).unwrap();
    support::write_sparse(&path, &vmdk_descriptor("monolithicFlat", "ffffffff", "RW 128 FLAT \"disk-flat.vmdk\" 0"));
    let gate: Option<Arc<dyn OpenGate>> = Some(Arc::new(ExtentDirectory::open(&ground.folder()).unwrap()));
    let options = OpenOptions { gate, ..OpenOptions::default() };
    assert_eq!(ground.leaks(&path, &options), (true, "opened".to_owned()));
}
