//! The image store: block matching, frames, packs, manifests, digests
