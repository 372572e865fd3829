//! The directory and its file, as the kernel asks for them.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bulbil_types::BLOCK_BYTES;
use bulbil_volume::{BlockDevice, BlockError};
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tracing::debug;

use super::DISK_FILE_NAME;
use super::execute::{self, Sought};
use super::pool::Pool;

const DIRECTORY: INodeNo = INodeNo::ROOT;
const DISK: INodeNo = INodeNo(2);

/// Largest data of one request.
pub(super) const MAX_REQUEST_BYTES: u32 = 1 << 20;
/// Requests that the kernel has running for readahead and asynchronous I/O.
const MAX_BACKGROUND: u16 = 64;
/// How long the kernel keeps what never changes.
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);
/// How long it keeps the number of allocated blocks.
const A_MOMENT: Duration = Duration::from_secs(1);

thread_local! {
    /// What a read fills; one for each thread, as large as its largest read.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How the session ended for the device.
pub(super) type FlushOutcome = Arc<Mutex<Option<BlockError>>>;

pub(super) struct DiskDirectory {
    device: Arc<dyn BlockDevice>,
    pool: Arc<Pool>,
    uid: u32,
    gid: u32,
    mounted_at: SystemTime,
    flushed: FlushOutcome,
}

impl DiskDirectory {
    pub(super) fn new(device: Arc<dyn BlockDevice>, workers: usize, flushed: FlushOutcome) -> Self {
        Self {
            device,
            pool: Pool::new(workers),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            mounted_at: SystemTime::now(),
            flushed,
        }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let is_disk = match inode {
            DIRECTORY => false,
            DISK => true,
            _ => return None,
        };
        let size = if is_disk { self.device.size_bytes() } else { 0 };
        let blocks = if is_disk { execute::allocated_bytes(&*self.device).div_ceil(512) } else { 0 };
        let kind = if is_disk { FileType::RegularFile } else { FileType::Directory };
        let perm = match (is_disk, self.device.is_read_only()) {
            (false, _) => 0o500,
            (true, true) => 0o400,
            (true, false) => 0o600,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks,
            atime: self.mounted_at,
            mtime: self.mounted_at,
            ctime: self.mounted_at,
            crtime: self.mounted_at,
            kind,
            perm,
            nlink: if is_disk { 1 } else { 2 },
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: u32::try_from(BLOCK_BYTES).expect("4096"),
            flags: 0,
        })
    }

    /// Runs what is quick here and the rest on a worker.
    fn run(&self, is_fast: bool, job: impl FnOnce(&dyn BlockDevice) + Send + 'static) {
        if is_fast {
            return self.run_here(job);
        }
        let device = Arc::clone(&self.device);
        self.pool.submit(move || job(&*device));
    }

    /// A device that panics costs one request, which its reply answers with an I/O error when it is dropped, and not the
    /// receiving thread.
    fn run_here(&self, job: impl FnOnce(&dyn BlockDevice)) {
        drop(catch_unwind(AssertUnwindSafe(|| job(&*self.device))));
    }

    /// The error of everything that would make, name or remove a file.
    fn refusal(&self) -> Errno {
        if self.device.is_read_only() { Errno::EROFS } else { Errno::EPERM }
    }
}

fn read(device: &dyn BlockDevice, offset: u64, len: usize, reply: ReplyData) {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        let data = &mut buffer[..len];
        match device.read_at(data, offset) {
            Ok(()) => reply.data(data),
            Err(error) => reply.error(execute::errno("read", offset, len as u64, &error)),
        }
    });
}

fn write(device: &dyn BlockDevice, offset: u64, data: &[u8], reply: ReplyWrite) {
    match device.write_at(data, offset, false) {
        Ok(()) => reply.written(u32::try_from(data.len()).expect("a request has at most 1 MiB")),
        Err(error) => reply.error(execute::errno("write", offset, data.len() as u64, &error)),
    }
}

