//! Documents of the API that are not records of the catalog.

use std::fmt;
use std::str::FromStr;

use bulbil_control::{
    ControlError, CopiedImage, ExportProgress, GcReport, ImageRecord, ImportProgress, InstanceView, ScrubProgress,
    ScrubReport, WarmedImage, WrittenFile,
};
use serde::{Deserialize, Serialize};

/// One line of a stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// An import or a copy has come so far.
    Progress(ImportProgress),
    /// An import, or a copy from another store, is complete.
    Image {
        /// The image.
        image: Box<ImageRecord>,
        /// Whether it was there before, with the same content.
        existed: bool,
    },
    /// A copy into another store is complete.
    Copied {
        /// What that store offers now.
        copied: Box<CopiedImage>,
    },
    /// An export, or the filling of the cache, has come so far.
    ExportProgress(ExportProgress),
    /// An export is complete.
    File {
        /// What was written.
        file: Box<WrittenFile>,
    },
    /// A scrub has come so far.
    ScrubProgress(ScrubProgress),
    /// A scrub has ended.
    Scrubbed {
        /// What it found.
        report: Box<ScrubReport>,
    },
    /// An image is in the cache.
    Warmed {
        /// What was done for it.
        warmed: Box<WarmedImage>,
    },
    /// A collection has ended.
    Collected {
        /// What it did.
        report: Box<GcReport>,
    },
    /// Something changed about an instance.
    Instance {
        /// The instance as it is now.
        instance: Box<InstanceView>,
    },
    /// All that was asked for has happened.
    Done,
    /// It has not.
    Error {
        /// Why.
        error: ControlError,
    },
}

/// How long a launch or start is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Until its supervising process runs.
    None,
    /// Until the machine runs.
    Running,
    /// Until the boot is decided: ready, degraded or failed.
    #[default]
    Ready,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Running => "running",
            Self::Ready => "ready",
        })
    }
}

impl FromStr for Wait {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let all = [Self::None, Self::Running, Self::Ready];
        let found = all.into_iter().find(|wait| wait.to_string() == word);
        found.ok_or_else(|| format!("unknown value `{word}`: use `none`, `running` or `ready`"))
    }
}

/// That the daemon is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Health {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
}

/// The body of an error answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) error: ControlError,
}
