//! `cargo xtask soak`: a guest that writes and verifies for long, while its disks' servers are disturbed.
//!
//! One guest has two volumes of one image, one by NBD and one by vhost-user-blk. fio writes and
//! verifies on both, and parts are discarded. Meanwhile snapshots are taken, and each server is killed and started again twice.
//! It passes when the guest saw no error and no wrong byte.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::guest::{Attach, LoadGuest};
use crate::bench::import::DataDir;
use crate::bench::process::{Server, fresh_directory, timed_output};
use crate::bench::{Bed, disks};
use crate::run::{say, workspace_root};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long the guest works
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(10..))]
    seconds: u32,
    /// Use the release binaries that are there
    #[arg(long)]
    no_build: bool,
}

/// Snapshots of each volume in the whole time.
const SNAPSHOTS: u32 = 8;
/// How long the guest may take beside its work: to start, to verify what is left, to end.
const EXTRA: Duration = Duration::from_secs(300);
/// How often the guest is looked at.
const POLL: Duration = Duration::from_millis(50);

/// A volume and the process that serves it.
struct Served {
    server: Server,
    command: Command,
    socket: PathBuf,
    what: &'static str,
}

impl Served {
    fn start(bed: &Bed, data: &DataDir<'_>, digest: &str, size_bytes: u64, what: &'static str) -> Result<Self> {
        let mut create = Command::new(&bed.bench_volume);
        create.arg("create").arg(data.path()).args([digest, &size_bytes.to_string()]);
        let volume = timed_output(&mut create)?.1.trim().to_owned();
        let socket = bed.work.join(format!("{what}.sock"));
        let mut command = Command::new(&bed.bench_volume);
        command.arg("serve").arg(data.path()).arg(volume).arg(&socket).arg(format!("--{what}"));
        let server = Server::start_and_listen(&mut command, &socket)?;
        Ok(Self { server, command, socket, what })
    }

    fn snapshot(&mut self) -> Result<()> {
        say(format!("soak: snapshot of the volume by {}", self.what));
        self.server.send("snapshot")
    }

    /// Kills the server and starts it again.
    fn kill(&mut self) -> Result<()> {
        say(format!("soak: killing the server by {}", self.what));
        self.server.kill()?;
        self.server = Server::start_and_listen(&mut self.command, &self.socket)?;
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.no_build {
        crate::bench::build()?;
    }
    let guest = LoadGuest::build()?;
    let bed = Bed::at(workspace_root().join("target/soak"))?;
    fresh_directory(&bed.work)?;
    let disk = disks::debian()?.raw;
    let size_bytes = std::fs::metadata(&disk)?.len();
    let data = DataDir::fresh(&bed, "data")?;
    let daemon = data.start_daemon()?;
    let (_, digest) = data.import(&disk, "base")?;
    drop(daemon);
    let mut served = [
        Served::start(&bed, &data, &digest, size_bytes, "nbd")?,
        Served::start(&bed, &data, &digest, size_bytes, "vhost-user")?,
    ];
    let attached = [Attach::nbd(&served[0].socket), Attach::vhost_user(&served[1].socket)];
    let mut command = guest.command(&bed.work, &job(args.seconds), &attached)?;
    let console = bed.work.join("console.log");
    let log = std::fs::File::create(&console).with_context(|| format!("cannot create {}", console.display()))?;
    let mut machine = command.stdin(Stdio::null()).stdout(log).spawn().context("cannot start QEMU")?;
    let watched = watch(&mut machine, args.seconds, &mut served);
    if machine.try_wait()?.is_none() {
        machine.kill().context("cannot stop QEMU")?;
    }
    machine.wait().context("cannot wait for QEMU")?;
    watched?;
    judge(&console)?;
    say(format!("soak: {} s of writing and verifying by NBD and vhost-user-blk: no error", args.seconds));
    std::fs::remove_dir_all(&bed.work).with_context(|| format!("cannot remove {}", bed.work.display()))
}

/// What the guest does: on each disk fio writes at random and verifies until the time is over. Beside it another part
/// is filled again and again, and half of it discarded: that half must read as zero, the other one as it was.
fn job(seconds: u32) -> String {
    let script = r#"
fio_on() { disk=$1; shift; fio --filename=/dev/$disk --direct=1 --ioengine=io_uring --verify=crc32c --verify_fatal=1 "$@"; }
random() {
    fio_on $1 --name=random --iodepth=16 --rw=randwrite --bsrange=4k-64k --size=384M --offset=1G --fsync=64 \
        --verify_backlog=512 --time_based --runtime=SECONDS --output=/tmp/$1.random
    echo "SOAK $1 random status $?"
}
kept() { fio_on $1 --name=kept --rw=write --bs=64k --size=16M --offset=1616M --fsync=1 --output=/tmp/$1.kept $2; }
discards() {
    rounds=0
    while [ ! -e /tmp/end ]; do
        fio_on $1 --name=gone --rw=write --bs=64k --size=16M --offset=1600M --output=/tmp/$1.gone || break
        kept $1 || break
        blkdiscard -o 1677721600 -l 16777216 /dev/$1 || break
        left=$(dd if=/dev/$1 bs=1M skip=1600 count=16 iflag=direct 2>/tmp/$1.dd | tr -d '\000' | wc -c)
        [ "$left" = 0 ] || { echo "$left bytes that were discarded are not zero"; break; }
        kept $1 --verify_only || break
        rounds=$((rounds + 1))
    done
    [ -e /tmp/end ] && [ $rounds -gt 0 ]
    echo "SOAK $1 discards status $? after $rounds rounds"
}
for disk in vda vdb; do random $disk & discards $disk & done
sleep SECONDS
touch /tmp/end
wait
grep -E 'err=|issued' /tmp/*.random
"#;
    script.replace("SECONDS", &seconds.to_string())
}

/// Disturbs the servers while the machine runs; an error when it does not end by itself.
fn watch(machine: &mut Child, seconds: u32, served: &mut [Served]) -> Result<()> {
    let (start, length) = (Instant::now(), Duration::from_secs(seconds.into()));
    let mut events: Vec<(Duration, bool)> = (1..=SNAPSHOTS).map(|n| (length * n / (SNAPSHOTS + 1), false)).collect();
    events.extend([(length * 2 / 5, true), (length * 7 / 10, true)]);
    events.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    while machine.try_wait().context("cannot wait for QEMU")?.is_none() {
        if events.last().is_some_and(|(at, _)| start.elapsed() >= *at) {
            let is_kill = events.pop().is_some_and(|(_, is_kill)| is_kill);
            for one in &mut *served {
                if is_kill { one.kill()? } else { one.snapshot()? }
            }
        }
        if start.elapsed() > length + EXTRA {
            bail!("the guest did not end {} s after its work should have", EXTRA.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn judge(console: &Path) -> Result<()> {
    let text = std::fs::read(console).with_context(|| format!("cannot read {}", console.display()))?;
    let text = String::from_utf8_lossy(&text);
    for work in ["vda random", "vda discards", "vdb random", "vdb discards"] {
        if !text.contains(&format!("SOAK {work} status 0")) {
            bail!("{work} failed in the guest, whose console is {}:\n{text}", console.display());
        }
    }
    for line in text.lines().filter(|line| ["err=", "issued", "SOAK"].iter().any(|word| line.contains(word))) {
        say(line.trim_end());
    }
    Ok(())
}
