//! The command line about stores: `bulbil store …` and `bulbil image copy`.

use std::path::PathBuf;
use std::time::Duration;

use bulbil_control::{KeySource, StoreLocation, parse_key_source, parse_location};
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueHint};

use crate::cli::NameAndVersion;
use crate::cli_private::Private;

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Add up what the store holds, and what each image costs
    Stats,
    /// Read everything again, name what is damaged, and heal it
    #[command(after_help = "\
Examples:
  bulbil store scrub --share 3/30                        a thirtieth of the packs, another one each day
  bulbil store scrub --heal-from s3://images/mirror      heal from another store that has the images

Damage is healed from the cache of this host where it has what is missing. The exit status is 1 when damage remains.")]
    Scrub {
        /// Read only this share of the packs
        #[arg(long, value_name = "I/N", value_parser = parse_share)]
        share: Option<Share>,
        /// Heal from this store as well
        #[arg(long, value_name = "LOCATION", value_parser = Private(parse_location), value_hint = ValueHint::DirPath)]
        heal_from: Option<StoreLocation>,
        /// Key of that store: file:PATH or command:PROGRAM ARGUMENTS
        #[arg(long, value_name = "SOURCE", value_parser = Private(parse_key_source), requires = "heal_from")]
        heal_from_key: Option<KeySource>,
    },
    /// Make, replace and list the keys of an encrypted store
    #[command(subcommand)]
    Key(KeyCommand),
    /// Free what nothing uses any more
    #[command(after_help = "\
Examples:
  bulbil store gc --dry-run          see what would be freed, and why
  bulbil store gc --grace 7d         leave alone what was in use in the last 7 days

Imports, copies and instances go on meanwhile.")]
    Gc {
        /// Change nothing, only tell what would be done
        #[arg(long)]
        dry_run: bool,
        /// How long unused packs stay, such as 90s, 30m, 24h or 7d [default: 0 in a directory, 24h elsewhere]
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        grace: Option<Duration>,
        /// Leave packs whole that are used in small part
        #[arg(long)]
        no_repack: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bulbil image copy debian-12 --to s3://images/team
  bulbil image copy debian-12 --from s3://images/team --as debian:12.1

A copy that was cut off goes on where it was when it is made again.")]
pub(crate) struct CopyArgs {
    /// Image to copy: of this host, or with --from of that store
    #[arg(value_name = "IMAGE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) image: String,
    /// Copy it to this store, which is made if there is none
    #[arg(long, value_name = "LOCATION", value_parser = Private(parse_location), required_unless_present = "from", conflicts_with = "from", value_hint = ValueHint::DirPath)]
    pub(crate) to: Option<StoreLocation>,
    /// Key of that store: file:PATH or command:PROGRAM ARGUMENTS
    #[arg(long, value_name = "SOURCE", value_parser = Private(parse_key_source), conflicts_with = "from")]
    pub(crate) to_key: Option<KeySource>,
    /// Copy it from this store
    #[arg(long, value_name = "LOCATION", value_parser = Private(parse_location), value_hint = ValueHint::DirPath)]
    pub(crate) from: Option<StoreLocation>,
    /// Key of that store: file:PATH or command:PROGRAM ARGUMENTS
    #[arg(long, value_name = "SOURCE", value_parser = Private(parse_key_source), conflicts_with = "to")]
    pub(crate) from_key: Option<KeySource>,
    /// Name and version of the copy [default: as the image]
    #[arg(long = "as", value_name = "NAME[:VERSION]")]
    pub(crate) name: Option<NameAndVersion>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Write a new random key to a file
    #[command(after_help = "\
Examples:
  bulbil store key new ~/.config/bulbil.key

A new store is encrypted when a key is named at its first use:
  bulbil image list --store /srv/images --store-key file:$HOME/.config/bulbil.key

Keep a copy of the file elsewhere: without a key nobody reads the store.")]
    New {
        /// The file, which must not exist
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// List the keys that open the store
    #[command(visible_alias = "ls")]
    List,
    /// Replace the key that this host opens the store with; nothing that is stored is written again
    Rotate {
        /// Where the new key is: file:PATH or command:PROGRAM ARGUMENTS
        #[arg(long, value_name = "SOURCE", value_parser = Private(parse_key_source))]
        new_key: KeySource,
    },
    /// Encrypt what is stored from now on with a new data key
    AddDataKey,
}

/// One of equal shares of all packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    /// From 0.
    pub(crate) index: u32,
    pub(crate) count: u32,
}

/// Parses `I/N`, where `I` is from 1 to `N`.
fn parse_share(text: &str) -> Result<Share, String> {
    let usage = || format!("`{text}` is not a share: write I/N with I from 1 to N, such as 3/30");
    let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n > 0 && text.bytes().all(|b| b.is_ascii_digit()));
    let (index, count) = text.split_once('/').ok_or_else(usage)?;
    let (index, count) = number(index).zip(number(count)).ok_or_else(usage)?;
    if index <= count { Ok(Share { index: index - 1, count }) } else { Err(usage()) }
}

/// A hundred years.
const MAX_DURATION_S: u64 = 36_525 * 86_400;

/// Parses a whole number of seconds, minutes, hours or days.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let usage = || format!("`{text}` is not a duration: write a number and s, m, h or d, such as 24h");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let units = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
    let found = units.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(*unit)?, *seconds)));
    let (number, unit_s) = found.ok_or_else(usage)?;
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(usage());
    }
    let number: u64 = number.parse().map_err(|_| usage())?;
    number.checked_mul(unit_s).filter(|s| *s <= MAX_DURATION_S).map(Duration::from_secs).ok_or_else(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_counted_from_1() {
        assert_eq!(parse_share("1/1"), Ok(Share { index: 0, count: 1 }));
        assert_eq!(parse_share("30/30"), Ok(Share { index: 29, count: 30 }));
        for text in ["", "1", "0/3", "4/3", "1/0", "+1/3", "1/3/5", "a/b", "1/99999999999"] {
            assert!(parse_share(text).unwrap_err().contains("3/30"), "{text}");
        }
    }

    #[test]
    fn durations_are_a_number_and_a_unit() {
        for (text, seconds) in [("0", 0), ("0s", 0), ("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "h", "24", "1.5h", "-1h", "+1h", "1w", "24 h", "99999999999999999999h", "36526d", "1ü"] {
            assert!(parse_duration(text).unwrap_err().contains("24h"), "{text}");
        }
    }
}
