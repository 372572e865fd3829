//! VHDX: what others write is read, what is written others read, and what is damaged is refused.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests are tests")]

mod damage;
mod image;
mod log;
mod read;
mod refuse;
#[path = "../support/mod.rs"]
mod support;
mod write;
