//! Clone and launch operating system images in seconds, on your own machines
fn main() {}
