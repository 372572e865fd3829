//! The command line: words, defaults and help texts.

use std::path::PathBuf;

use bulbil_api::Wait;
use bulbil_control::{
    CacheSize, Format, KeySource, PublishedPort, StoreChoice, StoreLocation, parse_key_source, parse_location,
};
use bulbil_types::{ByteSize, Name, Personality};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use crate::cli_disk::{DiskCommand, ExportArgs, InputArgs};
use crate::cli_private::Private;
use crate::cli_store::{CopyArgs, StoreCommand};
use crate::cli_volume::{MountArgs, SnapshotCommand, VolumeCommand};

/// Clone and launch operating system images in seconds, on your own machines.
#[derive(Debug, Parser)]
#[command(name = "bulbil", version, propagate_version = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bulbil launch debian-12.qcow2 --name web     import a disk image and start an instance of it
  bulbil shell web                             log in
  bulbil exec web -- uname -a                  run a command in it
  bulbil list                                  what is there
  bulbil rm web --force                        remove it, running or not

A background daemon is started when it is needed. `bulbil shutdown` ends it; instances go on.";

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory that holds everything [default: ~/.local/share/bulbil]
    #[arg(long, global = true, env = "BULBIL_DATA_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Store that the images are in: a path, file:///PATH or s3://BUCKET/PREFIX [default: in the data directory]
    #[arg(long, global = true, env = "BULBIL_STORE", value_name = "LOCATION", value_parser = Private(parse_location), value_hint = ValueHint::DirPath)]
    pub(crate) store: Option<StoreLocation>,
    /// Key of an encrypted store: file:PATH or command:PROGRAM ARGUMENTS
    #[arg(long, global = true, env = "BULBIL_STORE_KEY", value_name = "SOURCE", value_parser = Private(parse_key_source))]
    pub(crate) store_key: Option<KeySource>,
    /// Most space that the cache of read image data takes, such as 20GiB, or unlimited; kept until it is said otherwise
    #[arg(long, global = true, env = "BULBIL_CACHE_SIZE", value_name = "SIZE")]
    pub(crate) cache_size: Option<CacheSize>,
    /// How results are written
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: OutputFormat,
}

