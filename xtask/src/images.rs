//! `cargo xtask guest-image`: builds guest images by the scripts in `images/`.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;

use crate::run::{Cmd, print_data, workspace_root};

/// The environment variable that names the folder of guest images, for this task and for tests.
pub(crate) const IMAGES_DIR_VAR: &str = "BULBIL_TEST_IMAGES";

/// Decides the rebuilt disk's file system UUID; any other text would do.
const REBUILT_SEED: &str = "rebuilt";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How the Debian image is set up
    #[arg(long, value_enum, default_value_t = Profile::Fast)]
    profile: Profile,
    /// Build the very small image instead
    #[arg(long, conflicts_with_all = ["profile", "rebuilt"])]
    tiny: bool,
    /// Also make the same disk again, with a file system of its own
    #[arg(long)]
    rebuilt: bool,
    /// Build even when nothing changed, with packages of today
    #[arg(long)]
    rebuild: bool,
    /// Print the path of the finished raw disk on standard output
    #[arg(long)]
    print_path: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// Trimmed for starting under software emulation
    Fast,
    /// Debian's defaults
    Stock,
}

/// A guest image to build.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Image {
    Debian { profile: Profile, rebuilt: bool },
    Tiny,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let image = if args.tiny { Image::Tiny } else { Image::Debian { profile: args.profile, rebuilt: args.rebuilt } };
    let path = build(image, args.rebuild)?;
    if args.print_path {
        print_data(path.display().to_string())?;
    }
    Ok(())
}

/// The folder that finished images are in: `target/images`, or what [`IMAGES_DIR_VAR`] names.
pub(crate) fn images_dir() -> PathBuf {
    std::env::var_os(IMAGES_DIR_VAR).map_or_else(|| workspace_root().join("target/images"), PathBuf::from)
}

/// Builds `image` unless it is there already; returns its raw disk.
pub(crate) fn build(image: Image, rebuild: bool) -> Result<PathBuf> {
    let dir = images_dir();
    let (script, options, name) = match image {
        Image::Tiny => ("images/build-tiny.sh", vec![], "tiny"),
        Image::Debian { profile, rebuilt } => {
            let (profile, name) = match profile {
                Profile::Fast => ("fast", "debian-12"),
                Profile::Stock => ("stock", "debian-12-stock"),
            };
            let mut options = vec!["--profile", profile];
            if rebuilt {
                options.extend(["--rebuild-disk", REBUILT_SEED]);
            }
            ("images/build-debian.sh", options, name)
        }
    };
    Cmd::new(workspace_root().join(script))
        .shown_as(script)
        .args([&dir])
        .args(options)
        .args(rebuild.then_some("--rebuild"))
        .hint("cargo xtask setup installs what building an image needs")
        .run()?;
    Ok(dir.join(format!("{name}.raw")))
}
