//! Reads disk image formats safely and writes seed disks