impl Global {
    /// What was said about the store.
    pub(crate) fn store_choice(&self) -> StoreChoice {
        StoreChoice { location: self.store.clone(), key: self.store_key.clone() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Tables for people
    Table,
    /// One JSON document
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Import, list, show, export, mount and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Show, check and convert disk image files, without images and instances
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Create, list, resize, snapshot, clone, serve, mount and remove volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// List, show and remove snapshots of volumes
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Start a new instance of an image, or of a disk image file
    Launch(LaunchArgs),
    /// List instances
    #[command(visible_alias = "ls")]
    List,
    /// Show an instance in full
    #[command(visible_alias = "info")]
    Show {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
    },
    /// Log in to an instance over SSH
    Shell {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        /// User to log in as [default: the image's own]
        #[arg(long)]
        user: Option<String>,
        /// Command to run instead of a shell
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Run a command in an instance over SSH; its exit status becomes bulbil's
    #[command(after_help = "Example:\n  bulbil exec web -- cat /etc/hostname")]
    Exec {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        /// User to run it as [default: the image's own]
        #[arg(long)]
        user: Option<String>,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show what an instance wrote to its serial console
    Logs {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        /// Go on showing what is added
        #[arg(short, long)]
        follow: bool,
        /// Show only this many lines from the end
        #[arg(short = 'n', long, value_name = "N")]
        lines: Option<usize>,
    },
    /// Attach to an instance's serial console; Ctrl-] leaves it
    Console {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
    },
    /// Power an instance off
    Stop {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        /// Switch it off instead of asking the guest
        #[arg(short, long)]
        force: bool,
        /// Switch it off when the guest has not ended after this many seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=86400))]
        timeout: u64,
    },
    /// Start a stopped instance
    Start {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Stop an instance and start it again
    Reboot {
        /// Name or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        instance: String,
        /// Switch it off instead of asking the guest
        #[arg(short, long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Remove instances with their disks
    Rm {
        /// Names or ids
        #[arg(required_unless_present = "all", value_parser = NonEmptyStringValueParser::new())]
        instances: Vec<String>,
        /// Remove every instance
        #[arg(long, conflicts_with = "instances")]
        all: bool,
        /// Also if it runs
        #[arg(short, long)]
        force: bool,
    },
    /// See what the image store takes, free what is unused, find damage, change keys
    #[command(subcommand)]
    Store(StoreCommand),
    /// Check what this machine offers and what is missing
    Doctor,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  bulbil completion bash > ~/.local/share/bash-completion/completions/bulbil")]
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Run the daemon in the foreground
    Serve {
        /// Leave the terminal's session, as when it is started on demand
        #[arg(long, hide = true)]
        detached: bool,
    },
    /// End the daemon; instances go on
    Shutdown,
    #[command(hide = true)]
    Shim {
        /// The instance's id
        instance: bulbil_types::InstanceId,
    },
    #[command(hide = true)]
    DiskConverter,
    #[command(hide = true)]
    ImageReader {
        /// Try what the sandbox refuses, and tell
        #[arg(long)]
        self_test: bool,
    },
    #[command(hide = true)]
    KvmProbe,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import a disk image file
    #[command(
        after_help = "Examples:\n  bulbil image import debian-12.qcow2\n  bulbil image import disk.raw --as web:2.1"
    )]
    Import {
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Name and version of the image [default: the file's name, version 1]
        #[arg(long = "as", value_name = "NAME[:VERSION]")]
        name: Option<NameAndVersion>,
        /// Format of the file: raw, qcow2, vhd, vhdx, vmdk or vdi [default: recognised]
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<Format>,
        #[command(flatten)]
        input: InputArgs,
    },
    /// List images, here or of another store
    #[command(visible_alias = "ls", after_help = "Example:\n  bulbil image list --from s3://images/team")]
    List {
        /// List what this store offers
        #[arg(long, value_name = "LOCATION", value_parser = Private(parse_location), value_hint = ValueHint::DirPath)]
        from: Option<StoreLocation>,
        /// Key of that store: file:PATH or command:PROGRAM ARGUMENTS
        #[arg(long, value_name = "SOURCE", value_parser = Private(parse_key_source), requires = "from")]
        from_key: Option<KeySource>,
    },
    /// Copy an image to or from another store: only what is missing there is sent
    Copy(Box<CopyArgs>),
    /// Show an image in full
    #[command(visible_alias = "info")]
    Show {
        /// Name, name:version or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        image: String,
    },
    /// Bring an image into the cache of this host, before an instance asks for it
    Warm {
        /// Name, name:version or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        image: String,
    },
    /// Write an image to a disk image file
    Export(ExportArgs),
    /// Show an image as the file DIR/disk.raw until it is unmounted or Ctrl-C
    #[command(after_help = "Example:\n  mkdir disk && bulbil image mount debian-12 disk")]
    Mount {
        /// Name, name:version or id
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        image: String,
        #[command(flatten)]
        place: MountArgs,
    },
    /// Remove images and free what nothing else uses
    Rm {
        /// Names, name:version or ids
        #[arg(required = true, value_parser = NonEmptyStringValueParser::new())]
        images: Vec<String>,
    },
}

/// `NAME` or `NAME:VERSION`.
#[derive(Debug, Clone)]
pub(crate) struct NameAndVersion {
    pub(crate) name: Name,
    pub(crate) version: Option<Name>,
}

impl std::str::FromStr for NameAndVersion {
    type Err = bulbil_types::ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some((name, version)) => Ok(Self { name: name.parse()?, version: Some(version.parse()?) }),
            None => Ok(Self { name: text.parse()?, version: None }),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// How long to follow the boot: none, running or ready
    #[arg(long, value_name = "UNTIL", default_value_t)]
    pub(crate) wait: Wait,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil launch debian-12 --name web --user-data web.yaml --publish 8080:80
  bulbil launch ./debian-12.qcow2 --key ~/.ssh/id_ed25519.pub
  bulbil launch debian-12 --personality alibaba --count 3 --name node")]
pub(crate) struct LaunchArgs {
    /// An image (name, name:version, id) or a disk image file to import first
    #[arg(value_name = "IMAGE|FILE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) image: String,
    /// Name of the instance [default: made up]
    #[arg(long)]
    pub(crate) name: Option<Name>,
    /// Number of instances; they are named NAME-1, NAME-2, …
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) count: u32,
    /// Virtual processors
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) memory: ByteSize,
    /// Size of the root disk [default: the image's]
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk: Option<ByteSize>,
    /// Public key file whose keys may log in; may be given more than once
    #[arg(long, value_name = "FILE.pub", value_hint = ValueHint::FilePath)]
    pub(crate) key: Vec<PathBuf>,
    /// User data for cloud-init, given to the guest byte for byte
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) user_data: Option<PathBuf>,
    /// Cloud the instance looks like to its guest: ec2, alibaba or nocloud
    #[arg(long, default_value = "ec2")]
    pub(crate) personality: Personality,
    /// Port of the host that leads to a port of the guest; may be given more than once
    #[arg(long, value_name = "[ADDRESS:]HOST:GUEST")]
    pub(crate) publish: Vec<PublishedPort>,
    /// Check everything and create nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
    // Last: the heading is that of all that follows.
    #[command(flatten, next_help_heading = "Options of a file that is imported")]
    pub(crate) input: InputArgs,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
