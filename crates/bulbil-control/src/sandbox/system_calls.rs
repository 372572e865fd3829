//! The filter of system calls: what is allowed, as a list and as a program for the kernel.
//!
//! Two filters are stacked, and the kernel takes the stricter answer, of equals that of the younger:
//!
//! ```text
//! call                                        first: not there   second: the list   answer
//! ------------------------------------------  -----------------  -----------------  -----------------
//! allowed                                     allow              allow              it is made
//! clone3, or younger than the list            ENOSYS             allow              as on an old kernel
//! anything else                               allow              EPERM              as for lack of rights
//! of another architecture                     -                  -                  the process is killed
//! ```

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What files may be opened; Landlock says where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opens {
    /// None.
    Nothing,
    /// For reading.
    Reads,
    /// For reading and writing, created and removed.
    Writes,
}

impl Opens {
    pub(super) fn of(readable: bool, writable: bool) -> Self {
        match (readable, writable) {
            (_, true) => Self::Writes,
            (true, false) => Self::Reads,
            (false, false) => Self::Nothing,
        }
    }
}

/// What of a call is allowed: any use of it, or those for which the condition on one argument holds.
type Allowed = (i64, Option<Condition>);

/// `argument & mask == value`, of the argument with this index.
#[derive(Debug, Clone, Copy)]
struct Condition {
    argument: u8,
    mask: u64,
    value: u64,
}

/// Calls that work on what is open, or on this process alone, in all forms that C libraries use.
#[rustfmt::skip]
const ALWAYS: &[i64] = &[
    // Files that are open; `fcntl` has conditions.
    libc::SYS_read, libc::SYS_readv, libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2,
    libc::SYS_write, libc::SYS_writev, libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2,
    libc::SYS_lseek, libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fstatfs,
    libc::SYS_ftruncate, libc::SYS_fallocate, libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_sync_file_range,
    libc::SYS_fadvise64, libc::SYS_readahead, libc::SYS_copy_file_range, libc::SYS_sendfile, libc::SYS_splice,
    libc::SYS_flock, libc::SYS_dup, libc::SYS_dup3, libc::SYS_close, libc::SYS_close_range,
    // Sockets that are connected: neither made nor connected here, and no descriptor is passed on.
    libc::SYS_recvfrom, libc::SYS_sendto, libc::SYS_shutdown, libc::SYS_getsockopt,
    // Waiting.
    libc::SYS_ppoll, libc::SYS_pselect6, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2, libc::SYS_eventfd2, libc::SYS_pipe2,
    libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    // Memory; `mmap` and `mprotect` have conditions.
    libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_membarrier,
    // Threads and their signals; `clone` and `tgkill` have conditions.
    libc::SYS_futex, libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_rseq, libc::SYS_set_tid_address,
    libc::SYS_sched_yield, libc::SYS_sched_getaffinity, libc::SYS_getcpu,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sigaltstack,
    libc::SYS_rt_sigtimedwait, libc::SYS_restart_syscall, libc::SYS_exit, libc::SYS_exit_group,
    // What the process is.
    libc::SYS_getpid, libc::SYS_getppid, libc::SYS_gettid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid,
    libc::SYS_getegid, libc::SYS_uname, libc::SYS_sysinfo, libc::SYS_getrusage, libc::SYS_getrandom,
];

/// The old forms, which younger architectures do not have.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALWAYS_OLD: &[i64] = &[
    libc::SYS_dup2, libc::SYS_poll, libc::SYS_select, libc::SYS_epoll_create, libc::SYS_epoll_wait, libc::SYS_eventfd,
    libc::SYS_pipe, libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const ALWAYS_OLD: &[i64] = &[];

/// What goes with a directory: lists and names. Landlock refuses them elsewhere, but for asking what a name is.
const WITH_DIRECTORIES: &[i64] =
    &[libc::SYS_getdents64, libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_readlinkat, libc::SYS_getcwd];

/// What goes with a directory whose files are made and removed.
const WITH_WRITABLE: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_linkat,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
];

#[cfg(target_arch = "x86_64")]
const WITH_WRITABLE_OLD: &[i64] =
    &[libc::SYS_open, libc::SYS_renameat, libc::SYS_rename, libc::SYS_unlink, libc::SYS_link];
#[cfg(target_arch = "aarch64")]
const WITH_WRITABLE_OLD: &[i64] = &[libc::SYS_renameat];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const WITH_WRITABLE_OLD: &[i64] = &[];

/// Flags of `open` that write, create or cut off.
const WRITING_FLAGS: u64 =
    flags(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY));

/// What makes a `clone` a thread of this process and puts it in no namespace of its own.
const THREAD: u64 = flags(libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND);
const NAMESPACES: u64 = flags(
    libc::CLONE_NEWNS
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWCGROUP,
);

