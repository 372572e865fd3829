//! Sizes in bytes as people write them: `20GiB`, `512M`, `1 TiB`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

/// The text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write a number and a unit, such as `20GiB` or `512MiB`")]
pub struct ParseSizeError(String);

const UNITS: [(&str, u32); 5] = [("", 0), ("k", 10), ("m", 20), ("g", 30), ("t", 40)];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    /// Parses a whole number with an optional binary unit.
    ///
    /// `K`, `KB` and `KiB` all mean 1024 bytes, as in `qemu-img`; the same for M, G, T.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseSizeError(text.to_owned());
        let lower = text.trim().to_ascii_lowercase();
        let digits_end = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
        let (digits, unit) = lower.split_at(digits_end);
        let unit = unit.trim_start();
        let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(unit);
        let (_, shift) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(fail)?;
        let number: u64 = digits.parse().map_err(|_| fail())?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(fail)
    }
}

impl fmt::Display for ByteSize {
    /// Writes at most one decimal and a binary unit: `1.2 GiB`, `20 GiB`, `512 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut unit = 0;
        while unit + 1 < names.len() && self.0 >> (10 * (unit + 1)) != 0 {
            unit += 1;
        }
        let tenths = (u128::from(self.0) * 10) >> (10 * unit);
        let text = if unit == 0 || tenths % 10 == 0 {
            format!("{} {}", tenths / 10, names[unit])
        } else {
            format!("{}.{} {}", tenths / 10, tenths % 10, names[unit])
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_every_common_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("20GiB", 20 << 30),
            ("20 GB", 20 << 30),
            ("1t", 1 << 40),
            ("3MiB", 3 << 20),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap(), ByteSize(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5G", "1x", "99999999999T", "1 2"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_short() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (20 << 30, "20 GiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }
}
