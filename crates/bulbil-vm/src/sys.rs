//! What safe code cannot do: code between `fork` and `exec`, and memory that a virtual machine shares.
#![allow(unsafe_code, reason = "the one module with unsafe blocks; each is a few lines with its proof")]

use std::io;
use std::process::Command;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Makes the child be killed when the *thread* that spawns it ends (that is what the kernel watches), and with it
/// when the whole process dies, however it dies. The thread must therefore live as long as the child is wanted.
pub(crate) fn die_with_spawning_thread(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let parent = getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above: then nobody would send the signal.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec only async-signal-safe work is allowed. The closure makes two system calls
    // (prctl, getppid) and builds an error value from a kind: no allocation, no lock, no environment. It captures a
    // plain number. The standard library has no safe way to set a death signal.
    unsafe { command.pre_exec(before_exec) };
}

/// A step of the KVM probe failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmProbeError {
    /// A call to KVM failed.
    #[error("{step}: {source}")]
    Step {
        /// What was attempted.
        step: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel speaks another KVM.
    #[error("KVM speaks version {0}, not 12")]
    ApiVersion(i32),
    /// The guest did something else than halt.
    #[error("the guest did not halt but ended with {0}")]
    WrongExit(String),
    /// Not built for this processor.
    #[error("this program was built for a processor on which KVM is not tried")]
    NotBuilt,
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) use kvm::run_halting_guest;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(crate) fn run_halting_guest() -> Result<(), KvmProbeError> {
    Err(KvmProbeError::NotBuilt)
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod kvm {
    use std::io;

    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

    use super::KvmProbeError;

    const PAGE_BYTES: usize = 4096;

    /// Where the page lies in the guest: low, so that real mode reaches it, but not at zero.
    const GUEST_ADDRESS: u64 = 0x1000;

    /// The instruction `HLT`.
    const HLT: u8 = 0xf4;

    /// KVM's stable interface, the only one since 2007.
    const API_VERSION: i32 = 12;

    #[repr(C, align(4096))]
    struct Page([u8; PAGE_BYTES]);

    pub(crate) fn run_halting_guest() -> Result<(), KvmProbeError> {
        let kvm = Kvm::new().map_err(|e| step("open /dev/kvm", e))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmProbeError::ApiVersion(version));
        }
        let vm = kvm.create_vm().map_err(|e| step("create a virtual machine", e))?;
        give_memory(&vm)?;
        let mut vcpu = vm.create_vcpu(0).map_err(|e| step("create a virtual processor", e))?;
        point_at_code(&vcpu)?;
        run_to_halt(&mut vcpu)
    }

    fn give_memory(vm: &VmFd) -> Result<(), KvmProbeError> {
        // Never freed: the guest may use it until the process ends, which is right after the probe.
        let page: &'static mut Page = Box::leak(Box::new(Page([HLT; PAGE_BYTES])));
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: GUEST_ADDRESS,
            memory_size: PAGE_BYTES as u64,
            userspace_addr: std::ptr::from_mut(page) as u64,
        };
        // SAFETY: the region is one whole, aligned page of this process; it is leaked, so it outlives the machine,
        // and its only reference is given up here, so nothing else reads or writes it. It is the only region, so it
        // overlaps none. Sharing memory with a guest has no safe interface.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| step("give memory to the guest", e))
    }

    fn point_at_code(vcpu: &VcpuFd) -> Result<(), KvmProbeError> {
        let mut sregs = vcpu.get_sregs().map_err(|e| step("read segment registers", e))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).map_err(|e| step("set segment registers", e))?;
        let mut regs = vcpu.get_regs().map_err(|e| step("read registers", e))?;
        regs.rip = GUEST_ADDRESS;
        // Bit 1 is always set.
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(|e| step("set registers", e))
    }

    fn run_to_halt(vcpu: &mut VcpuFd) -> Result<(), KvmProbeError> {
        loop {
            match vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(()),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(KvmProbeError::WrongExit(format!("{other:?}"))),
                Err(error) if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(step("run the guest", error)),
            }
        }
    }

    fn step(step: &'static str, error: kvm_ioctls::Error) -> KvmProbeError {
        KvmProbeError::Step { step, source: io::Error::from(error) }
    }
}
