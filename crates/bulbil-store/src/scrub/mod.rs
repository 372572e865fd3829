//! Scrub.
pub(crate) mod quarantine;
