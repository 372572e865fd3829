//! Instance metadata as each cloud serves it
