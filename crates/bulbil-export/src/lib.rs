//! Serves block devices to virtual machines and to tools.
//!
//! [`nbd`] serves any [`BlockDevice`](bulbil_volume::BlockDevice) over the Network Block
//! Device protocol on a unix socket; [`vhost_user`] serves one over memory shared with the
//! virtual machine, which is faster.

#![forbid(unsafe_code)]

pub mod nbd;
pub mod vhost_user;
