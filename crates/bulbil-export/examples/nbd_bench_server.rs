//! Serves a file or memory over NBD, to measure the server by itself:
//!
//! ```text
//! cargo run --release -p bulbil-export --example nbd_bench_server -- SOCKET (file PATH | memory BYTES)
//! fio --name=x --ioengine=nbd --uri=nbd+unix:///?socket=SOCKET --rw=randread --bs=4k --iodepth=32 …
//! ```
//!
//! It ends when its standard input is closed.

#[path = "support/file_device.rs"]
mod file_device;

use std::io::{self, Read as _};
use std::sync::{Arc, RwLock};

use bulbil_export::nbd::{Export, NbdServer};
use bulbil_volume::{BlockDevice, BlockError, BlockErrorKind, ExtentKind, StatusExtent};
use file_device::FileDevice;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, kind, source] = args.as_slice() else {
        return Err("usage: nbd_bench_server SOCKET (file PATH | memory BYTES)".into());
    };
    let device: Arc<dyn BlockDevice> = match kind.as_str() {
        "file" => Arc::new(FileDevice::open(source)?),
        "memory" => Arc::new(MemoryDevice(RwLock::new(vec![0x5a; source.parse()?]))),
        _ => return Err(format!("unknown kind of device `{kind}`").into()),
    };
    let export = Export { name: String::new(), description: format!("{kind} {source}"), device };
    let server = NbdServer::bind(socket)?.export(export)?.spawn()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    server.shutdown();
    Ok(())
}

/// Nothing but a copy, so that what is measured is the protocol.
struct MemoryDevice(RwLock<Vec<u8>>);

impl MemoryDevice {
    fn range(offset: u64, len_bytes: usize) -> std::ops::Range<usize> {
        let start = usize::try_from(offset).expect("the server checks ranges, and the device fits into memory");
        start..start + len_bytes
    }
}

impl BlockDevice for MemoryDevice {
    fn size_bytes(&self) -> u64 {
        self.0.read().map_or(0, |bytes| bytes.len() as u64)
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        let bytes = self.0.read().map_err(|_| BlockError::new(BlockErrorKind::Poisoned, "an earlier panic"))?;
        buf.copy_from_slice(&bytes[Self::range(offset, buf.len())]);
        Ok(())
    }

    fn is_fast(&self, _offset: u64, _len_bytes: u64) -> bool {
        true
    }

    fn write_at(&self, buf: &[u8], offset: u64, _fua: bool) -> Result<(), BlockError> {
        let mut bytes = self.0.write().map_err(|_| BlockError::new(BlockErrorKind::Poisoned, "an earlier panic"))?;
        bytes[Self::range(offset, buf.len())].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, _fua: bool) -> Result<(), BlockError> {
        let mut bytes = self.0.write().map_err(|_| BlockError::new(BlockErrorKind::Poisoned, "an earlier panic"))?;
        let len = Self::range(len_bytes, 0).start;
        bytes[Self::range(offset, len)].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, len_bytes: u64, fua: bool) -> Result<(), BlockError> {
        self.write_zeroes(offset, len_bytes, fua)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn status(&self, _offset: u64, len_bytes: u64, _max_extents: usize) -> Result<Vec<StatusExtent>, BlockError> {
        Ok(vec![StatusExtent { len_bytes, kind: ExtentKind::Data }])
    }
}