impl Filesystem for DiskDirectory {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // What this kernel does not know it does without.
        let _ = config.set_max_write(MAX_REQUEST_BYTES);
        let _ = config.set_max_background(MAX_BACKGROUND);
        if let Err(nearest) = config.set_max_readahead(MAX_REQUEST_BYTES) {
            let _ = config.set_max_readahead(nearest);
        }
        for wish in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS] {
            if let Err(missing) = config.add_capabilities(wish) {
                debug!(?missing, "this kernel's FUSE lacks a capability");
            }
        }
        Ok(())
    }

    fn destroy(&mut self) {
        if !self.device.is_read_only()
            && let Err(error) = self.device.flush()
        {
            execute::errno("flush at the end", 0, 0, &error);
            *self.flushed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(DISK).filter(|_| parent == DIRECTORY && name == DISK_FILE_NAME) {
            Some(attributes) => reply.entry_with_ttls(&A_MOMENT, &FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&A_MOMENT, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _accessed: Option<TimeOrNow>,
        _modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _checked: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.attributes(inode) else { return reply.error(Errno::ENOENT) };
        let resizes = size.is_some_and(|size| size != attributes.size);
        if resizes || mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(self.refusal());
        }
        // Times are not kept; setting them harms nobody, and copying tools insist.
        reply.attr(&A_MOMENT, &attributes);
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != DISK {
            return reply.error(Errno::ENOENT);
        }
        if self.device.is_read_only() && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        // Closing promises nothing, so the kernel need not tell of it.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        len: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len_bytes = execute::clip(self.device.size_bytes(), offset, u64::from(len));
        let Ok(len) = usize::try_from(len_bytes) else { return reply.error(Errno::EINVAL) };
        if len == 0 {
            return reply.data(&[]);
        }
        let is_fast = self.device.is_fast(offset, len_bytes);
        self.run(is_fast, move |device| read(device, offset, len, reply));
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len_bytes = execute::clip(self.device.size_bytes(), offset, data.len() as u64);
        let Some(data) = usize::try_from(len_bytes).ok().and_then(|len| data.get(..len)) else {
            return reply.error(Errno::EINVAL);
        };
        if data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        // A write of part of a block first needs the rest of it.
        let is_aligned = offset.is_multiple_of(BLOCK_BYTES) && len_bytes.is_multiple_of(BLOCK_BYTES);
        if is_aligned || self.device.is_fast(offset, len_bytes) {
            return self.run_here(|device| write(device, offset, data, reply));
        }
        let data = data.to_vec();
        self.run(false, move |device| write(device, offset, &data, reply));
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        if self.device.is_read_only() {
            return reply.ok();
        }
        self.run(false, move |device| match device.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(execute::errno("flush", 0, 0, &error)),
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        len_bytes: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (change, len_bytes) = match execute::clearing(self.device.size_bytes(), mode, offset, len_bytes) {
            Ok((_, 0)) => return reply.ok(),
            Ok(decided) => decided,
            Err(errno) => return reply.error(errno),
        };
        self.run(false, move |device| match execute::clear(device, change, offset, len_bytes) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(execute::errno("clearing", offset, len_bytes, &error)),
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (Ok(offset), Some(sought)) = (u64::try_from(offset), Sought::from_whence(whence)) else {
            return reply.error(Errno::EINVAL);
        };
        self.run(false, move |device| match execute::seek(device, sought, offset) {
            Ok(Some(found)) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(execute::errno("seek", offset, 0, &error)),
        });
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if inode != DIRECTORY {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (DIRECTORY, FileType::Directory, "."),
            (DIRECTORY, FileType::Directory, ".."),
            (DISK, FileType::RegularFile, DISK_FILE_NAME),
        ];
        for (next, (inode, kind, name)) in (1..).zip(entries) {
            if next > offset && reply.add(inode, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let block_bytes = u32::try_from(BLOCK_BYTES).expect("4096");
        let blocks = self.device.size_bytes().div_ceil(BLOCK_BYTES);
        reply.statfs(blocks, 0, 0, 1, 0, block_bytes, 255, block_bytes);
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    // The kernel asks once and remembers: there are no extended attributes.

    fn getxattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _inode: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    // The directory stays as it is.

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(self.refusal());
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(self.refusal());
    }

    fn mkdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.refusal());
    }

    fn symlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.refusal());
    }

    fn link(&self, _request: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(self.refusal());
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refusal());
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refusal());
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refusal());
    }
}
