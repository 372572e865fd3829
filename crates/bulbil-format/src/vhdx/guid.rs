//! GUIDs as Windows stores them: the first three of their five fields are little-endian.

use std::fmt;

use crate::bytes::bytes_at;

/// A GUID, in the order of its bytes in the file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Guid([u8; 16]);

impl Guid {
    /// What stands for "none".
    pub(super) const ZERO: Self = Self([0; 16]);

    /// Takes the digits in the order in which people write them.
    pub(super) const fn from_digits(digits: u128) -> Self {
        Self::from_bytes(digits.to_be_bytes())
    }

    /// Reads the GUID at `at`; zero past the end of `bytes`.
    pub(super) fn read(bytes: &[u8], at: usize) -> Self {
        Self(bytes_at(bytes, at))
    }

    /// Takes the bytes of a UUID, of which every field is big-endian.
    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        let [i, j, k, l, m, n, o, p] = rest;
        Self([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }

    /// The bytes as they are in the file.
    pub(super) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g, h, i, rest @ ..] = self.0;
        let [j, k, node @ ..] = rest;
        write!(f, "{:08x}-", u32::from_le_bytes([a, b, c, d]))?;
        write!(f, "{:04x}-{:04x}-", u16::from_le_bytes([e, g]), u16::from_le_bytes([h, i]))?;
        write!(f, "{j:02x}{k:02x}-")?;
        node.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_shown_as_they_were_written() {
        let guid = Guid::from_digits(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(guid.as_bytes()[..6], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6]);
        assert_eq!(Guid::read(guid.as_bytes(), 0), guid);
        assert_eq!(Guid::from_bytes(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08_u128.to_be_bytes()), guid);
    }
}
