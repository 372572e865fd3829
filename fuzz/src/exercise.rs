//! What every disk that opened must keep to, whatever its image is.

use bulbil_format::{Disk, DiskContent, Extent, FormatError};

/// Bounds of the work for one input.
const MAX_EXTENTS: usize = 64;
const MAX_READS: usize = 4;
const READ_BYTES: u64 = 64 << 10;

/// Looks at a disk from all sides, if it opened.
pub(crate) fn check(opened: Result<Box<dyn Disk>, FormatError>) -> bool {
    match &opened {
        Ok(disk) => check_disk(&**disk),
        Err(error) => assert!(!error.to_string().contains(char::is_control), "{error:?}"),
    }
    opened.is_ok()
}

fn check_disk(disk: &dyn Disk) {
    let size = disk.size_bytes();
    assert!(size > 0 && size.is_multiple_of(512), "a disk of {size} bytes");
    let info = disk.info();
    assert_eq!((info.size_bytes, info.format), (size, disk.format()));
    assert!(info.data_bytes.is_none_or(|data_bytes| data_bytes <= size), "{info:?}");

    let extents = check_extents(disk);
    for extent in extents.iter().filter(|extent| extent.kind.has_content()).take(MAX_READS) {
        check_read(disk, extent.offset_bytes, extent.len_bytes.min(READ_BYTES));
    }
    for extent in extents.iter().filter(|extent| !extent.kind.has_content()).take(MAX_READS) {
        check_zeros(disk, extent);
    }
    // Across whatever borders there are, and the last sector.
    check_read(disk, size / 3, READ_BYTES.min(size - size / 3));
    check_read(disk, size - 512, 512);
    let mut buf = [0; 512];
    for offset in [size - 511, size, u64::MAX - 511, u64::MAX] {
        assert_eq!(disk.read_exact_at(&mut buf, offset).unwrap_err().code(), "out-of-range", "at {offset:#x}");
    }
    assert!(disk.next_extent(size).unwrap().is_none());
    assert!(disk.next_extent(u64::MAX).unwrap().is_none());
}

/// Returns the first extents: they cover the disk in order.
fn check_extents(disk: &dyn Disk) -> Vec<Extent> {
    let (size, mut end, mut extents) = (disk.size_bytes(), 0, Vec::new());
    while extents.len() < MAX_EXTENTS {
        let Ok(extent) = disk.next_extent(end) else { break };
        let Some(extent) = extent else {
            assert_eq!(end, size, "the extents end before the disk");
            break;
        };
        assert!(extent.offset_bytes == end && extent.len_bytes > 0, "{extent:?} at {end:#x}");
        end = extent.end_bytes();
        assert!(end <= size, "{extent:?} of {size:#x} bytes");
        extents.push(extent);
    }
    extents
}

/// Content may be damaged without a sign of it, but it is the same however it is read.
fn check_read(disk: &dyn DiskContent, offset: u64, len: u64) {
    let mut whole = vec![0xa5; usize::try_from(len).unwrap()];
    if disk.read_exact_at(&mut whole, offset).is_err() {
        return;
    }
    let (start, end) = (whole.len() / 3, (whole.len() / 3 + 512).min(whole.len()));
    let mut part = vec![0x5a; end - start];
    disk.read_exact_at(&mut part, offset + start as u64).expect("a part of what was read before");
    assert!(part == whole[start..end], "two reads of {:#x} differ", offset + start as u64);
}

fn check_zeros(disk: &dyn DiskContent, extent: &Extent) {
    let len = extent.len_bytes.min(READ_BYTES / 8);
    let mut bytes = vec![0xa5; usize::try_from(len).unwrap()];
    for offset in [extent.offset_bytes, extent.end_bytes() - len] {
        disk.read_exact_at(&mut bytes, offset).expect("zeros need no reading");
        assert!(bytes.iter().all(|byte| *byte == 0), "content in {extent:?}");
    }
}
