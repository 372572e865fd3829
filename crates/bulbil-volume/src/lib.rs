//! Copy-on-write volumes: a manifest below, an overlay above, and the base cache between.

#![forbid(unsafe_code)]

mod device;

pub use device::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
