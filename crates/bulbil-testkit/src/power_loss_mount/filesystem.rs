//! The file system as the kernel asks for it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::disk::{Inode, ROOT, UNIT};
use super::{PowerLossMachine, State, lock};

/// The kernel keeps nothing.
const NOW: Duration = Duration::ZERO;

// fallocate(2): the same on every architecture of Linux.
const FALLOC_FL_PUNCH_HOLE: i32 = 0x02;

/// What an operation needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Nothing,
    Io,
    Space,
}

pub(super) struct MountedDisk {
    machine: PowerLossMachine,
    process: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    last: u64,
    /// The generation in which a handle was opened, and for a directory what was in it.
    handles: HashMap<u64, (u64, Vec<(String, u64)>)>,
}

impl MountedDisk {
    pub(super) fn new(machine: PowerLossMachine, process: usize) -> Self {
        Self { machine, process, open: Mutex::default() }
    }

    /// Makes one operation, unless the process or the machine is dead, or a fault says otherwise.
    fn with<R>(&self, need: Need, work: impl FnOnce(&mut State) -> Result<R, Errno>) -> Result<R, Errno> {
        let state = &mut *lock(&self.machine.state);
        state.operations += 1;
        if state.processes[self.process].is_observer {
            return work(state);
        }
        let power = state.fuse;
        let process = &mut state.processes[self.process].fuse;
        if power == Some(0) || *process == Some(0) {
            return Err(Errno::EIO);
        }
        if let Some(left) = process {
            *left -= 1;
        }
        if let Some(left) = &mut state.fuse {
            *left -= 1;
        }
        let faults = state.faults;
        let mut hits = |rate: u64| rate > 0 && state.rng.one_in(rate);
        if need == Need::Space && hits(faults.no_space) {
            *state.done.entry("machine: no space").or_default() += 1;
            return Err(Errno::ENOSPC);
        }
        if need != Need::Nothing && hits(faults.failed_io) {
            *state.done.entry("machine: failed read or write").or_default() += 1;
            return Err(Errno::EIO);
        }
        work(state)
    }

    /// As [`with`](Self::with), by a handle: one of a process that was killed reaches nothing.
    fn with_handle<R>(
        &self,
        handle: FileHandle,
        need: Need,
        work: impl FnOnce(&mut State) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        let opened = self.open.lock().unwrap_or_else(PoisonError::into_inner).handles.get(&handle.0).map(|(g, _)| *g);
        self.with(need, |state| match opened == Some(state.processes[self.process].generation) {
            true => work(state),
            false => Err(Errno::EIO),
        })
    }

    fn handle(&self, generation: u64, listed: Vec<(String, u64)>) -> FileHandle {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.last += 1;
        let number = open.last;
        open.handles.insert(number, (generation, listed));
        FileHandle(number)
    }

    fn close(&self, handle: FileHandle) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).handles.remove(&handle.0);
    }

    fn generation(&self) -> u64 {
        lock(&self.machine.state).processes[self.process].generation
    }
}

fn name_of(name: &OsStr) -> Result<&str, Errno> {
    name.to_str().ok_or(Errno::EINVAL)
}

fn attributes(state: &State, number: u64) -> Result<FileAttr, Errno> {
    let (kind, size, stored) = match state.disk.inode(number).ok_or(Errno::ENOENT)? {
        Inode::File(data) => (FileType::RegularFile, data.size_bytes(), data.stored_bytes()),
        Inode::Directory(_) => (FileType::Directory, 0, 0),
    };
    let time: SystemTime = UNIX_EPOCH + Duration::from_secs(1_790_000_000);
    Ok(FileAttr {
        ino: INodeNo(number),
        size,
        blocks: stored / 512,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: UNIT as u32,
        flags: 0,
    })
}

fn child(state: &State, parent: INodeNo, name: &str) -> Result<u64, Errno> {
    state.disk.entries(parent.0).and_then(|entries| entries.get(name)).ok_or(Errno::ENOENT)
}

fn must_be_free(state: &State, parent: INodeNo, name: &str) -> Result<(), Errno> {
    if child(state, parent, name).is_ok() { Err(Errno::EEXIST) } else { Ok(()) }
}

