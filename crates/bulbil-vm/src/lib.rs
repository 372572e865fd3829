//! Runs virtual machines under QEMU.
//!
//! ```text
//!  InstanceSpec ──qemu_argv──► argv ──QemuProcess::spawn──► QEMU ──► ExitReason
//!   (spec)         (argv)                (process)           │ │
//!                                                   QMP ◄────┘ └────► serial log
//!                                                  (qmp)              (console) ──► BootProgress (boot)
//! ```
//!
//! What can be decided without touching anything is a pure function or a pure state machine: the command line, the
//! version, the accelerator, the meaning of the console, the verdict on a boot, the reason of an exit. Only
//! [`process`], [`qmp`], [`qemu::QemuBinary::probe`] and [`accel::probe_in_child`] do input and output.
//!
//! The crate knows nothing of volumes, networks or metadata: a disk is a socket that speaks NBD or vhost-user, a NIC is a socket
//! that carries Ethernet frames.

#![deny(unsafe_code)]

pub mod accel;
mod argv;
pub mod attach;
pub mod boot;
pub mod cloud_init;
pub mod console;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod spec;
mod sys;

pub use accel::{AccelChoice, Accelerator, KvmVerdict, ProbeCommand, detect_accelerator, probe_kvm_blocking};
pub use argv::qemu_argv;
pub use attach::{DiskAttach, DiskChoice, choose_attach};
pub use boot::{BootInput, BootPhase, BootProgress, BootVerdict, Expectations, PhaseReached};
pub use cloud_init::{CloudInitReport, parse_cloud_init_status};
pub use console::{ConsoleEvent, ConsoleParser};
pub use process::{ExitReason, QemuCommand, QemuProcess, QmpSeen, exit_reason};
pub use qemu::{QemuBinary, QemuVersion};
pub use qmp::{Qmp, QmpError, QmpEvent, QmpEventKind};
pub use spec::{Disk, DiskSource, Firmware, InstanceSpec, Nic, Paths, Smbios, SocketRole, SpecError, UefiFirmware};
