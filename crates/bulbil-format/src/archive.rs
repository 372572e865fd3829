//! OVA and other tar archives with one disk.

use std::sync::Arc;

use crate::{FormatError, ReadAt};

/// Returns the disk image in an archive.
pub(crate) fn disk_in(_file: Arc<dyn ReadAt>) -> Result<Arc<dyn ReadAt>, FormatError> {
    Err(FormatError::UnsupportedFormat { name: "tar or OVA archive".to_owned() })
}