fn reply_entry(reply: ReplyEntry, outcome: Result<FileAttr, Errno>) {
    match outcome {
        Ok(attributes) => reply.entry(&NOW, &attributes, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

fn reply_empty(reply: ReplyEmpty, outcome: Result<(), Errno>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for MountedDisk {
    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name_of(name)
            .and_then(|name| self.with(Need::Nothing, |state| attributes(state, child(state, parent, name)?)));
        reply_entry(reply, found);
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        // The root is asked for when the file system is mounted and unmounted, whoever is dead.
        let found = match inode.0 {
            ROOT => attributes(&lock(&self.machine.state), ROOT),
            number => self.with(Need::Nothing, |state| attributes(state, number)),
        };
        match found {
            Ok(attributes) => reply.attr(&NOW, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
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
        let done = self.with(Need::Io, |state| {
            if let (Some(size), Some(file)) = (size, state.disk.file(inode.0)) {
                file.set_size(size);
            }
            attributes(state, inode.0)
        });
        match done {
            Ok(attributes) => reply.attr(&NOW, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let made = name_of(name).and_then(|name| {
            self.with(Need::Space, |state| {
                must_be_free(state, parent, name)?;
                let number = state.disk.make(parent.0, name, true);
                attributes(state, number)
            })
        });
        reply_entry(reply, made);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = name_of(name).and_then(|name| {
            self.with(Need::Io, |state| {
                child(state, parent, name)?;
                state.disk.set_entry(parent.0, name, None);
                Ok(())
            })
        });
        reply_empty(reply, done);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = name_of(name).and_then(|name| {
            self.with(Need::Io, |state| {
                let number = child(state, parent, name)?;
                if state.disk.entries(number).is_some_and(|entries| !entries.list().is_empty()) {
                    return Err(Errno::ENOTEMPTY);
                }
                state.disk.set_entry(parent.0, name, None);
                Ok(())
            })
        });
        reply_empty(reply, done);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let done = name_of(name).and_then(|name| Ok((name, name_of(new_name)?))).and_then(|(name, new_name)| {
            self.with(Need::Space, |state| {
                let number = child(state, parent, name)?;
                state.disk.set_entry(new_parent.0, new_name, Some(number));
                state.disk.set_entry(parent.0, name, None);
                Ok(())
            })
        });
        reply_empty(reply, done);
    }

    fn link(&self, _request: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let done = name_of(name).and_then(|name| {
            self.with(Need::Space, |state| {
                must_be_free(state, parent, name)?;
                state.disk.set_entry(parent.0, name, Some(inode.0));
                attributes(state, inode.0)
            })
        });
        reply_entry(reply, done);
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.with(Need::Nothing, |state| attributes(state, inode.0)) {
            Ok(_) => reply.opened(self.handle(self.generation(), Vec::new()), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = name_of(name).and_then(|name| {
            self.with(Need::Space, |state| {
                must_be_free(state, parent, name)?;
                let number = state.disk.make(parent.0, name, false);
                attributes(state, number)
            })
        });
        match made {
            Ok(attributes) => {
                let handle = self.handle(self.generation(), Vec::new());
                reply.created(&NOW, &attributes, Generation(0), handle, FopenFlags::FOPEN_DIRECT_IO);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        len: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.with_handle(handle, Need::Io, |state| {
            Ok(state.disk.file(inode.0).ok_or(Errno::EISDIR)?.read(offset, len as usize))
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let done = self.with_handle(handle, Need::Space, |state| {
            state.disk.file(inode.0).ok_or(Errno::EISDIR)?.write(offset, data);
            Ok(data.len() as u32)
        });
        match done {
            Ok(written) => reply.written(written),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.close(handle);
        reply.ok();
    }

    fn fsync(&self, _request: &Request, inode: INodeNo, handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply_empty(
            reply,
            self.with_handle(handle, Need::Nothing, |state| {
                state.disk.sync(inode.0);
                Ok(())
            }),
        );
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let listed = self.with(Need::Nothing, |state| {
            state.disk.entries(inode.0).map(super::disk::Entries::list).ok_or(Errno::ENOTDIR)
        });
        match listed {
            Ok(listed) => reply.opened(self.handle(self.generation(), listed), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.handles.get(&handle.0).map(|(_, listed)| listed.clone()).unwrap_or_default()
        };
        let found = self.with_handle(handle, Need::Nothing, |state| {
            let kind = |number: u64| match state.disk.inode(number) {
                Some(Inode::Directory(_)) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            let dots = [(".".to_owned(), inode.0), ("..".to_owned(), inode.0)];
            let all = dots.into_iter().chain(listed).map(|(name, number)| (kind(number), name, number));
            Ok(all.collect::<Vec<_>>())
        });
        match found {
            Ok(entries) => {
                for (next, (kind, name, number)) in (1..).zip(entries).skip(offset as usize) {
                    if reply.add(INodeNo(number), next, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.close(handle);
        reply.ok();
    }

    fn fsyncdir(&self, request: &Request, inode: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        self.fsync(request, inode, handle, data_only, reply);
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        len_bytes: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & FALLOC_FL_PUNCH_HOLE == 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        reply_empty(
            reply,
            self.with_handle(handle, Need::Io, |state| {
                state.disk.file(inode.0).ok_or(Errno::EISDIR)?.clear(offset, len_bytes);
                Ok(())
            }),
        );
    }

    fn lseek(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // SEEK_DATA and SEEK_HOLE; all others the kernel answers itself.
        let found = self.with_handle(handle, Need::Nothing, |state| {
            let file = state.disk.file(inode.0).ok_or(Errno::EISDIR)?;
            file.seek(offset.cast_unsigned(), whence == 3).ok_or(Errno::ENXIO)
        });
        match found {
            Ok(found) => reply.offset(found.cast_signed()),
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, _request: &Request, _inode: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
