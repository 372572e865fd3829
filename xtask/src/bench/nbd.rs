//! The least NBD client: connect and read one block.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::{Result, bail};

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
/// `NBD_FLAG_C_FIXED_NEWSTYLE` and `NBD_FLAG_C_NO_ZEROES`
const CLIENT_FLAGS: u32 = 3;
/// `NBD_OPT_EXPORT_NAME`: the one option that every server knows; it ends the handshake.
const OPTION_EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const COOKIE: u64 = 0x6265_6e63;

/// Reads 4 KiB of the default export over a fresh connection, by the
/// [protocol](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
pub(crate) fn read_first_block(mut stream: UnixStream) -> Result<[u8; 4096]> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[..16] != GREETING {
        bail!("this is no NBD server");
    }
    let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
    hello.extend_from_slice(b"IHAVEOPT");
    hello.extend_from_slice(&OPTION_EXPORT_NAME.to_be_bytes());
    hello.extend_from_slice(&0_u32.to_be_bytes());
    stream.write_all(&hello)?;
    // Size and transmission flags.
    stream.read_exact(&mut [0; 10])?;
    stream.write_all(&read_request(0, 4096))?;
    let mut reply = [0; 16];
    stream.read_exact(&mut reply)?;
    let good: Vec<u8> = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &0_u32.to_be_bytes(), &COOKIE.to_be_bytes()].concat();
    if reply[..] != good[..] {
        bail!("the server refused to read: {reply:02x?}");
    }
    let mut block = [0; 4096];
    stream.read_exact(&mut block)?;
    Ok(block)
}

fn read_request(offset: u64, len_bytes: u32) -> Vec<u8> {
    let flags_and_type = 0_u32;
    [
        &REQUEST_MAGIC.to_be_bytes()[..],
        &flags_and_type.to_be_bytes(),
        &COOKIE.to_be_bytes(),
        &offset.to_be_bytes(),
        &len_bytes.to_be_bytes(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_28_bytes_in_network_order() {
        let request = read_request(0x1000, 4096);
        assert_eq!(request.len(), 28);
        assert_eq!(request[..4], [0x25, 0x60, 0x95, 0x13]);
        assert_eq!(request[16..], [0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0]);
    }
}
