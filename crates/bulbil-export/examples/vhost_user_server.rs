//! Serves a raw file over vhost-user-blk, to measure the server by itself, and to be killed and started again:
//!
//! ```text
//! cargo run --release -p bulbil-export --example vhost_user_server -- SOCKET FILE [QUEUES [POLLING_US]]
//! qemu-system-x86_64 -object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem -m 512M \
//!   -chardev socket,id=vu0,path=SOCKET,reconnect=1 -device vhost-user-blk-pci,chardev=vu0,num-queues=1 …
//! ```
//!
//! `resize BYTES` on its standard input changes the size; it ends when its standard input is closed.

#[path = "support/file_device.rs"]
mod file_device;

use std::io::{self, BufRead as _};
use std::sync::Arc;
use std::time::Duration;

use bulbil_export::vhost_user::{Options, VhostUserServer};
use file_device::FileDevice;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, path, rest @ ..] = args.as_slice() else {
        return Err("usage: vhost_user_server SOCKET FILE [QUEUES [POLLING_US]]".into());
    };
    let number = |index: usize| rest.get(index).map_or(Ok(0), |text: &String| text.parse::<u16>());
    let (queues, polling) = (number(0)?.max(1), Duration::from_micros(number(1)?.into()));
    let device = Arc::new(FileDevice::open(path)?);
    let options = Options { serial: "example".to_owned(), queues, max_polling: polling, ..Options::default() };
    let server = VhostUserServer::bind(socket, Arc::clone(&device) as _, options)?.spawn()?;
    for line in io::stdin().lock().lines() {
        if let Some(size) = line?.strip_prefix("resize ") {
            device.resize(size.parse()?)?;
            let _was_connected = server.notify_resize();
        }
    }
    server.shutdown();
    Ok(())
}