/// What is done to descriptors by `fcntl`: copies, flags and locks. Not who gets a signal of them, which would be a way
/// to send any signal to any process of the user.
#[rustfmt::skip]
const DESCRIPTOR_COMMANDS: [i32; 12] = [
    libc::F_DUPFD, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL,
    libc::F_GETLK, libc::F_SETLK, libc::F_SETLKW, libc::F_OFD_GETLK, libc::F_OFD_SETLK, libc::F_OFD_SETLKW,
];

/// What terminals are asked; nothing is changed, and no other device is reached.
const TERMINAL_QUESTIONS: [u64; 3] = [TCGETS, TIOCGWINSZ, TCGETS2];
const TCGETS: u64 = 0x5401;
const TIOCGWINSZ: u64 = 0x5413;
/// Newer C libraries use it for `isatty`.
const TCGETS2: u64 = 0x802c_542a;

/// The first number that all architectures share and that is younger than the calls listed here; `clone3`, whose
/// flags a filter cannot see.
const YOUNGER: std::ops::Range<i64> = libc::SYS_clone3..1024;

/// A 32-bit set of flags, as the filter compares it.
const fn flags(bits: i32) -> u64 {
    bits.cast_unsigned() as u64
}

fn only(call: i64, argument: u8, mask: u64, value: u64) -> Allowed {
    (call, Some(Condition { argument, mask, value }))
}

/// Everything that is allowed to the process with this id.
fn allowed(opens: Opens, pid: u64) -> Vec<Allowed> {
    const ALL_BITS: u64 = 0xffff_ffff;
    let executable = flags(libc::PROT_EXEC);
    let any = |calls: &'static [i64]| calls.iter().map(|call| (*call, None));
    let mut list: Vec<Allowed> = any(ALWAYS).chain(any(ALWAYS_OLD)).collect();
    list.extend([
        only(libc::SYS_mmap, 2, executable, 0),
        only(libc::SYS_mprotect, 2, executable, 0),
        only(libc::SYS_clone, 0, THREAD | NAMESPACES, THREAD),
        only(libc::SYS_tgkill, 0, ALL_BITS, pid),
        only(libc::SYS_prctl, 0, ALL_BITS, flags(libc::PR_SET_NAME)),
        // Its own limits, and only to look at them.
        only(libc::SYS_prlimit64, 2, u64::MAX, 0),
    ]);
    list.extend(DESCRIPTOR_COMMANDS.map(|command| only(libc::SYS_fcntl, 1, ALL_BITS, flags(command))));
    list.extend(TERMINAL_QUESTIONS.map(|question| only(libc::SYS_ioctl, 1, ALL_BITS, question)));
    if opens != Opens::Nothing {
        list.extend(any(WITH_DIRECTORIES));
    }
    match opens {
        Opens::Nothing => {}
        Opens::Reads => {
            list.push(only(libc::SYS_openat, 2, WRITING_FLAGS, 0));
            #[cfg(target_arch = "x86_64")]
            list.push(only(libc::SYS_open, 1, WRITING_FLAGS, 0));
        }
        Opens::Writes => list.extend(any(WITH_WRITABLE).chain(any(WITH_WRITABLE_OLD))),
    }
    list
}

/// Restricts all threads of this process.
///
/// # Errors
/// A phrase on why the kernel does not.
pub(super) fn restrict(opens: Opens) -> Result<(), String> {
    let fail = |reason: &dyn std::fmt::Display| format!("seccomp: {reason}");
    let target = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| fail(&e))?;
    let pid = u64::from(std::process::id());
    let programs = programs(&allowed(opens, pid), target).map_err(|e| fail(&e))?;
    programs.iter().try_for_each(|program| seccompiler::apply_filter_all_threads(program)).map_err(|e| fail(&e))
}

/// The two filters, in the order they are to be applied.
fn programs(allowed: &[Allowed], target: TargetArch) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let errno = |number: i32| SeccompAction::Errno(number.unsigned_abs());
    let mut list: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, condition) in allowed {
        let rules = list.entry(*call).or_default();
        if let Some(condition) = condition {
            rules.push(rule(*condition)?);
        }
    }
    // Let through by the list only, so that the first filter's answer stands.
    let younger: Vec<i64> = YOUNGER.filter(|call| !list.contains_key(call)).collect();
    list.extend(younger.iter().map(|call| (*call, Vec::new())));
    let absent = younger.into_iter().map(|call| (call, Vec::new())).collect();
    let not_there = SeccompFilter::new(absent, SeccompAction::Allow, errno(libc::ENOSYS), target)?;
    let list = SeccompFilter::new(list, errno(libc::EPERM), SeccompAction::Allow, target)?;
    Ok([not_there.try_into()?, list.try_into()?])
}

