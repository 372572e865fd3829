//! Serves block devices to virtual machines and to tools.
//!
//! [`nbd`] serves any [`BlockDevice`](bulbil_volume::BlockDevice) over the Network Block
//! Device protocol on a unix socket.

#![forbid(unsafe_code)]

pub mod nbd;
