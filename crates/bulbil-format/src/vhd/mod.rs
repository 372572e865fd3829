//! VHD.

use std::sync::Arc;

use crate::{Disk, FormatError, OpenOptions, ReadAt};

/// Opens an image.
pub(crate) fn open(_file: Arc<dyn ReadAt>, _options: &OpenOptions) -> Result<Box<dyn Disk>, FormatError> {
    Err(FormatError::UnsupportedFormat { name: "VHD".to_owned() })
}
