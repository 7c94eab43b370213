"""`python benchmarks/swarm/replicating.py`: a large model from one lab to another, beside the bare stream and libtorrent.

Two real labs on a DHT of this machine, each with all its processes. A model of an ONNX file and `--mib` of other bytes is published in one
and replicated by the other: found, fetched over the encrypted stream, each blob verified, on the disk and synced. Then it is looked at in
the sandbox, for which its files are written out once, and named; then a worker loads those files and answers: told apart, as is what a
small model takes. CPU is the two managers': all, and of it their event loops'.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Cpu(NamedTuple):
    """Seconds of a manager."""

    whole: float
    loop: float
    """Of its main thread."""

    @classmethod
    def of(cls, process: psutil.Process) -> Cpu:
        times = process.cpu_times()
        main = next(each for each in process.threads() if each.id == process.pid)
        return cls(times.user + times.system, main.user_time + main.system_time)

    def less(self, other: Cpu) -> Cpu:
        return Cpu(self.whole - other.whole, self.loop - other.loop)

    def per_gb(self, nbytes: int) -> str:
        return f"{self.whole / nbytes * 1e9:.2f} ({self.loop / nbytes * 1e9:.2f})"


NOTHING = Cpu(0.0, 0.0)


@dataclass
class Replicated:
    """Seconds until a model was all on the disk, named, and answered by a worker; what the managers used until the first of these."""

    stored: float = 0.0
    named: float = 0.0
    answered: float = 0.0
    giver: Cpu = NOTHING
    taker: Cpu = NOTHING


def manager(lab: tether.Lab) -> psutil.Process:
    return psutil.Process(next(each.pid for each in lab.status().services if each.role == "manager"))


def replicate(giver: tether.Lab, taker: tether.Lab, name: str) -> Replicated:
    came, managers = Replicated(), (manager(giver), manager(taker))

    def watch(staging: Path) -> None:
        """A pack is written beside its place and put there when it was synced."""
        while not (found := list(staging.glob("*.pending"))):
            time.sleep(0.002)
        while any(path.exists() for path in found):
            time.sleep(0.002)
        came.stored = time.perf_counter() - began
        came.giver, came.taker = (Cpu.of(each).less(was) for each, was in zip(managers, before, strict=True))

    watching = threading.Thread(target=watch, args=[Path(taker.status().data) / "store" / "staging"], daemon=True)
    before, began = [Cpu.of(each) for each in managers], time.perf_counter()
    watching.start()
    replica = taker.replicate(name, giver.address, timeout=600.0)
    came.named = time.perf_counter() - began
    watching.join()
    taker.infer(replica.versions[0], {"x": np.zeros((1, 4), np.float32)}, timeout=600.0)
    came.answered = time.perf_counter() - began
    return came


def labs(net: Testnet, folder: Path, nbytes: int, rounds: int) -> list[dict[str, Any]]:
    """A row a round; rates and CPU are less what a small model takes."""
    rows: list[dict[str, Any]] = []
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
                "MB/s": round(nbytes / 1e6 / (large.stored - small.stored), 1),
                "giver's CPU s/GB (loop's)": large.giver.less(small.giver).per_gb(nbytes),
                "taker's CPU s/GB (loop's)": large.taker.less(small.taker).per_gb(nbytes),
                "seconds of a small model": round(small.stored, 2),
                "and to look at it": round(small.named - small.stored, 2),
                "of the large one": round(large.named - large.stored, 2),
                "until a worker has answered": round(large.answered - large.named, 2),
            })  # fmt: skip
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
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
