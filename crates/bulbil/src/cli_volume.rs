//! The words of `bulbil volume …`, `bulbil snapshot …` and `bulbil image mount`.

use std::path::PathBuf;
use std::str::FromStr;

use bulbil_types::{ByteSize, Name};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueHint};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume: empty, or as an image or a snapshot is
    Create(CreateArgs),
    /// List volumes, those of instances among them
    #[command(visible_alias = "ls")]
    List,
    /// Show a volume in full
    #[command(visible_alias = "info")]
    Show {
        /// Name or id; of an instance, its root volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
    },
    /// Make a volume larger; a running instance sees it at once
    #[command(after_help = "\
Example:
  bulbil volume resize web 40GiB

The partition and the file system on it are the guest's business: cloud-init grows them when it boots.")]
    Resize {
        /// Name or id; of an instance, its root volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        /// The new size; a volume never becomes smaller
        #[arg(value_name = "SIZE")]
        size: ByteSize,
    },
    /// Take a snapshot of a volume, in use by a running instance or not
    #[command(after_help = "\
Examples:
  bulbil volume snapshot web --name before-upgrade
  bulbil volume create --snapshot before-upgrade

It is what a loss of power at that moment would have left. The guest goes on meanwhile.")]
    Snapshot {
        /// Name or id; of an instance, its root volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        /// Name of the snapshot
        #[arg(long)]
        name: Option<Name>,
    },
    /// Make a volume that begins as another one is now
    #[command(after_help = "Example:\n  bulbil volume clone data --name data-for-test")]
    Clone {
        /// Name or id; of an instance, its root volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        /// Name of the new volume [default: made up]
        #[arg(long)]
        name: Option<Name>,
    },
    /// Serve a volume on a socket until Ctrl-C
    Serve(ServeArgs),
    /// Show a volume as the file DIR/disk.raw until it is unmounted or Ctrl-C
    #[command(after_help = "\
Example:
  mkdir disk && bulbil volume mount data disk &
  mount -o loop disk/disk.raw /mnt

What was written is durable after fsync, or when the directory is unmounted.")]
    Mount {
        /// Name or id; of an instance that does not run, its root volume
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        volume: String,
        #[command(flatten)]
        place: MountArgs,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
    },
    /// Remove volumes with everything written to them
    Rm {
        /// Names or ids
        #[arg(required = true, value_parser = NonEmptyStringValueParser::new())]
        volumes: Vec<String>,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil volume create data --size 100GiB
  bulbil volume create --image debian-12 --size 20GiB
  bulbil volume create restored --snapshot before-upgrade")]
pub(crate) struct CreateArgs {
    /// Name of the volume [default: made up]
    pub(crate) name: Option<Name>,
    /// Size [default: that of the image or snapshot]
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<ByteSize>,
    /// Image that it begins as: name, name:version or id
    #[arg(long, value_name = "IMAGE", value_parser = NonEmptyStringValueParser::new(), conflicts_with = "snapshot")]
    pub(crate) image: Option<String>,
    /// Snapshot that it begins as: name or id
    #[arg(long, value_name = "SNAPSHOT", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) snapshot: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil volume serve data --nbd unix:/run/data.nbd
  nbdinfo 'nbd+unix:///?socket=/run/data.nbd'
  bulbil volume serve data --vhost-user /run/data.vhost")]
pub(crate) struct ServeArgs {
    /// Name or id; of an instance that does not run, its root volume
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub(crate) volume: String,
    /// Serve it over NBD on this new socket
    #[arg(long, value_name = "unix:PATH", required_unless_present = "vhost_user", value_hint = ValueHint::FilePath)]
    pub(crate) nbd: Option<UnixAddress>,
    /// Serve it to a virtual machine as vhost-user-blk on this new socket
    #[arg(long, value_name = "PATH", conflicts_with = "nbd", value_hint = ValueHint::FilePath)]
    pub(crate) vhost_user: Option<PathBuf>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// Empty directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) directory: PathBuf,
}

/// `unix:PATH`.
#[derive(Debug, Clone)]
pub(crate) struct UnixAddress(pub(crate) PathBuf);

impl FromStr for UnixAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err(format!("`{text}` is not an address to serve at: write unix:PATH")),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List snapshots
    #[command(visible_alias = "ls")]
    List,
    /// Show a snapshot in full
    #[command(visible_alias = "info")]
    Show {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        snapshot: String,
    },
    /// Remove snapshots; volumes made from them go on
    Rm {
        /// Names or ids
        #[arg(required = true, value_parser = NonEmptyStringValueParser::new())]
        snapshots: Vec<String>,
    },
}
