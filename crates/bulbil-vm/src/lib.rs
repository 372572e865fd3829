//! Runs virtual machines under QEMU
