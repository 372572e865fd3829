//! Serves block devices to virtual machines and to tools.
//!
//! [`nbd`] serves any [`BlockDevice`](bulbil_volume::BlockDevice) over the Network Block
//! Device protocol on a unix socket; [`vhost_user`] serves one over memory shared with the
//! virtual machine, which is faster; [`fuse`] shows one as a file in a mounted directory.

#![forbid(unsafe_code)]

#[macro_use]
mod counters;
pub mod fuse;
pub mod nbd;
pub mod vhost_user;
