//! The bytes of small stored objects, held still: what was written once is read for ever.
//!
//! Each text is an object as the first version of its format wrote it.

use crate::attachment::{self, AttachmentKind};
use crate::gc::list::{Condemned, CondemnedList};
use crate::lease::{self, End, LeaseDocument, Void};
use crate::pack::PackId;
use crate::scrub::quarantine::QuarantineDocument;
use crate::sealed;

fn check<T>(document: &T, golden: &str)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    assert_eq!(String::from_utf8(sealed::encode(document)).unwrap(), golden);
    assert_eq!(sealed::decode::<T>("golden", golden.as_bytes()).unwrap(), *document);
}

#[test]
fn a_list_of_condemned_packs_is_read_for_ever() {
    let pack = |n, doomed| Condemned { id: PackId([n; 16]), generation: 4, since_ms: 1_790_000_000_000, doomed };
    let list = CondemnedList {
        format_version: 1,
        generation: 5,
        collector: "000102030405060708090a0b0c0d0e0f".to_owned(),
        packs: vec![pack(1, false), pack(2, true)],
        superseded: vec!["manifests/ab/0000000000000001-00000002.manifest".to_owned()],
    };
    check(&list, LIST);
}

#[test]
fn a_lease_is_read_for_ever() {
    let process = r#"{"boot_id":"5e1f","namespace":"pid:[4026531836]","pid":77,"started":12345}"#;
    let document = LeaseDocument {
        format_version: 1,
        owner: "00000000000000ff".parse().unwrap(),
        purpose: "import".to_owned(),
        generation: 3,
        started_ms: 1_790_000_000_000,
        expires_ms: 1_790_000_600_000,
        process: serde_json::from_str(process).unwrap(),
    };
    check(&document, LEASE);
}

#[test]
fn the_ends_of_leases_are_read_for_ever() {
    let publishing = End::Publishing { names: vec!["manifests/ab/0000000000000001-00000002.manifest".to_owned()] };
    let expired = End::Expired { collector: "000102030405060708090a0b0c0d0e0f".to_owned() };
    for (end, golden) in [(publishing, PUBLISHING), (expired, EXPIRED)] {
        assert_eq!(String::from_utf8(lease::encode_end(end)).unwrap(), golden);
    }
}

#[test]
fn a_void_object_is_known_for_ever_and_also_when_it_is_damaged() {
    let random = "101112131415161718191a1b1c1d1e1f".to_owned();
    assert_eq!(String::from_utf8(Void::with("000102030405060708090a0b0c0d0e0f", random)).unwrap(), VOID);
    assert!(Void::is(VOID.as_bytes()) && (VOID.len() as u64) < Void::MAX_BYTES);
    for position in 0..VOID.len() {
        let mut bad = VOID.as_bytes().to_vec();
        bad[position] ^= 0xff;
        assert!(Void::is(&bad), "byte {position}");
    }
    assert!(!Void::is(b"BULBMANI") && !Void::is(b"") && !Void::is(b"{"));
}

#[test]
fn a_note_of_quarantine_is_read_for_ever() {
    check(&QuarantineDocument { format_version: 1, frames: vec![0, 7], since_ms: 1_790_000_000_000 }, QUARANTINE);
}

#[test]
fn an_attachment_is_read_for_ever() {
    let object = attachment::encode(b"first touched");
    assert_eq!(&object[..21], b"BULBATTAfirst touched");
    assert_eq!(blake3::hash(&object).to_hex().as_str(), ATTACHMENT);
    let content = crate::published::ContentName([0xab; 32]);
    for (kind, name) in [(AttachmentKind::BootTrace, "boot-trace"), (AttachmentKind::Leaves, "leaves")] {
        let object = format!("attachments/{name}/{}", "ab".repeat(32));
        assert_eq!(AttachmentKind::parse(&object), Some((kind, content)));
    }
}

const LIST: &str = concat!(
    r#"{"format_version":1,"generation":5,"collector":"000102030405060708090a0b0c0d0e0f","packs":[{"id":"01010101010101010101010101010101","generation":4,"since_ms":1790000000000},{"id":"02020202020202020202020202020202","generation":4,"since_ms":1790000000000,"doomed":true}],"superseded":["manifests/ab/0000000000000001-00000002.manifest"]}"#,
    "\n988efcd7531a94ad7c864123fedca48700d8136aaab9d51b46efacf7a3d06230\n"
);
const LEASE: &str = concat!(
    r#"{"format_version":1,"owner":"00000000000000ff","purpose":"import","generation":3,"started_ms":1790000000000,"expires_ms":1790000600000,"process":{"boot_id":"5e1f","namespace":"pid:[4026531836]","pid":77,"started":12345}}"#,
    "\n702e23584249b99be35d742da5013640bdb6bae9f1f151ceba7d6b29d02394a7\n"
);
const PUBLISHING: &str = concat!(
    r#"{"format_version":1,"outcome":"publishing","names":["manifests/ab/0000000000000001-00000002.manifest"]}"#,
    "\n446be0e00a71ca5d17ba78dcba976968adf12e0ea623de5fd84e005a1622f094\n"
);
const EXPIRED: &str = concat!(
    r#"{"format_version":1,"outcome":"expired","collector":"000102030405060708090a0b0c0d0e0f"}"#,
    "\n64f01833ad98c8f3e6e2d31f7af5b335e3223ec4806f676e345824b95116312e\n"
);
const VOID: &str = concat!(
    r#"{"void":"000102030405060708090a0b0c0d0e0f","random":"101112131415161718191a1b1c1d1e1f"}"#,
    "\n80f57eb1d9a0187290a27ecf1697f1af1de9302f4243b08656913327f2c48161\n"
);
const QUARANTINE: &str = concat!(
    r#"{"format_version":1,"frames":[0,7],"since_ms":1790000000000}"#,
    "\nb685e64b53e86f161293506ae4300ace34c2f9f28d051e5570ef5aafc39adc59\n"
);
const ATTACHMENT: &str = "88b2033e24e0a589d1967829c74d19da1366fe70c410fac2d7272e605bd627fb";
