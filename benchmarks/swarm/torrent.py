"""`python benchmarks/swarm/torrent.py FILE`: one file from one peer by libtorrent over TCP, two processes on one loopback: a reference.

Needs `pip install libtorrent` (2.1), which Tether itself does not. No uTP, no DHT, no encryption; pieces of 4 MiB as Tether's blobs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PIECE_NBYTES = 4 << 20
SETTINGS = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_incoming_utp": False,
    "enable_outgoing_utp": False,
    "in_enc_policy": 2,
    "out_enc_policy": 2,
    "allow_multiple_connections_per_ip": True,
}


def session() -> Any:
    """On a free port of loopback."""
    import libtorrent

    return libtorrent.session({**SETTINGS, "listen_interfaces": "127.0.0.1:0"})


def torrent(path: Path) -> Any:
    """What describes the file."""
    import libtorrent

    files = libtorrent.file_storage()
    libtorrent.add_files(files, str(path))
    made = libtorrent.create_torrent(files, PIECE_NBYTES, libtorrent.create_torrent.v1_only)
    libtorrent.set_piece_hashes(made, str(path.parent))
    return libtorrent.torrent_info(made.generate())


def give(path: Path) -> None:
    """Until standard input ends."""
    import libtorrent

    giving, info = session(), torrent(path)
    handle = giving.add_torrent({"ti": info, "save_path": str(path.parent), "flags": libtorrent.torrent_flags.seed_mode})
    handle.resume()
    path.with_suffix(".torrent").write_bytes(libtorrent.bencode(libtorrent.create_torrent(info).generate()))
    print(giving.listen_port(), flush=True)
    sys.stdin.read()


def take(description: Path, folder: Path, port: int) -> float:
    """Seconds until all of it is there and verified."""
    import libtorrent

    taking, info = session(), libtorrent.torrent_info(str(description))
    handle = taking.add_torrent({"ti": info, "save_path": str(folder)})
    began = time.perf_counter()
    handle.resume()
    handle.connect_peer(("127.0.0.1", port))
    while not handle.status().is_seeding:
        time.sleep(0.005)
    return time.perf_counter() - began


def measure(path: Path) -> float | None:
    """MB/s; None: libtorrent is not here."""
    command = [sys.executable, __file__, str(path)]
    with subprocess.Popen([*command, "--give"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as giver:
        port = (giver.stdout.readline() if giver.stdout else "").strip()
        if not port:
            return None
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            done = subprocess.run([*command, "--take", folder, "--port", port], capture_output=True, text=True, check=True)
        giver.communicate()
    return path.stat().st_size / 1e6 / float(json.loads(done.stdout)["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--give", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--take", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.give:
        give(given.file)
    elif given.take:
        print(json.dumps({"seconds": take(given.file.with_suffix(".torrent"), given.take, given.port)}))
    else:
        rate = measure(given.file)
        print("libtorrent is not here: pip install libtorrent" if rate is None else f"libtorrent over TCP: {rate:.0f} MB/s")


if __name__ == "__main__":
    main()