fn rule(condition: Condition) -> Result<SeccompRule, seccompiler::BackendError> {
    let Condition { argument, mask, value } = condition;
    let len = if mask > u64::from(u32::MAX) { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
    SeccompRule::new(vec![SeccompCondition::new(argument, len, SeccompCmpOp::MaskedEq(mask), value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Opens; 3] = [Opens::Nothing, Opens::Reads, Opens::Writes];

    fn conditions(opens: Opens, call: i64) -> Vec<Option<Condition>> {
        allowed(opens, 7).into_iter().filter(|(known, _)| *known == call).map(|(_, condition)| condition).collect()
    }

    #[test]
    fn what_a_reader_never_needs_is_not_in_the_list() {
        #[rustfmt::skip]
        let never = [
            libc::SYS_execve, libc::SYS_execveat, libc::SYS_socket, libc::SYS_socketpair, libc::SYS_connect,
            libc::SYS_bind, libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4, libc::SYS_sendmsg, libc::SYS_sendmmsg,
            libc::SYS_recvmsg, libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_kill,
            libc::SYS_tkill, libc::SYS_rt_sigqueueinfo, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal,
            libc::SYS_pidfd_getfd, libc::SYS_mount, libc::SYS_umount2, libc::SYS_move_mount, libc::SYS_open_tree,
            libc::SYS_pivot_root, libc::SYS_chroot, libc::SYS_unshare, libc::SYS_setns, libc::SYS_bpf,
            libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_io_uring_setup, libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register, libc::SYS_keyctl, libc::SYS_add_key, libc::SYS_memfd_create, libc::SYS_setuid,
            libc::SYS_setresuid, libc::SYS_capset, libc::SYS_seccomp, libc::SYS_fchmodat, libc::SYS_truncate,
            libc::SYS_clone3, libc::SYS_openat2, libc::SYS_mknodat, libc::SYS_symlinkat, libc::SYS_setxattr,
            libc::SYS_init_module, libc::SYS_kexec_load, libc::SYS_reboot, libc::SYS_shmget, libc::SYS_msgget,
        ];
        for opens in ALL {
            for call in never {
                assert!(conditions(opens, call).is_empty(), "{opens:?}: call {call}");
            }
        }
    }

    #[test]
    fn files_are_opened_only_where_a_directory_is_given() {
        assert!(conditions(Opens::Nothing, libc::SYS_openat).is_empty());
        let [Some(condition)] = conditions(Opens::Reads, libc::SYS_openat)[..] else { panic!("one condition") };
        let allows = |bits: i32| flags(bits) & condition.mask == condition.value;
        assert!(allows(libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_DIRECTORY | libc::O_NOFOLLOW));
        for writing in [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC, libc::O_TMPFILE | libc::O_RDWR] {
            assert!(!allows(writing), "{writing:#o}");
        }
        assert!(matches!(conditions(Opens::Writes, libc::SYS_openat)[..], [None]));
        assert!(conditions(Opens::Reads, libc::SYS_unlinkat).is_empty());
        assert!(matches!(conditions(Opens::Writes, libc::SYS_unlinkat)[..], [None]));
    }

    #[test]
    fn only_threads_of_this_process_are_made_and_signalled() {
        let [Some(clone)] = conditions(Opens::Nothing, libc::SYS_clone)[..] else { panic!("one condition") };
        // What glibc asks for a thread; and for a process.
        let thread = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SYSVSEM
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_CLEARTID;
        assert_eq!(flags(thread) & clone.mask, clone.value);
        for process in [libc::SIGCHLD, libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, thread | libc::CLONE_NEWUSER]
        {
            assert_ne!(flags(process) & clone.mask, clone.value, "{process:#x}");
        }
        let [Some(signal)] = conditions(Opens::Nothing, libc::SYS_tgkill)[..] else { panic!("one condition") };
        assert_eq!((signal.argument, signal.value), (0, 7));
    }

    #[test]
    fn no_descriptor_is_made_to_send_signals_to_others() {
        for opens in ALL {
            let conditions = conditions(opens, libc::SYS_fcntl);
            let allows = |command: i32| {
                conditions.iter().any(|condition| {
                    condition.is_none_or(|condition| {
                        condition.argument == 1 && flags(command) & condition.mask == condition.value
                    })
                })
            };
            assert!(allows(libc::F_DUPFD_CLOEXEC) && allows(libc::F_GETFL) && allows(libc::F_SETLK));
            // F_SETOWN, F_SETSIG, F_SETOWN_EX
            assert!([8, 10, 15].iter().all(|command| !allows(*command)), "{opens:?}");
        }
    }

    #[test]
    fn both_filters_compile_for_each_processor_and_fit_into_the_kernel() {
        // BPF_MAXINSNS
        const MAX_INSTRUCTIONS: usize = 4096;
        for target in [TargetArch::x86_64, TargetArch::aarch64] {
            for opens in ALL {
                let programs = programs(&allowed(opens, 7), target).unwrap();
                assert!(programs.iter().all(|program| program.len() < MAX_INSTRUCTIONS));
            }
        }
    }
}
