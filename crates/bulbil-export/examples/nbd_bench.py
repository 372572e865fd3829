#!/usr/bin/env python3
"""Measures NBD servers side by side with fio's nbd engine: bulbil's (examples/nbd_bench_server.rs),
nbdkit and qemu-nbd, on the same page-cached file, interleaved, best of some rounds. The CPU time
of the server per request is the figure that other load on the machine disturbs least.

    cargo build --release -p bulbil-export --example nbd_bench_server
    crates/bulbil-export/examples/nbd_bench.py target/release/examples/nbd_bench_server
"""

import argparse
import json
import os
import subprocess
import tempfile
import time

WORKLOADS = {
    "4k randread QD1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "4k randread QD32": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "256k read QD4": ["--rw=read", "--bs=256k", "--iodepth=4"],
    "4k randwrite QD32": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    "256k write QD4": ["--rw=write", "--bs=256k", "--iodepth=4"],
    "4k write + flush": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"],
}


def cpu_seconds(pid):
    """User and system time of a process, from /proc/PID/stat."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_kib(pid):
    """The most memory a process has had resident."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def start(command, socket):
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not os.path.exists(socket):
        assert server.poll() is None and time.monotonic() < deadline, command
        time.sleep(0.01)
    return server


def fio(socket, size, seconds, arguments):
    command = ["fio", "--name=bench", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", f"--size={size}"]
    command += ["--time_based", f"--runtime={seconds}", "--randrepeat=0", "--output-format=json"]
    output = subprocess.run(command + arguments, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{"):])["jobs"][0]
    return job["read"] if job["read"]["total_ios"] else job["write"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", nargs="+", help="path of nbd_bench_server; several to compare builds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="only this one")
    options = parser.parse_args()
    size = options.size_mib << 20
    with tempfile.TemporaryDirectory() as directory:
        disk = f"{directory}/disk.raw"
        with open(disk, "wb") as out:
            for _ in range(options.size_mib):
                out.write(os.urandom(1 << 20))
            os.fsync(out.fileno())
        sockets = {}
        for index, server in enumerate(options.server):
            socket = f"{directory}/bulbil{index}"
            sockets["bulbil" if index == 0 else server] = (socket, [server, socket, "file", disk])
        socket = f"{directory}/memory"
        sockets["bulbil (memory)"] = (socket, [options.server[0], socket, "memory", str(size)])
        socket = f"{directory}/nbdkit"
        sockets["nbdkit file"] = (socket, ["nbdkit", "-f", "-U", socket, "file", disk])
        socket = f"{directory}/qemu"
        sockets["qemu-nbd"] = (socket, ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-k", socket, disk])
        servers = {name: (socket, start(command, socket)) for name, (socket, command) in sockets.items()}
        for workload in options.workload or WORKLOADS:
            results = {name: [] for name in servers}
            for _ in range(options.rounds):
                for name, (socket, server) in servers.items():
                    before = cpu_seconds(server.pid)
                    result = fio(socket, size, options.seconds, WORKLOADS[workload])
                    result["cpu_us"] = (cpu_seconds(server.pid) - before) / result["total_ios"] * 1e6
                    results[name].append(result)
            for name, runs in results.items():
                iops = max(run["iops"] for run in runs)
                cpu = min(run["cpu_us"] for run in runs)
                bandwidth = max(run["bw_bytes"] for run in runs) / 1e6
                p50 = min(run["clat_ns"].get("percentile", {}).get("50.000000", 0) for run in runs) / 1e3
                print(f"{workload:18} {name:16} {iops:9.0f} IOPS {bandwidth:6.0f} MB/s  p50 {p50:6.0f} us  "
                      f"server CPU {cpu:6.1f} us/request", flush=True)
        for name, (socket, server) in servers.items():
            print(f"{name:16} {memory_kib(server.pid)} KiB")
            server.terminate()
            server.wait()


main()
