//! The words of `bulbil disk …`, and those of `bulbil image export`, which writes the same files.

use std::path::PathBuf;

use bulbil_control::{DiskFile, Format, Subformat, TargetCompression, TargetFormat, TargetOptions};
use bulbil_types::ByteSize;
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueHint};

use crate::error::{CliError, CliResult};

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Show what a disk image file says about itself
    #[command(after_help = "Example:\n  bulbil disk info debian-12.qcow2")]
    Info {
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Format of the file: raw, qcow2, vhd, vhdx, vmdk or vdi [default: recognised]
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<Format>,
        #[command(flatten)]
        input: InputArgs,
    },
    /// Read disk image files to their ends: tables, checksums, everything compressed
    #[command(after_help = "Example:\n  bulbil disk check backup/*.qcow2")]
    Check {
        /// The files
        #[arg(required = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
        files: Vec<PathBuf>,
        /// Format of the files: raw, qcow2, vhd, vhdx, vmdk or vdi [default: recognised]
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<Format>,
        #[command(flatten)]
        input: InputArgs,
    },
    /// Write a disk image file as one of another format
    Convert(ConvertArgs),
}

/// What is said about an image that is read.
#[derive(Debug, Clone, Args)]
pub(crate) struct InputArgs {
    /// Image that the file is based on; given again, the one that is based on, and so on
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) parent: Vec<PathBuf>,
    /// Directory of the other files of a split image; none other is opened
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) extent_dir: Option<PathBuf>,
    /// Snapshot to read, by name or id, instead of the current state
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) snapshot: Option<String>,
    /// Go on where this machine cannot restrict the process that reads
    #[arg(long)]
    pub(crate) no_sandbox: bool,
}

impl InputArgs {
    /// The first of these options that was given.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        let given = [
            ("--parent", !self.parent.is_empty()),
            ("--extent-dir", self.extent_dir.is_some()),
            ("--snapshot", self.snapshot.is_some()),
            ("--no-sandbox", self.no_sandbox),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(option, _)| option)
    }

    pub(crate) fn disk_file(&self, path: PathBuf, format: Option<Format>) -> DiskFile {
        DiskFile {
            path,
            format,
            parents: self.parent.clone(),
            extent_dir: self.extent_dir.clone(),
            snapshot: self.snapshot.clone(),
        }
    }
}

/// What image file to write.
#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// Format to write: raw, qcow2, vhd, vhdx, vmdk, vdi or ova [default: by the extension of the new file]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    format: Option<TargetFormat>,
    /// Variant: dynamic or fixed of vhd; monolithicSparse or streamOptimized of vmdk [default: the first]
    #[arg(long, value_name = "VARIANT")]
    subformat: Option<Subformat>,
    /// Compression of qcow2: none, zlib or zstd [default: none]
    #[arg(long, value_name = "METHOD")]
    compress: Option<TargetCompression>,
    /// Cluster size of qcow2, 512 to 2MiB [default: 64KiB]
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<ByteSize>,
    /// Replace the new file if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

impl TargetArgs {
    /// What to write to `path`; a mistake is one of usage.
    pub(crate) fn options(&self, path: &std::path::Path, backing: bool) -> CliResult<TargetOptions> {
        let format = self.format.or_else(|| TargetFormat::of_new_file(path)).ok_or_else(|| {
            CliError::usage(format!("the name `{}` does not say which format to write", path.display()))
                .hint("say so: --format raw, qcow2, vhd, vhdx, vmdk, vdi or ova")
        })?;
        let options = TargetOptions {
            format,
            subformat: self.subformat,
            compression: self.compress,
            cluster_bytes: self.cluster_size.map(|size| size.0),
        };
        options.check(backing).map_err(|error| CliError::usage(error.to_string()))?;
        Ok(options)
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil disk convert debian-12.qcow2 debian-12.vmdk
  bulbil disk convert disk.raw azure.vhd --subformat fixed
  bulbil disk convert disk.vhdx disk.qcow2 --compress zstd
  bulbil disk convert changed.raw changed.qcow2 --backing debian-12.qcow2")]
pub(crate) struct ConvertArgs {
    /// The file to read
    #[arg(value_name = "IN", value_hint = ValueHint::FilePath)]
    pub(crate) input: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub(crate) output_file: PathBuf,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Image below the new qcow2 image, which then holds the difference only
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) backing: Option<PathBuf>,
    /// Format of the image below [default: recognised]
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    pub(crate) backing_format: Option<Format>,
    /// Format of the file to read: raw, qcow2, vhd, vhdx, vmdk or vdi [default: recognised]
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub(crate) input_format: Option<Format>,
    #[command(flatten)]
    pub(crate) source: InputArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil image export debian-12 debian-12.qcow2 --compress zstd
  bulbil image export web:2.1 web.ova")]
pub(crate) struct ExportArgs {
    /// Name, name:version or id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub(crate) image: String,
    /// The file to write
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
}
