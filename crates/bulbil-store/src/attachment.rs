//! Attachments: small objects that belong to a content and help to use it, but are not needed to read it.
//!
//! ```text
//! attachments/<kind>/<name of the content, 64 digits>
//! 0       8      magic "BULBATTA"
//! 8       …      the attachment, as its kind defines
//! end-32  32     BLAKE3 of everything before
//! ```
//! In an encrypted store this is encrypted as a whole, see `encryption`. One that is missing or damaged costs time, never correctness.

use crate::digest::Digest;
use crate::encryption::EncryptedKind;
use crate::error::StoreError;
use crate::published::ContentName;
use crate::store::Store;

const MAGIC: &[u8; 8] = b"BULBATTA";
const MAX_BYTES: u64 = 64 << 20;

/// What an attachment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachmentKind {
    /// The order in which a boot first touches the content.
    BootTrace,
    /// The hash of every window, from which the digest of a changed disk is made.
    Leaves,
}

impl AttachmentKind {
    pub(crate) const ALL: [Self; 2] = [Self::BootTrace, Self::Leaves];

    /// The content to which an attachment object of a known kind belongs.
    pub(crate) fn content_of(object_name: &str) -> Option<ContentName> {
        Self::parse(object_name).map(|(_, content)| content)
    }

    /// The kind and the content of an attachment object; `None` for one of an unknown kind.
    pub(crate) fn parse(object_name: &str) -> Option<(Self, ContentName)> {
        let (kind, hex) = object_name.strip_prefix("attachments/")?.split_once('/')?;
        let kind = Self::ALL.into_iter().find(|known| known.as_str() == kind)?;
        Some((kind, ContentName::parse(hex)?))
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::BootTrace => "boot-trace",
            Self::Leaves => "leaves",
        }
    }
}

impl Store {
    /// Stores an attachment of a content in place of an earlier one. Durable when this returns.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, `Timeout`.
    pub fn put_attachment(&self, digest: &Digest, kind: AttachmentKind, bytes: &[u8]) -> Result<(), StoreError> {
        let name = object_name(self.content_name(digest), kind);
        self.objects.put(&name, &self.encrypt_object(EncryptedKind::Attachment, &name, encode(bytes))?)
    }

    /// Reads an attachment of a content.
    ///
    /// # Errors
    /// `NotFound` when it has none of this kind; `Corrupt`, `Io`, `Timeout`.
    pub fn attachment(&self, digest: &Digest, kind: AttachmentKind) -> Result<Vec<u8>, StoreError> {
        self.read_attachment(&object_name(self.content_name(digest), kind))
    }

    /// Reads the attachment in an object.
    pub(crate) fn read_attachment(&self, name: &str) -> Result<Vec<u8>, StoreError> {
        let bytes = self.decrypt_object(EncryptedKind::Attachment, name, self.objects.get(name, MAX_BYTES)?)?;
        let damaged = || StoreError::corrupt(format!("the attachment `{name}` is damaged"));
        let (content, hash) = bytes.split_last_chunk::<32>().ok_or_else(damaged)?;
        let sound = content.starts_with(MAGIC) && blake3::hash(content).as_bytes() == hash;
        sound.then(|| content[MAGIC.len()..].to_vec()).ok_or_else(damaged)
    }
}

/// Makes the object of an attachment.
pub(crate) fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut object = MAGIC.to_vec();
    object.extend_from_slice(bytes);
    let hash = blake3::hash(&object);
    object.extend_from_slice(hash.as_bytes());
    object
}

fn object_name(content: ContentName, kind: AttachmentKind) -> String {
    format!("attachments/{}/{content}", kind.as_str())
}
