"""`python benchmarks/swarm/replicating.py`: a large model from one lab to another, beside the bare stream and libtorrent.

Two real labs on a DHT of this machine, each with all its processes. A model of an ONNX file and `--mib` of other bytes is published in one
and replicated by the other: found, fetched over the encrypted stream, each blob verified, on the disk and synced. Then it is looked at in
the sandbox, for which its files are written out once, and named: told apart, as is what a small model takes. CPU is the two managers'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import results
import streams
import torrent
from onnx import TensorProto, helper, numpy_helper

import tether
from tether.testing.testnet import Testnet, testnet

MIB = 1 << 20
AIM_STREAM, AIM_TORRENT = 0.7, 1.5


def write_model(folder: Path, nbytes: int) -> Path:
    """A product of matrices, and a file beside it with bytes that are nowhere else."""
    folder.mkdir()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.frombuffer(os.urandom(16), np.uint8).reshape(4, 4).astype(np.float32), "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    with (folder / "weights.bin").open("wb") as file:
        for _ in range(0, nbytes, MIB):
            file.write(os.urandom(min(nbytes, MIB)))
    return folder


def manager_cpu(lab: tether.Lab) -> float:
    """Seconds."""
    manager = next(each.pid for each in lab.status().services if each.role == "manager")
    times = psutil.Process(manager).cpu_times()
    return times.user + times.system


def replicate(giver: tether.Lab, taker: tether.Lab, name: str) -> dict[str, float]:
    """Seconds until all of it is on the disk there, and until it is named; CPU seconds of the managers until it is on the disk."""
    came: dict[str, float] = {}

    def watch(staging: Path) -> None:
        """A pack is written beside its place and put there when it was synced."""
        while not (found := list(staging.glob("*.pending"))):
            time.sleep(0.002)
        while any(path.exists() for path in found):
            time.sleep(0.002)
        came.update(seconds=time.perf_counter() - began, giver=manager_cpu(giver) - before[0], taker=manager_cpu(taker) - before[1])

    watching = threading.Thread(target=watch, args=[Path(taker.status().data) / "store" / "staging"], daemon=True)
    before, began = (manager_cpu(giver), manager_cpu(taker)), time.perf_counter()
    watching.start()
    taker.replicate(name, giver.address, timeout=600.0)
    named = time.perf_counter() - began
    watching.join()
    return {**came, "named": named}


def labs(net: Testnet, folder: Path, nbytes: int, rounds: int) -> list[dict[str, float]]:
    """A row a round; rates are less what a small model takes."""
    rows: list[dict[str, float]] = []
    with (
        tether.up(workers=1, data=folder / "giver", bootstrap=net.bootstrap) as giver,
        tether.up(workers=1, data=folder / "taker", bootstrap=net.bootstrap) as taker,
    ):
        for number in range(rounds):
            giver.publish(f"small-{number}", write_model(folder / f"small-{number}", 1))
            giver.publish(f"large-{number}", write_model(folder / f"large-{number}", nbytes))
        os.sync()  # what was published is not the replica's to write
        taker.join(str(giver.invite(scope="replicate")))
        for number in range(rounds):
            small, large = (replicate(giver, taker, f"{size}-{number}") for size in ("small", "large"))
            rows.append({
                "MB/s": nbytes / 1e6 / (large["seconds"] - small["seconds"]),
                "giver's CPU s/GB": (large["giver"] - small["giver"]) / nbytes * 1e9,
                "taker's CPU s/GB": (large["taker"] - small["taker"]) / nbytes * 1e9,
                "seconds of a small model": small["seconds"],
                "and to look at it": small["named"] - small["seconds"],
                "of the large one": large["named"] - large["seconds"],
            })  # fmt: skip
            print("  ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    return rows


def stream_rate(net: Testnet, seconds: float) -> float:
    """MB/s of a bare encrypted stream."""
    with streams.serving(net.nodes, seconds + 60) as (_, key):
        done = subprocess.run(streams.client_command(net.nodes, key, seconds), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return float(figures["nbytes"] / 1e6 / figures["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; the system's temporary one")
    given = parser.parse_args()
    with testnet() as net, tempfile.TemporaryDirectory(dir=given.folder) as folder:
        stream = [stream_rate(net, 3.0) for _ in range(given.rounds)]
        rows = labs(net, Path(folder), given.mib * MIB, given.rounds)
        stream += [stream_rate(net, 3.0) for _ in range(given.rounds)]
        reference = [torrent.measure(Path(folder) / f"large-{number}" / "weights.bin") for number in range(given.rounds)]
    rate, bare = statistics.median(row["MB/s"] for row in rows), statistics.median(stream)
    print(f"replicated: {rate:.0f} MB/s; the bare stream: {bare:.0f} MB/s; {rate / bare:.2f} × (aim ≥ {AIM_STREAM})")
    known = [each for each in reference if each is not None]
    if known:
        print(f"libtorrent over TCP: {statistics.median(known):.0f} MB/s; {rate / statistics.median(known):.2f} × (aim ≥ {AIM_TORRENT})")
    else:
        print("libtorrent is not here: pip install libtorrent==2.1.1")
    results.write("replicating", mib=given.mib, rows=rows, stream=stream, libtorrent=known)


if __name__ == "__main__":
    main()
